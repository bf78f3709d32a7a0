"""The maximum of each heat map, resized bicubically to the pixels of its box, without the resized map."""

import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose

A = tl.constexpr(-0.75)  # of the cubic kernel, as in PyTorch's bicubic resizing
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _side(low, high, limit):
    """A box's side, at least 1 (also if it is NaN), and its number of positions, at most limit."""
    side = high - low
    side = tl.where(side >= 1.0, side, 1.0)
    return side, tl.minimum(tl.ceil(side), limit.to(tl.float32))


@triton.jit
def _source(position, count, SIDE: tl.constexpr):
    """Where position of count lies among SIDE values: the value at or before it, and the distance from there."""
    source = (position.to(tl.float32) + 0.5) * tl.div_rn(tl.zeros_like(count) + SIDE, count) - 0.5
    low = tl.floor(source)
    return low.to(tl.int32), source - low


@triton.jit
def _weight(t, TAP: tl.constexpr):
    """Of the value TAP − 1 places after that at or before a position, t after it."""
    x = tl.abs(t + (1 - TAP))
    if TAP == 1 or TAP == 2:
        weight = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    else:
        weight = ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    return weight


@triton.jit
def _place(low, TAP: tl.constexpr, SIDE: tl.constexpr):
    return tl.minimum(tl.maximum(low + (TAP - 1), 0), SIDE - 1)


@triton.jit(do_not_specialize=["keypoints", "height", "width"])
def heatmaps_to_keypoints_kernel(
    maps_ptr,
    boxes_ptr,
    points_ptr,
    scores_ptr,
    keypoints,
    height,
    width,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """points [N, K, 3] and scores [N, K] of maps [N, K, SIDE, SIDE] over boxes [N, 4], all float32.

    A program goes through the positions of its box, TILE rows × BLOCK columns at a time, each thread keeps the first of
    the largest values that it meets. Grid: N × K. Reads each map once, 12.5 kB for 56 × 56, and holds it in L1; the
    work is that of the box's area: 16 loads from L1 and 50 operations per position.
    """
    program = tl.program_id(0).to(tl.int64)
    box = boxes_ptr + program // keypoints * 4
    x1, y1 = tl.load(box), tl.load(box + 1)
    side_x, count_x = _side(x1, tl.load(box + 2), width)
    side_y, count_y = _side(y1, tl.load(box + 3), height)
    columns, rows = count_x.to(tl.int32), count_y.to(tl.int32)
    maps_ptr += program * SIDE * SIDE
    best = tl.full([TILE, BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([TILE, BLOCK], tl.int32)
    for top in range(0, rows, TILE):
        row = top + tl.arange(0, TILE)
        low_y, t_y = _source(row, count_y, SIDE)
        for left in range(0, columns, BLOCK):
            column = left + tl.arange(0, BLOCK)
            low_x, t_x = _source(column, count_x, SIDE)
            value = tl.zeros([TILE, BLOCK], tl.float32)
            for j in tl.static_range(4):
                line = maps_ptr + _place(low_y, j, SIDE)[:, None] * SIDE
                wide = tl.zeros([TILE, BLOCK], tl.float32)
                for i in tl.static_range(4):
                    wide += tl.load(line + _place(low_x, i, SIDE)[None, :]) * _weight(t_x, i)[None, :]
                value += wide * _weight(t_y, j)[:, None]
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            better = inside & (value > best)
            best = tl.where(better, value, best)
            place = tl.where(better, row[:, None] * columns + column[None, :], place)
    score = tl.max(tl.max(best, axis=1), axis=0)
    first = tl.min(tl.min(tl.where(best == score, place, LAST), axis=1), axis=0)
    points_ptr += program * 3
    tl.store(points_ptr, ((first % columns).to(tl.float32) + 0.5) * tl.div_rn(side_x, count_x) + x1)
    tl.store(points_ptr + 1, ((first // columns).to(tl.float32) + 0.5) * tl.div_rn(side_y, count_y) + y1)
    tl.store(points_ptr + 2, 1.0)
    tl.store(scores_ptr + program, score)


def config(maps: int) -> Launch:
    """block, tile: columns and rows at a time. 32 columns are a warp's row of loads, few of them in vain in a narrow
    box."""
    return choose("heatmaps_to_keypoints", Launch(32, 4, 16), maps=maps)


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """heatmaps [N, K, S, S] and boxes [N, 4], float32 -> x, y, 1 [N, K, 3] and the values there [N, K]."""
    count, keypoints, side, _ = heatmaps.shape
    points, scores = heatmaps.new_empty((count, keypoints, 3)), heatmaps.new_empty((count, keypoints))
    if scores.numel():
        launch = config(scores.numel())
        heatmaps_to_keypoints_kernel[(scores.numel(),)](
            heatmaps.contiguous(),
            boxes.contiguous(),
            points,
            scores,
            keypoints,
            height,
            width,
            SIDE=side,
            BLOCK=launch.block,
            TILE=launch.tile,
            **launch.options,
        )
    return points, scores
