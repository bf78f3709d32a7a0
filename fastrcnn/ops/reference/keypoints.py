"""Definition of the way from heat maps to keypoints, over all detections at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

A = -0.75  # of the cubic kernel, as in PyTorch's and OpenCV's bicubic resizing
BLOCK = 1 << 25  # values of resized maps at a time


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """heatmaps [N, K, S, S], boxes [N, 4] of their dtype -> x, y, 1 [N, K, 3] and the values there [N, K].

    Every map is resized to height × width positions; those past the box's own number of them repeat its last, which
    leaves the first maximum where it is.
    """
    corner, sides, counts = grid(boxes, height, width)
    chunk = max(1, BLOCK // max(heatmaps.shape[1] * height * width, 1))
    found = [
        _first_maximum(maps, _taps(wh[:, 0], width, maps.shape[3]), _taps(wh[:, 1], height, maps.shape[2]))
        for maps, wh in zip(heatmaps.split(chunk), counts.split(chunk), strict=True)
    ]
    place, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return to_points(place % width, place // width, corner, sides, counts), scores


def grid(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """boxes [N, 4] -> corners, sides and numbers of positions, each [N, 2] (x, y); one that is NaN has one position."""
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = torch.where(sides >= 1, sides, 1)
    counts = torch.stack([sides[:, 0].ceil().clamp(max=width), sides[:, 1].ceil().clamp(max=height)], 1)
    return boxes[:, :2], sides, counts


def to_points(column: Tensor, row: Tensor, corner: Tensor, sides: Tensor, counts: Tensor) -> Tensor:
    """Positions column, row int64 [N, K] in the grids of boxes, [N, 2] each -> x, y, 1 [N, K, 3]."""
    place = torch.stack([column, row], 2).to(sides.dtype)
    points = (place + 0.5) * (sides / counts)[:, None] + corner[:, None]  # c = d + 0.5 (Heckbert 1990)
    return F.pad(points, (0, 1), value=1.0)


def _taps(count: Tensor, length: int, side: int) -> list[tuple[Tensor, Tensor]]:
    """Resizing `side` values to count [N]: the four (index int64, weight), [N, length] each, of every position."""
    position = torch.arange(length, dtype=count.dtype, device=count.device)
    return taps(torch.minimum(position, count[:, None] - 1), count[:, None], side)


def taps(position: Tensor, count: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """The four (index int64, weight) of positions in a row of `side` values resized to `count`, which broadcast."""
    source = (position + 0.5) * (side / count) - 0.5
    low = source.floor()
    t = source - low
    weights = _outer(t + 1), _inner(t), _inner(1 - t), _outer(2 - t)
    return [((low.long() + k).clamp(0, side - 1), weight) for k, weight in zip(range(-1, 3), weights, strict=True)]


def _inner(x: Tensor) -> Tensor:
    return ((A + 2) * x - (A + 3)) * x * x + 1


def _outer(x: Tensor) -> Tensor:
    return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A


def _first_maximum(maps: Tensor, columns: list, rows: list) -> tuple[Tensor, Tensor]:
    """maps [n, K, S, S] -> index int64 [n, K] into the flattened resized map, and the value there."""
    n, keypoints, side, _ = maps.shape
    width, height = columns[0][0].shape[1], rows[0][0].shape[1]
    wide = sum(
        w[:, None, None] * maps.gather(3, i[:, None, None].expand(n, keypoints, side, width)) for i, w in columns
    )
    resized = sum(
        w[:, None, :, None] * wide.gather(2, i[:, None, :, None].expand(n, keypoints, height, width)) for i, w in rows
    )
    value, place = resized.flatten(2).max(2)
    return place, value
