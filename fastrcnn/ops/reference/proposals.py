"""Proposals of a region proposal network by definition: decode every anchor, then select, image by image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops.reference.anchors import grid_anchors
from fastrcnn.ops.reference.box_coder import MAX_LOG, decode_boxes
from fastrcnn.ops.reference.nms import nms_padded


def select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Tensor],
    image_sizes: Tensor,
    strides: Sequence[float],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    max_proposals: int,
    nms_threshold: float,
    min_size: float,
    weights: Sequence[float],
    per_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastrcnn.ops.select_proposals`; at least one image, strides [2 L] (sy, sx, ...) flat."""
    images = []
    for image, size in enumerate(image_sizes):
        levels = []
        for level, cells in enumerate(cell_anchors):
            anchors = grid_anchors([cells], logits[level].shape[-2:], strides[2 * level : 2 * level + 2])
            level_logits = logits[level][image].detach().permute(1, 2, 0).flatten()  # [h w A]
            level_deltas = deltas[level][image].detach().permute(1, 2, 0).reshape(-1, 4)
            boxes = _decoded(level_deltas, anchors, size, weights)
            sides = boxes[:, 2:] - boxes[:, :2]
            valid = level_logits.isfinite() & level_deltas.isfinite().all(1) & (sides >= min_size).all(1)
            ranked = torch.where(level_logits.isfinite(), level_logits, float("-inf"))
            top = ranked.topk(min(pre_nms_top_n, len(ranked))).indices
            best, boxes, valid = level_logits[top].to(boxes.dtype), boxes[top], valid[top]
            count = min(post_nms_top_n, len(top))
            kept = nms_padded(boxes[None], best[None], nms_threshold, count, valid=valid[None])[0][0]
            levels.append((boxes[kept], torch.where(kept >= 0, best[kept], float("-inf"))))
        boxes, best = (torch.cat(parts) for parts in zip(*levels, strict=True))
        order = best.sort(descending=True, stable=True).indices[:max_proposals]
        images.append((boxes[order], best[order]))
    boxes, best = (torch.stack(parts) for parts in zip(*images, strict=True))  # [B, P, ...]
    valid = best.isfinite()
    if per_batch:
        order = best.flatten().sort(descending=True, stable=True).indices
        valid = valid & (order.argsort().view_as(valid) < max_proposals)
    return torch.where(valid[..., None], boxes, 0), torch.where(valid, torch.sigmoid(best), 0), valid


def _decoded(deltas: Tensor, anchors: Tensor, size: Tensor, weights: Sequence[float]) -> Tensor:
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    return decode_boxes(deltas.to(dtype), anchors.to(dtype), size.expand(len(anchors), 2), list(weights), MAX_LOG)
