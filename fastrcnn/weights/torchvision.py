"""torchvision's detectors, V1 and V2, and its classifiers as bodies of a detector; both directions."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastrcnn.weights.names import Renaming

# torchvision before 0.14, and so the files that it publishes, lacks the inner ".0"
_OLD = Renaming(
    row
    for end in ("weight", "bias")
    for row in (
        (f"backbone.fpn.inner_blocks.{{k}}.{end}", f"backbone.fpn.inner_blocks.{{k}}.0.{end}"),
        (f"backbone.fpn.layer_blocks.{{k}}.{end}", f"backbone.fpn.layer_blocks.{{k}}.0.{end}"),
        (f"rpn.head.conv.{end}", f"rpn.head.conv.0.0.{end}"),
        (f"roi_heads.mask_head.mask_fcn{{k+1}}.{end}", f"roi_heads.mask_head.{{k}}.0.{end}"),
        (f"head.classification_head.conv.{{2k}}.{end}", f"head.classification_head.conv.{{k}}.0.{end}"),
        (f"head.regression_head.conv.{{2k}}.{end}", f"head.regression_head.conv.{{k}}.0.{end}"),
    )
)
# the logit of a class that never fires: torchvision's RetinaNet has a channel for the label 0
_NEVER = -20.0


def body(state: Mapping[str, Tensor]) -> str | None:
    """The family of a classifier's parameters, None if they are something else."""
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return "torchvision ResNet"
    if any(name.startswith("features.") for name in state):
        return "torchvision classifier"
    return None


def convert_body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as the body of a backbone, without the classifier: what `features` holds, where there is one."""
    prefix = "features." if "conv1.weight" not in state else ""
    kept = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    return convert({f"backbone.body.{n}": value for n, value in kept.items() if not n.startswith("fc.")})


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameters of a torchvision detector."""
    return (
        "roi_heads.box_predictor.cls_score.weight" in state and "rpn.head.cls_logits.weight" in state
    ) or "head.classification_head.cls_logits.weight" in state


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names; RetinaNet loses the logits of the label 0, which no object has."""
    new = _OLD.convert(state)
    ours = Renaming(_rows(new)).convert(new)
    for name in _retina_logits(ours):
        ours[name] = ours[name].unflatten(0, (_anchors(ours), -1))[:, 1:].flatten(0, 1)
    return ours


def export(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under torchvision's names of today; a body alone becomes a classifier without its last layer."""
    state = dict(state)
    for name in _retina_logits(state):
        logits = state[name].unflatten(0, (_anchors(state), -1))
        value = _NEVER if name.endswith("bias") else 0.0
        state[name] = torch.cat([torch.full_like(logits[:, :1], value), logits], 1).flatten(0, 1)
    theirs = Renaming(_rows(state)).export(state, "torchvision")
    if all(name.startswith("backbone.body.") for name in theirs):
        prefix = "" if "backbone.body.conv1.weight" in theirs else "features."
        theirs = {name.replace("backbone.body.", prefix): value for name, value in theirs.items()}
    return theirs


def _retina_logits(state: Mapping[str, Tensor]) -> list[str]:
    retina = "rpn.head.cls_tower.0.weight" in state
    return [f"rpn.head.cls_logits.{end}" for end in ("weight", "bias")] if retina else []


def _anchors(state: Mapping[str, Tensor]) -> int:
    return len(state["rpn.head.bbox_pred.bias"]) // 4


