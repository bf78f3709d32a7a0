"""The anchor kernel against the definition: in the interpreter, or on a GPU where there is one."""

import pytest
import torch
from support import DEVICE

from fastrcnn.ops.reference import anchors as reference
from triton_kernels import anchors as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_to_the_reference(dtype):
    sizes = [9, 11, 4, 6, 0, 3, 1, 1]  # the first level fills more than one program; one level is empty
    strides = [8.0, 8.0, 15.5, 16.25, 32.0, 32.0, 64.1, 64.0]
    cells = [(torch.randn(count, 4, device=DEVICE) * 100).to(dtype) for count in (3, 1, 3, 2)]
    got = kernels.grid_anchors(cells, sizes, strides)
    assert got.equal(reference.grid_anchors(cells, sizes, strides))


def test_cell_anchors_of_any_memory_layout():
    cells = torch.randn(4, 3, device=DEVICE).t()
    got = kernels.grid_anchors([cells], [2, 3], [4.0, 8.0])
    assert got.equal(reference.grid_anchors([cells], [2, 3], [4.0, 8.0]))
