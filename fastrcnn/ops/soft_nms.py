"""Soft-NMS: overlapped boxes lose score instead of being dropped (Bodla et al. 2017)."""

from typing import Literal

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import soft_nms as reference


def _fake(boxes, scores, method, iou_threshold, sigma, min_score, max_output, labels, valid):
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    shape = boxes.shape[0], max_output
    found = boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape, dtype=dtype)
    return *found, boxes.new_empty(shape[:1], dtype=torch.int32)


_SOFT_NMS = _library.register(
    "soft_nms_padded(Tensor boxes, Tensor scores, str method, float iou_threshold, float sigma, float min_score, "
    "SymInt max_output, Tensor? labels, Tensor? valid) -> (Tensor, Tensor, Tensor)",
    reference=reference.soft_nms_padded,
    fake=_fake,
)


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    max_output: int,
    method: Literal["linear", "gaussian"] = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS of S independent sets (Bodla et al., Soft-NMS, 2017, with the defaults of their code), with shapes known
    beforehand and no host synchronisation; max_output steps of a few small kernels each.

    boxes [S, N, 4] xyxy and scores [S, N], floating; labels integers [S, N]: boxes of different labels do not touch
    each other; valid bool [S, N]: the others take no part, and neither does what is not finite. The best box is taken
    and the scores of the others are multiplied, with "linear" by 1 − IoU where the IoU is above iou_threshold, with
    "gaussian" by exp(−IoU² / sigma), until max_output are taken or the best score is below min_score.

    Returns indices int64 [S, max_output] and their reduced scores (float32, or float64 for such arguments), by falling
    score, −1 and 0 where empty, and counts int32 [S]. No gradient. ValueError on shapes, dtypes, devices or numbers
    that do not fit.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [S, N, 4], got {tuple(boxes.shape)}")
    for name, value in (("scores", scores), ("labels", labels), ("valid", valid)):
        if value is not None and value.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must be [S, N] = {tuple(boxes.shape[:2])}, got {tuple(value.shape)}")
    _library.check_floating(boxes=boxes, scores=scores)
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    _library.check_one_device(boxes=boxes, scores=scores, labels=labels, valid=valid)
    if method not in ("linear", "gaussian"):
        raise ValueError(f"method must be 'linear' or 'gaussian', got {method!r}")
    if max_output < 0 or sigma <= 0:
        raise ValueError(f"max_output ({max_output}) must not be negative and sigma ({sigma}) positive")
    boxes, scores = boxes.detach(), scores.detach()
    return _SOFT_NMS(boxes, scores, method, iou_threshold, sigma, min_score, max_output, labels, valid)
