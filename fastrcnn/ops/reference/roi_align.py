"""ROIAlign of one and of many feature levels, in plain PyTorch.

The mean over a grid of bilinear samples is a weighted sum of pixels, so each bin is a list of taps: rows of a table
that holds one pixel with all its channels per row, and weights. `torch.nn.functional.embedding_bag` is that sum.

Method: He et al., Mask R-CNN (2017), section 3; the level of a box: Lin et al., Feature Pyramid Networks (2017),
equation 1. Rules for borders and rounding follow torchvision.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Axis(NamedTuple):
    """One axis of N boxes in pixels of their feature maps: all [N]."""

    start: Tensor  # coordinate of the box's lower side
    step: Tensor  # length of a bin
    extent: Tensor  # int64, pixels of the feature map
    samples: Tensor  # int64, samples per bin, at least 1

    def select(self, rows: Tensor) -> "Axis":
        return Axis(*(value[rows] for value in self))


class Regions(NamedTuple):
    """Where N boxes lie in the feature maps."""

    level: Tensor  # int64 [N]
    image: Tensor  # int64 [N]
    usable: Tensor  # bool [N]; the others give zeros
    y: Axis
    x: Axis

    def select(self, rows: Tensor) -> "Regions":
        return Regions(self.level[rows], self.image[rows], self.usable[rows], self.y.select(rows), self.x.select(rows))


def level_thresholds(scales: Sequence[float], canonical_size: float, canonical_level: int) -> list[float]:
    """The box areas from which on a box belongs to the second, third, … level; a level no coarser than the one before
    it gets no box, as in torchvision.

    Comparing areas with them is torchvision's floor(canonical_level + log2(√area / canonical_size) + 1e-6), clamped to
    the levels -log2(scale); unlike log2, a comparison gives the same answer on every device.
    """
    levels = [round(-math.log2(scale)) for scale in scales]
    return [
        (canonical_size * 2.0 ** (level - canonical_level - 1e-6)) ** 2 if level > finer else math.inf
        for finer, level in pairwise(levels)
    ]


def locate(
    shapes: Sequence[Sequence[int]],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    last_pixel: bool = False,
) -> Regions:
    """Assign each box to its level and express it in that level's pixels. shapes: (B, C, H, W) of each level.

    A box is usable if it is valid, finite, its image and its feature map exist, and it has a sample.
    """
    if boxes.ndim == 3:
        count, per_image = boxes.shape[:2]
        image = torch.arange(count, device=boxes.device)[:, None].expand(count, per_image).flatten()
        corners = boxes.flatten(0, 1)
    else:
        image, corners = boxes[:, 0].long(), boxes[:, 1:]
    x1, y1, x2, y2 = corners.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    level = torch.zeros_like(image)
    for threshold in level_thresholds(scales, canonical_size, canonical_level):
        level = level + (area >= threshold)
    if last_pixel:
        x2, y2 = x2 - 1, y2 - 1
    height = _of_level(level, [shape[2] for shape in shapes])
    width = _of_level(level, [shape[3] for shape in shapes])
    scale = _of_level(level, scales, boxes.dtype)
    usable = corners.abs().sum(1).isfinite() & (image >= 0) & (image < shapes[0][0]) & (height > 0) & (width > 0)
    if valid is not None:
        usable = usable & valid.flatten()
    y = _axis(y1, y2, scale, height, output_size[0], sampling_ratio, aligned)
    x = _axis(x1, x2, scale, width, output_size[1], sampling_ratio, aligned)
    usable = usable & (y.samples > 0) & (x.samples > 0)
    y, x = (axis._replace(samples=axis.samples.clamp(min=1)) for axis in (y, x))
    return Regions(level, image, usable, y, x)


def _of_level(level: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """values[level] without a tensor made of Python numbers, which would fix symbolic sizes."""
    chosen = torch.full_like(level, values[0], dtype=dtype)
    for index, value in enumerate(values[1:], 1):
        chosen = torch.where(level == index, value, chosen)
    return chosen


def _axis(low: Tensor, high: Tensor, scale: Tensor, extent: Tensor, bins: int, ratio: int, aligned: bool) -> Axis:
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    length = high * scale - offset - start
    if not aligned:
        length = length.clamp(min=1)
    step = length / bins
    if ratio > 0:
        samples = torch.full_like(extent, ratio)
    else:  # one sample per pixel; more than the map has would only help boxes that lie almost wholly outside it
        samples = torch.minimum(step.nan_to_num(0).ceil().clamp(0, 2**30).long(), extent)
    return Axis(start, step, extent, samples)


def _axis_taps(axis: Axis, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Pixels int64 and weights of all bins: [N, bins, 2 · samples] each. The weights of a bin add up to at most 1."""
    start, step = axis.start[:, None, None], axis.step[:, None, None]
    size = axis.extent[:, None, None].to(start.dtype)
    bin_index = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None]
    sample_index = torch.arange(samples, device=start.device, dtype=start.dtype)
    coordinate = start + bin_index * step + (sample_index + 0.5) * step / samples
    inside = (coordinate >= -1) & (coordinate <= size)
    coordinate = torch.minimum(coordinate.clamp(min=0), size - 1)
    low = coordinate.floor()
    high = torch.minimum(low + 1, size - 1)
    share = torch.where(inside, coordinate - low, 0) / samples
    rest = torch.where(inside, 1 - (coordinate - low), 0) / samples
    return torch.cat([low, high], 2).long(), torch.cat([rest, share], 2)


