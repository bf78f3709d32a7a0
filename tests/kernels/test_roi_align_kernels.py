"""The ROIAlign kernels against the fp64 reference: in the interpreter, or on a GPU where there is one."""

import importlib
import math
import warnings
from contextlib import ExitStack, contextmanager

import aot
import numpy as np
import pytest
import torch
from support import DEVICE, assert_accurate

from fastrcnn.ops.reference import roi_align as reference
from triton_kernels import roi_align as kernels
from triton_kernels.launch import Launch, override

op = importlib.import_module("fastrcnn.ops.roi_align")  # the package's attribute of this name is the function

OUTPUT = [2, 3]
SCALES = [1 / 4, 1 / 8]
CANONICAL = 16.0, 3  # boxes from 16 pixels on belong to the second level
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # NumPy interprets


@contextmanager
def deterministic():
    """Also fills torch.empty with NaN, so that what a kernel does not write shows; torch may not warn."""
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(dtype: torch.dtype, format_: torch.memory_format, channels: int = 6):
    """Two levels, two images with three boxes each: small and large, across the border, one not valid, one NaN."""
    maps = [torch.randn(2, channels, h, w).to(dtype) for h, w in ((9, 8), (5, 4))]
    boxes = [
        [[3.0, 2.0, 11.0, 14.0], [0.0, 0.0, 9.0, 9.0], [-6.0, 5.0, 29.0, 40.0]],
        [[20.0, 18.0, 31.5, 29.0], [NAN, 0.0, 5.0, 5.0], [5.5, 1.0, 29.0, 20.0]],
    ]
    valid = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)
    return [m.contiguous(memory_format=format_).to(DEVICE) for m in maps], torch.tensor(boxes, device=DEVICE), valid


def flat_shapes(features) -> list[int]:
    return [size for feature in features for size in feature.shape]


def check(features, boxes, valid, scales, ratio, aligned, *, output=OUTPUT, canonical=CANONICAL) -> torch.Tensor:
    """The forward and both gradients; returns the output."""
    settings = output, scales, ratio, aligned, *canonical
    channels_last, dtype = reference.is_channels_last(features[0]), features[0].dtype
    wide = [feature.double().requires_grad_() for feature in features]
    want = reference.multilevel_roi_align(wide, boxes, valid, *settings)
    with deterministic():
        got = op._triton(features, boxes, valid, *settings)
    assert got.dtype == dtype
    assert reference.is_channels_last(got) == channels_last
    assert_accurate(got, want, dtype)

    grad = torch.randn_like(got)
    wanted = torch.autograd.grad(want, wide, grad.double())
    for backward in (scatter, gather):
        grads = backward(grad, boxes, valid, flat_shapes(features), channels_last, *settings)
        for g, w in zip(grads, wanted, strict=True):
            assert g.dtype == dtype
            if g.shape[1] > 1 < g[0, 0].numel():
                assert reference.is_channels_last(g) == channels_last
            assert_accurate(g, w, dtype)
    return got


def scatter(*arguments):
    return op._triton_backward(*arguments)


def gather(*arguments):
    with deterministic():
        return op._triton_backward(*arguments)


@pytest.mark.parametrize(
    ("dtype", "format_", "ratio", "aligned"),
    [
        (torch.float32, "channels_last", 2, True),
        (torch.float32, "contiguous", 0, False),
        (torch.float16, "channels_last", 0, True),
        (torch.float16, "contiguous", 3, False),
        (torch.bfloat16, "channels_last", 1, False),
        (torch.bfloat16, "contiguous", 2, True),
    ],
)
def test_equal_to_the_reference(dtype, format_, ratio, aligned):
    check(*inputs(dtype, FORMATS[format_]), SCALES, ratio, aligned)


def test_sampling_ratio_that_is_not_unrolled(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_UNROLLED_RATIO", 0)
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    check(features, boxes[:, ::2], valid[:, ::2], SCALES, 3, False)


@pytest.mark.parametrize("ratio", [2, 0])
def test_one_level_and_rois(ratio):
    """The image's index stands in the boxes; indices of no image give zeros, and no memory outside is touched."""
    (feature, _), _, _ = inputs(torch.float32, torch.channels_last, channels=1)
    rois = [[1, 2.5, 3, 9, 30], [0, 4, 4, 4.5, 4.5], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, -9, 7, 500, 12]]
    check([feature], torch.tensor(rois, device=DEVICE), None, [0.3], ratio, False)


