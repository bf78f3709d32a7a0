"""Greedy non-maximum suppression by definition: one box after the other, in falling score order."""

import torch
from torch import Tensor


def overlaps(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """IoU of a and b [..., 4] above the threshold -> bool [...]; the one definition, the kernels repeat it.

    The product form needs no division. `inter > 0` beside it: an inverted box has a negative area, and
    0 > threshold * (negative union) would be true. A NaN coordinate makes every comparison false.
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return (inter > iou_threshold * union) & (inter > 0)


def greedy(boxes: Tensor, candidates: Tensor, iou_threshold: float, labels: Tensor | None = None) -> Tensor:
    """boxes [S, N, 4], candidates bool [S, N], labels [S, N], all in falling score order -> kept bool [S, N]."""
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    position = torch.arange(boxes.shape[1], device=boxes.device)
    keep = candidates
    for i in range(boxes.shape[1]):
        hit = overlaps(boxes[:, i : i + 1], boxes, iou_threshold) & (position > i)  # [S, N]
        if labels is not None:
            hit = hit & (labels[:, i : i + 1] == labels)
        keep = keep & ~(hit & keep[:, i : i + 1])
    return keep


def usable_boxes(boxes: Tensor, scores: Tensor, valid: Tensor | None) -> Tensor:
    """bool [S, N]: valid, with finite box and score."""
    usable = (boxes * 0).sum(
        -1
    ) == scores * 0  # 0 == 0; NaN where something is not finite. Half the kernels of isfinite
    return usable if valid is None else usable & valid


def falling_order(scores: Tensor, usable: Tensor | None = None) -> Tensor:
    """Indices of the last dimension by falling score, equal scores in their order; unusable ones last."""
    key = scores if usable is None else torch.where(usable, scores, float("-inf"))
    return torch.sort(key, dim=-1, descending=True, stable=True).indices


def gather_boxes(boxes: Tensor, indices: Tensor) -> Tensor:
    """boxes [S, N, 4], indices [S, K] -> [S, K, 4]."""
    return boxes.gather(1, indices[..., None].expand(-1, -1, 4))


def pad_kept(keep: Tensor, order: Tensor, max_output: int) -> tuple[Tensor, Tensor]:
    """keep bool, order int64 [S, N] -> the first max_output kept of order, padded with −1, and counts int32 [S]."""
    rank = keep.cumsum(1)  # [S, N]: kept so far
    wanted = torch.arange(1, max_output + 1, device=keep.device).expand(len(keep), -1)
    position = torch.searchsorted(rank, wanted.contiguous())  # N where there are fewer
    padded = torch.cat([order, order.new_full((len(order), 1), -1)], 1)
    return padded.gather(1, position), keep.sum(1).clamp(max=max_output).to(torch.int32)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastrcnn.ops.nms_padded`."""
    usable = usable_boxes(boxes, scores, valid)
    order = falling_order(scores, usable)
    labels = None if labels is None else labels.gather(1, order)
    keep = greedy(gather_boxes(boxes, order), usable.gather(1, order), iou_threshold, labels)
    return pad_kept(keep, order, max_output)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See `fastrcnn.ops.nms`."""
    order = falling_order(scores)
    return order[greedy(boxes[order][None], torch.ones_like(order[None], dtype=torch.bool), iou_threshold)[0]]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See `fastrcnn.ops.batched_nms`."""
    order = falling_order(scores)
    everything = torch.ones_like(order[None], dtype=torch.bool)
    return order[greedy(boxes[order][None], everything, iou_threshold, idxs[order][None])[0]]
