"""The matching kernels against the reference: equal to the last bit."""

import pytest
import torch
import triton
from support import DEVICE

from fastrcnn.ops.reference import match as reference
from triton_kernels import match as kernels
from triton_kernels.launch import Launch, override

THRESHOLDS = [(0.6, 0.3), (0.5, 0.0), (-1.0, -2.0)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN boxes


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN or of the largest integers, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_boxes(*shape, integer=False, dtype=torch.float32):
    corner, side = torch.rand(*shape, 2) * 30, torch.rand(*shape, 2) * 20 + 1
    if integer:  # many exact ties
        corner, side = (corner / 4).round(), (side / 4).ceil()
    return torch.cat((corner, corner + side), -1).to(DEVICE, dtype)


def spoiled(boxes):
    """With NaN, infinite, inverted, empty and equal boxes among them."""
    rows = boxes.view(-1, 4)
    for value in (float("nan"), float("inf"), -float("inf"), 0.0, 60000.0):
        rows[torch.randint(len(rows), (len(rows) // 20 + 1,)), torch.randint(4, (1,))] = value
    inverted, empty, equal = torch.randint(len(rows), (3, len(rows) // 20 + 1))
    rows[inverted] = rows[inverted][:, [2, 3, 0, 1]]
    rows[inverted[:1]] = rows[inverted[:1]][:, [2, 1, 0, 3]]  # of negative area
    rows[empty, 2:] = rows[empty, :2]
    rows[equal] = rows[0].clone()
    return boxes


def check(boxes, gt, valid, high, low, low_quality):
    got = kernels.match_boxes(boxes, gt, valid, high, low, low_quality)
    want = reference.match_boxes(boxes, gt, valid, high, low, low_quality)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    return got


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(("shared", "integer"), [(False, False), (True, True)])
def test_equals_reference(shared, integer, low_quality):
    for high, low in THRESHOLDS:
        boxes = random_boxes(*([] if shared else [3]), 70, integer=integer)
        gt, valid = random_boxes(3, 9, integer=integer), torch.rand(3, 9, device=DEVICE) > 0.5
        valid[1] = False
        gt[0, 3], valid[0, 3] = torch.tensor([90.0, 90, 95, 95]), True  # touches nothing: all boxes tie at IoU 0
        matched, _ = check(boxes, gt, valid, high, low, low_quality)
        if high >= 0:
            assert (matched[1] == -1).all()
            assert (matched[0] >= 0).all() or not low_quality


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_boxes(dtype, low_quality):
    for seed in range(3):
        torch.manual_seed(seed)
        boxes, gt = random_boxes(2, 90, integer=seed % 2, dtype=dtype), random_boxes(2, 12, dtype=dtype)
        valid = torch.rand(2, 12, device=DEVICE) > 0.3
        check(spoiled(boxes), gt if seed < 1 else spoiled(gt), valid, 0.5, 0.4, low_quality)
    check(torch.full_like(boxes, float("nan")), gt, valid, 0.5, 0.4, low_quality)
    check(boxes, torch.full_like(gt, float("nan")), valid, 0.5, 0.4, low_quality)


def test_negative_zero():
    """An inverted ground truth makes a negative union, and so IoUs of −0, which are as good as 0: all boxes tie."""
    gt, valid = (
        torch.tensor([[[100.0, 100, 50, 150]]], device=DEVICE),
        torch.ones(1, 1, dtype=torch.bool, device=DEVICE),
    )
    matched, _ = check(random_boxes(40), gt, valid, 0.5, 0.3, True)
    assert (matched == 0).all()


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("anchors", [0, 1, 63, 64, 65])
def test_sizes(anchors, low_quality):
    for batch, slots in ((0, 3), (1, 0), (1, 1), (2, 40)):
        boxes, gt = random_boxes(batch, anchors), random_boxes(batch, slots)
        valid = torch.rand(batch, slots, device=DEVICE) > 0.9
        if slots:
            valid[:1, -1] = True
        check(boxes, gt, valid, 0.5, 0.3, low_quality)


@pytest.mark.parametrize(("block", "warps"), [(64, 1), (32, 2)])
def test_other_configurations(block, warps):
    boxes, gt, valid = random_boxes(2, 140, integer=True), random_boxes(2, 9), torch.rand(2, 9, device=DEVICE) > 0.4
    with override("match", Launch(block, warps)):
        check(boxes, gt, valid, 0.5, 0.4, True)


def test_dtypes_and_strides():
    boxes, gt = random_boxes(40, 2, dtype=torch.float16).transpose(0, 1), random_boxes(2, 4).mT.contiguous().mT
    valid = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)[:, ::2]
    check(boxes, gt, valid, 0.5, 0.3, True)
    check(random_boxes(1, 40).expand(2, 40, 4), gt[:, :1].expand(2, 4, 4), valid, 0.5, 0.3, True)
    check(random_boxes(41)[1:], gt, valid, 0.5, 0.3, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter can start at the last block")
def test_offsets_past_32_bits(monkeypatch):
    """The last boxes of tensors whose other pages are never touched."""
    from triton.runtime import interpreter

    torch.use_deterministic_algorithms(False)
    count, launch = (1 << 28) + 35, Launch(64, 1)
    last, rest = 2 * -(-count // launch.block) - 1, count % launch.block
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (last, 0, 0)))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # it would copy everything
    monkeypatch.setattr(triton, "cdiv", lambda a, b: 1)
    try:
        boxes, _ = torch.empty(2, count, 4, dtype=torch.float16), torch.empty(2, count, 2)
    except RuntimeError as error:
        pytest.skip(f"memory that is never touched is not granted: {error}")
    boxes[1, -rest:] = random_boxes(rest)
    gt, valid = random_boxes(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with override("match", launch):
        matched, iou = kernels.match_boxes(boxes, gt, valid, 0.9, 0.2, True)
    want = reference.match_boxes(boxes[1:, -rest:], gt[1:], valid[1:], 0.9, 0.2, True)
    torch.testing.assert_close((matched[1:, -rest:], iou[1:, -rest:]), want, rtol=0, atol=0)
    assert (want[0] >= 0).any()


def test_configuration():
    assert kernels.config(8 * 267_000, 64).block == 128
    assert kernels.config(8 * 2100, 64).block == kernels.config(1, 1).block == 32