def taps(regions: Regions, output_size: Sequence[int], samples: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels and weights of every bin of N boxes: [N · h · w, 4 · samples_y · samples_x] each.

    Pixels count from the first one of the first image in the box's own level. samples: (y, x) samples per bin, equal
    for all these boxes. Where the weight is 0 the pixel means nothing.
    """
    y, weight_y = _axis_taps(regions.y, output_size[0], samples[0])
    x, weight_x = _axis_taps(regions.x, output_size[1], samples[1])
    first_row = regions.image * regions.y.extent
    line = (first_row[:, None, None] + y) * regions.x.extent[:, None, None]  # [N, h, ty]
    pixel = line[:, :, None, :, None] + x[:, None, :, None, :]  # [N, h, w, ty, tx]
    weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    return pixel.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def same_grid(regions: Regions, rows: Tensor, sampling_ratio: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Part `rows` into sets of boxes with equal (y, x) samples per bin. Reads the device if the ratio is adaptive."""
    if sampling_ratio > 0:
        yield (sampling_ratio, sampling_ratio), rows
        return
    grids = torch.stack([regions.y.samples[rows], regions.x.samples[rows]], 1)
    kinds, kind = grids.unique(dim=0, return_inverse=True)
    for index, (y, x) in enumerate(kinds.tolist()):
        yield (y, x), rows[kind == index]


def gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows: table [P, C], index and weight [M, T] -> [M, C]."""
    if table.shape[1] == 0:  # embedding_bag fails on it with more than one thread
        return table[:1].expand(index.shape[0], 0)
    return embedding_bag(index, table, mode="sum", per_sample_weights=weight)


def scatter(grad: Tensor, source: Tensor, index: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The transpose of `gather`: grad [M, C] -> [rows, C]. source (row of grad), index and weight: one entry per tap.

    Each row sums its taps in a fixed order: the result is repeatable.
    """
    if grad.shape[1] == 0:
        return grad.new_zeros((rows, 0))
    hit, order = index.sort(stable=True)
    first = torch.searchsorted(hit, torch.arange(rows, device=grad.device))
    return embedding_bag(source[order], grad, first, mode="sum", per_sample_weights=weight[order])


def flat_taps(regions: Regions, output_size: Sequence[int], sampling_ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source, pixel, weight) of every tap of N > 0 boxes, flat. source: bin, counted through all boxes."""
    rows = torch.arange(regions.level.shape[0], device=regions.level.device)
    bins = torch.arange(output_size[0] * output_size[1], device=rows.device)
    parts = []
    for samples, group in same_grid(regions, rows, sampling_ratio):
        pixel, weight = taps(regions.select(group), output_size, samples)
        source = (group[:, None] * bins.shape[0] + bins).flatten().repeat_interleave(pixel.shape[1])
        parts.append((source, pixel.flatten(), weight.flatten()))
    source, pixel, weight = (torch.cat(values) for values in zip(*parts, strict=True))
    return source, pixel, weight


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def is_channels_last(feature: Tensor) -> bool:
    """Whether a pixel's channels lie side by side."""
    return feature.shape[1] > 1 and feature.stride(1) == 1


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def multilevel_roi_align(
    features: list[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    last_pixel: bool = False,
) -> Tensor:
    """features L × [B, C, H, W], boxes [B, R, 4] or [K, 5] (image, x1, y1, x2, y2) -> [N, C, h, w], N = B · R or K.

    Differentiable in the features, fixed shapes if sampling_ratio > 0. Memory: about the output and its taps, and one
    copy of the features.
    """
    dtype = compute_dtype(features[0].dtype)
    shapes = [feature.shape for feature in features]
    channels = shapes[0][1]
    settings = output_size, scales, sampling_ratio, aligned, canonical_size, canonical_level, last_pixel
    regions = locate(shapes, boxes.detach().to(dtype), valid, *settings)
    levels = [feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features]
    # what has no weight reads the last row, so that nothing outside a box, infinity included, reaches its sum
    table = torch.cat([*levels, features[0].new_zeros(1, channels)]).to(dtype)
    parts, order = [], []
    for samples, rows in same_grid(regions, torch.arange(regions.level.shape[0], device=boxes.device), sampling_ratio):
        pixel, weight = taps(regions.select(rows), output_size, samples)
        box = rows.repeat_interleave(output_size[0] * output_size[1])[:, None]
        parts.append(gather(table, *_of_table(regions, shapes, box, pixel, weight)))
        order.append(rows)
    # the empty slice keeps the gradient's path when there are no boxes and so no parts
    out = torch.cat([table[:0], *parts]).view(regions.level.shape[0], *output_size, channels)
    if sampling_ratio <= 0 and order:
        out = out[torch.cat(order).argsort()]
    out = out.permute(0, 3, 1, 2).to(features[0].dtype)
    return out.clone(memory_format=memory_format(is_channels_last(features[0])))


def multilevel_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    shapes: Sequence[int],
    channels_last: bool,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    last_pixel: bool = False,
) -> list[Tensor]:
    """Gradient of `multilevel_roi_align` in each level; shapes: B, C, H, W of all levels in one flat list."""
    dtype = compute_dtype(grad.dtype)
    levels = [tuple(shapes[i : i + 4]) for i in range(0, len(shapes), 4)]
    settings = output_size, scales, sampling_ratio, aligned, canonical_size, canonical_level, last_pixel
    regions = locate(levels, boxes.to(dtype), valid, *settings)
    rows_of_level = [batch * height * width for batch, _, height, width in levels]
    rows = sum(rows_of_level) + 1
    total = torch.zeros((rows, grad.shape[1]), dtype=dtype, device=grad.device)
    if grad.shape[0]:
        source, pixel, weight = flat_taps(regions, output_size, sampling_ratio)
        box = source // (output_size[0] * output_size[1])
        index, weight = _of_table(regions, levels, box, pixel, weight)
        grad_rows = grad.to(dtype).permute(0, 2, 3, 1).flatten(0, 2)
        total = scatter(grad_rows, source, index, weight, rows)
    grads = []
    for part, (batch, channels, height, width) in zip(total[:-1].split(rows_of_level), levels, strict=True):
        part = part.to(grad.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)
        grads.append(part.clone(memory_format=memory_format(channels_last)))
    return grads


def _of_table(
    regions: Regions, shapes: Sequence[Sequence[int]], box: Tensor, pixel: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Pixels of the boxes' own levels as rows of the table of all levels, whose last row stands for nothing."""
    starts = [0]
    for batch, _, height, width in shapes:
        starts.append(starts[-1] + batch * height * width)
    counts = regions.usable[box] & (weight != 0)
    index = pixel + _of_level(regions.level, starts[:-1])[box]
    return torch.where(counts, index, starts[-1]), torch.where(counts, weight, 0)
