"""Anchors of a feature pyramid by definition: every cell anchor at every grid position."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_anchors(cell_anchors: Sequence[Tensor], grid_sizes: Sequence[int], strides: Sequence[float]) -> Tensor:
    """See `fastrcnn.ops.grid_anchors`; grid_sizes [2 L] (h, w, h, w, ...) and strides [2 L] (sy, sx, ...) are flat."""
    levels = []
    for level, cells in enumerate(cell_anchors):
        h, w = grid_sizes[2 * level : 2 * level + 2]
        stride_y, stride_x = strides[2 * level : 2 * level + 2]
        dtype = torch.promote_types(cells.dtype, torch.float32)
        y = torch.arange(h, dtype=dtype, device=cells.device) * stride_y
        x = torch.arange(w, dtype=dtype, device=cells.device) * stride_x
        corner = torch.stack([x[None, :].expand(h, w), y[:, None].expand(h, w)], -1)  # [h, w, 2]
        anchors = corner.repeat(1, 1, 2)[:, :, None] + cells.to(dtype)  # [h, w, A, 4]
        levels.append(anchors.reshape(-1, 4).to(cells.dtype))
    return torch.cat(levels)
