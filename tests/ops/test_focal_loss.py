"""Focal loss against torchvision's and its formula."""

import pytest
import torch
import torchvision.ops as theirs
from support import DEVICE, assert_accurate

from fastrcnn import ops
from fastrcnn.ops.reference import focal_loss as reference


def sample(*shape, dtype=torch.float64, spread=4.0):
    """Logits [..., N, C] and labels of all kinds, some of them without a channel."""
    labels = torch.randint(-2, shape[-1] + 2, shape[:-1], device=DEVICE)
    return (torch.randn(shape, device=DEVICE, dtype=dtype) * spread), labels


def by_torchvision(logits, labels, alpha, gamma):
    """The sum over the rows that count, with dense targets."""
    dense = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1] + 2)[..., 1:-1].to(logits.dtype)
    counts = labels >= 0
    loss = theirs.sigmoid_focal_loss(logits, dense, alpha, gamma, reduction="none")
    return torch.where(counts[..., None], loss, 0).sum((-2, -1))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (1.0, 1.5), (0.0, 5.0)])
@pytest.mark.parametrize("shape", [(40, 7), (3, 20, 80), (2, 3, 5, 1)])
def test_is_torchvisions(shape, alpha, gamma):
    logits, labels = sample(*shape)
    logits.requires_grad_()
    got, want = ops.focal_loss(logits, labels, alpha, gamma), by_torchvision(logits, labels, alpha, gamma)
    assert got.shape == shape[:-2]
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((loss * weights).sum(), logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gamma", [2.0, 0.7])
def test_gradcheck(gamma):
    logits, labels = sample(2, 5, 3)
    torch.autograd.gradcheck(lambda x: ops.focal_loss(x, labels, 0.3, gamma), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 4.0, 30.0])
def test_accuracy(dtype, spread):
    logits, labels = sample(60, 80, dtype=dtype, spread=spread)
    logits -= 4.6  # where training begins
    got = ops.focal_loss(logits.requires_grad_(), labels)
    assert got.dtype == torch.float32
    assert_accurate(got, reference.focal_loss(logits.double(), labels, 0.25, 2.0), torch.float32)
    (gradient,) = torch.autograd.grad(got, logits)
    assert gradient.dtype == dtype
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    assert_accurate(gradient, reference.focal_loss_backward(one, logits.double(), labels, 0.25, 2.0), dtype)


def test_extremes():
    """No overflow, no log of 0, and what stands in an ignored row does not count."""
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [float("nan"), float("inf")]], device=DEVICE, requires_grad=True)
    loss = ops.focal_loss(logits, torch.tensor([1, 1, -1], device=DEVICE))
    torch.testing.assert_close(loss, torch.tensor(0.25 * 1e4 + 0.75 * 1e4, device=DEVICE))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-0.25, 0.75], [0.0, 0.0]], device=DEVICE))


def test_channels_last_maps_and_labels_of_any_integers():
    maps = torch.randn(2, 3 * 5, 4, 6, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    rows = maps.permute(0, 2, 3, 1).reshape(2, -1, 5)
    labels = torch.randint(-1, 6, (2, 72), device=DEVICE)
    losses = [ops.focal_loss(rows, labels.to(dtype)) for dtype in (torch.int64, torch.int32, torch.int8)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    losses[0].sum().backward()
    assert maps.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(()).long(), {}, r"shapes \[..., N, C\] and \[..., N\], got \[3\] and \[\]"),
        (torch.zeros(4, 3), torch.zeros(3).long(), {}, r"got \[4, 3\] and \[3\]"),
        (torch.zeros(4, 3), torch.zeros(4), {}, r"labels must be integers, got torch.float32"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), {}, r"logits must be of floating point"),
        (torch.zeros(4, 3), torch.zeros(4).long(), {"alpha": -1}, r"alpha \(-1\) must be from 0 to 1"),
        (torch.zeros(4, 3), torch.zeros(4).long(), {"gamma": -1}, r"gamma \(-1\) not negative"),
    ],
)
def test_errors(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        ops.focal_loss(logits, labels, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 2.0), (0.6, 0.0)])
def test_dense_is_torchvisions(alpha, gamma, reduction):
    inputs, targets = torch.randn(6, 5, device=DEVICE) * 5, torch.rand(6, 5, device=DEVICE)
    inputs[0], targets[:3] = inputs[0] * 20, targets[:3].round()
    found = []
    for module in (ops, theirs):
        x = inputs.clone().requires_grad_()
        loss = module.sigmoid_focal_loss(x, targets, alpha=alpha, gamma=gamma, reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss.sum(), x)))
    torch.testing.assert_close(*found)
    half = ops.sigmoid_focal_loss(inputs.half(), targets.half(), alpha, gamma, reduction)
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"alpha": 2.0}, ValueError),
        ({"alpha": -0.5}, ValueError),
        ({"reduction": "max"}, ValueError),
        ({"targets": torch.zeros(2, 3)}, ValueError),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, RuntimeError),
    ],
)
def test_dense_has_torchvisions_errors(arguments, error):
    arguments = {"inputs": torch.zeros(2, 2), "targets": torch.zeros(2, 2)} | arguments
    for module in (ops, theirs):
        with pytest.raises(error):
            module.sigmoid_focal_loss(**arguments)
