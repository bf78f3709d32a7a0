"""ROIAlign on the CPU against torchvision's, and under everything that may call an operator."""

import copy
import importlib
import math

import pytest
import torch
import torch._dynamo.testing
import torchvision
from support import assert_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrcnn.ops import MultiScaleRoIAlign, RoIAlign, multilevel_roi_align, roi_align
from fastrcnn.ops.reference import roi_align as reference

module = importlib.import_module("fastrcnn.ops.roi_align")  # the package's attribute of this name is the function

OP = torch.ops.fastrcnn.multilevel_roi_align.default
OP_BACKWARD = torch.ops.fastrcnn.multilevel_roi_align_backward.default
OP_SINGLE = torch.ops.fastrcnn.roi_align.default
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCALES = [1 / 4, 1 / 8, 1 / 16]
SHAPES = [(16, 20), (8, 10), (4, 5)]  # of an image of 64 × 80
SETTINGS = [3, 2], SCALES, 2, False, 24.0, 3  # boxes from 24 pixels on belong to the second level, from 48 to the third


def boxes_in(width: int, height: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    """Random boxes of very different sizes, some of them partly outside."""
    corner = torch.rand(*shape, 2, dtype=dtype) * torch.tensor([width, height], dtype=dtype) - 4
    side = torch.exp(torch.rand(*shape, 2, dtype=dtype) * math.log(max(width, height)))
    return torch.cat([corner, corner + side], -1)


def rois_in(width: int, height: int, images: int, count: int, dtype=torch.float32) -> torch.Tensor:
    image = torch.randint(0, images, (count, 1)).to(dtype)
    return torch.cat([image, boxes_in(width, height, count, dtype=dtype)], 1)


def pyramid(*, images=2, channels=5, dtype=torch.float32, channels_last=True, requires_grad=False):
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(images, channels, h, w, dtype=dtype).contiguous(memory_format=format_) for h, w in SHAPES]
    return [m.requires_grad_(requires_grad) for m in maps]


def flat_shapes(maps) -> list[int]:
    return [size for m in maps for size in m.shape]


