"""The ROIAlign kernels against the fp64 reference: in the interpreter, or on a GPU where there is one."""

import importlib
from contextlib import contextmanager

import pytest
import torch
from support import DEVICE, assert_accurate

from fastrcnn.ops.reference import roi_align as reference
from triton_kernels import roi_align as kernels

op = importlib.import_module("fastrcnn.ops.roi_align")  # the package's attribute of this name is the function

OUTPUT = [2, 3]
SCALES = [1 / 4, 1 / 8]
CANONICAL = 16.0, 3  # boxes from 16 pixels on belong to the second level
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@contextmanager
def deterministic():
    """Also fills torch.empty with NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(dtype: torch.dtype, format_: torch.memory_format, channels: int = 6):
    """Two levels, two images with three boxes each: small and large, across the border, one not valid, one NaN."""
    maps = [torch.randn(2, channels, h, w).to(dtype) for h, w in ((9, 8), (5, 4))]
    boxes = [
        [[3.0, 2.0, 11.0, 14.0], [0.0, 0.0, 9.0, 9.0], [-6.0, 5.0, 29.0, 40.0]],
        [[20.0, 18.0, 31.5, 29.0], [float("nan"), 0.0, 5.0, 5.0], [5.5, 1.0, 29.0, 20.0]],
    ]
    valid = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)
    return [m.contiguous(memory_format=format_).to(DEVICE) for m in maps], torch.tensor(boxes, device=DEVICE), valid


def check(features, boxes, valid, scales, ratio, aligned, dtype) -> None:
    settings = OUTPUT, scales, ratio, aligned, *CANONICAL
    channels_last = reference.is_channels_last(features[0])
    shapes = [size for feature in features for size in feature.shape]
    wide = [feature.double().requires_grad_() for feature in features]
    want = reference.multilevel_roi_align(wide, boxes, valid, *settings)
    with deterministic():
        got = op._triton(features, boxes, valid, *settings)
    assert got.dtype == dtype
    assert reference.is_channels_last(got) == channels_last
    assert_accurate(got, want, dtype)

    grad = torch.randn_like(got)
    grads = op._triton_backward(grad, boxes, valid, shapes, channels_last, *settings)
    for g, w in zip(grads, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert g.dtype == dtype
        assert_accurate(g, w, dtype)


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_the_reference(dtype, format_, ratio):
    check(*inputs(dtype, FORMATS[format_]), SCALES, ratio, dtype != torch.float16, dtype)


@pytest.mark.parametrize("aligned", [False, True])
def test_sampling_ratio_that_is_not_unrolled(monkeypatch, aligned):
    monkeypatch.setattr(kernels, "MAX_UNROLLED_RATIO", 0)
    check(*inputs(torch.float32, torch.channels_last), SCALES, 3, aligned, torch.float32)


@pytest.mark.parametrize("ratio", [2, 0])
def test_one_level_and_rois(ratio):
    """The image's index stands in the boxes; indices of no image give zeros, and no memory outside is touched."""
    (feature, _), _, _ = inputs(torch.float32, torch.channels_last, channels=1)
    rois = [[1, 2.5, 3, 9, 30], [0, 4, 4, 4.5, 4.5], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, -9, 7, 500, 12]]
    check([feature], torch.tensor(rois, device=DEVICE), None, [0.3], ratio, False, torch.float32)


def test_more_channels_than_a_block():
    features, boxes, valid = inputs(torch.float16, torch.channels_last, channels=300)
    check(features, boxes[:, :1].contiguous(), valid[:, :1], SCALES, 1, True, torch.float16)


def test_five_levels():
    maps = [torch.randn(1, 4, 16 >> k, 16 >> k, device=DEVICE) for k in range(5)]
    sides = torch.tensor([3.0, 5.0, 9.0, 17.0, 33.0, 60.0], device=DEVICE)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)[None]
    thresholds = reference.level_thresholds([0.25 / 2**k for k in range(5)], 4.0, 2)
    areas = boxes[0, :, 2] * boxes[0, :, 3]
    assert sum((areas >= t).int() for t in thresholds).tolist() == [0, 0, 1, 2, 3, 3]
    settings = OUTPUT, [0.25 / 2**k for k in range(5)], 1, False, 4.0, 2
    want = reference.multilevel_roi_align([m.double() for m in maps], boxes, None, *settings)
    assert_accurate(op._triton(maps, boxes, None, *settings), want, torch.float32)


def test_six_levels_do_without_the_kernel():
    maps = [torch.randn(1, 4, 32 >> k, 32 >> k, device=DEVICE) for k in range(6)]
    sides = torch.tensor([3.0, 9.0, 33.0, 128.0], device=DEVICE)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)[None]
    settings = OUTPUT, [0.25 / 2**k for k in range(6)], 1, False, 4.0, 2
    wide = [m.double().requires_grad_() for m in maps]
    want = reference.multilevel_roi_align(wide, boxes, None, *settings)
    got = op._triton(maps, boxes, None, *settings)
    assert_accurate(got, want, torch.float32)
    grad, shapes = torch.randn_like(got), [size for m in maps for size in m.shape]
    grads = op._triton_backward(grad, boxes, None, shapes, False, *settings)
    for g, w in zip(grads, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert_accurate(g, w, torch.float32)
    assert grads[5].any()


def test_no_boxes():
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    settings = OUTPUT, SCALES, 2, False, *CANONICAL
    assert op._triton(features, boxes[:, :0], valid[:, :0], *settings).shape == (0, 6, 2, 3)
    shapes = [size for feature in features for size in feature.shape]
    grads = op._triton_backward(torch.zeros(0, 6, 2, 3, device=DEVICE), boxes[:, :0], None, shapes, True, *settings)
    assert all(not g.any() for g in grads)


def test_deterministic_gradients_do_without_the_kernel(monkeypatch):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    shapes, settings = [size for f in features for size in f.shape], (OUTPUT, SCALES, 2, False, *CANONICAL)
    grad = torch.randn(6, 6, *OUTPUT, device=DEVICE)
    want = op._triton_backward(grad, boxes, valid, shapes, True, *settings)
    monkeypatch.delattr(kernels, "roi_align_backward")
    with deterministic():
        first, second = (op._triton_backward(grad, boxes, valid, shapes, True, *settings) for _ in range(2))
    for w, a, b in zip(want, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, w)


def test_each_thread_moves_sixteen_bytes():
    for itemsize in (2, 4):
        for channels in (32, 64, 100, 256, 1024):
            chosen = kernels.config(channels, itemsize)
            assert chosen.block <= 256
            assert chosen.num_warps == 1 or chosen.block * itemsize == chosen.num_warps * 512


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [2, 0])
def test_no_host_synchronisation(ratio):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    features = [f.requires_grad_() for f in features]

    def step():
        out = op.multilevel_roi_align(features, boxes, OUTPUT, SCALES, ratio, True, *CANONICAL, valid=valid)
        return torch.autograd.grad(out.square().sum(), features)

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.gpu
def test_the_public_operator_launches_the_kernel():
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    settings = SCALES, 2, True, *CANONICAL
    got = op.multilevel_roi_align(features, boxes, OUTPUT, *settings, valid=valid)
    want = reference.multilevel_roi_align([f.double() for f in features], boxes, valid, OUTPUT, *settings)
    assert_accurate(got, want, torch.float32)
