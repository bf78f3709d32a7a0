"""ROIAlign of all levels and images in one launch, forward and backward.

One program pools one row of bins of one box, a block of channels at a time. It finds the box's level by comparing its
area with thresholds, so nothing is sorted or read back. With channels_last features each sample reads four runs of
neighbouring channels: the fast path. Coordinates and sums are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LEVELS = 5
MAX_UNROLLED_RATIO = 4
# sizes that change from batch to batch: a new compilation for each would cost more than their specialisation gains
_SIZES = ["images", "boxes_per_image", *(f"{size}{level}" for size in "hw" for level in range(MAX_LEVELS))]


@triton.jit
def _pick(level, v0, v1, v2, v3, v4):
    """The value of the box's level; a choice between arguments keeps what is known about a pointer's alignment."""
    return tl.where(level == 0, v0, tl.where(level == 1, v1, tl.where(level == 2, v2, tl.where(level == 3, v3, v4))))


@triton.jit
def _locate(
    n, boxes_ptr, valid_ptr, images, boxes_per_image, t1, t2, t3, t4, PADDED: tl.constexpr, HAS_VALID: tl.constexpr
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
    level = (
        (area >= t1).to(tl.int32) + (area >= t2).to(tl.int32) + (area >= t3).to(tl.int32) + (area >= t4).to(tl.int32)
    )
    return image, level, x1, y1, x2, y2, usable


@triton.jit
def _axis(low, high, scale, extent, BINS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """First coordinate, length of a bin, samples per bin."""
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
    return start, step, samples


@triton.jit
def _corners(start, step, bin, sample, samples, extent):
    """Low and high pixel of a sample and their weights, 0 if it lies outside the map."""
    coordinate = start + bin * step + tl.div_rn((sample + 0.5) * step, samples.to(tl.float32))
    inside = (coordinate >= -1.0) & (coordinate <= extent)
    coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (extent - 1).to(tl.float32))
    low = coordinate.to(tl.int32)
    high = tl.minimum(low + 1, extent - 1)
    share = coordinate - low
    return low, high, tl.where(inside, 1.0 - share, 0.0), tl.where(inside, share, 0.0)


@triton.jit
def _sample(p, mask, line_stride, pixel_stride, y_axis, x_axis, h, w, ph, pw, iy, ix, value, BACKWARD: tl.constexpr):
    """Sample (iy, ix) of bin (ph, pw) in a map whose first pixel is p [BLOCK].

    Forward: value [BLOCK] plus the sample. Backward: value goes into the map's four pixels, and is returned as it is.
    """
    y_low, y_high, y_rest, y_share = _corners(y_axis[0], y_axis[1], ph, iy, y_axis[2], h)
    x_low, x_high, x_rest, x_share = _corners(x_axis[0], x_axis[1], pw, ix, x_axis[2], w)
    upper = p + y_low * line_stride
    lower = p + y_high * line_stride
    left = x_low * pixel_stride
    right = x_high * pixel_stride
    if BACKWARD:
        tl.atomic_add(upper + left, value * (y_rest * x_rest), mask=mask, sem="relaxed")
        tl.atomic_add(upper + right, value * (y_rest * x_share), mask=mask, sem="relaxed")
        tl.atomic_add(lower + left, value * (y_share * x_rest), mask=mask, sem="relaxed")
        tl.atomic_add(lower + right, value * (y_share * x_share), mask=mask, sem="relaxed")
    else:
        value = tl.fma(tl.load(upper + left, mask=mask, other=0.0).to(tl.float32), y_rest * x_rest, value)
        value = tl.fma(tl.load(upper + right, mask=mask, other=0.0).to(tl.float32), y_rest * x_share, value)
        value = tl.fma(tl.load(lower + left, mask=mask, other=0.0).to(tl.float32), y_share * x_rest, value)
        value = tl.fma(tl.load(lower + right, mask=mask, other=0.0).to(tl.float32), y_share * x_share, value)
    return value


@triton.jit(do_not_specialize=_SIZES)
def roi_align_kernel(
    pooled_ptr,
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
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pooled [N, C, PH, PW] from the maps f0 … f4 [B, C, h, w], or their float32 gradients from that of pooled.

    s0 … s4: scales; t1 … t4: the areas from which on a box belongs to the next level. Grid: (N · PH, blocks of C).
    """
    program = tl.program_id(0).to(tl.int64)
    n = program // PH
    ph = (program % PH).to(tl.int32)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    if CHANNELS_LAST:
        row_ptr = pooled_ptr + program * (PW * C) + channel
        bin_stride = C
    else:
        row_ptr = pooled_ptr + (n * C + channel) * (PH * PW) + ph * PW
        bin_stride = 1
    image, level, x1, y1, x2, y2, usable = _locate(
        n, boxes_ptr, valid_ptr, images, boxes_per_image, t1, t2, t3, t4, PADDED, HAS_VALID
    )
    h = _pick(level, h0, h1, h2, h3, h4)
    w = _pick(level, w0, w1, w2, w3, w4)
    scale = _pick(level, s0, s1, s2, s3, s4)
    y_axis = _axis(y1, y2, scale, h, PH, RATIO, ALIGNED)
    x_axis = _axis(x1, x2, scale, w, PW, RATIO, ALIGNED)
    count = y_axis[2] * x_axis[2]
    if (not usable) | (h <= 0) | (w <= 0) | (count <= 0):
        if not BACKWARD:
            for pw in range(PW):
                zero = tl.zeros([BLOCK], tl.float32).to(pooled_ptr.dtype.element_ty)
                tl.store(row_ptr + pw * bin_stride, zero, mask=mask)
        return

    size = h.to(tl.int64) * w
    p = _pick(level, f0, f1, f2, f3, f4)
    if CHANNELS_LAST:
        p += image * size * C + channel
        pixel_stride = C
        line_stride = w.to(tl.int64) * C
    else:
        p += (image * C + channel) * size
        pixel_stride = 1
        line_stride = w.to(tl.int64)
    for pw in range(PW):
        if BACKWARD:
            value = tl.load(row_ptr + pw * bin_stride, mask=mask, other=0.0).to(tl.float32) / count.to(tl.float32)
        else:
            value = tl.zeros([BLOCK], tl.float32)
        if UNROLL:
            for iy in tl.static_range(RATIO):
                for ix in tl.static_range(RATIO):
                    value = _sample(
                        p, mask, line_stride, pixel_stride, y_axis, x_axis, h, w, ph, pw, iy, ix, value, BACKWARD
                    )
        else:
            for iy in range(y_axis[2]):
                for ix in range(x_axis[2]):
                    value = _sample(
                        p, mask, line_stride, pixel_stride, y_axis, x_axis, h, w, ph, pw, iy, ix, value, BACKWARD
                    )
        if not BACKWARD:
            value = (value / count.to(tl.float32)).to(pooled_ptr.dtype.element_ty)
            tl.store(row_ptr + pw * bin_stride, value, mask=mask)


