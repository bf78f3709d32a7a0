"""Definition of matching: each box with the ground truth that it overlaps most."""

import torch
from torch import Tensor

BELOW, BETWEEN = -1, -2


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, high: float, low: float, allow_low_quality: bool
) -> tuple[Tensor, Tensor]:
    """boxes [B, A, 4] or [A, 4], gt_boxes [B, G, 4], gt_valid [B, G] -> matched int64 [B, A], iou [B, A].

    The best IoU of a ground truth is known once its row is, so one sweep over the rows serves both the maximum over the
    ground truths and the low-quality rule, and the A×G matrix exists only in blocks of at most `_block(...)` numbers.
    """
    batch, anchors = gt_valid.shape[0], boxes.shape[-2]
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, gt_boxes.dtype), torch.float32)
    # an IoU with a NaN box is NaN, which never matches: so empty slots are made NaN
    gt = torch.where(gt_valid[..., None], gt_boxes.to(dtype), float("nan"))
    boxes = boxes.to(dtype).expand(batch, anchors, 4)
    images = max(1, _block(boxes) // max(anchors, 1))
    parts = [
        _match(b, g, high, low, allow_low_quality)
        for b, g in zip(boxes.split(images), gt.split(images), strict=True)
        if b.shape[0]
    ]
    if not parts:
        return boxes.new_empty((0, anchors), dtype=torch.int64), boxes.new_empty((0, anchors))
    return torch.cat([m for m, _ in parts]), torch.cat([i for _, i in parts])


def _block(boxes: Tensor) -> int:
    """Numbers per intermediate: few enough for a CPU's cache, many enough to fill a GPU."""
    return 1 << 18 if boxes.device.type == "cpu" else 1 << 25


def _match(boxes: Tensor, gt: Tensor, high: float, low: float, allow_low_quality: bool) -> tuple[Tensor, Tensor]:
    batch, anchors, _ = boxes.shape
    columns = [c.contiguous() for c in boxes.unbind(-1)]  # of [B, A]
    area = (columns[2] - columns[0]) * (columns[3] - columns[1])
    best = boxes.new_full((batch, anchors), -1)
    index = boxes.new_zeros((batch, anchors), dtype=torch.int64)
    tied = boxes.new_zeros((batch, anchors), dtype=torch.bool)
    rows = max(1, _block(boxes) // max(batch * anchors, 1))
    for first in range(0, gt.shape[1] if anchors else 0, rows):
        iou = _iou(columns, area, gt[:, first : first + rows])  # [rows, B, A]
        value, row = iou.max(0)  # the first of equals
        index = torch.where(value > best, row + first, index)
        best = torch.maximum(best, value)
        if allow_low_quality:
            top = iou.amax(2, keepdim=True)
            # the best IoU of a real ground truth may be 0, and then all boxes that do not touch it tie
            tied = tied | ((iou == top) & (top >= 0)).any(0)
    below = torch.where(best < low, BELOW, BETWEEN)
    matched = torch.where((best >= high) | tied, index, torch.where(best < 0, BELOW, below))
    return matched, best.clamp(min=0)


def _iou(columns: list[Tensor], area: Tensor, gt: Tensor) -> Tensor:
    """boxes as 4 columns [B, A], gt [B, rows, 4] -> [rows, B, A] in torchvision's arithmetic; −1 where it is NaN."""
    x1, y1, x2, y2 = columns
    gx1, gy1, gx2, gy2 = gt.transpose(0, 1)[..., None].unbind(2)  # [rows, B, 1] each
    w = (torch.minimum(x2, gx2) - torch.maximum(x1, gx1)).clamp(min=0)
    h = (torch.minimum(y2, gy2) - torch.maximum(y1, gy1)).clamp(min=0)
    inter = w * h
    iou = inter / ((gx2 - gx1) * (gy2 - gy1) + area - inter)
    return torch.where(iou >= 0, iou, -1)
