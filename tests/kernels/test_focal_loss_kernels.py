"""The kernels of the focal loss against the reference in float64."""

import pytest
import torch
import triton
from support import DEVICE, assert_accurate

from fastrcnn.ops.reference import focal_loss as reference
from triton_kernels import focal_loss as kernels
from triton_kernels.launch import Launch, override


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(logits, labels, alpha=0.25, gamma=2.0):
    grad = torch.randn(logits.shape[:-2], device=DEVICE)
    got = kernels.focal_loss(logits, labels, alpha, gamma)
    assert got.dtype == torch.float32
    assert_accurate(got, reference.focal_loss(logits.double(), labels, alpha, gamma), torch.float32)
    got = kernels.focal_loss_backward(grad, logits, labels, alpha, gamma)
    assert (got.dtype, got.is_contiguous()) == (logits.dtype, True)
    want = reference.focal_loss_backward(grad.double(), logits.double(), labels, alpha, gamma)
    assert_accurate(got, want, logits.dtype)
    assert (got[labels < 0] == 0).all()


def sample(*shape, dtype=torch.float32, spread=4.0):
    labels = torch.randint(-1, shape[-1] + 1, shape[:-1], device=DEVICE)
    return (torch.randn(shape, device=DEVICE) * spread).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_equals_reference(gamma, dtype):
    for spread in (0.1, 4.0, 40.0):
        check(*sample(3, 11, 80, dtype=dtype, spread=spread), 0.3, gamma)


@pytest.mark.parametrize("shape", [(700, 1), (3, 91), (5, 1, 2), (2, 2, 33, 9), (2, 6, 600)])
def test_shapes(shape):
    check(*sample(*shape))


@pytest.mark.parametrize(("block", "warps"), [(64, 1), (1024, 4)])
def test_other_configurations(block, warps):
    with override("focal_loss", Launch(block, warps)):
        check(*sample(2, 13, 7))
        check(*sample(2, 3, 80), gamma=3.0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 4), (0, 3, 4)])
def test_nothing(shape):
    logits, labels = torch.zeros(shape, device=DEVICE), torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE)
    assert torch.equal(kernels.focal_loss(logits, labels, 0.25, 2.0), torch.zeros(shape[:-2], device=DEVICE))
    assert kernels.focal_loss_backward(torch.zeros(shape[:-2], device=DEVICE), logits, labels, 0.25, 2.0).shape == shape


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's
def test_ignored_rows_may_hold_anything():
    logits, labels = sample(2, 9, 5)
    labels[:, ::2] = -1
    logits[:, ::2] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.0], device=DEVICE)
    assert kernels.focal_loss(logits, labels, 0.25, 2.0).isfinite().all()
    check(torch.where(labels[..., None] < 0, 0, logits), labels)
    assert kernels.focal_loss_backward(torch.ones(2, device=DEVICE), logits, labels, 0.25, 2.0).isfinite().all()


def test_strides_and_integers():
    logits, labels = sample(2, 6, 8)
    check(logits.transpose(0, 1), labels.T)
    check(logits[:, ::2], labels[:, ::2].int())
    check(logits, labels.to(torch.int8))


def test_same_every_time():
    logits, labels = sample(2, 60, 80)
    first, second = (kernels.focal_loss(logits, labels, 0.25, 2.0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter can start at the last block")
def test_offsets_past_32_bits(monkeypatch):
    """The last rows of a tensor whose other pages are never touched."""
    from triton.runtime import interpreter

    torch.use_deterministic_algorithms(False)
    launch, classes = Launch(64, 1), 70
    rows = (1 << 31) // classes + 3
    blocks = triton.cdiv(rows * classes, launch.block)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (blocks - 1, 0, 0)))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # it would copy everything
    try:
        logits, out = (torch.empty(rows, classes, dtype=torch.float16) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"memory that is never touched is not granted: {error}")
    labels = torch.zeros(rows, dtype=torch.int64)
    logits[-2:], labels[-2:] = torch.randn(2, classes), torch.tensor([7, 0])
    grid = (1,)
    sums = torch.full((blocks,), float("nan"))
    arguments = (rows, rows * classes, blocks, 0.25, 2.0)
    constants = {"CLASSES": classes, "SQUARE": True, "BLOCK": launch.block}
    kernels.focal_loss_kernel[grid](logits, labels, sums, *arguments, **constants)
    last = rows * classes - (blocks - 1) * launch.block  # elements in the last block, of one row
    assert 0 < last <= classes
    tail = logits[-1:, -last:].double()
    torch.testing.assert_close(sums[-1].double(), reference.focal_loss(tail, labels[-1:], 0.25, 2.0))
    kernels.focal_loss_backward_kernel[grid](torch.ones(()), logits, labels, out, *arguments, **constants)
    want = reference.focal_loss_backward(torch.ones(()).double(), tail, labels[-1:], 0.25, 2.0)
    assert_accurate(out[-1:, -last:], want, torch.float16)


def test_configuration():
    assert kernels.config(100 * 168 * 9 * 80, 8) == Launch(4096, 8)
    assert kernels.config(5, 1) == Launch(512, 1)