@pytest.mark.parametrize(("ratio", "aligned"), [(2, True), (0, False)])
def test_boxes_that_are_odd(ratio, aligned):
    """Inverted, empty, thin, at and beyond the borders of the map, infinite."""
    feature = torch.randn(1, 3, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    boxes = [
        [5.0, 4.0, 1.0, 0.5],
        [4.5, 1.0, 0.5, 3.0],
        [2.25, 1.75, 2.25, 1.75],
        [1.0, 2.0, 1.0 + 2**-20, 4.0],
        [6.0, 5.0, 6.0, 5.0],
        [-1.0, -1.0, -1.0, 5.5],
        [-9.0, 1.0, -2.0, 3.0],
        [7.0, 1.0, 9.0, 3.0],
        [1.0, -math.inf, 3.0, 2.0],
    ]
    check([feature], torch.tensor([boxes], device=DEVICE), None, [1.0], ratio, aligned, output=[2, 2])


def test_box_of_infinite_area_belongs_to_the_last_level():
    features, _, _ = inputs(torch.float32, torch.channels_last)
    side = 1e20  # its one sample lies at 0
    boxes = torch.tensor([[[-side, -side, side, side]]] * 2, device=DEVICE)
    got = check(features, boxes, None, SCALES, 1, True, output=[1, 1])
    assert torch.equal(got[:, :, 0, 0], features[1][:, :, 0, 0])


def test_more_channels_than_a_block():
    features, boxes, valid = inputs(torch.float16, torch.channels_last, channels=300)
    check(features, boxes[:, :1].contiguous(), valid[:, :1], SCALES, 1, True, output=[1, 2])


def test_level_of_the_whole_box_and_samples_to_its_last_pixel():
    features, _, _ = inputs(torch.float32, torch.channels_last)
    boxes = torch.tensor([[[2.0, 3, 18, 19], [2, 3, 17.5, 19], [0, 0, 1, 1]]], device=DEVICE).expand(2, 3, 4)
    whole = check(features, boxes, None, SCALES, 2, False)
    got = check(features, boxes, None, SCALES, 2, False, canonical=(*CANONICAL, True))
    assert not torch.isclose(got, whole)[[0, 1, 3, 4]].flatten(1).all(1).any()
    # 16 pixels a side: the first box belongs to the second level, though it would not without its last pixel
    inner = boxes[:, :1] - boxes.new_tensor([0, 0, 1, 1])
    second = check(features[1:], inner, None, SCALES[1:], 2, False)
    torch.testing.assert_close(got[[0, 3]], second)


def test_five_levels_some_empty_some_smaller_than_a_tile():
    shapes = [(16, 9), (8, 8), (0, 7), (3, 2), (1, 1)]
    maps = [torch.randn(1, 4, h, w, device=DEVICE).contiguous(memory_format=torch.channels_last) for h, w in shapes]
    sides = torch.tensor([3.0, 5.0, 9.0, 17.0, 33.0, 60.0, 80.0], device=DEVICE)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)[None]
    scales = [0.25 / 2**k for k in range(5)]
    areas, thresholds = boxes[0, :, 2] * boxes[0, :, 3], reference.level_thresholds(scales, 4.0, 2)
    assert sum((areas >= t).int() for t in thresholds).tolist() == [0, 0, 1, 2, 3, 3, 4]
    got = check(maps, boxes, None, scales, 1, False, output=[2, 1], canonical=(4.0, 2))
    assert not got[3].any()
    check([maps[2], maps[2]], boxes[:, :1], None, scales[:2], 1, False, canonical=(4.0, 2))


def test_six_levels_do_without_the_kernels():
    maps = [torch.randn(1, 4, 32 >> k, 32 >> k, device=DEVICE) for k in range(6)]
    sides = torch.tensor([3.0, 9.0, 33.0, 128.0], device=DEVICE)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)[None]
    check(maps, boxes, None, [0.25 / 2**k for k in range(6)], 1, False, canonical=(4.0, 2))


def test_no_boxes_and_no_channels():
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    settings = OUTPUT, SCALES, 2, False, *CANONICAL
    for per_image in (boxes[:, :0], boxes.new_zeros(0, 5)):
        assert op._triton(features, per_image, None, *settings).shape == (0, 6, 2, 3)
        for backward in (scatter, gather):
            grad = torch.zeros(0, 6, 2, 3, device=DEVICE)
            grads = backward(grad, per_image, None, flat_shapes(features), True, *settings)
            assert all(torch.equal(g, torch.zeros_like(f)) for g, f in zip(grads, features, strict=True))
    check([feature[:, :0] for feature in features], boxes, valid, SCALES, 2, False)


