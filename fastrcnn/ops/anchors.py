"""Anchors of all positions of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import anchors as reference


def _fake(cell_anchors, grid_sizes, strides):
    sizes = zip(cell_anchors, grid_sizes[::2], grid_sizes[1::2], strict=True)
    return cell_anchors[0].new_empty((sum(len(cells) * h * w for cells, h, w in sizes), 4))


def _triton(cell_anchors, grid_sizes, strides):
    if cell_anchors[0].dtype == torch.float64:  # the kernel computes in float32
        return reference.grid_anchors(cell_anchors, grid_sizes, strides)
    from triton_kernels import anchors as kernels

    return kernels.grid_anchors(cell_anchors, grid_sizes, strides)


_GRID_ANCHORS = _library.register(
    "grid_anchors(Tensor[] cell_anchors, SymInt[] grid_sizes, float[] strides) -> Tensor",
    reference=reference.grid_anchors,
    fake=_fake,
    triton=_triton,
)


def grid_anchors(
    grid_sizes: Sequence[tuple[int, int]], strides: Sequence[tuple[float, float]], cell_anchors: Sequence[Tensor]
) -> Tensor:
    """Anchors [sum of A·h·w, 4] xyxy of all levels; order: level, y, x, cell anchor (fastest).

    grid_sizes: (h, w) of each level; strides: (y, x) in pixels, not necessarily integers; cell_anchors: [A, 4] around
    the origin, of one floating dtype, which is the result's. anchor = cell anchor + (x·sx, y·sy, x·sx, y·sy).
    No gradient. ValueError if the three do not fit together or cell_anchors are on several devices.
    Source: Faster R-CNN (arXiv 1506.01497), section 3.1.1.
    """
    if not len(grid_sizes) == len(strides) == len(cell_anchors) > 0:
        raise ValueError(
            "grid_sizes, strides and cell_anchors must have one entry per level, "
            f"got {len(grid_sizes)}, {len(strides)} and {len(cell_anchors)}"
        )
    for level, cells in enumerate(cell_anchors):
        if cells.dim() != 2 or cells.shape[1] != 4:
            raise ValueError(f"cell_anchors[{level}] must be [A, 4], got {tuple(cells.shape)}")
        if cells.dtype != cell_anchors[0].dtype or not cells.is_floating_point():
            raise ValueError(f"cell_anchors must share one floating dtype, got {[c.dtype for c in cell_anchors]}")
    _library.check_one_device(**{f"cell_anchors[{level}]": cells for level, cells in enumerate(cell_anchors)})
    sizes = [side for size in grid_sizes for side in size]
    return _GRID_ANCHORS(list(cell_anchors), sizes, [torch.sym_float(s) for stride in strides for s in stride])
