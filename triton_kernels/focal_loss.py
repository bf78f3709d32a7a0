"""Focal loss of integer labels: the logits are read once forward, and read and their gradient written once backward.

With u the logit of being wrong, −x for the class of a row and x for all others, an element costs w·q^γ·softplus(u),
q = sigmoid(u), and its derivative by u is w·q^γ·(q + γ·(1 − q)·softplus(u)). All of it follows from exp(−|u|).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose


@triton.jit
def _my_elements(logits_ptr, labels_ptr, rows, total, blocks, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Image, offsets, what is inside, logit of being wrong, whether the class is the row's, whether the row counts.

    The row of an element is found in 32 bits from the first row of the block; rows of other blocks cost nothing.
    """
    image = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = start + lane < total
    offsets = image * total + start + lane
    x = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    first = start // CLASSES
    local = (start - first * CLASSES).to(tl.int32) + lane
    row = local // CLASSES
    label = tl.load(labels_ptr + image * rows + first + row, mask=inside, other=-1).to(tl.int32)
    present = label == local - row * CLASSES + 1
    return image, offsets, inside, tl.where(present, -x, x), present, label >= 0


@triton.jit
def _parts(wrong, present, alpha, gamma, SQUARE: tl.constexpr):
    """w·q^γ, q, 1 − q and softplus(wrong)."""
    small = tl.exp(-tl.abs(wrong))
    # log(1 + small), where the sum rounds most of small away by its series
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
    log = tl.where(small < 1.0 / 64.0, series, tl.log(1.0 + small))
    larger = 1.0 / (1.0 + small)
    positive = wrong >= 0.0
    q = tl.where(positive, larger, small * larger)
    rest = tl.where(positive, small * larger, larger)
    if SQUARE:
        focus = q * q
    else:
        focus = tl.exp(-gamma * (tl.maximum(-wrong, 0.0) + log))  # −log q, which stays finite where q rounds to 0
    return tl.where(present, alpha, 1.0 - alpha) * focus, q, rest, tl.maximum(wrong, 0.0) + log


@triton.jit(do_not_specialize=["rows", "blocks"])
def focal_loss_kernel(
    logits_ptr,
    labels_ptr,
    sums_ptr,
    rows,
    total,
    blocks,
    alpha,
    gamma,
    CLASSES: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums [images, blocks] of the loss of logits [images, rows, CLASSES], total = rows · CLASSES per image.

    Grid: images × blocks of elements. Moves 2 B per element in half precision and 8 B per row; about 30 operations per
    element, an exponential, a logarithm and a reciprocal among them.
    """
    _, _, _, wrong, present, counts = _my_elements(logits_ptr, labels_ptr, rows, total, blocks, CLASSES, BLOCK)
    scale, _, _, cost = _parts(wrong, present, alpha, gamma, SQUARE)
    loss = tl.sum(tl.where(counts, scale * cost, 0.0), axis=0)
    tl.store(sums_ptr + tl.program_id(0), loss)


@triton.jit(do_not_specialize=["rows", "blocks"])
def focal_loss_backward_kernel(
    grad_ptr,
    logits_ptr,
    labels_ptr,
    out_ptr,
    rows,
    total,
    blocks,
    alpha,
    gamma,
    CLASSES: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out, like logits [images, rows, CLASSES]: grad [images] times the derivative of the loss.

    Grid: images × blocks of elements. Moves 4 B per element in half precision and 8 B per row; about 35 operations per
    element, an exponential, a logarithm and a reciprocal among them.
    """
    image, offsets, inside, wrong, present, counts = _my_elements(
        logits_ptr, labels_ptr, rows, total, blocks, CLASSES, BLOCK
    )
    scale, q, rest, cost = _parts(wrong, present, alpha, gamma, SQUARE)
    slope = tl.load(grad_ptr + image).to(tl.float32) * scale * (q + gamma * rest * cost)
    slope = tl.where(counts, tl.where(present, -slope, slope), 0.0)
    tl.store(out_ptr + offsets, slope.to(out_ptr.dtype.element_ty), mask=inside)


def config(elements: int, images: int) -> Launch:
    """block: elements, of the elements per image.

    Sixteen elements per thread: in half precision two vectors of 16 B on their way. Fewer threads where that would
    leave under 512 programs.
    """
    block = min(4096, max(512, triton.next_power_of_2(elements * images // 512)))
    return choose("focal_loss", Launch(block, block // 512), elements=elements, images=images)


def _arguments(logits: Tensor, labels: Tensor, alpha: float, gamma: float):
    """Rows, total and the rest of the arguments of both kernels, the options, and images."""
    rows, classes = logits.shape[-2:]
    total = rows * classes
    images = logits.numel() // total
    launch = config(total, images)
    blocks = triton.cdiv(total, launch.block)
    constants = {"CLASSES": classes, "SQUARE": gamma == 2, "BLOCK": launch.block}
    return (rows, total, blocks, alpha, gamma), constants | launch.options, images


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    leading = logits.shape[:-2]
    if not logits.numel():
        return logits.new_zeros(leading, dtype=torch.float32)
    logits, labels = logits.contiguous(), labels.contiguous()
    arguments, options, images = _arguments(logits, labels, alpha, gamma)
    sums = logits.new_empty((images, arguments[2]), dtype=torch.float32)
    focal_loss_kernel[(sums.numel(),)](logits, labels, sums, *arguments, **options)
    return sums.sum(1).view(leading)


def focal_loss_backward(grad: Tensor, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not out.numel():
        return out
    logits, labels = logits.contiguous(), labels.contiguous()
    arguments, options, images = _arguments(logits, labels, alpha, gamma)
    grid = (images * arguments[2],)
    focal_loss_backward_kernel[grid](grad.contiguous(), logits, labels, out, *arguments, **options)
    return out
