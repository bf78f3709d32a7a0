"""Soft-NMS by definition: the best box is taken, and what it overlaps loses score, again and again."""

import torch
from torch import Tensor

from fastrcnn.ops.reference.nms import usable_boxes


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_output: int,
    labels: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastrcnn.ops.soft_nms_padded`."""
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    sets, count = scores.shape
    indices = torch.full((sets, max_output), -1, device=boxes.device)
    found = scores.new_zeros((sets, max_output), dtype=dtype)
    if not sets or not count:
        return indices, found, torch.zeros(sets, dtype=torch.int32, device=boxes.device)
    usable = usable_boxes(boxes, scores, valid)
    boxes = torch.where(usable[..., None], boxes, 0).to(dtype)
    left = torch.where(usable, scores, -torch.inf).to(dtype)  # −∞: out, taken already or never in
    x1, y1, x2, y2 = boxes.unbind(2)
    area = (x2 - x1) * (y2 - y1)
    for slot in range(min(max_output, count)):
        best, index = left.max(1, keepdim=True)  # [S, 1]; the first of equal ones
        taken = (best > -torch.inf) & (best >= min_score)
        indices[:, slot : slot + 1] = torch.where(taken, index, -1)
        found[:, slot : slot + 1] = torch.where(taken, best, 0)
        width = torch.minimum(x2, x2.gather(1, index)) - torch.maximum(x1, x1.gather(1, index))
        height = torch.minimum(y2, y2.gather(1, index)) - torch.maximum(y1, y1.gather(1, index))
        overlap = width.clamp(min=0) * height.clamp(min=0)
        union = area + area.gather(1, index) - overlap
        iou = torch.where(overlap > 0, overlap / union, 0)
        if labels is not None:
            iou = torch.where(labels == labels.gather(1, index), iou, 0)
        if method == "gaussian":
            factor = torch.exp(-iou * iou / sigma)
        else:
            factor = torch.where(iou > iou_threshold, 1 - iou, 1)
        left = (left * factor).scatter(1, index, -torch.inf)
    return indices, found, (indices >= 0).sum(1, dtype=torch.int32)
