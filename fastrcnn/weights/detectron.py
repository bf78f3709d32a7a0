"""Detectron's (Caffe2) blobs: R-CNNs on C4, C5 and FPN, group norm, ResNeXt, masks, keypoints, RetinaNet, bodies."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastrcnn.weights.errors import WeightError
from fastrcnn.weights.names import Renaming

# what ends a blob's name: weights and biases, and of norms scales and statistics
_ENDS = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}
# the ratios of RetinaNet's anchors in Detectron's recipes, in the order of the channels; ours is ascending
_RETINA_RATIOS = (1.0, 2.0, 0.5)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are Detectron's blobs."""
    return "conv1_w" in state and "res2_0_branch2a_w" in state


def is_body(state: Mapping[str, Tensor]) -> bool:
    """Whether they are of a classifier."""
    return not any(name.startswith(("conv_rpn_", "retnet_", "cls_score_")) for name in state)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, without momentum, classifier and the fixed upsampling of the keypoints.

    The folded batch norm of these files gets the statistics 0 and 1. RetinaNet's channels, by octave and then by
    ratio (1, 2, 0.5) there, are put in the order of maskrcnn-benchmark: by ascending ratio and then by octave.
    """
    dropped = ("fc1000_", "pred_", "kps_score_w", "kps_score_b")
    names = Renaming(_rows(state))
    ours = {}
    for name, value in state.items():
        if name.endswith("_momentum") or name.startswith(dropped):
            continue
        layer, _, end = (names.ours(name) or name).rpartition(".")
        ours[f"{layer}.{_ENDS[end]}" if layer and end in _ENDS else name] = value
        if name.endswith("_bn_s") and f"{name[:-1]}rm" not in state:
            ours[f"{layer}.running_mean"] = torch.zeros_like(value)
            ours[f"{layer}.running_var"] = torch.ones_like(value)
    if "rpn.head.cls_tower.0.weight" in ours:
        _order_retina(ours)
    return ours


def _order_retina(state: dict[str, Tensor]) -> None:
    anchors, ratios = len(state["rpn.head.bbox_pred.bias"]) // 4, len(_RETINA_RATIOS)
    if anchors % ratios:
        raise WeightError(f"a Detectron RetinaNet with {anchors} anchors: the order of its ratios is not known")
    order = torch.tensor(_RETINA_RATIOS).argsort()
    for layer in ("cls_logits", "bbox_pred"):
        for end in ("weight", "bias"):
            channels = state[f"rpn.head.{layer}.{end}"].unflatten(0, (anchors // ratios, ratios, -1))
            state[f"rpn.head.{layer}.{end}"] = channels[:, order].transpose(0, 1).flatten(0, 2)


def _rows(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Blob names up to the last underscore, and our names up to the last dot."""
    body = "backbone.body."
    yield "res_conv1_bn_", f"{body}stem.bn1."
    yield "conv1_gn_", f"{body}stem.bn1."
    yield "conv1_", f"{body}stem.conv1."
    # the last stage belongs to the head on regions, unless a pyramid or a head of its own stands on it
    if "cls_score_w" in state and not any(name.startswith(("fpn_", "fc6_", "head_conv1_")) for name in state):
        yield from _stage("4", "roi_heads.box.feature_extractor.head.")
    yield from _stage("{s}", body)

    normed = any(name.startswith("fpn_") and name.endswith("_gn_s") for name in state)
    for theirs, ours in (("inner_{}_lateral", "inner"), ("inner_{}", "inner"), ("{}", "layer")):
        theirs, ours = f"fpn_{theirs.format('res{s+1}_{b}_sum')}", f"backbone.fpn.fpn_{ours}{{s}}."
        yield f"{theirs}_gn_", f"{ours}1."
        yield f"{theirs}_", f"{ours}0." if normed else ours
    yield "fpn_6_", "backbone.fpn.top_blocks.p6."
    yield "fpn_7_", "backbone.fpn.top_blocks.p7."

    # the first level of the pyramid holds what all levels share
    for theirs, ours in (("conv_rpn", "conv"), ("rpn_cls_logits", "cls_logits"), ("rpn_bbox_pred", "bbox_pred")):
        yield f"{theirs}_fpn{{l}}_", f"rpn.head.{ours}."
        yield f"{theirs}_", f"rpn.head.{ours}."
    for kind in ("cls", "bbox"):
        yield f"retnet_{kind}_conv_n{{k}}_fpn{{l}}_", f"rpn.head.{kind}_tower.{{2k}}."
    yield "retnet_cls_pred_fpn{l}_", "rpn.head.cls_logits."
    yield "retnet_bbox_pred_fpn{l}_", "rpn.head.bbox_pred."

    box = "roi_heads.box.feature_extractor."
    yield "head_conv{k+1}_gn_", f"{box}xconvs.{{3k+1}}."
    yield "head_conv{k+1}_", f"{box}xconvs.{{3k}}." if "head_conv1_gn_s" in state else f"{box}xconvs.{{2k}}."
    yield "fc{k}_", f"{box}fc{{k}}."
    yield "cls_score_", "roi_heads.box.predictor.cls_score."
    yield "bbox_pred_", "roi_heads.box.predictor.bbox_pred."

    mask = "roi_heads.mask.feature_extractor.mask_fcn{k}."
    yield "_[mask]_fcn{k}_gn_", f"{mask}1."
    yield "_[mask]_fcn{k}_", f"{mask}0." if "_[mask]_fcn1_gn_s" in state else mask
    yield "conv5_mask_", "roi_heads.mask.predictor.conv5_mask."
    yield "mask_fcn_logits_", "roi_heads.mask.predictor.mask_fcn_logits."

    yield "conv_fcn{k}_", "roi_heads.keypoint.feature_extractor.conv_fcn{k}."
    yield "kps_score_lowres_", "roi_heads.keypoint.predictor.kps_score_lowres."


def _stage(stage: str, prefix: str) -> Iterator[tuple[str, str]]:
    """A residual stage, or all of them for "{s}"; Caffe2 counts from the stem."""
    number = "{s+1}" if stage == "{s}" else str(int(stage) + 1)
    for branch, layer, norm in (
        ("1", "downsample.0.", "downsample.1."),
        ("2a", "conv1.", "bn1."),
        ("2b", "conv2.", "bn2."),
        ("2c", "conv3.", "bn3."),
    ):
        for kind in ("bn", "gn"):
            yield f"res{number}_{{b}}_branch{branch}_{kind}_", f"{prefix}layer{stage}.{{b}}.{norm}"
        yield f"res{number}_{{b}}_branch{branch}_", f"{prefix}layer{stage}.{{b}}.{layer}"
