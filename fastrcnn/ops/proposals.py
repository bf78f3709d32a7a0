"""Proposal selection of a region proposal network, for all images and levels at once and with fixed shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrcnn.ops import _library
from fastrcnn.ops.box_coder import decode_boxes
from fastrcnn.ops.nms import nms_padded


def _composite(
    logits,
    deltas,
    cell_anchors,
    image_sizes,
    strides,
    pre_nms_top_n,
    post_nms_top_n,
    max_proposals,
    nms_threshold,
    min_size,
    weights,
    per_batch,
):
    stride_pairs = zip(strides[::2], strides[1::2], strict=True)
    levels = [
        _candidates(*level, pre_nms_top_n) for level in zip(logits, deltas, cell_anchors, stride_pairs, strict=True)
    ]
    counts = [level_logits.shape[1] for level_logits, _, _ in levels]
    most = max(counts)
    # levels with fewer candidates are filled up; their logit −inf makes them invalid
    score = torch.stack([pad(part, (0, most - part.shape[1]), value=float("-inf")) for part, _, _ in levels], 1)
    codes = torch.stack([pad(part, (0, 0, 0, most - part.shape[1])) for _, part, _ in levels], 1)
    anchors = torch.stack([pad(part, (0, 0, 0, most - part.shape[1])) for _, _, part in levels], 1)
    boxes = decode_boxes(codes, anchors, weights, clip_to=image_sizes[:, None, None])  # [B, L, k, 4]
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = score.isfinite() & codes.isfinite().all(-1) & (sides >= min_size).all(-1)
    score = torch.sigmoid(score)

    per_level = min(post_nms_top_n, most)
    kept, _ = nms_padded(boxes.flatten(0, 1), score.flatten(0, 1), nms_threshold, per_level, valid=valid.flatten(0, 1))
    kept = kept.view(len(image_sizes), len(levels), per_level)
    slot = kept.clamp(min=0)
    boxes = boxes.gather(2, slot[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)
    score = torch.where(kept >= 0, score.gather(2, slot), -1).flatten(1)

    total = min(max_proposals, sum(min(post_nms_top_n, n) for n in counts))
    score, order = (x[:, :total] for x in score.sort(dim=1, descending=True, stable=True))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    valid = score >= 0
    if per_batch:
        rank = score.flatten().argsort(descending=True, stable=True).argsort().view_as(score)
        valid = valid & (rank < max_proposals)
    return torch.where(valid[..., None], boxes, 0), torch.where(valid, score, 0), valid


def _candidates(logits, deltas, cells, strides, pre_nms_top_n):
    """The best of one level: logits [B, k] (−inf where not finite), deltas and anchors [B, k, 4]."""
    logits, deltas = logits.detach(), deltas.detach()
    images, count, h, w = logits.shape
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    flat = logits.permute(0, 2, 3, 1).flatten(1).to(dtype)
    # NaN would come first
    best, index = torch.where(flat.isfinite(), flat, float("-inf")).topk(min(pre_nms_top_n, count * h * w), dim=1)
    cell, position = index % count, index // count
    y, x = position // w, position % w
    image = torch.arange(images, device=index.device)[:, None, None]
    channel = cell[..., None] * 4 + torch.arange(4, device=index.device)
    codes = deltas[image, channel, y[..., None], x[..., None]].to(dtype)  # read in place, in either memory format
    stride_y, stride_x = strides
    shift = torch.stack([x.to(dtype) * stride_x, y.to(dtype) * stride_y], -1)
    return best, codes, cells.to(dtype)[cell] + shift.repeat(1, 1, 2)


_SELECT_PROPOSALS = _library.register_composite(
    "select_proposals(Tensor[] logits, Tensor[] deltas, Tensor[] cell_anchors, Tensor image_sizes, float[] strides, "
    "int pre_nms_top_n, int post_nms_top_n, int max_proposals, float nms_threshold, float min_size, float[] weights, "
    "bool per_batch) -> (Tensor, Tensor, Tensor)",
    _composite,
)


def select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Tensor],
    strides: Sequence[tuple[float, float]],
    image_sizes: Tensor,
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    max_proposals: int,
    nms_threshold: float,
    min_size: float,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    per_batch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals of every image from the outputs of a region proposal network, without gradient.

    Per level l, of stride (y, x) pixels: logits [B, A, h, w], deltas [B, 4·A, h, w] (the 4 values of an anchor side by
    side, scaled by weights as in `decode_boxes`), cell_anchors [A, 4]. image_sizes: integer [B, 2], (h, w) in pixels.

    Per image and level: the pre_nms_top_n anchors of highest logit, decoded and clipped to the image; those with both
    sides >= min_size; greedy NMS at nms_threshold; its first post_nms_top_n. Over the levels of an image: the
    max_proposals best, or, per_batch, the max_proposals best of the whole batch. Whatever is not finite is dropped.

    Returns boxes [B, P, 4] xyxy, scores [B, P] (sigmoid of the logit) and valid bool [B, P], by falling score, invalid
    slots last and 0; P = min(max_proposals, sum over levels of min(post_nms_top_n, pre_nms_top_n, A·h·w)).
    float32, or float64 if the deltas are. Only the selected anchors are computed; no host synchronisation.
    ValueError on levels or shapes that do not fit together.

    Source: Faster R-CNN (arXiv 1506.01497) with the per-level rule of feature pyramids (arXiv 1612.03144);
    per_batch is maskrcnn-benchmark's FPN_POST_NMS_PER_BATCH.
    """
    if not len(logits) == len(deltas) == len(cell_anchors) == len(strides) > 0:
        raise ValueError(
            "logits, deltas, cell_anchors and strides must have one entry per level, "
            f"got {len(logits)}, {len(deltas)}, {len(cell_anchors)} and {len(strides)}"
        )
    for level, (scores, codes, cells) in enumerate(zip(logits, deltas, cell_anchors, strict=True)):
        images, _, h, w = scores.shape
        if scores.shape[1] != len(cells) or codes.shape != (images, 4 * len(cells), h, w):
            raise ValueError(
                f"level {level}: {len(cells)} cell anchors want logits [B, {len(cells)}, h, w] and deltas "
                f"[B, {4 * len(cells)}, h, w], got {tuple(scores.shape)} and {tuple(codes.shape)}"
            )
    if image_sizes.shape != (len(logits[0]), 2):
        raise ValueError(f"image_sizes must be [B, 2] = [{len(logits[0])}, 2], got {tuple(image_sizes.shape)}")
    return _SELECT_PROPOSALS(
        list(logits),
        list(deltas),
        list(cell_anchors),
        image_sizes,
        [float(s) for stride in strides for s in stride],
        pre_nms_top_n,
        post_nms_top_n,
        max_proposals,
        nms_threshold,
        min_size,
        [float(weight) for weight in weights],
        per_batch,
    )
