"""detectron2's R-CNNs (FPN, C4, masks, keypoints, cascades), RetinaNet and ResNet bodies; both directions."""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fastrcnn.weights.names import Renaming

_RES2 = re.compile(r"(backbone\.)?(bottom_up\.)?res2\.0\.conv1\.weight")
# computed there, not learned
_DERIVED = re.compile(r"pixel_(mean|std)|(proposal_generator\.)?anchor_generator\..*")
# the last layers of the heads on regions; a cascade numbers its stages
_LAST = re.compile(
    r"roi_heads\.(?:box|mask)\.predictor\.(?:\d+\.)?(cls_score|bbox_pred|mask_fcn_logits)\.(?:weight|bias)"
)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameters of a detectron2 model."""
    return any(_RES2.fullmatch(name) for name in state)


def is_body(state: Mapping[str, Tensor]) -> bool:
    """Whether they are those of a ResNet alone."""
    return "res2.0.conv1.weight" in state


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, the background first, as a class without boxes and masks (zeros)."""
    names = Renaming(_rows(state))
    # of a body, the classifier is left out
    ours = names.convert({k: v for k, v in state.items() if not _DERIVED.fullmatch(k) and not k.startswith("fc1000.")})
    return _each_last(ours, _background_first)


def export(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under detectron2's names, the background last, and only with scores.

    Boxes and masks of the background, which nothing reads, are left out.
    """
    shared = re.compile(r"roi_heads\.mask\.feature_extractor\.head\.layer4\.")  # the box head's, listed twice
    state = {name: value for name, value in state.items() if not shared.match(name)}
    return Renaming(_rows(state)).export(_each_last(state, _background_last), "detectron2")


def _each_last(state: dict[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """change(layer, value) on weights and biases of the last layers of the heads."""
    layers = {name: _LAST.fullmatch(name) for name in state}
    return {name: change(layers[name][1], value) if layers[name] else value for name, value in state.items()}


def _background_first(layer: str, value: Tensor) -> Tensor:
    if layer == "cls_score":
        return value.roll(1, 0)
    # also where one box serves all classes: of our two the second is for objects
    return torch.cat([torch.zeros_like(value[: 4 if layer == "bbox_pred" else 1]), value])


def _background_last(layer: str, value: Tensor) -> Tensor:
    return value.roll(-1, 0) if layer == "cls_score" else value[4 if layer == "bbox_pred" else 1 :]


def _rows(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names of the model that a state dict, theirs or ours, is of."""
    body_alone = all(name.startswith("backbone.body.") for name in state) or "res2.0.conv1.weight" in state
    pyramid = any(name.startswith(("backbone.fpn.", "backbone.bottom_up.")) for name in state)
    trunk = "" if body_alone else "backbone.bottom_up." if pyramid else "backbone."
    yield f"{trunk}stem.conv1.norm.", "backbone.body.stem.bn1."
    yield f"{trunk}stem.", "backbone.body.stem."
    yield from _stages(state, trunk, "backbone.body.")
    yield from _stages(state, "roi_heads.", "roi_heads.box.feature_extractor.head.")

    for theirs, ours in (("fpn_lateral", "fpn_inner"), ("fpn_output", "fpn_layer")):
        normed = any(
            f"backbone.{theirs}{k + 1}.norm.weight" in state or f"backbone.fpn.{ours}{k}.0.weight" in state
            for k in range(1, 5)
        )
        yield from _layer(f"backbone.{theirs}{{k+1}}", f"backbone.fpn.{ours}{{k}}", normed)
    yield "backbone.top_block.", "backbone.fpn.top_blocks."

    if "head.cls_score.weight" in state or "rpn.head.cls_tower.0.weight" in state:
        yield "head.cls_subnet.", "rpn.head.cls_tower."
        yield "head.bbox_subnet.", "rpn.head.bbox_tower."
        yield "head.cls_score.", "rpn.head.cls_logits."
        yield "head.bbox_pred.", "rpn.head.bbox_pred."
        return

    yield "proposal_generator.rpn_head.conv.conv{k}.", "rpn.head.conv.{k}."
    yield "proposal_generator.rpn_head.conv.", "rpn.head.conv."
    yield "proposal_generator.rpn_head.objectness_logits.", "rpn.head.cls_logits."
    yield "proposal_generator.rpn_head.anchor_deltas.", "rpn.head.bbox_pred."

    for stage in ("{i}.", ""):  # of a cascade
        head, extractor = f"roi_heads.box_head.{stage}", f"roi_heads.box.feature_extractor.{stage}"
        first = stage.replace("{i}", "0")
        normed = (
            f"roi_heads.box_head.{first}conv1.norm.weight" in state
            or f"roi_heads.box.feature_extractor.{first}xconvs.1.weight" in state
        )
        if normed:
            yield f"{head}conv{{k+1}}.norm.", f"{extractor}xconvs.{{3k+1}}."
        yield f"{head}conv{{k+1}}.", f"{extractor}xconvs.{{3k}}." if normed else f"{extractor}xconvs.{{2k}}."
        for end in ("weight", "bias"):
            yield f"{head}fc{{k}}.{end}", f"{extractor}fc{{k+5}}.{end}"
        yield f"roi_heads.box_predictor.{stage}cls_score.", f"roi_heads.box.predictor.{stage}cls_score."
        yield f"roi_heads.box_predictor.{stage}bbox_pred.", f"roi_heads.box.predictor.{stage}bbox_pred."

    head, extractor = "roi_heads.mask_head", "roi_heads.mask.feature_extractor"
    normed = f"{head}.mask_fcn1.norm.weight" in state or f"{extractor}.mask_fcn1.1.weight" in state
    yield from _layer(f"{head}.mask_fcn{{k}}", f"{extractor}.mask_fcn{{k}}", normed)
    yield f"{head}.deconv.", "roi_heads.mask.predictor.conv5_mask."
    yield f"{head}.predictor.", "roi_heads.mask.predictor.mask_fcn_logits."

    yield "roi_heads.keypoint_head.conv_fcn{k}.", "roi_heads.keypoint.feature_extractor.conv_fcn{k}."
    yield "roi_heads.keypoint_head.score_lowres.", "roi_heads.keypoint.predictor.kps_score_lowres."


def _layer(theirs: str, ours: str, normed: bool) -> Iterator[tuple[str, str]]:
    """A convolution that holds its norm there, and that stands beside it in a Sequential here."""
    if normed:
        yield f"{theirs}.norm.", f"{ours}.1."
    yield f"{theirs}.", f"{ours}.0." if normed else f"{ours}."


def _stages(state: Mapping[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """The residual stages below a prefix."""
    for name in state:  # a deformable convolution holds its offsets here, and stands beside them there
        match = re.search(r"(res|layer)(\d+)\.(\d+)\.conv2(_|\.)offset\.weight$", name)
        if match is not None:
            stage, index = int(match[2]) - (match[1] == "res"), match[3]
            there, here = f"{theirs}res{stage + 1}.{index}.conv2", f"{ours}layer{stage}.{index}.conv2"
            yield f"{there}_offset.", f"{here}.offset."
            yield f"{there}.norm.", f"{ours}layer{stage}.{index}.bn2."
            yield f"{there}.", f"{here}.conv."
    there, here = f"{theirs}res{{s+1}}.{{b}}.", f"{ours}layer{{s}}.{{b}}."
    yield f"{there}conv{{c}}.norm.", f"{here}bn{{c}}."
    yield f"{there}conv{{c}}.", f"{here}conv{{c}}."
    yield f"{there}shortcut.norm.", f"{here}downsample.1."
    yield f"{there}shortcut.", f"{here}downsample.0."