@pytest.mark.parametrize(("count", "padded"), [(1, True), (63, True), (64, True), (65, True), (65, False)])
def test_gather_of_many_boxes(count, padded):
    """Whole and partial words of the bitmap; all boxes of an image crowd on one tile."""
    corners = torch.rand(2, count, 2) + 4.5
    boxes = torch.cat([corners, corners + 1.5], 2)
    valid = torch.stack([torch.ones(count), torch.rand(count) < 0.05]).bool()
    if not padded:
        image = torch.randint(0, 2, (count, 1)).float()
        boxes, valid = torch.cat([image, boxes[0]], 1), valid[0]
    boxes, valid, shape = boxes.to(DEVICE), valid.to(DEVICE), [2, 2, 7, 9]
    settings = [1, 1], [1.0], 1, True, *CANONICAL
    grad = torch.randn(valid.numel(), 2, 1, 1, device=DEVICE)
    want = reference.multilevel_roi_align_backward(grad.double(), boxes, valid, shape, True, *settings)
    (got,) = gather(grad, boxes, valid, shape, True, *settings)
    assert_accurate(got, want[0], torch.float32)
    if count == 65:
        assert torch.equal(got, gather(grad, boxes, valid, shape, True, *settings)[0])


@pytest.mark.parametrize("launch", [Launch(2, 1, tile=2), Launch(16, 2, tile=8)])
def test_results_do_not_depend_on_the_launch_configuration(launch):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    with ExitStack() as stack:
        for direction in ("forward", "scatter", "tiles", "gather"):
            stack.enter_context(override(f"roi_align_{direction}", launch))
        check(features, boxes[:, -1:], valid[:, -1:], SCALES, 1, True, output=[1, 2])


def test_which_gradient_is_taken(monkeypatch):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    taken = []
    for name in ("roi_align_scatter", "roi_align_gather"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name, **__: taken.append(name))
    grad = torch.randn(6, 6, *OUTPUT, device=DEVICE)
    for backward in (scatter, gather):
        backward(grad, boxes, valid, flat_shapes(features), True, OUTPUT, SCALES, 2, False, *CANONICAL)
    assert taken == ["roi_align_scatter", "roi_align_gather"]


def test_infinite_gradients_stay_with_the_box():
    feature = torch.zeros(1, 3, 5, 9, device=DEVICE)
    boxes = torch.tensor([[[0.6, 0.6, 2.5, 2.5], [5.0, 1.0, 8.0, 4.0]]], device=DEVICE)
    grad = torch.ones(2, 3, 2, 2, device=DEVICE)
    grad[0, :, 0, 0] = math.inf
    settings = [feature.shape, True, [2, 2], [1.0], 1, True, *CANONICAL]
    (got,) = scatter(grad, boxes, None, *settings)
    assert not got.isnan().any()
    assert got.isinf().sum() == 3 * 4
    (got,) = gather(grad, boxes, None, *settings)
    assert got[..., 4:].isfinite().all()
    assert got[..., 4:].sum() > 0


