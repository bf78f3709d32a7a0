"""ROIAlign of all levels and images in one launch, forward and backward.

A box's level follows from its area inside the kernels, so nothing is sorted or read back. channels_last is the fast
memory format: each sample reads, and each touched pixel writes, runs of neighbouring channels. Coordinates and sums
are float32. Two gradients: `roi_align_scatter` adds atomically, `roi_align_gather` is repeatable bit by bit.

Method: He et al., Mask R-CNN (2017), section 3; the level of a box: Lin et al., Feature Pyramid Networks (2017),
equation 1. The bytes and operations below are for 8 images of 800×1333, P2–P5 with 256 channels in bfloat16, 512 boxes
each, 7×7 bins of 2×2 samples, with boxes whose sides are log-uniform from 16 to 600 pixels. Not measured on a GPU.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose

MAX_LEVELS = 5
MAX_UNROLLED_RATIO = 4
WORD = tl.constexpr(32)  # boxes per word of the gather's bitmap
FIELDS = tl.constexpr(8)  # floats per box in the gather's table, 6 of them used: one aligned sector of 32 bytes
# sizes that change from batch to batch: a new compilation for each would cost more than their specialisation gains
_SIZES = [f"{size}{level}" for size in "hw" for level in range(MAX_LEVELS)]
_COUNTS = [*_SIZES, "images", "boxes_per_image"]


@triton.jit
def _pick(level, values):
    """values[level]; a choice between arguments keeps what is known about a pointer's alignment."""
    coarse = tl.where(level == 2, values[2], tl.where(level == 3, values[3], values[4]))
    return tl.where(level == 0, values[0], tl.where(level == 1, values[1], coarse))


@triton.jit
def _locate(
    n, boxes_ptr, valid_ptr, images, boxes_per_image, areas, inset, PADDED: tl.constexpr, HAS_VALID: tl.constexpr
):
    """Box n: image, level, corners in image pixels, and whether it is to be pooled."""
    if PADDED:  # [B, R, 4]
        p = boxes_ptr + n * 4
        image = n // boxes_per_image
        usable = n >= 0
    else:  # [K, 5]
        p = boxes_ptr + n * 5 + 1
        named = tl.load(p - 1)
        usable = (named >= 0) & (named < images)
        image = tl.where(usable, named, 0.0).to(tl.int64)
    x1 = tl.load(p)
    y1 = tl.load(p + 1)
    x2 = tl.load(p + 2)
    y2 = tl.load(p + 3)
    usable &= tl.abs(x1) + tl.abs(y1) + tl.abs(x2) + tl.abs(y2) < float("inf")
    if HAS_VALID:
        usable &= tl.load(valid_ptr + n) != 0
    area = (x2 - x1) * (y2 - y1)
    level = (area >= areas[0]).to(tl.int32) + (area >= areas[1]).to(tl.int32)
    level += (area >= areas[2]).to(tl.int32) + (area >= areas[3]).to(tl.int32)
    return image, level, x1, y1, x2 - inset, y2 - inset, usable