def _rows(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names of the model that a state dict, theirs or ours, is of."""
    yield "backbone.body.conv1.", "backbone.body.stem.conv1."
    yield "backbone.body.bn1.", "backbone.body.stem.bn1."
    for layer in ("layer{s}.{b}.conv{c}.weight", "layer{s}.{b}.bn{c}.", "layer{s}.{b}.downsample.{i}.", "{i}."):
        yield f"backbone.body.{layer}", f"backbone.body.{layer}"

    # RetinaNet's pyramid begins at the second stage
    retina = "head.classification_head.cls_logits.weight" in state or "rpn.head.cls_tower.0.weight" in state
    first = 2 if retina else 1
    normed = any(f"backbone.fpn.{name}.1.weight" in state for name in ("inner_blocks.0", f"fpn_inner{first}"))
    for theirs, ours in (("inner_blocks", "fpn_inner"), ("layer_blocks", "fpn_layer")):
        yield from _layer(f"backbone.fpn.{theirs}.{{k}}", f"backbone.fpn.{ours}{{k+{first}}}", normed)
    yield "backbone.fpn.extra_blocks.", "backbone.fpn.top_blocks."

    if retina:
        for theirs, ours in (("classification_head", "cls"), ("regression_head", "bbox")):
            normed = f"head.{theirs}.conv.0.1.weight" in state or f"rpn.head.{ours}_tower.1.weight" in state
            yield from _sequence(f"head.{theirs}.conv", f"rpn.head.{ours}_tower", normed)
        yield "head.classification_head.cls_logits.", "rpn.head.cls_logits."
        yield "head.regression_head.bbox_reg.", "rpn.head.bbox_pred."
        return

    several = "rpn.head.conv.1.0.weight" in state or "rpn.head.conv.1.weight" in state
    yield ("rpn.head.conv.{k}.0.", "rpn.head.conv.{k}.") if several else ("rpn.head.conv.0.0.", "rpn.head.conv.")
    yield "rpn.head.cls_logits.", "rpn.head.cls_logits."
    yield "rpn.head.bbox_pred.", "rpn.head.bbox_pred."

    head, extractor = "roi_heads.box_head", "roi_heads.box.feature_extractor"
    normed = f"{head}.0.1.weight" in state or f"{extractor}.xconvs.1.weight" in state
    step = 3 if normed else 2
    convolutions = sum(
        f"{head}.{k}.0.weight" in state or f"{extractor}.xconvs.{step * k}.weight" in state for k in range(len(state))
    )
    yield from _sequence(head, f"{extractor}.xconvs", normed)
    for end in ("weight", "bias"):
        if convolutions:  # then Flatten, and a Linear and a ReLU each
            yield f"{head}.{convolutions + 1}.{end}", f"{extractor}.fc6.{end}"
            yield f"{head}.{convolutions + 3}.{end}", f"{extractor}.fc7.{end}"
        yield f"{head}.fc{{k}}.{end}", f"{extractor}.fc{{k}}.{end}"
    yield "roi_heads.box_predictor.cls_score.", "roi_heads.box.predictor.cls_score."
    yield "roi_heads.box_predictor.bbox_pred.", "roi_heads.box.predictor.bbox_pred."

    head, extractor = "roi_heads.mask_head", "roi_heads.mask.feature_extractor"
    normed = f"{head}.0.1.weight" in state or f"{extractor}.mask_fcn1.1.weight" in state
    yield from _layer(f"{head}.{{k}}", f"{extractor}.mask_fcn{{k+1}}", normed)
    yield "roi_heads.mask_predictor.", "roi_heads.mask.predictor."

    yield "roi_heads.keypoint_head.{2k}.", "roi_heads.keypoint.feature_extractor.conv_fcn{k+1}."
    yield "roi_heads.keypoint_predictor.", "roi_heads.keypoint.predictor."


def _layer(theirs: str, ours: str, normed: bool) -> Iterator[tuple[str, str]]:
    """A convolution, in a Sequential with its norm where it has one; theirs always is in one."""
    if normed:
        yield f"{theirs}.1.", f"{ours}.1."
    yield f"{theirs}.0.", f"{ours}.0." if normed else f"{ours}."


def _sequence(theirs: str, ours: str, normed: bool) -> Iterator[tuple[str, str]]:
    """Convolution, norm if any, ReLU, again and again; theirs are Sequentials in a Sequential, ours is one."""
    if normed:
        yield f"{theirs}.{{k}}.1.", f"{ours}.{{3k+1}}."
    yield f"{theirs}.{{k}}.0.", f"{ours}.{{3k}}." if normed else f"{ours}.{{2k}}."
