"""Anchors computed from their index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # anchors per program: 4 KB written
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # no fusion: the reference rounds the product


@triton.jit
def anchor_position(index, width, cells):
    """index within a level (order: y, x, cell) -> cell, x, y."""
    position = index // cells
    return index % cells, position % width, position // width


@triton.jit(do_not_specialize=["count", "width", "cells"])
def grid_anchors_kernel(cells_ptr, anchors_ptr, count, width, cells, stride_y, stride_x, BLOCK: tl.constexpr):
    """anchors [count, 4] = cell + (x stride_x, y stride_y, x stride_x, y stride_y), of one level.

    Grid: blocks of anchors. Writes 16 B per anchor; cell anchors [cells, 4] stay in L1.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell, x, y = anchor_position(index, width, cells)
    shift_x = x.to(tl.float32) * stride_x
    shift_y = y.to(tl.float32) * stride_y
    side = tl.arange(0, 4)[None, :]
    inside = (index < count)[:, None]
    corner = tl.load(cells_ptr + cell[:, None] * 4 + side, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, 4]
    anchor = corner + tl.where(side % 2 == 0, shift_x[:, None], shift_y[:, None])
    tl.store(anchors_ptr + index[:, None].to(tl.int64) * 4 + side, anchor, mask=inside)


def grid_anchors(cell_anchors: list[Tensor], grid_sizes: list[int], strides: list[float]) -> Tensor:
    """cell_anchors: [A, 4] per level, of one dtype; grid_sizes and strides flat, (y, x) per level -> [sum A h w, 4].

    One launch per level: what differs between levels would need a table on the device, and so a copy from the host.
    """
    counts = [len(c) * h * w for c, h, w in zip(cell_anchors, grid_sizes[::2], grid_sizes[1::2], strict=True)]
    anchors = torch.empty(sum(counts), 4, dtype=cell_anchors[0].dtype, device=cell_anchors[0].device)
    levels = zip(anchors.split(counts), cell_anchors, grid_sizes[1::2], strides[::2], strides[1::2], strict=True)
    for part, cells, width, stride_y, stride_x in levels:
        if len(part):
            grid_anchors_kernel[(triton.cdiv(len(part), BLOCK),)](
                cells.contiguous(),
                part,
                len(part),
                width,
                len(cells),
                stride_y,
                stride_x,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return anchors
