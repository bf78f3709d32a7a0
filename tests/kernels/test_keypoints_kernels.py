"""The keypoint kernel against the definition: in the interpreter, or on a GPU where there is one."""

import math

import pytest
import torch
from support import DEVICE
from torch.nn import functional as F

from fastrcnn.ops.reference import keypoints as reference
from triton_kernels import keypoints as kernels
from triton_kernels.launch import Launch, override


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN, so that what the kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def boxes_of(count, largest=40.0):
    corner = torch.rand(count, 2) * 20
    return torch.cat([corner, corner + torch.rand(count, 2) ** 2 * largest], 1).to(DEVICE)


def maps_of(count, keypoints, side):
    coarse = torch.randn(count, keypoints, side // 2, side // 2, device=DEVICE)
    return F.interpolate(coarse, scale_factor=2.0, mode="bilinear")


def check(maps, boxes, height=64, width=80):
    points, scores = kernels.heatmaps_to_keypoints(maps, boxes, height, width)
    want, want_scores = reference.heatmaps_to_keypoints(maps.double(), boxes.double(), height, width)
    assert points.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, want_scores.float(), rtol=1e-5, atol=1e-5)
    error = (points - want).abs().amax(2)
    # two positions that are equal up to rounding: either may be found
    assert (error < 1e-3).float().mean() > 0.97, error.max()
    return points, scores


@pytest.mark.parametrize("side", [14, 28, 56])
def test_equals_the_reference(side):
    check(maps_of(7, 3, side), boxes_of(7))


def test_noise_and_borders():
    maps = torch.randn(6, 2, 7, 7, device=DEVICE)
    maps[0, 0, 0, 0] = maps[1, 0, 6, 6] = maps[2, 1, 0, 6] = 9
    check(maps, boxes_of(6))


def test_special_boxes():
    boxes = boxes_of(5)
    boxes[0, 2:] = boxes[0, :2]  # no area: one position
    boxes[1, 2:] = boxes[1, :2] - 3
    boxes[2, 2] = boxes[2, 0] + 300  # more than fits: fewer positions
    boxes[3, 3] = math.inf
    boxes[4, 2] = math.nan
    maps = maps_of(5, 2, 14)
    finite, _ = check(maps[:3], boxes[:3])
    assert finite.isfinite().all()
    points, scores = kernels.heatmaps_to_keypoints(maps, boxes, 64, 80)
    torch.testing.assert_close(points[:3], finite)
    assert scores.isfinite().all()
    assert points[3, :, 0].isfinite().all()


@pytest.mark.parametrize(("block", "tile", "warps"), [(16, 16, 1), (64, 4, 4), (128, 2, 8)])
def test_any_launch_configuration(block, tile, warps):
    with override("heatmaps_to_keypoints", Launch(block, warps, tile)):
        check(maps_of(3, 2, 14), boxes_of(3, 100.0))


def test_of_equal_values_the_first():
    """Of a thread's own, and of those of different threads."""
    maps = torch.zeros(1, 1, 8, 8, device=DEVICE)
    boxes = torch.tensor([[4.0, 6, 64, 66]], device=DEVICE)
    assert check(maps, boxes)[0].tolist() == [[[4.5, 6.5, 1]]]


def test_any_memory_layout_and_nothing():
    maps, boxes = maps_of(4, 3, 14), boxes_of(4)
    want = kernels.heatmaps_to_keypoints(maps, boxes, 64, 80)
    strided = maps.contiguous(memory_format=torch.channels_last), boxes.t().contiguous().t()
    for got, expected in zip(kernels.heatmaps_to_keypoints(*strided, 64, 80), want, strict=True):
        assert torch.equal(got, expected)
    assert kernels.heatmaps_to_keypoints(maps[:0], boxes[:0], 64, 80)[0].shape == (0, 3, 3)
    assert kernels.heatmaps_to_keypoints(maps[:, :0], boxes, 64, 80)[1].shape == (4, 0)


@pytest.mark.gpu
def test_no_host_synchronisation_and_replay_in_a_graph():
    maps, boxes = maps_of(20, 17, 56), boxes_of(20, 300.0)
    kernels.heatmaps_to_keypoints(maps, boxes, 400, 400)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.heatmaps_to_keypoints(maps, boxes, 400, 400)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        points, _ = kernels.heatmaps_to_keypoints(maps, boxes, 400, 400)
    boxes.add_(3)
    graph.replay()
    assert torch.equal(points, kernels.heatmaps_to_keypoints(maps, boxes, 400, 400)[0])
