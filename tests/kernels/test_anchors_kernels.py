"""The anchor kernel against the definition: in the interpreter, or on a GPU where there is one."""

import pytest
import torch
from support import DEVICE

from fastrcnn.ops.reference import anchors as reference
from triton_kernels import anchors as kernels
from triton_kernels import launch
from triton_kernels.launch import Launch


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(counts, sizes, strides, dtype=torch.float32):
    cells = [(torch.randn(count, 4, device=DEVICE) * 100).to(dtype) for count in counts]
    got = kernels.grid_anchors(cells, sizes, strides)
    want = reference.grid_anchors(cells, sizes, strides)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates: the other of the two neighbours
        assert (got.view(torch.int16).int() - want.view(torch.int16).int()).abs().max() <= 1
    else:
        assert got.equal(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_the_reference(dtype):
    strides = [8.0, 8.0, 15.5, 16.25, 32.0, 32.0, 64.1, 64.0]
    # one level is empty; the number of anchors changes from level to level
    check((3, 1, 3, 2), [9, 11, 4, 6, 0, 3, 1, 1], strides, dtype)


@pytest.mark.parametrize("counts", [(3,) * 7, (3, 3, 3, 2, 2, 0, 2), (15,)])
def test_launches_of_several_levels(counts):
    sizes = [side for level in range(len(counts)) for side in (8 - level, 9 - level)]
    check(counts, sizes, [4.0 * 2**level for level in range(len(counts)) for _ in "yx"])


@pytest.mark.parametrize(("block", "num_warps"), [(16, 1), (64, 4), (4096, 8)])
def test_any_launch_configuration(block, num_warps):
    """A row of 57 anchors in one program, and in several."""
    with launch.override("anchors", Launch(block, num_warps)):
        check((3, 3), [5, 19, 3, 10], [8.0, 8.0, 16.0, 16.0])


def test_offsets_past_2_31():
    """The last rows of a level of 2^32 anchors, written to where a tensor of nothing but them begins."""
    side, rows, block = 2**16, 2, 2**15
    cells = torch.randn(1, 4, device=DEVICE)
    anchors = torch.empty(rows * side, 4, device=DEVICE)
    programs, before = rows * side // block, (side - rows) * side
    per_level = [cells], [-before // block], [-before], [side], [0.5], [0.25]
    absent = cells, programs, 0, 1, 1.0, 1.0
    arguments = [x for level, other in zip(per_level, absent, strict=True) for x in [*level, *[other] * 4]]
    kernels.grid_anchors_kernel[(programs,)](anchors, *arguments, CELLS=1, BLOCK=block, **Launch(block, 8).options)
    shift = torch.tensor([0, (side - rows) * 0.5] * 2, device=DEVICE)
    torch.testing.assert_close(anchors, reference.grid_anchors([cells], [rows, side], [0.5, 0.25]) + shift)


@pytest.mark.gpu
def test_no_host_synchronisation_and_replay_in_a_graph():
    cells = [torch.randn(3, 4, device=DEVICE) for _ in range(2)]
    arguments = [7, 9, 4, 5], [8.0, 8.0, 16.0, 16.0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.grid_anchors(cells, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        anchors = kernels.grid_anchors(cells, *arguments)
    for cell in cells:
        cell.mul_(2)
    graph.replay()
    assert anchors.equal(reference.grid_anchors(cells, *arguments))


def test_cell_anchors_of_any_memory_layout():
    cells = torch.randn(4, 3, device=DEVICE).t()
    got = kernels.grid_anchors([cells], [2, 3], [4.0, 8.0])
    assert got.equal(reference.grid_anchors([cells], [2, 3], [4.0, 8.0]))
