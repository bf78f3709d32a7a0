"""Focal loss: cross-entropy of independent classes in which what is easy counts little (Lin et al. 2017)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrcnn.ops import _library
from fastrcnn.ops.reference import focal_loss as reference


def _fake(logits, labels, alpha, gamma):
    return logits.new_empty(logits.shape[:-2], dtype=torch.promote_types(logits.dtype, torch.float32))


def _backward_fake(grad, logits, labels, alpha, gamma):
    return logits.new_empty(logits.shape)


def _launcher(name: str):
    """The kernels compute in float32: float64 is left to the definition."""

    def launch(*args):
        from triton_kernels import focal_loss as kernels

        wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        return getattr(reference if wide else kernels, name)(*args)

    return launch


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma):
        ctx.save_for_backward(logits, labels)
        ctx.rest = alpha, gamma
        with _library.below_autograd():
            return FOCAL_LOSS(logits, labels, alpha, gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return FOCAL_LOSS_BACKWARD(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


def _autograd(logits, *rest):
    if _library.needs_grad(logits):
        return _FocalLoss.apply(logits, *rest)
    with _library.below_autograd():
        return FOCAL_LOSS(logits, *rest)


FOCAL_LOSS = _library.register(
    "focal_loss(Tensor logits, Tensor labels, float alpha, float gamma) -> Tensor",
    reference=reference.focal_loss,
    fake=_fake,
    triton=_launcher("focal_loss"),
    autograd=_autograd,
)
FOCAL_LOSS_BACKWARD = _library.register(
    "focal_loss_backward(Tensor grad, Tensor logits, Tensor labels, float alpha, float gamma) -> Tensor",
    reference=reference.focal_loss_backward,
    fake=_backward_fake,
    triton=_launcher("focal_loss_backward"),
)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum [...] of the focal loss of logits [..., N, C], for one class out of C, or none, per row: a scalar for [N, C].

    labels: integers [..., N], 0 background, 1 … C the class of channel label − 1, negative: the row is ignored. With p
    the probability given to the truth, an element costs −w·(1 − p)^gamma·log(p), w = alpha for the class of a row and
    1 − alpha for all others. Differentiable once in logits, the gradient in their dtype. float16 and bfloat16 are
    computed in float32, and the sum is float32 (float64 for such logits); nothing as large as the logits is kept but
    they themselves, and the order of adding is fixed. ValueError if the shapes do not fit, logits are not of floating
    point, labels not integers, the devices differ, alpha is not from 0 to 1 or gamma is negative.
    Source: Focal Loss for Dense Object Detection (arXiv 1708.02002), with integer labels as in maskrcnn-benchmark.
    """
    _library.check_floating(logits=logits)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    _library.check_one_device(logits=logits, labels=labels)
    if logits.dim() < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits and labels must have the shapes [..., N, C] and [..., N], "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha ({alpha}) must be from 0 to 1 and gamma ({gamma}) not negative")
    return FOCAL_LOSS(logits, labels, alpha, gamma)


def _sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction):
    cost = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p = inputs.sigmoid()
    loss = cost * (p + targets - 2 * p * targets) ** gamma  # 1 − the probability given to the target
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


_SIGMOID_FOCAL_LOSS = _library.register_composite(
    "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha, float gamma, str reduction) -> Tensor",
    _sigmoid_focal_loss,
)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """Focal loss of logits `inputs` against `targets`, of the same shape and from 0 to 1, as torchvision has it.

    alpha: weight of targets 1 against targets 0, from 0 to 1, or −1 for no weights. reduction: "none", "mean" or
    "sum". ValueError for another alpha, reduction or shape, RuntimeError for tensors that are not of floating point or
    on several devices. For one class per row, `focal_loss` is the same sum without dense targets.
    """
    if not (0 <= alpha <= 1) and alpha != -1:
        raise ValueError(f"alpha must be from 0 to 1, or -1 for no weights, got {alpha}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")
    _library.check_floating(RuntimeError, inputs=inputs, targets=targets)
    _library.check_one_device(RuntimeError, inputs=inputs, targets=targets)
    if inputs.shape != targets.shape:
        raise ValueError(f"targets must have the shape of inputs {list(inputs.shape)}, got {list(targets.shape)}")
    return _SIGMOID_FOCAL_LOSS(inputs, targets, alpha, gamma, reduction)