# ---- against torchvision


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3, 0, -1])
@pytest.mark.parametrize("count", [1, 60], ids=["few", "many"])
@pytest.mark.parametrize("format_", FORMATS)
def test_equal_to_torchvision(format_, count, ratio, aligned):
    """Contiguous maps take another path on CPUs if there are few boxes or few channels."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        channels = module._FEW_CHANNELS + 1
        x = torch.randn(2, channels, 20, 23, dtype=dtype).contiguous(memory_format=FORMATS[format_]).requires_grad_()
        rois = rois_in(60, 50, 2, count, dtype)
        arguments = rois, (3, 4), 0.4, ratio, aligned
        want, got = torchvision.ops.roi_align(x, *arguments), roi_align(x, *arguments)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
        assert got.is_contiguous(memory_format=FORMATS[format_])
        plain = reference.multilevel_roi_align([x], rois, None, (3, 4), [0.4], ratio, aligned, 224.0, 4)
        torch.testing.assert_close(plain, want, rtol=0, atol=tolerance)

        grad = torch.randn_like(want)
        (want_grad,) = torch.autograd.grad(want, x, grad)
        (got_grad,) = torch.autograd.grad(got, x, grad)
        torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=10 * tolerance)
        assert got_grad.stride() == x.stride()
        (by_autograd,) = torch.autograd.grad(plain, x, grad)
        torch.testing.assert_close(by_autograd, want_grad, rtol=0, atol=10 * tolerance)
        shape, rest = list(x.shape), ((3, 4), [0.4], ratio, aligned, 224.0, 4)
        channels_last = format_ == "channels_last"
        (by_formula,) = reference.multilevel_roi_align_backward(grad, rois, None, shape, channels_last, *rest)
        torch.testing.assert_close(by_formula, want_grad, rtol=0, atol=10 * tolerance)


def test_lists_of_boxes_modules_and_defaults():
    x, boxes = torch.randn(2, 3, 12, 15), [boxes_in(15, 12, 4), boxes_in(15, 12, 0)]
    torch.testing.assert_close(roi_align(x, boxes, 5), torchvision.ops.roi_align(x, boxes, 5))
    ours, theirs = RoIAlign((2, 3), 0.5, 2, True), torchvision.ops.RoIAlign((2, 3), 0.5, 2, True)
    torch.testing.assert_close(ours(x, boxes), theirs(x, boxes))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format_", FORMATS)
def test_half_precision(dtype, format_):
    """Computed in float32: as accurate as the rounding of the result, forward and backward."""
    x = torch.randn(2, 5, 12, 15).to(dtype).contiguous(memory_format=FORMATS[format_]).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for count in (1, 30):
        rois = rois_in(15, 12, 2, count)
        got = roi_align(x, rois, 3, 1.0, 2, True)
        want = torchvision.ops.roi_align(wide, rois.double(), 3, 1.0, 2, True)
        assert_accurate(got, want, dtype)
        grad = torch.randn_like(got)
        assert_accurate(*torch.autograd.grad(got, x, grad), *torch.autograd.grad(want, wide, grad.double()), dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
def test_multi_scale_module_equals_torchvision(ratio, channels_last):
    maps = [torch.randn(2, 3, 96 >> k, 128 >> k, dtype=torch.float64, requires_grad=True) for k in range(4)]
    if channels_last:
        maps = [m.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps]
    x = dict(zip(("a", "b", "c", "d"), maps, strict=True)) | {"unused": torch.randn(1)}
    boxes = [boxes_in(512, 384, 30, dtype=torch.float64), boxes_in(512, 384, 7, dtype=torch.float64)]
    arguments = ["a", "b", "c", "d"], (3, 2), ratio
    ours, theirs = MultiScaleRoIAlign(*arguments), torchvision.ops.MultiScaleRoIAlign(*arguments)
    sizes = [(384, 500), (380, 512)]
    got, want = ours(x, boxes, sizes), theirs(x, boxes, sizes)
    torch.testing.assert_close(got, want)
    assert ours.scales == theirs.scales
    assert repr(ours) == repr(theirs)
    grad = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, maps, grad), torch.autograd.grad(want, maps, grad), strict=True):
        torch.testing.assert_close(g, w)


def test_levels_are_those_of_torchvision():
    sides = torch.tensor([1, 28, 56, 111, 112, 113, 223, 224, 225, 447, 448, 449, 895, 896, 4000], dtype=torch.float32)
    boxes = torch.cat([sides[:, None] * torch.tensor([0, 0, 1, 1]), boxes_in(2000, 2000, 3000)])
    for finest, coarsest in ((2, 5), (3, 7), (4, 4)):
        scales = [2.0**-k for k in range(finest, coarsest + 1)]
        shapes = [(1, 1, 9, 9)] * len(scales)
        regions = reference.locate(shapes, boxes[None], None, (2, 2), scales, 1, False, 224.0, 4)
        want = torchvision.ops.poolers.LevelMapper(finest, coarsest)([boxes])
        assert torch.equal(regions.level, want)


def test_padded_boxes_are_those_of_each_image():
    maps, boxes = pyramid(), boxes_in(80, 64, 2, 9)
    got = multilevel_roi_align(maps, boxes, *SETTINGS)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(9)[:, None], boxes.flatten(0, 1)], 1)
    assert torch.equal(got, multilevel_roi_align(maps, rois, *SETTINGS))
    theirs = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], (3, 2), 2, canonical_scale=24, canonical_level=3)
    want = theirs({str(i): m for i, m in enumerate(maps)}, list(boxes), [(64, 80)] * 2)
    torch.testing.assert_close(got, want)


# ---- what the padded flow adds


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
def test_unusable_boxes_give_zeros_and_no_gradient(ratio, channels_last):
    maps = pyramid(channels_last=channels_last, requires_grad=True)
    boxes = boxes_in(80, 64, 2, 6)
    boxes[0, 1, 2], boxes[1, 2, 0], boxes[1, 3] = float("nan"), float("inf"), -float("inf")
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4] = valid[1, 0] = False
    good = valid.flatten() & boxes.flatten(0, 1).isfinite().all(1)
    settings = [3, 2], SCALES, ratio, True, 24.0, 3
    rois = torch.cat([torch.arange(2.0).repeat_interleave(6)[:, None], boxes.flatten(0, 1)], 1)
    want = multilevel_roi_align(maps, rois[good], *settings)
    got = multilevel_roi_align(maps, boxes, *settings, valid=valid)
    torch.testing.assert_close(got[good], want)
    assert not got[~good].any()
    plain = reference.multilevel_roi_align(maps, boxes, valid, *settings)
    torch.testing.assert_close(plain, got)
    grad = torch.randn_like(got)
    wanted = torch.autograd.grad(want, maps, grad[good])
    for found in (got, plain):
        for g, w in zip(torch.autograd.grad(found, maps, grad), wanted, strict=True):
            torch.testing.assert_close(g, w)


def test_images_that_do_not_exist_give_zeros():
    maps = pyramid(requires_grad=True)
    rois = torch.tensor([[2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [float("nan"), 0, 0, 9, 9], [1, 0, 0, 9, 9]])
    for pool in (multilevel_roi_align, lambda m, r, *s: reference.multilevel_roi_align(m, r, None, *s)):
        out = pool(maps, rois, *SETTINGS)
        assert not out[:3].any()
        assert out[3].all()
        torch.autograd.grad(out.sum(), maps)


def test_adaptive_grids_are_limited_by_the_map():
    """A box of a million pixels would take 10¹⁰ samples; one per pixel and bin is enough. torchvision takes all."""
    x = torch.randn(1, 3, 10, 200)
    rois = torch.tensor([[0, -2e6, -2e6, 3e6, 3e6], [0, 2, 2, 190, 9]])
    got = roi_align(x, rois, 2)
    torch.testing.assert_close(got, reference.multilevel_roi_align([x], rois, None, (2, 2), [1.0], -1, False, 224.0, 4))
    torch.testing.assert_close(got[1:], torchvision.ops.roi_align(x, rois[1:], 2))


@pytest.mark.parametrize("ratio", [2, 0])
def test_pieces_do_not_change_the_result(monkeypatch, ratio):
    maps, boxes = pyramid(requires_grad=True), boxes_in(80, 64, 2, 20)
    settings = [3, 2], SCALES, ratio, False, 24.0, 3
    want = multilevel_roi_align(maps, boxes, *settings)
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, maps, grad)
    monkeypatch.setattr(module, "_TAPS_PER_CHUNK", 200)
    monkeypatch.setattr(module, "_TAPS_PER_SORT", 200)
    got = multilevel_roi_align(maps, boxes, *settings)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, maps, grad), want_grads, strict=True):
        torch.testing.assert_close(g, w)


# ---- edges


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_inputs(ratio, channels_last):
    settings = [3, 2], SCALES, ratio, False, 24.0, 3
    for images, count in ((2, 0), (0, 3), (0, 0)):
        maps = pyramid(images=images, channels_last=channels_last, requires_grad=True)
        for pool in (multilevel_roi_align, lambda m, b, *s: reference.multilevel_roi_align(m, b, None, *s)):
            out = pool(maps, torch.zeros(images, count, 4), *settings)
            assert out.shape == (0, 5, 3, 2)
            assert all(not g.any() for g in torch.autograd.grad(out.sum(), maps))
    x = torch.randn(1, 3, 8, 8)
    assert MultiScaleRoIAlign(["a"], 2, ratio)({"a": x}, [torch.zeros(0, 4)], [(8, 8)]).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("ratio", [2, 0])
def test_empty_feature_maps(ratio):
    maps = pyramid(images=1)
    maps[2] = maps[2][:, :, :0]
    boxes = torch.tensor([[[0.0, 0.0, 60.0, 60.0], [0.0, 0.0, 8.0, 8.0]]])
    settings = [3, 2], SCALES, ratio, False, 24.0, 3
    for pool in (multilevel_roi_align, lambda m, b, *s: reference.multilevel_roi_align(m, b, None, *s)):
        out = pool(maps, boxes, *settings)
        assert not out[0].any()
        assert out[1].any()
        no_channels = [m[:, :0].requires_grad_() for m in maps]
        out = pool(no_channels, boxes, *settings)
        assert out.shape == (2, 0, 3, 2)
        assert [g.shape for g in torch.autograd.grad(out.sum(), no_channels)] == [m.shape for m in no_channels]


def test_inputs_that_are_not_contiguous():
    rois = rois_in(15, 12, 2, 30)
    for x in (
        torch.randn(2, 5, 24, 30)[:, :, ::2, ::2],
        torch.randn(2, 10, 12, 15).contiguous(memory_format=torch.channels_last)[:, ::2],
        torch.randn(2, 10, 14, 15).contiguous(memory_format=torch.channels_last)[:, 2:7, 1:13],
        torch.randn(1, 5, 12, 15).expand(2, 5, 12, 15),
        torch.randn(12, 15, 2, 5).permute(2, 3, 0, 1),
    ):
        got = roi_align(x, rois, (3, 4), 1.0, 2)
        torch.testing.assert_close(got, torchvision.ops.roi_align(x, rois, (3, 4), 1.0, 2))
        assert got.stride() == _meta_of(x, rois).stride()
    x = torch.randn(2, 5, 12, 15, requires_grad=True)
    out, strided = roi_align(x, rois.t().contiguous().t(), 3, 1.0, 2), roi_align(x, rois, 3, 1.0, 2)
    assert torch.equal(out, strided)
    grad = torch.randn(30, 3, 3, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        *(torch.autograd.grad(o, x, g, retain_graph=True)[0] for o, g in ((out, grad), (out, grad.contiguous())))
    )


def _meta_of(x, rois):
    with FakeTensorMode() as mode:
        return roi_align(mode.from_tensor(x), mode.from_tensor(rois), (3, 4), 1.0, 2)


def test_errors():
    maps, boxes = pyramid(), boxes_in(80, 64, 2, 4)
    x = maps[0]
    for ops in (torchvision.ops, module):
        with pytest.raises(AssertionError, match="boxes"):
            ops.roi_align(x, torch.zeros(3, 4), 2)
        with pytest.raises(AssertionError, match="boxes"):
            ops.roi_align(x, [torch.zeros(3, 5), torch.zeros(3, 5)], 2)
        with pytest.raises(AssertionError, match="boxes"):
            ops.roi_align(x, 1.0, 2)
        with pytest.raises(ValueError, match="images list should not be empty"):
            ops.MultiScaleRoIAlign(["a"], 2, 2)({"a": x}, [torch.zeros(1, 4)], [])
    for arguments, message in (
        ((maps[:2], boxes, *SETTINGS), "got 2, 3"),
        (([], boxes, 2, [], 2, False), "got 0, 0"),
        ((maps, boxes, 2, SCALES[::-1], 2, False), "scales must be positive and not rise"),
        (([x, x.double()], boxes, 2, SCALES[:2], 2, False), r"features\[1\] is torch.float64"),
        (([x, x[:, :3]], boxes, 2, SCALES[:2], 2, False), r"features\[1\].*\(2, 3, 16, 20\)"),
        ((maps, boxes[0], *SETTINGS), r"boxes must be \[B, R, 4\] or \[K, 5\]: got \(4, 4\)"),
        ((maps, boxes[:1], *SETTINGS), "boxes are of 1 images and features of 2"),
        ((maps, boxes, *SETTINGS, torch.ones(2, 4)), r"valid must be bool \(2, 4\)"),
        (([m.int() for m in maps], boxes, *SETTINGS), r"features\[0\] must be of floating point, got torch.int32"),
        ((maps, boxes.long(), *SETTINGS), "boxes must be of floating point, got torch.int64"),
        ((maps, boxes.to("meta"), *SETTINGS), r"boxes must be on the device of features\[0\], cpu, got meta"),
        (([*maps[:2], maps[2].to("meta")], boxes, *SETTINGS), r"features\[2\] must be on the device"),
    ):
        with pytest.raises(ValueError, match=message):
            multilevel_roi_align(*arguments)
    rois = rois_in(20, 16, 2, 3)
    for arguments, message in (
        ((x[0], rois, 2), r"input must be \[N, C, H, W\]: got \(5, 16, 20\)"),
        ((x.int(), rois, 2), "input must be of floating point, got torch.int32"),
        ((x, rois.int(), 2), "boxes must be of floating point, got torch.int32"),
        ((x, [rois[:1, 1:].int(), rois[1:, 1:].int()], 2), "boxes must be of floating point, got torch.int32"),
        ((x, rois.to("meta"), 2), "boxes must be on the device of input, cpu, got meta"),
    ):
        with pytest.raises(RuntimeError, match=message):
            roi_align(*arguments)
    maps, grad = pyramid(requires_grad=True), torch.ones(8, 5, 3, 2, requires_grad=True)
    first, *_ = torch.autograd.grad(multilevel_roi_align(maps, boxes, *SETTINGS), maps, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- gradients, compilers, tracers


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(ratio, channels_last):
    maps = [
        torch.randn(2, 2, 5 >> k, 6 >> k, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        .requires_grad_()
        for k in range(2)
    ]
    boxes = boxes_in(24, 20, 2, 3, dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    settings = [2, 2], SCALES[:2], ratio, True, 12.0, 3
    assert torch.autograd.gradcheck(lambda *m: OP(list(m), boxes, valid, *settings), maps)
    assert torch.autograd.gradcheck(lambda *m: reference.multilevel_roi_align(list(m), boxes, valid, *settings), maps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    valid = torch.rand(2, 4) < 0.7
    for channels in (5, 1):
        for requires_grad in (False, True):
            maps = pyramid(channels=channels, channels_last=channels_last, requires_grad=requires_grad)
            torch.library.opcheck(OP, (maps, boxes_in(80, 64, 2, 4), valid, *SETTINGS))
        torch.library.opcheck(OP_SINGLE, (maps[0], rois_in(20, 16, 2, 3), 1.0, 3, 2, 2, False))
        grad = torch.randn(8, channels, 3, 2)
        arguments = boxes_in(80, 64, 2, 4), valid, flat_shapes(maps), channels_last
        torch.library.opcheck(OP_BACKWARD, (grad, *arguments, *SETTINGS))
    maps = pyramid(channels_last=channels_last, requires_grad=True)
    torch.library.opcheck(OP, (maps, rois_in(80, 64, 2, 7), None, *SETTINGS))
    torch.library.opcheck(OP, (maps, rois_in(80, 64, 2, 0), None, *SETTINGS))


def pool_twice(maps, boxes, valid):
    single = roi_align(maps[0], [boxes[0], boxes[1]], (2, 3), SCALES[0], 2)
    return single.square().sum() + multilevel_roi_align(maps, boxes, *SETTINGS, valid=valid).square().sum()


def test_compile():
    maps, boxes, valid = pyramid(requires_grad=True), boxes_in(80, 64, 2, 7), torch.rand(2, 7) < 0.7
    want = pool_twice(maps, boxes, valid)
    got = torch.compile(pool_twice, fullgraph=True, backend="aot_eager")(maps, boxes, valid)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, maps), torch.autograd.grad(want, maps), strict=True):
        torch.testing.assert_close(g, w)
        assert g.is_contiguous(memory_format=torch.channels_last)


def test_modules_compile():
    maps, boxes = pyramid(requires_grad=True), list(boxes_in(80, 64, 2, 7))
    features = dict(zip("abc", maps, strict=True))
    multi_scale = MultiScaleRoIAlign(list("abc"), (3, 2), 2, canonical_scale=24, canonical_level=3)
    for module_, arguments in (
        (RoIAlign((3, 2), 0.25, 2, True), (maps[0], boxes)),
        (multi_scale, (features, boxes, [(64, 80), (60, 70)])),
    ):
        compiled = torch.compile(copy.deepcopy(module_), fullgraph=True, backend="aot_eager")
        want = module_(*arguments)
        want_grad = torch.autograd.grad(want.square().sum(), maps[0])
        for _ in range(2):  # the first call of the multi-scale module also sets its scales
            got = compiled(*arguments)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got.square().sum(), maps[0]), want_grad)
    assert compiled.scales == SCALES


def test_compile_with_changing_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool_twice, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for count, h, w in ((7, 24, 40), (9, 32, 48), (11, 56, 72)):
        maps = [torch.randn(2, 5, h >> k, w >> k).contiguous(memory_format=torch.channels_last) for k in range(3)]
        maps = [m.requires_grad_() for m in maps]
        boxes, valid = boxes_in(4 * w, 4 * h, 2, count), torch.rand(2, count) < 0.7
        got, want = compiled(maps, boxes, valid), pool_twice(maps, boxes, valid)
        torch.testing.assert_close(got, want)
        for g, wanted in zip(torch.autograd.grad(got, maps), torch.autograd.grad(want, maps), strict=True):
            torch.testing.assert_close(g, wanted)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, frames


def test_fake_tensors_forward_and_backward():
    real, boxes, valid = pyramid(requires_grad=True), boxes_in(80, 64, 2, 7), torch.rand(2, 7) < 0.7
    with FakeTensorMode() as mode:
        maps = [mode.from_tensor(m) for m in real]
        for ratio in (2, 0):
            settings = [3, 2], SCALES, ratio, False, 24.0, 3
            out = multilevel_roi_align(maps, mode.from_tensor(boxes), *settings, valid=mode.from_tensor(valid))
            assert out.shape == (14, 5, 3, 2)
            for grad, m in zip(torch.autograd.grad(out.sum(), maps), maps, strict=True):
                assert grad.shape == m.shape
                assert grad.stride() == m.stride()
        plain = reference.multilevel_roi_align(maps, mode.from_tensor(boxes), mode.from_tensor(valid), *SETTINGS)
        assert plain.shape == (14, 5, 3, 2)


def test_export_to_one_node_and_its_decomposition():
    class Model(torch.nn.Module):
        def forward(self, a, b, c, boxes, valid):
            return multilevel_roi_align([a, b, c], boxes, *SETTINGS, valid=valid)

    inputs = *pyramid(), boxes_in(80, 64, 2, 7), torch.rand(2, 7) < 0.7
    program = torch.export.export(Model(), inputs)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["fastrcnn.multilevel_roi_align.default"]
    lowered = program.run_decompositions({OP: reference.multilevel_roi_align})
    assert all("fastrcnn" not in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(*inputs), Model()(*inputs))