@dataclass(frozen=True)
class Config:
    """block: channels per program."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        # a contracted multiply-add would move samples at the border of a map or of an adaptive grid
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def config(channels: int, itemsize: int) -> Config:
    """At most 256 channels per program, and so few warps that each thread moves 16 bytes of a pixel at once."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, max(block * itemsize // 512, 1))


def roi_align_forward(
    out: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    *,
    channels_last: bool,
) -> None:
    """Fill out [N, C, h, w], of the memory format that channels_last says.

    features: L × [B, C, Hl, Wl], copied if they have another format; L ≤ MAX_LEVELS. boxes: [B, R, 4] or [K, 5].
    valid: bool, one per box. thresholds: L − 1 rising areas.
    """
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    maps = [feature.contiguous(memory_format=format_) for feature in features]
    _launch(out, maps, boxes, valid, scales, thresholds, sampling_ratio, aligned, channels_last, backward=False)


def roi_align_backward(
    grads: Sequence[Tensor],
    grad: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    *,
    channels_last: bool,
) -> None:
    """Add to grads, float32 L × [B, C, Hl, Wl] of that memory format, what grad [N, C, h, w] of the output gives them.

    Atomic additions: the last bits differ from run to run.
    """
    grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _launch(grad, grads, boxes, valid, scales, thresholds, sampling_ratio, aligned, channels_last, backward=True)


def _launch(
    pooled, maps, boxes, valid, scales, thresholds, sampling_ratio, aligned, channels_last, *, backward: bool
) -> None:
    count, channels, height, width = pooled.shape
    if pooled.numel() == 0:
        return
    ratio = max(sampling_ratio, 0)
    chosen = config(channels, maps[0].element_size())
    absent = MAX_LEVELS - len(maps)
    padded = boxes.ndim == 3
    boxes = boxes.float().contiguous()
    roi_align_kernel[(count * height, triton.cdiv(channels, chosen.block))](
        pooled,
        boxes,
        boxes if valid is None else valid.contiguous().view(torch.uint8),
        *maps,
        *(maps[:1] * absent),
        *(level.shape[2] for level in maps),
        *([0] * absent),
        *(level.shape[3] for level in maps),
        *([0] * absent),
        *scales,
        *([1.0] * absent),
        *thresholds,
        *([float("inf")] * absent),
        maps[0].shape[0],
        boxes.shape[1],
        C=channels,
        PH=height,
        PW=width,
        RATIO=ratio,
        ALIGNED=aligned,
        PADDED=padded,
        HAS_VALID=valid is not None,
        CHANNELS_LAST=channels_last,
        UNROLL=0 < ratio <= MAX_UNROLLED_RATIO,
        BACKWARD=backward,
        BLOCK=chosen.block,
        **chosen.options,
    )
