"""Which ground truth a box belongs to."""

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import match as reference


def _fake(boxes, gt_boxes, gt_valid, high, low, allow_low_quality):
    shape = gt_valid.shape[0], boxes.shape[-2]
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, gt_boxes.dtype), torch.float32)
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape, dtype=dtype)


def _cpu(boxes, gt_boxes, gt_valid, *rest):
    used = int((gt_valid * torch.arange(1, gt_valid.shape[1] + 1)).max()) if gt_valid.numel() else 0
    return reference.match_boxes(boxes, gt_boxes[:, :used], gt_valid[:, :used], *rest)  # skip slots empty in all images


def _triton(boxes, gt_boxes, *rest):
    if torch.float64 in (boxes.dtype, gt_boxes.dtype):  # the kernels compute in float32
        return reference.match_boxes(boxes, gt_boxes, *rest)
    from triton_kernels import match as kernels

    return kernels.match_boxes(boxes, gt_boxes, *rest)


MATCH = _library.register(
    "match_boxes(Tensor boxes, Tensor gt_boxes, Tensor gt_valid, float high, float low, bool allow_low_quality)"
    " -> (Tensor, Tensor)",
    reference=reference.match_boxes,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
)


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, high: float, low: float, allow_low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Match each box with the valid ground truth of highest IoU, the first of equals (Faster R-CNN, Ren et al. 2015).

    boxes: [B, A, 4] xyxy, or [A, 4] shared by all images; gt_boxes: [B, G, 4]; gt_valid: bool [B, G], False in empty
    slots. Returns matched int64 [B, A]: the index of the ground truth where IoU ≥ high, −1 where IoU < low, −2 between;
    and the best IoU float32 [B, A] (float64 for such boxes; 0 where there is none). allow_low_quality: every box that
    ties the best IoU of some valid ground truth is matched with its own best as well. Boxes with NaN never match; an
    image without valid ground truth is all −1. float16 and bfloat16 are computed in float32. The A×G matrix is never
    held. No gradient. ValueError if the shapes do not fit together, boxes are not of floating point, gt_valid is not
    bool, the tensors are on several devices, or low exceeds high.
    """
    if low > high:
        raise ValueError(f"low ({low}) must not exceed high ({high})")
    _library.check_floating(boxes=boxes, gt_boxes=gt_boxes)
    _library.check_one_device(boxes=boxes, gt_boxes=gt_boxes, gt_valid=gt_valid)
    if gt_valid.dtype != torch.bool:
        raise ValueError(f"gt_valid must be of torch.bool, got {gt_valid.dtype}")
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have the shape [B, A, 4] or [A, 4], got {list(boxes.shape)}")
    if gt_boxes.dim() != 3 or gt_boxes.shape[-1] != 4 or gt_valid.shape != gt_boxes.shape[:2]:
        raise ValueError(
            "gt_boxes and gt_valid must have the shapes [B, G, 4] and [B, G], "
            f"got {list(gt_boxes.shape)} and {list(gt_valid.shape)}"
        )
    if boxes.dim() == 3 and boxes.shape[0] != gt_boxes.shape[0]:
        raise ValueError(f"boxes are of {boxes.shape[0]} images and gt_boxes of {gt_boxes.shape[0]}")
    return MATCH(boxes.detach(), gt_boxes.detach(), gt_valid, high, low, allow_low_quality)
