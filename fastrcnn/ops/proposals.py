"""Proposal selection of a region proposal network, for all images and levels at once and with fixed shapes."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrcnn.ops import _library
from fastrcnn.ops.box_coder import decode_boxes
from fastrcnn.ops.nms import nms_padded
from fastrcnn.ops.reference.box_coder import MAX_LOG


def _sizes(logits, pre_nms_top_n, post_nms_top_n, max_proposals):
    """Anchors of the largest level, what each level may keep, and what each image may."""
    counts = [level.shape[1] * level.shape[2] * level.shape[3] for level in logits]
    kept = [min(post_nms_top_n, pre_nms_top_n, count) for count in counts]
    return max(counts), max(kept), min(max_proposals, sum(kept))


def _dtype(deltas):
    return reduce(torch.promote_types, (level.dtype for level in deltas), torch.float32)


def _fake(logits, deltas, cell_anchors, image_sizes, strides, pre_nms_top_n, post_nms_top_n, max_proposals, *_):
    _, _, total = _sizes(logits, pre_nms_top_n, post_nms_top_n, max_proposals)
    shape = logits[0].shape[0], total
    boxes = logits[0].new_empty((*shape, 4), dtype=_dtype(deltas))
    return boxes, boxes.new_empty(shape), boxes.new_empty(shape, dtype=torch.bool)


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
    dtype = _dtype(deltas)
    levels = [
        _candidates(*level, pre_nms_top_n, dtype)
        for level in zip(logits, deltas, cell_anchors, stride_pairs, strict=True)
    ]
    most = max(level_logits.shape[1] for level_logits, _, _ in levels)
    # levels with fewer candidates are filled up; their logit −inf makes them invalid
    best = torch.stack([pad(part, (0, most - part.shape[1]), value=float("-inf")) for part, _, _ in levels], 1)
    codes = torch.stack([pad(part, (0, 0, 0, most - part.shape[1])) for _, part, _ in levels], 1)
    anchors = torch.stack([pad(part, (0, 0, 0, most - part.shape[1])) for _, _, part in levels], 1)
    boxes = decode_boxes(codes, anchors, weights, clip_to=image_sizes[:, None, None])  # [B, L, k, 4]
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = best.isfinite() & codes.isfinite().all(-1) & (sides >= min_size).all(-1)

    _, per_level, total = _sizes(logits, pre_nms_top_n, post_nms_top_n, max_proposals)
    kept, _ = nms_padded(boxes.flatten(0, 1), best.flatten(0, 1), nms_threshold, per_level, valid=valid.flatten(0, 1))
    kept = kept.view(len(image_sizes), len(levels), per_level)
    slot = kept.clamp(min=0)
    boxes = boxes.gather(2, slot[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)
    best = torch.where(kept >= 0, best.gather(2, slot), float("-inf")).flatten(1)

    best, order = (x[:, :total] for x in best.sort(dim=1, descending=True, stable=True))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    valid = best.isfinite()
    if per_batch:
        rank = best.flatten().argsort(descending=True, stable=True).argsort().view_as(order)
        valid = valid & (rank < max_proposals)
    return torch.where(valid[..., None], boxes, 0), torch.where(valid, torch.sigmoid(best), 0), valid


def _candidates(logits, deltas, cells, strides, pre_nms_top_n, dtype):
    """The best of one level: logits [B, k] (−inf where not finite), deltas and anchors [B, k, 4]."""
    images, count, h, w = logits.shape
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


def _triton(
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
    from triton_kernels import nms as nms_kernels
    from triton_kernels import proposals as kernels

    most, per_level, total = _sizes(logits, pre_nms_top_n, post_nms_top_n, max_proposals)
    double = torch.float64 in [x.dtype for x in (*logits, *deltas)]  # the kernels compute in float32
    if double or len(logits) > kernels.MAX_LEVELS or most >= 2**31 or not total or not len(image_sizes):
        return _composite(
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
        )
    best, boxes, valid = kernels.candidates(
        logits, deltas, cell_anchors, image_sizes, strides, pre_nms_top_n, min_size, weights, MAX_LOG
    )
    if nms_kernels.prefer_segmented(best.shape[1], per_level):  # they are sorted already
        kept, counts = nms_kernels.nms_segmented(boxes, None, None, None, nms_threshold, per_level, valid=valid)
    else:
        kept, counts = nms_padded(boxes, best, nms_threshold, per_level, valid=valid)
    return kernels.merge(best, boxes, kept, counts, len(logits), total, max_proposals if per_batch else None)


_SELECT_PROPOSALS = _library.register(
    "select_proposals(Tensor[] logits, Tensor[] deltas, Tensor[] cell_anchors, Tensor image_sizes, float[] strides, "
    "int pre_nms_top_n, int post_nms_top_n, int max_proposals, float nms_threshold, float min_size, float[] weights, "
    "bool per_batch) -> (Tensor, Tensor, Tensor)",
    reference=_composite,
    fake=_fake,
    triton=_triton,
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
    side, scaled by weights as in `decode_boxes`), cell_anchors [A, 4], all of floating point, contiguous or
    channels_last without a copy. image_sizes: integer [B, 2], (h, w) in pixels.

    Per image and level: the pre_nms_top_n anchors of highest logit, decoded and clipped to the image; those with both
    sides >= min_size; greedy NMS at nms_threshold; its first post_nms_top_n. Over the levels of an image: the
    max_proposals of highest logit, or, per_batch, the max_proposals best of the whole batch. Whatever is not finite is
    dropped.

    Equal logits: between images and levels the earlier comes first. Within a level, which of them are among the
    pre_nms_top_n and in which order they enter the NMS is `torch.topk`'s choice, which differs between devices and may
    between versions of torch. So with float16 or bfloat16 logits, which often are equal, results of a CPU and a GPU
    differ in boxes of equal score; the same input on the same device gives the same result.

    Returns boxes [B, P, 4] xyxy, scores [B, P] (sigmoid of the logit) and valid bool [B, P], by falling logit, invalid
    slots last and 0; P = min(max_proposals, sum over levels of min(post_nms_top_n, pre_nms_top_n, A·h·w)).
    float32, or float64 if any deltas are. Only the selected anchors are computed; no host synchronisation.
    ValueError on levels, shapes, dtypes or devices that do not fit together.

    Source: Faster R-CNN (arXiv 1506.01497) with the per-level rule of feature pyramids (arXiv 1612.03144);
    per_batch is maskrcnn-benchmark's FPN_POST_NMS_PER_BATCH.
    """
    if not len(logits) == len(deltas) == len(cell_anchors) == len(strides) > 0:
        raise ValueError(
            "logits, deltas, cell_anchors and strides must have one entry per level, "
            f"got {len(logits)}, {len(deltas)}, {len(cell_anchors)} and {len(strides)}"
        )
    lists = {"logits": logits, "deltas": deltas, "cell_anchors": cell_anchors}
    named = {f"{name}[{level}]": x for name, levels in lists.items() for level, x in enumerate(levels)}
    _library.check_floating(**named)
    _library.check_one_device(**named, image_sizes=image_sizes)
    images = logits[0].shape[:1]
    for level, (scores, codes, cells) in enumerate(zip(logits, deltas, cell_anchors, strict=True)):
        if cells.dim() != 2 or cells.shape[1] != 4:
            raise ValueError(f"cell_anchors[{level}] must be [A, 4], got {list(cells.shape)}")
        count, grid = len(cells), scores.shape[2:]
        if scores.dim() != 4 or scores.shape[:2] != (*images, count) or codes.shape != (*images, 4 * count, *grid):
            raise ValueError(
                f"level {level}: {count} cell anchors want logits [{len(logits[0])}, {count}, h, w] and deltas "
                f"[{len(logits[0])}, {4 * count}, h, w], got {list(scores.shape)} and {list(codes.shape)}"
            )
    if image_sizes.shape != (*images, 2):
        raise ValueError(f"image_sizes must be [B, 2] = [{len(logits[0])}, 2], got {list(image_sizes.shape)}")
    if image_sizes.is_floating_point() or image_sizes.is_complex() or image_sizes.dtype == torch.bool:
        raise ValueError(f"image_sizes must be integers, got {image_sizes.dtype}")
    if len(weights) != 4:
        raise ValueError(f"weights must be 4 numbers (x, y, w, h), got {list(weights)}")
    limits = {"pre_nms_top_n": pre_nms_top_n, "post_nms_top_n": post_nms_top_n, "max_proposals": max_proposals}
    for name, limit in limits.items():
        if limit < 0:
            raise ValueError(f"{name} must not be negative, got {limit}")
    return _SELECT_PROPOSALS(
        [x.detach() for x in logits],
        [x.detach() for x in deltas],
        [x.detach() for x in cell_anchors],
        image_sizes,
        [torch.sym_float(s) for stride in strides for s in stride],
        pre_nms_top_n,
        post_nms_top_n,
        max_proposals,
        nms_threshold,
        min_size,
        [float(weight) for weight in weights],
        per_batch,
    )