def test_elements_beyond_two_to_the_31st():
    """Only the pages that are touched get memory: maps of 9 images with 2**28 elements each, a box in the last one."""
    images, channels, height, width = 9, 4, 8192, 8192
    shape = images, height, width, channels
    feature = torch.empty(shape, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    corner = feature[-1, :, -4:, -4:]
    corner.copy_(torch.randn(channels, 4, 4))
    boxes = torch.tensor([[8.0, width - 3.5, height - 3.0, width - 1.0, height - 1.5]], device=DEVICE)
    small = boxes - torch.tensor([8.0, width - 4, height - 4, width - 4, height - 4], device=DEVICE)
    settings = [1, 2], [1.0], 1, True, *CANONICAL
    out = op._triton([feature], boxes, None, *settings)
    assert_accurate(out, reference.multilevel_roi_align([corner[None].double()], small, None, *settings), torch.float16)
    del feature, corner

    # NumPy leaves zeros to the operating system, torch writes them
    zeros = torch.from_numpy(np.zeros(shape, np.float32)) if DEVICE == "cpu" else torch.zeros(shape, device=DEVICE)
    grads = zeros.permute(0, 3, 1, 2)
    grad = torch.randn(1, channels, 1, 2, device=DEVICE)
    kernels.roi_align_scatter([grads], grad, boxes, None, [1.0], [], 0.0, 1, True, channels_last=True)
    want = reference.multilevel_roi_align_backward(grad.double(), small, None, [1, channels, 4, 4], True, *settings)
    assert_accurate(grads[-1:, :, -4:, -4:], want[0], torch.float32)


def test_each_thread_moves_sixteen_bytes():
    for itemsize in (2, 4):
        for channels in (32, 64, 100, 256, 1024):
            for chosen, size in (
                (kernels.forward_config(channels, itemsize), itemsize),
                (kernels.scatter_config(channels), 4),
            ):
                assert chosen.block <= 256
                assert chosen.num_warps == 1 or chosen.block * size == chosen.num_warps * 512


def test_four_channels_are_added_at_once():
    found = aot.reports("cases_roi_align", "sm_90")
    for dtype in ("fp32", "fp16", "bf16"):
        (atomic,) = found[f"scatter-{dtype}"]["atomics"]
        assert atomic.endswith(".global.gpu.relaxed.add.v4.f32")
    assert all(report["atomics"] == [] for name, report in found.items() if not name.startswith("scatter"))


def step(features, boxes, valid, ratio=2) -> list[torch.Tensor]:
    """The output and its gradients in the features."""
    out = op.multilevel_roi_align(features, boxes, OUTPUT, SCALES, ratio, True, *CANONICAL, valid=valid)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), features)]


GRADIENTS = pytest.mark.parametrize("repeatable", [False, True], ids=["scatter", "gather"])


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [2, 0])
@GRADIENTS
def test_no_host_synchronisation(ratio, repeatable):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    features = [f.requires_grad_() for f in features]
    want = step(features, boxes, valid, ratio)
    torch.use_deterministic_algorithms(repeatable)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(features, boxes, valid, ratio)
        got = step(features, boxes, valid, ratio)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [2, 0])
@GRADIENTS
def test_cuda_graph_with_changed_inputs(ratio, repeatable):
    features, boxes, valid = inputs(torch.bfloat16, torch.channels_last)
    features = [f.requires_grad_() for f in features]
    torch.use_deterministic_algorithms(repeatable)
    try:
        step(features, boxes, valid, ratio)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(features, boxes, valid, ratio)
        with torch.no_grad():
            for feature in features:
                feature.normal_()
        boxes.copy_(boxes.flip(0, 1) + 1.5)
        valid.logical_not_()
        graph.replay()
        want = step(features, boxes, valid, ratio)
    finally:
        torch.use_deterministic_algorithms(False)
    for g, w in zip(got, want, strict=True):
        if repeatable:
            assert torch.equal(g, w)
        else:
            assert_accurate(g, w, torch.bfloat16)


@pytest.mark.gpu
@GRADIENTS
def test_opcheck(repeatable):
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    settings = OUTPUT, SCALES, 2, True, *CANONICAL
    grad = torch.randn(6, 6, *OUTPUT, device=DEVICE)
    torch.use_deterministic_algorithms(repeatable)
    try:
        for requires_grad in (False, True):
            maps = [f.detach().requires_grad_(requires_grad) for f in features]
            torch.library.opcheck(op._OP, (maps, boxes, valid, *settings))
        torch.library.opcheck(op._OP_BACKWARD, (grad, boxes, valid, flat_shapes(features), True, *settings))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_gather_repeats_bit_by_bit():
    features = [torch.randn(2, 64, 100 >> k, 168 >> k, device=DEVICE, dtype=torch.bfloat16) for k in range(2)]
    features = [f.contiguous(memory_format=torch.channels_last).requires_grad_() for f in features]
    corner = torch.rand(2, 512, 2, device=DEVICE) * 200
    boxes = torch.cat([corner, corner + torch.rand(2, 512, 2, device=DEVICE) * 60], 2)
    with deterministic():
        first, *others = (step(features, boxes, None) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for g, w in zip(first, step(features, boxes, None), strict=True):
        assert_accurate(g, w, torch.bfloat16)


@pytest.mark.gpu
def test_the_public_operator_launches_the_kernel():
    features, boxes, valid = inputs(torch.float32, torch.channels_last)
    settings = SCALES, 2, True, *CANONICAL
    got = op.multilevel_roi_align(features, boxes, OUTPUT, *settings, valid=valid)
    want = reference.multilevel_roi_align([f.double() for f in features], boxes, valid, OUTPUT, *settings)
    assert_accurate(got, want, torch.float32)