@triton.jit
def _axis(low, high, scale, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """An axis of a box in its map: first coordinate, length of a bin, samples per bin, pixels of the map."""
    offset = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    length = high * scale - offset - start
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    step = tl.div_rn(length, BINS * 1.0)
    if RATIO > 0:
        samples = RATIO + extent * 0
    else:
        samples = tl.minimum(tl.maximum(tl.ceil(step), 0.0), extent.to(tl.float32)).to(tl.int32)
    return start, step, samples, extent


@triton.jit
def _coordinate(axis, bin, sample):
    """Of a sample in pixels of the map: as it is, clamped to the map, and whether it counts."""
    start, step, samples, extent = axis
    coordinate = start + bin * step + tl.div_rn((sample + 0.5) * step, samples.to(tl.float32))
    clamped = tl.minimum(tl.maximum(coordinate, 0.0), (extent - 1).to(tl.float32))
    return coordinate, clamped, (coordinate >= -1.0) & (coordinate <= extent)


@triton.jit
def _corners(axis, bin, sample):
    """Low and high pixel of a sample and their weights, 0 if it lies outside the map."""
    _, coordinate, inside = _coordinate(axis, bin, sample)
    low = coordinate.to(tl.int32)
    high = tl.minimum(low + 1, axis[3] - 1)
    share = coordinate - low
    return low, high, tl.where(inside, 1.0 - share, 0.0), tl.where(inside, share, 0.0)


@triton.jit
def _weight(axis, bin, pixel, RATIO: tl.constexpr, UNROLL: tl.constexpr):
    """Bilinear weight of float pixels in a bin along one axis, summed over its samples: not yet their mean."""
    total = pixel * 0.0
    if UNROLL:
        for sample in tl.static_range(RATIO):
            _, coordinate, inside = _coordinate(axis, bin, sample)
            total += tl.maximum(1.0 - tl.abs(pixel - tl.where(inside, coordinate, -2.0)), 0.0)
    else:
        for sample in range(axis[2]):
            _, coordinate, inside = _coordinate(axis, bin, sample)
            total += tl.maximum(1.0 - tl.abs(pixel - tl.where(inside, coordinate, -2.0)), 0.0)
    return total


@triton.jit
def _touched(axis, BINS: tl.constexpr):
    """First and last pixel that any sample may touch; none if the last is smaller."""
    extent = axis[3]
    # rounding keeps the order of coordinates, so all samples lie between these two
    one, one_clamped, _ = _coordinate(axis, 0, 0)
    other, other_clamped, _ = _coordinate(axis, BINS - 1, axis[2] - 1)
    first = tl.minimum(one_clamped, other_clamped).to(tl.int32)
    last = tl.minimum(tl.maximum(one_clamped, other_clamped).to(tl.int32) + 1, extent - 1)
    return first, tl.where((tl.maximum(one, other) >= -1.0) & (tl.minimum(one, other) <= extent), last, -1)


@triton.jit
def _bins(axis, first_pixel, last_pixel, BINS: tl.constexpr):
    """First and last bin that may touch the pixels; none if the last is smaller."""
    start, step, samples, extent = axis
    # samples keep half a spacing from the ends of their bin; where that is near the rounding of coordinates, take all
    close = tl.abs(step) < samples.to(tl.float32) * (extent * (1.0 / (1 << 18)))
    inverse = 1.0 / tl.where(close, 1.0, step)
    one = (first_pixel - 1 - start) * inverse
    other = (last_pixel + 1 - start) * inverse
    first = tl.minimum(tl.maximum(tl.floor(tl.minimum(one, other)), 0.0), BINS * 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.floor(tl.maximum(one, other)), -1.0), BINS - 1.0).to(tl.int32)
    return tl.where(close, 0, first), tl.where(close, BINS - 1, last)


