"""Anchors computed from their index."""

from itertools import accumulate, groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose

MAX_LEVELS = 5
_SIZES = [f"{size}{level}" for size in ("start", "first", "width") for level in range(MAX_LEVELS)]


@triton.jit
def pick(level, v0, v1, v2, v3, v4):
    """The argument of a level; a choice between arguments keeps what is known about the alignment of pointers."""
    return tl.where(level == 0, v0, tl.where(level == 1, v1, tl.where(level == 2, v2, tl.where(level == 3, v3, v4))))


@triton.jit
def anchor_position(index, width, cells):
    """index within a level (order: y, x, cell) -> cell, x, y."""
    position = index // cells
    return index % cells, position % width, position // width


@triton.jit
def load_shifted(cells_ptr, cell, shift_x, shift_y, inside):
    """Anchors [N, 4] float32: cell anchors [A, 4] of cell [N], moved; shifts [N]. 0 where not inside."""
    side = tl.arange(0, 4)[None, :]
    corner = tl.load(cells_ptr + cell[:, None] * 4 + side, mask=inside[:, None], other=0.0).to(tl.float32)
    return corner + tl.where(side % 2 == 0, shift_x[:, None], shift_y[:, None])


@triton.jit(do_not_specialize=_SIZES)
def grid_anchors_kernel(
    anchors_ptr,
    c0,
    c1,
    c2,
    c3,
    c4,
    start0,
    start1,
    start2,
    start3,
    start4,
    first0,
    first1,
    first2,
    first3,
    first4,
    width0,
    width1,
    width2,
    width3,
    width4,
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
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """anchors [N, 4] = cell + (x sx, y sy, x sx, y sy), of up to five levels with CELLS anchors per position.

    c: cell anchors [CELLS, 4]; start: the level's first program; first: its first anchor; width: positions per row;
    sy, sx: strides. Grid: for each level, its rows × blocks of BLOCK anchors of a row.
    Writes 16 B per anchor (8 B in half precision); the cell anchors stay in L1. y belongs to the whole program and the
    division by CELLS is a multiplication: 50 instructions per anchor in the code for sm_90, a third of them for finding
    the row. At the full bandwidth of an H200 an SM writes 1.3 anchors of 16 B per clock and can issue 98 for each.
    """
    program = tl.program_id(0)
    level = (
        (program >= start1).to(tl.int32)
        + (program >= start2).to(tl.int32)
        + (program >= start3).to(tl.int32)
        + (program >= start4).to(tl.int32)
    )
    program -= pick(level, start0, start1, start2, start3, start4)
    row = pick(level, width0, width1, width2, width3, width4) * CELLS
    blocks = tl.cdiv(row, BLOCK)
    y = program // blocks
    column = (program % blocks) * BLOCK
    lane = tl.arange(0, BLOCK)
    index = column + lane  # in the row
    x = index // CELLS
    shift_x = x.to(tl.float32) * pick(level, sx0, sx1, sx2, sx3, sx4)
    shift_y = tl.zeros([BLOCK], tl.float32) + y.to(tl.float32) * pick(level, sy0, sy1, sy2, sy3, sy4)
    inside = index < row
    anchors = load_shifted(pick(level, c0, c1, c2, c3, c4), index - x * CELLS, shift_x, shift_y, inside)
    first = pick(
        level, first0.to(tl.int64), first1.to(tl.int64), first2.to(tl.int64), first3.to(tl.int64), first4.to(tl.int64)
    )
    p = anchors_ptr + (first + y.to(tl.int64) * row + column) * 4 + lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p, anchors.to(anchors_ptr.dtype.element_ty), mask=inside[:, None])


def grid_anchors_launch(cells: int, itemsize: int) -> Launch:
    """block: anchors per program; the 64 bytes that each thread writes spread the cost of finding a row."""
    return choose("anchors", Launch(block=2048 // itemsize, num_warps=4), cells=cells, itemsize=itemsize)


def grid_anchors(cell_anchors: list[Tensor], grid_sizes: list[int], strides: list[float]) -> Tensor:
    """cell_anchors: [A, 4] per level, of one dtype; grid_sizes and strides flat, (y, x) per level -> [sum A h w, 4].

    One launch for up to five neighbouring levels with equal A. A row must have fewer than 2^31 anchors.
    """
    heights, widths = grid_sizes[::2], grid_sizes[1::2]
    counts = [len(c) * h * w for c, h, w in zip(cell_anchors, heights, widths, strict=True)]
    firsts = list(accumulate(counts, initial=0))
    anchors = torch.empty(firsts[-1], 4, dtype=cell_anchors[0].dtype, device=cell_anchors[0].device)
    filled = [level for level, count in enumerate(counts) if count]
    for cells, group in groupby(filled, key=lambda level: len(cell_anchors[level])):
        same = list(group)
        for i in range(0, len(same), MAX_LEVELS):
            levels = same[i : i + MAX_LEVELS]
            chosen = grid_anchors_launch(cells, anchors.element_size())
            programs = (heights[level] * triton.cdiv(widths[level] * cells, chosen.block) for level in levels)
            *starts, total = accumulate(programs, initial=0)
            absent = MAX_LEVELS - len(levels)
            of_levels = [
                [cell_anchors[level].contiguous() for level in levels],
                starts,
                [firsts[level] for level in levels],
                [widths[level] for level in levels],
                [strides[2 * level] for level in levels],
                [strides[2 * level + 1] for level in levels],
            ]
            fill = [of_levels[0][0], total, 0, 1, 1.0, 1.0]
            arguments = [x for values, other in zip(of_levels, fill, strict=True) for x in [*values, *[other] * absent]]
            grid_anchors_kernel[(total,)](anchors, *arguments, CELLS=cells, BLOCK=chosen.block, **chosen.options)
    return anchors
