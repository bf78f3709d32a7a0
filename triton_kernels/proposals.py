"""Proposal selection of a region proposal network: what lies around the top-k and the NMS, for all images and levels.

A set is one level of one image: S = B · L of them, the levels of an image side by side. Anchors are computed from their
index and never stored, and only those of the top-k are decoded.
"""

from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.anchors import MAX_LEVELS, anchor_position, load_shifted, pick
from triton_kernels.launch import Launch, choose

_MAPS = [f"{size}{level}" for size in ("count", "cells", "stride") for level in range(MAX_LEVELS)]
_GRIDS = [f"{size}{level}" for size in ("width", "cells", "stride") for level in range(MAX_LEVELS)]


@triton.jit(do_not_specialize=["levels", *_MAPS])
def proposal_keys_kernel(
    keys_ptr,
    l0,
    l1,
    l2,
    l3,
    l4,
    count0,
    count1,
    count2,
    count3,
    count4,
    cells0,
    cells1,
    cells2,
    cells3,
    cells4,
    stride0,
    stride1,
    stride2,
    stride3,
    stride4,
    levels,
    length,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys [S, length]: the logits of each set in the order of its anchors; −inf where not finite, and as padding.

    l: logits [B, cells, h, w]; count: cells · h · w; stride: elements from one cell to the next, 1 with channels_last,
    which CHANNELS_LAST says of all levels: then a set is copied as it lies. Grid: S · blocks of length.
    Reads every logit and writes S · length once; a division per logit if not CHANNELS_LAST.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BLOCK)
    segment = program // blocks
    level = segment % levels
    image = (segment // levels).to(tl.int64)
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    count = pick(level, count0, count1, count2, count3, count4)
    p = pick(level, l0, l1, l2, l3, l4) + image * count
    if CHANNELS_LAST:
        p += index
    else:
        cells = pick(level, cells0, cells1, cells2, cells3, cells4)
        stride = pick(level, stride0, stride1, stride2, stride3, stride4)
        p += (index % cells) * stride + (index // cells) * tl.where(stride == 1, cells, 1)
    logit = tl.load(p, mask=index < count, other=float("-inf")).to(tl.float32)
    key = tl.where(tl.abs(logit) < float("inf"), logit, float("-inf"))
    tl.store(keys_ptr + segment.to(tl.int64) * length + index, key.to(keys_ptr.dtype.element_ty), mask=index < length)


@triton.jit
def _columns(x, N: tl.constexpr):
    """[N, 4] -> its four columns."""
    even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _clip(x, limit):
    x = tl.where(x < 0, 0.0, x)
    return tl.where(x > limit, limit, x)  # NaN stays, which tl.minimum may drop


@triton.jit(do_not_specialize=["levels", "k", *_GRIDS])
def proposal_decode_kernel(
    index_ptr,
    logits_ptr,
    image_sizes_ptr,
    boxes_ptr,
    valid_ptr,
    d0,
    d1,
    d2,
    d3,
    d4,
    c0,
    c1,
    c2,
    c3,
    c4,
    width0,
    width1,
    width2,
    width3,
    width4,
    size0,
    size1,
    size2,
    size3,
    size4,
    cells0,
    cells1,
    cells2,
    cells3,
    cells4,
    stride0,
    stride1,
    stride2,
    stride3,
    stride4,
    sy0,
    sy1,
    sy2,
    sy3,
    sy4,
    sx0,
    sx1,
    sx2,
    sx3,
    sx4,
    levels,
    k,
    wx,
    wy,
    ww,
    wh,
    max_log,
    min_size,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Boxes [S, k, 4] of the anchors index [S, k], clipped to image_sizes [B, 2] (h, w), and whether they are valid.

    logits [S, k]: −inf marks padding. d: deltas [B, 4 · cells, h, w]; c: cell anchors [cells, 4]; width and size: w and
    h · w; stride: elements from one channel of the deltas to the next, 1 with channels_last, which CHANNELS_LAST says
    of all levels. wx … wh: weights of the deltas. valid [S, k]: finite logit and deltas, sides of at least min_size.
    Grid: (S, blocks of k). Per box: reads 8 B of index, a logit and four deltas, from 1 sector with channels_last and
    from 4 without; writes 17 B. About 100 operations.
    """
    segment = tl.program_id(0)
    level = segment % levels
    image = (segment // levels).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = segment.to(tl.int64) * k + slot
    logit = tl.load(logits_ptr + place, mask=slot < k, other=float("-inf")).to(tl.float32)
    valid = logit > float("-inf")
    index = tl.load(index_ptr + place, mask=valid, other=0).to(tl.int32)

    width = pick(level, width0, width1, width2, width3, width4)
    size = pick(level, size0, size1, size2, size3, size4)
    cells = pick(level, cells0, cells1, cells2, cells3, cells4)
    cell, x, y = anchor_position(index, width, cells)
    shift_x = x.to(tl.float32) * pick(level, sx0, sx1, sx2, sx3, sx4)
    shift_y = y.to(tl.float32) * pick(level, sy0, sy1, sy2, sy3, sy4)
    anchors = load_shifted(pick(level, c0, c1, c2, c3, c4), cell, shift_x, shift_y, valid)

    p = pick(level, d0, d1, d2, d3, d4) + image * size * cells * 4
    side = tl.arange(0, 4)[None, :]
    if CHANNELS_LAST:
        p += index.to(tl.int64)[:, None] * 4 + side
    else:
        stride = pick(level, stride0, stride1, stride2, stride3, stride4).to(tl.int64)
        position = (y * width + x) * tl.where(stride == 1, cells * 4, 1).to(tl.int64)
        p += position[:, None] + (cell[:, None] * 4 + side) * stride
    codes = tl.load(p, mask=valid[:, None], other=0.0).to(tl.float32)
    valid &= tl.min((tl.abs(codes) < float("inf")).to(tl.int32), axis=1) > 0
    codes = tl.where(valid[:, None], codes, 0.0)
    dx, dy, dw, dh = _columns(codes, BLOCK)
    x1, y1, x2, y2 = _columns(anchors, BLOCK)
    w = x2 - x1
    h = y2 - y1
    cx = tl.div_rn(dx, wx) * w + (x1 + 0.5 * w)
    cy = tl.div_rn(dy, wy) * h + (y1 + 0.5 * h)
    dw = tl.div_rn(dw, ww)
    dh = tl.div_rn(dh, wh)
    w = 0.5 * (tl.exp(tl.where(dw > max_log, max_log, dw)) * w)
    h = 0.5 * (tl.exp(tl.where(dh > max_log, max_log, dh)) * h)
    bottom = tl.load(image_sizes_ptr + image * 2).to(tl.float32)
    right = tl.load(image_sizes_ptr + image * 2 + 1).to(tl.float32)
    x1 = _clip(cx - w, right)
    y1 = _clip(cy - h, bottom)
    x2 = _clip(cx + w, right)
    y2 = _clip(cy + h, bottom)
    valid &= (x2 - x1 >= min_size) & (y2 - y1 >= min_size)
    boxes = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (BLOCK, 4))
    tl.store(boxes_ptr + place[:, None] * 4 + side, boxes, mask=(slot < k)[:, None])
    tl.store(valid_ptr + place, valid.to(tl.uint8), mask=slot < k)


@triton.jit(do_not_specialize=["images", "levels", "k", "per_level", "total", "per_batch", "steps"])
def proposal_merge_kernel(
    logits_ptr,
    boxes_ptr,
    kept_ptr,
    counts_ptr,
    out_boxes_ptr,
    out_scores_ptr,
    out_valid_ptr,
    images,
    levels,
    k,
    per_level,
    total,
    per_batch,
    steps,
    PER_BATCH: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first `total` of each image from its levels' sorted lists: out_boxes [B, total, 4], scores and valid.

    kept [S, per_level] (rising slots, counts [S] of them) picks from logits [S, k] (falling) and boxes [S, k, 4]. An
    element's rank is its place in its own list plus the elements before it in each other list, found bit by bit in
    `steps` bits; of equal logits that of the earlier list comes first, and empty elements come last, so that ranks
    are a permutation and each slot of the result is written once. PER_BATCH: ranks over the images too decide what is
    valid: the first per_batch. Grid: (B, blocks of levels · per_level). LEVELS: power of two ≥ levels.
    Reads per element 2 · steps numbers from L2 or L1 for each list compared, and 16 B of box; writes 21 B.
    """
    image = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < levels * per_level
    own = image * levels + tl.where(inside, element // per_level, 0)
    place = element % per_level
    filled = inside & (place < tl.load(counts_ptr + own))
    slot = tl.load(kept_ptr + own.to(tl.int64) * per_level + place, mask=filled, other=0)
    source = own.to(tl.int64) * k + slot
    logit = tl.load(logits_ptr + source, mask=filled, other=float("-inf")).to(tl.float32)

    level = tl.arange(0, LEVELS)
    image_rank = tl.zeros([BLOCK], tl.int32)
    batch_rank = tl.zeros([BLOCK], tl.int32)
    first = image
    last = image + 1
    if PER_BATCH:
        first = image * 0
        last = images
    for other_image in range(first, last):
        other = other_image * levels + level
        count = tl.load(counts_ptr + other, mask=level < levels, other=0)
        kept = kept_ptr + other.to(tl.int64)[None, :] * per_level
        logits = logits_ptr + other.to(tl.int64)[None, :] * k
        earlier = other[None, :] < own[:, None]
        before = tl.zeros([BLOCK, LEVELS], tl.int32)
        for step in range(steps):
            probe = before + (1 << (steps - 1 - step))
            possible = probe <= count[None, :]
            probed_slot = tl.load(kept + probe - 1, mask=possible, other=0)
            value = tl.load(logits + probed_slot, mask=possible, other=float("-inf")).to(tl.float32)
            further = tl.where(earlier, value >= logit[:, None], value > logit[:, None])
            before = tl.where(possible & further, probe, before)
        before = tl.where(earlier & (filled == 0)[:, None], per_level, before)  # the empty elements of earlier lists
        before = tl.where(other[None, :] == own[:, None], place[:, None], before)
        rank = tl.sum(tl.where(level[None, :] < levels, before, 0), axis=1)
        batch_rank += rank
        image_rank += tl.where(other_image == image, rank, 0)

    wanted = inside & (image_rank < total)
    valid = filled
    if PER_BATCH:
        valid &= batch_rank < per_batch
    side = tl.arange(0, 4)[None, :]
    boxes = tl.load(boxes_ptr + source[:, None] * 4 + side, mask=(wanted & valid)[:, None], other=0.0)
    small = tl.exp(-tl.abs(tl.where(filled, logit, 0.0)))  # no overflow
    score = tl.div_rn(tl.where(logit >= 0, 1.0, small), 1.0 + small)
    rank = image.to(tl.int64) * total + image_rank
    tl.store(out_boxes_ptr + rank[:, None] * 4 + side, boxes, mask=wanted[:, None])
    tl.store(out_scores_ptr + rank, tl.where(valid, score, 0.0), mask=wanted)
    tl.store(out_valid_ptr + rank, valid.to(tl.uint8), mask=wanted)


def keys_launch(anchors: int, itemsize: int) -> Launch:
    """block: logits per program; two 16-byte stores per thread."""
    return choose("proposal_keys", Launch(block=4096 // itemsize, num_warps=4), anchors=anchors, itemsize=itemsize)


def decode_launch(candidates: int) -> Launch:
    """block: candidates per program; one per thread: it waits for gathers, so many threads and few registers each."""
    return choose("proposal_decode", Launch(block=128, num_warps=4), candidates=candidates)


def merge_launch(candidates: int, levels: int) -> Launch:
    """block: elements per program; two searches per thread: with four ptxas spills a register on some targets."""
    block = max(512 // triton.next_power_of_2(levels), 1)
    return choose("proposal_merge", Launch(block, num_warps=8), candidates=candidates, levels=levels)


def _uniform(maps: list[Tensor]) -> tuple[list[Tensor], list[int], bool]:
    """Maps of one dtype, contiguous in either memory format; elements from channel to channel; all channels_last?"""
    dtype = reduce(torch.promote_types, (m.dtype for m in maps))
    maps = [m.to(dtype) for m in maps]
    last = [m.is_contiguous(memory_format=torch.channels_last) for m in maps]
    maps = [m if flat else m.contiguous() for m, flat in zip(maps, last, strict=True)]
    strides = [1 if flat else m.shape[2] * m.shape[3] for m, flat in zip(maps, last, strict=True)]
    return maps, strides, all(last)


def _padded(*values: list) -> list:
    """Arguments of every level, one kind after the other; absent levels repeat the first."""
    return [x for of_levels in values for x in [*of_levels, *of_levels[:1] * (MAX_LEVELS - len(of_levels))]]


def candidates(
    logits: list[Tensor],
    deltas: list[Tensor],
    cell_anchors: list[Tensor],
    image_sizes: Tensor,
    strides: list[float],
    pre_nms_top_n: int,
    min_size: float,
    weights: list[float],
    max_log: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of every set: logits [S, k] in their dtype, falling; boxes float32 [S, k, 4]; valid bool [S, k].

    Arguments as of `fastrcnn.ops.select_proposals`, at least one image and one anchor, at most MAX_LEVELS levels;
    strides flat. k: pre_nms_top_n, or fewer if no level has so many anchors.

    One top-k of all sets, padded to the largest level. In two stages, chunks of a level and then their survivors, it
    would read less: 800 × 1333 pixels and 8 images are 2.1 M logits, 8 M padded. But its radix passes over 16 MB of
    bfloat16 keys run in L2, some 15 µs in all, and each further top-k is about 15 more launches of 2 µs.
    """
    maps, channel_strides, channels_last = _uniform(logits)
    images, levels = maps[0].shape[0], len(maps)
    sets = images * levels
    counts = [m[0].numel() for m in maps]
    cells = [max(m.shape[1], 1) for m in maps]
    length = triton.cdiv(max(counts), 16) * 16  # rows begin at multiples of 16 bytes
    keys = torch.empty(sets, length, dtype=maps[0].dtype, device=maps[0].device)
    chosen = keys_launch(max(counts), keys.element_size())
    proposal_keys_kernel[(sets * triton.cdiv(length, chosen.block),)](
        keys,
        *_padded(maps, counts, cells, channel_strides),
        levels,
        length,
        CHANNELS_LAST=channels_last,
        BLOCK=chosen.block,
        **chosen.options,
    )
    best, index = keys.topk(min(pre_nms_top_n, max(counts)), dim=1)

    maps, channel_strides, channels_last = _uniform(deltas)
    k = best.shape[1]
    boxes = torch.empty(sets, k, 4, dtype=torch.float32, device=best.device)
    valid = torch.empty(sets, k, dtype=torch.bool, device=best.device)
    chosen = decode_launch(k)
    proposal_decode_kernel[(sets, triton.cdiv(k, chosen.block))](
        index,
        best,
        image_sizes.contiguous(),
        boxes,
        valid.view(torch.uint8),
        *_padded(
            maps,
            [c.float().contiguous() for c in cell_anchors],
            [max(m.shape[3], 1) for m in maps],
            [m.shape[2] * m.shape[3] for m in maps],
            cells,
            channel_strides,
            strides[::2],
            strides[1::2],
        ),
        levels,
        k,
        *weights,
        max_log,
        min_size,
        CHANNELS_LAST=channels_last,
        BLOCK=chosen.block,
        **chosen.options,
    )
    return best, boxes, valid


def merge(
    logits: Tensor, boxes: Tensor, kept: Tensor, counts: Tensor, levels: int, total: int, per_batch: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `total` of each image: boxes [B, total, 4], scores [B, total], valid bool [B, total].

    logits [S, k] and boxes [S, k, 4] of `candidates`, kept int64 [S, M] and counts int32 [S] of the NMS. per_batch:
    so many of the whole batch are valid.
    """
    sets, k = logits.shape
    images, per_level = sets // levels, kept.shape[1]
    out_boxes = torch.empty(images, total, 4, dtype=torch.float32, device=boxes.device)
    scores = torch.empty(images, total, dtype=torch.float32, device=boxes.device)
    valid = torch.empty(images, total, dtype=torch.bool, device=boxes.device)
    chosen = merge_launch(levels * per_level, levels)
    proposal_merge_kernel[(images, triton.cdiv(levels * per_level, chosen.block))](
        logits,
        boxes,
        kept,
        counts,
        out_boxes,
        scores,
        valid.view(torch.uint8),
        images,
        levels,
        k,
        per_level,
        total,
        total if per_batch is None else per_batch,
        per_level.bit_length(),
        PER_BATCH=per_batch is not None,
        LEVELS=triton.next_power_of_2(levels),
        BLOCK=chosen.block,
        **chosen.options,
    )
    return out_boxes, scores, valid