@triton.jit
def _regions(
    n,
    boxes_ptr,
    valid_ptr,
    h,
    w,
    s,
    areas,
    inset,
    images,
    boxes_per_image,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Box n: image, level, its two axes in that level's pixels, and whether it has a sample."""
    image, level, x1, y1, x2, y2, usable = _locate(
        n, boxes_ptr, valid_ptr, images, boxes_per_image, areas, inset, PADDED, HAS_VALID
    )
    height = _pick(level, h)
    width = _pick(level, w)
    scale = _pick(level, s)
    y_axis = _axis(y1, y2, scale, height, PH, RATIO, ALIGNED)
    x_axis = _axis(x1, x2, scale, width, PW, RATIO, ALIGNED)
    usable &= (height > 0) & (width > 0) & (y_axis[2] > 0) & (x_axis[2] > 0)
    return image, level, y_axis, x_axis, usable


@triton.jit
def _channels(block, C: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a block and which of them exist: known when compiling if all do, which saves a predicate per load."""
    channel = block * BLOCK + tl.arange(0, BLOCK)
    if C % BLOCK == 0:
        mask = tl.full([BLOCK], True, tl.int1)
    else:
        mask = channel < C
    return channel, mask


@triton.jit
def _if_positive(mask, number):
    """mask, or nothing if the number is not positive. (The interpreter cannot spread a comparison over a block.)"""
    return mask & (tl.zeros(mask.shape, tl.float32) + number > 0)


@triton.jit
def _add_sample(value, p, mask, line_stride, pixel_stride, y_axis, x_axis, ph, pw, iy, ix):
    """value [BLOCK] plus sample (iy, ix) of bin (ph, pw) in the map whose first pixel is p [BLOCK]."""
    y_low, y_high, y_rest, y_share = _corners(y_axis, ph, iy)
    x_low, x_high, x_rest, x_share = _corners(x_axis, pw, ix)
    upper = p + y_low * line_stride
    lower = p + y_high * line_stride
    left = x_low * pixel_stride
    right = x_high * pixel_stride
    value = tl.fma(tl.load(upper + left, mask=mask, other=0.0).to(tl.float32), y_rest * x_rest, value)
    value = tl.fma(tl.load(upper + right, mask=mask, other=0.0).to(tl.float32), y_rest * x_share, value)
    value = tl.fma(tl.load(lower + left, mask=mask, other=0.0).to(tl.float32), y_share * x_rest, value)
    return tl.fma(tl.load(lower + right, mask=mask, other=0.0).to(tl.float32), y_share * x_share, value)


@triton.jit(do_not_specialize=_COUNTS)
def roi_align_forward_kernel(
    out_ptr,
    boxes_ptr,
    valid_ptr,
    f0,
    f1,
    f2,
    f3,
    f4,
    h0,
    h1,
    h2,
    h3,
    h4,
    w0,
    w1,
    w2,
    w3,
    w4,
    s0,
    s1,
    s2,
    s3,
    s4,
    t1,
    t2,
    t3,
    t4,
    inset,
    images,
    boxes_per_image,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [N, C, PH, PW] from the maps f0 … f4 [B, C, h, w].

    s0 … s4: scales; t1 … t4: the areas from which on a box belongs to the next level; inset: taken off x2 and y2
    thereafter. Grid: (N · PH, blocks of C), a
    row of bins each.

    Bytes: 1.64 GB of taps asked of L1, 0.80 GB of them distinct within a program, which is what L2 gives if L1 keeps
    the 8 KB of a bin; from memory the touched part of 363 MB of maps, and 103 MB written. Operations: 420 instructions
    of a warp for a bin and 256 channels, of which 16 load 16 bytes per thread, 128 multiply and add and 128 widen.
    Merging the taps of a bin would save a third of the loads and cost as many instructions for its weights.
    """
    program = tl.program_id(0).to(tl.int64)
    n = program // PH
    ph = (program % PH).to(tl.int32)
    channel, mask = _channels(tl.program_id(1), C, BLOCK)
    if CHANNELS_LAST:
        row_ptr = out_ptr + program * (PW * C) + channel
        bin_stride = C
    else:
        row_ptr = out_ptr + (n * C + channel) * (PH * PW) + ph * PW
        bin_stride = 1
    image, level, y_axis, x_axis, usable = _regions(
        n,
        boxes_ptr,
        valid_ptr,
        (h0, h1, h2, h3, h4),
        (w0, w1, w2, w3, w4),
        (s0, s1, s2, s3, s4),
        (t1, t2, t3, t4),
        inset,
        images,
        boxes_per_image,
        PH,
        PW,
        RATIO,
        ALIGNED,
        PADDED,
        HAS_VALID,
    )
    if not usable:
        for pw in range(PW):
            zero = tl.zeros([BLOCK], tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(row_ptr + pw * bin_stride, zero, mask=mask)
        return

    width = x_axis[3].to(tl.int64)
    size = y_axis[3] * width
    p = _pick(level, (f0, f1, f2, f3, f4))
    if CHANNELS_LAST:
        p += image * size * C + channel
        pixel_stride = C
        line_stride = width * C
    else:
        p += (image * C + channel) * size
        pixel_stride = 1
        line_stride = width
    count = (y_axis[2] * x_axis[2]).to(tl.float32)
    for pw in range(PW):
        value = tl.zeros([BLOCK], tl.float32)
        if UNROLL:
            for iy in tl.static_range(RATIO):
                for ix in tl.static_range(RATIO):
                    value = _add_sample(value, p, mask, line_stride, pixel_stride, y_axis, x_axis, ph, pw, iy, ix)
        else:
            for iy in range(y_axis[2]):
                for ix in range(x_axis[2]):
                    value = _add_sample(value, p, mask, line_stride, pixel_stride, y_axis, x_axis, ph, pw, iy, ix)
        tl.store(row_ptr + pw * bin_stride, (value / count).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def roi_align_scatter_kernel(
    grad_ptr,
    boxes_ptr,
    valid_ptr,
    f0,
    f1,
    f2,
    f3,
    f4,
    h0,
    h1,
    h2,
    h3,
    h4,
    w0,
    w1,
    w2,
    w3,
    w4,
    s0,
    s1,
    s2,
    s3,
    s4,
    t1,
    t2,
    t3,
    t4,
    inset,
    images,
    boxes_per_image,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to the float32 gradients f0 … f4 [B, C, h, w] what grad [N, PH, PW, C] of the output gives them.

    Grid: (N · PH, blocks of C). The PH programs of a box take its pixel rows in turn. All bins that touch a pixel are
    summed in registers (at most two rows of bins at a time: more meet only where bins are narrower than a pixel), then
    added by one atomic per pixel and vector of 4 channels.

    Bytes: 727 MB of zeros beforehand, 1.3 GB of atomics, 727 MB read and 363 MB written by the cast afterwards.
    Operations: 1.27 M atomic rows of 1 KB, where a program per row of bins would need 1.55 M and one per tap 3.21 M;
    each takes about 140 instructions of 2 warps.
    """
    program = tl.program_id(0).to(tl.int64)
    n = program // PH
    channel, mask = _channels(tl.program_id(1), C, BLOCK)
    image, level, y_axis, x_axis, usable = _regions(
        n,
        boxes_ptr,
        valid_ptr,
        (h0, h1, h2, h3, h4),
        (w0, w1, w2, w3, w4),
        (s0, s1, s2, s3, s4),
        (t1, t2, t3, t4),
        inset,
        images,
        boxes_per_image,
        PH,
        PW,
        RATIO,
        ALIGNED,
        PADDED,
        HAS_VALID,
    )
    if not usable:
        return

    width = x_axis[3].to(tl.int64)
    size = y_axis[3] * width
    p = _pick(level, (f0, f1, f2, f3, f4))
    if CHANNELS_LAST:
        p += image * size * C + channel
        pixel_stride = C
        line_stride = width * C
    else:
        p += (image * C + channel) * size
        pixel_stride = 1
        line_stride = width
    count = (y_axis[2] * x_axis[2]).to(tl.float32)
    box_ptr = grad_ptr + n * (PH * PW * C) + channel
    y_first, y_last = _touched(y_axis, PH)
    x_first, x_last = _touched(x_axis, PW)
    for y in range(y_first + (program % PH).to(tl.int32), y_last + 1, PH):
        ph_first, ph_last = _bins(y_axis, y, y, PH)
        for ph in range(ph_first, ph_last + 1, 2):
            upper = _weight(y_axis, ph, y * 1.0, RATIO, UNROLL) / count
            lower = _weight(y_axis, ph + 1, y * 1.0, RATIO, UNROLL) / count
            lower = tl.where(ph < ph_last, lower, 0.0)
            if upper + lower > 0:
                for x in range(x_first, x_last + 1):
                    pw_first, pw_last = _bins(x_axis, x, x, PW)
                    value = tl.zeros([BLOCK], tl.float32)
                    share = upper * 0.0
                    for pw in range(pw_first, pw_last + 1):
                        weight = _weight(x_axis, pw, x * 1.0, RATIO, UNROLL)
                        share += weight
                        q = box_ptr + (ph * PW + pw) * C
                        # masked by the weights, so that an infinite gradient stays in its own pixels
                        part = tl.load(q, mask=_if_positive(mask, upper * weight), other=0.0).to(tl.float32)
                        value = tl.fma(part, upper * weight, value)
                        part = tl.load(q + PW * C, mask=_if_positive(mask, lower * weight), other=0.0).to(tl.float32)
                        value = tl.fma(part, lower * weight, value)
                    pixel = p + y * line_stride + x * pixel_stride
                    tl.atomic_add(pixel, value, mask=_if_positive(mask, share), sem="relaxed")


@triton.jit
def _tile(tile, h, w, TILE: tl.constexpr):
    """Level, upper row and left column of tiles: those of each level by rows, the coarsest level first."""
    columns = (
        tl.cdiv(w[0], TILE),
        tl.cdiv(w[1], TILE),
        tl.cdiv(w[2], TILE),
        tl.cdiv(w[3], TILE),
        tl.cdiv(w[4], TILE),
    )
    first3 = tl.cdiv(h[4], TILE) * columns[4]
    first2 = first3 + tl.cdiv(h[3], TILE) * columns[3]
    first1 = first2 + tl.cdiv(h[2], TILE) * columns[2]
    first0 = first1 + tl.cdiv(h[1], TILE) * columns[1]
    level = 4 - (tile >= first3).to(tl.int32) - (tile >= first2).to(tl.int32)
    level -= (tile >= first1).to(tl.int32) + (tile >= first0).to(tl.int32)
    within = tile - _pick(level, (first0, first1, first2, first3, 0))
    across = tl.maximum(_pick(level, columns), 1)
    return level, within // across * TILE, within % across * TILE


@triton.jit(do_not_specialize=[*_COUNTS, "count", "tiles", "words"])
def roi_align_tiles_kernel(
    bitmap_ptr,
    table_ptr,
    boxes_ptr,
    valid_ptr,
    h0,
    h1,
    h2,
    h3,
    h4,
    w0,
    w1,
    w2,
    w3,
    w4,
    s0,
    s1,
    s2,
    s3,
    s4,
    t1,
    t2,
    t3,
    t4,
    inset,
    images,
    boxes_per_image,
    count,
    tiles,
    words,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bitmap int32 [B, tiles, words]: bit i of word j says whether box 32 j + i touches the tile.

    Boxes count within the image if they are [B, R, 4], and among all `count` if they are [K, 5]. table [N, FIELDS], of
    usable boxes: start and step of the y and of the x axis, samples of both. Grid: (B · words, blocks of tiles).

    Bytes: 2.9 MB written. Operations: about 10 for each of the 23 M pairs of a box and a tile of its image.
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // words
    word = program % words
    bit = tl.arange(0, WORD)
    index = word * WORD + bit
    if PADDED:
        there = index < boxes_per_image
        n = image * boxes_per_image + tl.where(there, index, 0)
    else:
        there = index < count
        n = tl.where(there, index, 0)
    h = (h0, h1, h2, h3, h4)
    w = (w0, w1, w2, w3, w4)
    own, level, y_axis, x_axis, usable = _regions(
        n,
        boxes_ptr,
        valid_ptr,
        h,
        w,
        (s0, s1, s2, s3, s4),
        (t1, t2, t3, t4),
        inset,
        images,
        boxes_per_image,
        PH,
        PW,
        RATIO,
        ALIGNED,
        PADDED,
        HAS_VALID,
    )
    usable &= there & (own == image)
    if tl.program_id(1) == 0:
        row = table_ptr + n * FIELDS
        tl.store(row, y_axis[0], mask=usable)
        tl.store(row + 1, y_axis[1], mask=usable)
        tl.store(row + 2, x_axis[0], mask=usable)
        tl.store(row + 3, x_axis[1], mask=usable)
        tl.store(row + 4, y_axis[2].to(tl.float32), mask=usable)
        tl.store(row + 5, x_axis[2].to(tl.float32), mask=usable)
    y_first, y_last = _touched(y_axis, PH)
    x_first, x_last = _touched(x_axis, PW)

    tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile_level, y, x = _tile(tile, h, w, TILE)
    hit = (tile_level[:, None] == level[None, :]) & usable[None, :]
    hit &= (y[:, None] <= y_last[None, :]) & (y[:, None] + TILE > y_first[None, :])
    hit &= (x[:, None] <= x_last[None, :]) & (x[:, None] + TILE > x_first[None, :])
    bits = tl.sum(hit.to(tl.int32) << bit[None, :], axis=1)
    tl.store(bitmap_ptr + (image * tiles + tile) * words + word, bits, mask=tile < tiles)


@triton.jit(do_not_specialize=[*_COUNTS, "tiles", "words"])
def roi_align_gather_kernel(
    grad_ptr,
    bitmap_ptr,
    table_ptr,
    f0,
    f1,
    f2,
    f3,
    f4,
    h0,
    h1,
    h2,
    h3,
    h4,
    w0,
    w1,
    w2,
    w3,
    w4,
    images,
    boxes_per_image,
    tiles,
    words,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RATIO: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients f0 … f4 [B, C, h, w], each pixel once, from grad [N, PH, PW, C] of the output.

    bitmap and table: of `roi_align_tiles_kernel`. Grid: (tiles · B · blocks of C), a tile of TILE × TILE pixels of one
    image each. The boxes of a tile add up in their own order, whatever the order of the programs: bitwise repeatable.
    The crowded tiles of the coarse levels start first. An infinite gradient may make the rest of its tiles NaN.

    Bytes: 363 MB written, 103 MB read; with repeats 0.24 GB of gradients (476 k bins in 109 k pairs of a box and a tile
    that meet; no tile meets more than 48 boxes, even where a quarter of the boxes crowds around 8 objects). Operations:
    1.8 G multiply-adds, in all about 230 M instructions of a warp.
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks % images
    tile = (program // blocks // images).to(tl.int32)
    channel, mask = _channels((program % blocks).to(tl.int32), C, BLOCK)
    h = (h0, h1, h2, h3, h4)
    w = (w0, w1, w2, w3, w4)
    level, y_first, x_first = _tile(tile, h, w, TILE)
    height = _pick(level, h)
    width = _pick(level, w)
    y = y_first + tl.arange(0, TILE)
    x = x_first + tl.arange(0, TILE)
    y_float = y.to(tl.float32)
    x_float = x.to(tl.float32)
    total = tl.zeros([TILE, TILE, BLOCK], tl.float32)
    word_ptr = bitmap_ptr + (image * tiles + tile) * words
    for j in range(words):
        word = tl.load(word_ptr + j)
        while word != 0:
            bit = word & -word
            word ^= bit
            # the exponent of a power of two; that of the sign bit is negative as a number
            index = j * WORD + ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
            n = index.to(tl.int64)
            if PADDED:
                n += image * boxes_per_image
            fields = table_ptr + n * FIELDS
            if RATIO > 0:
                y_samples = RATIO + height * 0
                x_samples = y_samples
            else:
                y_samples = tl.load(fields + 4).to(tl.int32)
                x_samples = tl.load(fields + 5).to(tl.int32)
            y_axis = tl.load(fields), tl.load(fields + 1), y_samples, height
            x_axis = tl.load(fields + 2), tl.load(fields + 3), x_samples, width
            count = (y_axis[2] * x_axis[2]).to(tl.float32)
            ph_first, ph_last = _bins(y_axis, y_first, y_first + TILE - 1, PH)
            pw_first, pw_last = _bins(x_axis, x_first, x_first + TILE - 1, PW)
            box_ptr = grad_ptr + n * (PH * PW * C) + channel
            # two columns of bins at a time: the mean number that meets a tile
            for pw in range(pw_first, pw_last + 1, 2):
                left = _weight(x_axis, pw, x_float, RATIO, UNROLL) / count
                right = _weight(x_axis, pw + 1, x_float, RATIO, UNROLL) / count
                for ph in range(ph_first, ph_last + 1):
                    q = box_ptr + (ph * PW + pw) * C
                    part = tl.load(q, mask=mask, other=0.0).to(tl.float32)
                    row = left[:, None] * part[None, :]
                    part = tl.load(q + C, mask=_if_positive(mask, pw_last - pw), other=0.0).to(tl.float32)
                    row = tl.fma(right[:, None], part[None, :], row)
                    weight = _weight(y_axis, ph, y_float, RATIO, UNROLL)
                    total = tl.fma(weight[:, None, None], row[None, :, :], total)
    size = height.to(tl.int64) * width
    p = _pick(level, (f0, f1, f2, f3, f4)) + image * size * C
    pixel = y.to(tl.int64)[:, None] * width + x[None, :]
    if CHANNELS_LAST:
        p += pixel[:, :, None] * C + channel[None, None, :]
    else:
        p += pixel[:, :, None] + (channel * size)[None, None, :]
    there = (y < height)[:, None] & (x < width)[None, :]
    tl.store(p, total.to(f0.dtype.element_ty), mask=there[:, :, None] & mask[None, None, :])


def forward_config(channels: int, itemsize: int) -> Launch:
    """At most 256 channels per program, and so few warps that each thread moves 16 bytes of a pixel at once."""
    block = min(triton.next_power_of_2(channels), 256)
    rule = Launch(block, max(block * itemsize // 512, 1))
    return choose("roi_align_forward", rule, channels=channels, itemsize=itemsize)


def scatter_config(channels: int) -> Launch:
    """At most 256 channels, and one atomic of 16 bytes per thread and pixel: 128 channels of float32 per warp."""
    block = min(triton.next_power_of_2(channels), 256)
    return choose("roi_align_scatter", Launch(block, max(block // 128, 1)), channels=channels)


def tiles_config(tiles: int) -> Launch:
    """block: tiles per program, each against 32 boxes: 16 pairs per thread."""
    return choose("roi_align_tiles", Launch(64, 4), tiles=tiles)


def gather_config(channels: int, itemsize: int) -> Launch:
    """tile: its side. A thread sums 4 × 4 pixels of 4 channels in 64 registers, and needs as many for all the rest."""
    block = min(triton.next_power_of_2(channels), 128)
    return choose("roi_align_gather", Launch(block, 1, tile=4), channels=channels, itemsize=itemsize)


def roi_align_forward(
    out: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    inset: float,
    sampling_ratio: int,
    aligned: bool,
    *,
    channels_last: bool,
) -> None:
    """Fill out [N, C, h, w], of the memory format that channels_last says.

    features: L × [B, C, Hl, Wl], copied if they have another format; L ≤ MAX_LEVELS. boxes: [B, R, 4] or [K, 5].
    valid: bool, one per box. thresholds: L − 1 rising areas. inset: taken off x2 and y2 once the level is known.
    """
    if out.numel() == 0:
        return
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    maps = [feature.contiguous(memory_format=format_) for feature in features]
    count, channels, height, _ = out.shape
    chosen = forward_config(channels, out.element_size())
    roi_align_forward_kernel[(count * height, triton.cdiv(channels, chosen.block))](
        out,
        *_of_boxes(boxes, valid),
        *_to_all_levels(maps, maps[0]),
        *_sizes(maps),
        *_of_levels(scales, thresholds),
        inset,
        *_counts(maps, boxes),
        C=channels,
        ALIGNED=aligned,
        HAS_VALID=valid is not None,
        CHANNELS_LAST=channels_last,
        BLOCK=chosen.block,
        **_constants(out, boxes, sampling_ratio),
        **chosen.options,
    )


def roi_align_scatter(
    grads: Sequence[Tensor],
    grad: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    inset: float,
    sampling_ratio: int,
    aligned: bool,
    *,
    channels_last: bool,
) -> None:
    """Add to grads, float32 L × [B, C, Hl, Wl] of that memory format, what grad [N, C, h, w] of the output gives them.

    grad is copied if it is not channels_last. Atomic additions: the last bits differ from run to run.
    """
    if grad.numel() == 0:
        return
    grad = grad.contiguous(memory_format=torch.channels_last)
    count, channels, height, _ = grad.shape
    chosen = scatter_config(channels)
    roi_align_scatter_kernel[(count * height, triton.cdiv(channels, chosen.block))](
        grad,
        *_of_boxes(boxes, valid),
        *_to_all_levels(grads, grads[0]),
        *_sizes(grads),
        *_of_levels(scales, thresholds),
        inset,
        *_counts(grads, boxes),
        C=channels,
        ALIGNED=aligned,
        HAS_VALID=valid is not None,
        CHANNELS_LAST=channels_last,
        BLOCK=chosen.block,
        **_constants(grad, boxes, sampling_ratio),
        **chosen.options,
    )


def roi_align_gather(
    grads: Sequence[Tensor],
    grad: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    inset: float,
    sampling_ratio: int,
    aligned: bool,
    *,
    channels_last: bool,
) -> None:
    """Fill grads, L × [B, C, Hl, Wl] of that memory format and any dtype, with what grad [N, C, h, w] gives them.

    grad is copied if it is not channels_last. Equal inputs give equal bits. Scratch memory: a bit for each pair of a
    box and a tile of its image ([K, 5] boxes: of any image), and 32 bytes per box.
    """
    if all(level.numel() == 0 for level in grads):
        return
    grad = grad.contiguous(memory_format=torch.channels_last)
    count, channels, _, _ = grad.shape
    images = grads[0].shape[0]
    chosen = gather_config(channels, grad.element_size())
    tiles = sum(triton.cdiv(g.shape[2], chosen.tile) * triton.cdiv(g.shape[3], chosen.tile) for g in grads)
    per_image = boxes.shape[1] if boxes.ndim == 3 else count
    words = triton.cdiv(per_image, WORD.value) if grad.numel() else 0
    bitmap = torch.empty((images, tiles, words), dtype=torch.int32, device=grad.device)
    table = torch.empty((count, FIELDS.value), device=grad.device)
    constants = _constants(grad, boxes, sampling_ratio)
    if words:
        marking = tiles_config(tiles)
        roi_align_tiles_kernel[(images * words, triton.cdiv(tiles, marking.block))](
            bitmap,
            table,
            *_of_boxes(boxes, valid),
            *_sizes(grads),
            *_of_levels(scales, thresholds),
            inset,
            *_counts(grads, boxes),
            count,
            tiles,
            words,
            ALIGNED=aligned,
            HAS_VALID=valid is not None,
            TILE=chosen.tile,
            BLOCK=marking.block,
            **{name: value for name, value in constants.items() if name != "UNROLL"},
            **marking.options,
        )
    roi_align_gather_kernel[(tiles * images * triton.cdiv(channels, chosen.block),)](
        grad,
        bitmap,
        table,
        *_to_all_levels(grads, grads[0]),
        *_sizes(grads),
        *_counts(grads, boxes),
        tiles,
        words,
        C=channels,
        CHANNELS_LAST=channels_last,
        TILE=chosen.tile,
        BLOCK=chosen.block,
        **constants,
        **chosen.options,
    )


def _of_boxes(boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    boxes = boxes.float().contiguous()
    return boxes, boxes if valid is None else valid.contiguous().view(torch.uint8)


def _to_all_levels(values: Sequence[Any], absent: Any) -> list[Any]:
    """As many as the kernels take."""
    return [*values, *[absent] * (MAX_LEVELS - len(values))]


def _sizes(maps: Sequence[Tensor]) -> list[int]:
    return [size for axis in (2, 3) for size in _to_all_levels([level.shape[axis] for level in maps], 0)]


def _of_levels(scales: Sequence[float], thresholds: Sequence[float]) -> list[float]:
    # no area, not even an infinite one, reaches a threshold that is NaN
    return [*_to_all_levels(scales, 1.0), *_to_all_levels(thresholds, math.nan)[:-1]]


def _counts(maps: Sequence[Tensor], boxes: Tensor) -> tuple[int, int]:
    return maps[0].shape[0], boxes.shape[1]


def _constants(pooled: Tensor, boxes: Tensor, sampling_ratio: int) -> dict[str, Any]:
    ratio = max(sampling_ratio, 0)
    return {
        "PH": pooled.shape[2],
        "PW": pooled.shape[3],
        "RATIO": ratio,
        "PADDED": boxes.ndim == 3,
        "UNROLL": 0 < ratio <= MAX_UNROLLED_RATIO,
    }
