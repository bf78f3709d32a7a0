"""Box coder: encode and decode (with clipping), forward and backward.

Boxes are read as one contiguous run and split in registers, so that a thread loads 16 bytes at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # boxes per program, 2 per thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _load4(ptr, first, n, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns of rows first … first + BLOCK of [n, 4]; ones past the end."""
    offsets = first * 4 + tl.arange(0, 4 * BLOCK)
    flat = tl.load(ptr + offsets, mask=offsets < n * 4, other=1.0).to(DTYPE)
    xs, ys = tl.split(tl.reshape(flat, (BLOCK, 2, 2)))  # [BLOCK, 2] each: (x1, x2), (y1, y2)
    x1, x2 = tl.split(xs)
    y1, y2 = tl.split(ys)
    return x1, y1, x2, y2


@triton.jit
def _store4(ptr, first, n, x1, y1, x2, y2, BLOCK: tl.constexpr):
    offsets = first * 4 + tl.arange(0, 4 * BLOCK)
    flat = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (4 * BLOCK,))
    tl.store(ptr + offsets, flat.to(ptr.dtype.element_ty), mask=offsets < n * 4)


@triton.jit
def _centres(x1, y1, x2, y2):
    w = x2 - x1
    h = y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


@triton.jit
def _load_sizes(ptr, first, n, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    offsets = first * 2 + tl.arange(0, 2 * BLOCK)
    flat = tl.load(ptr + offsets, mask=offsets < n * 2, other=1).to(DTYPE)
    return tl.split(tl.reshape(flat, (BLOCK, 2)))  # h, w


@triton.jit
def _at_most(x, limit):
    return tl.where(x > limit, limit, x)  # keeps NaN, which tl.minimum may drop


@triton.jit
def _clip(x, limit):
    return _at_most(tl.where(x < 0, 0.0, x), limit)


@triton.jit
def _pass_inside(grad, x, limit):
    return tl.where((x >= 0) & (x <= limit), grad, 0.0)


@triton.jit
def encode_boxes_forward_kernel(
    boxes_ptr, anchors_ptr, out_ptr, n, wx, wy, ww, wh, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    """out = (wx·(bx − ax)/aw, wy·(by − ay)/ah, ww·log(bw/aw), wh·log(bh/ah)). Grid ⌈n/BLOCK⌉; 48 B per box in fp32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    bx1, by1, bx2, by2 = _load4(boxes_ptr, first, n, BLOCK, DTYPE)
    ax1, ay1, ax2, ay2 = _load4(anchors_ptr, first, n, BLOCK, DTYPE)
    bx, by, bw, bh = _centres(bx1, by1, bx2, by2)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2)
    dx = wx * (bx - ax) / aw
    dy = wy * (by - ay) / ah
    dw = ww * tl.log(bw / aw)
    dh = wh * tl.log(bh / ah)
    _store4(out_ptr, first, n, dx, dy, dw, dh, BLOCK)


@triton.jit
def encode_boxes_backward_kernel(
    grad_ptr,
    boxes_ptr,
    anchors_ptr,
    grad_boxes_ptr,
    grad_anchors_ptr,
    n,
    wx,
    wy,
    ww,
    wh,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of boxes and anchors from that of the deltas. Grid ⌈n/BLOCK⌉; 80 B per box in fp32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    gx, gy, gw, gh = _load4(grad_ptr, first, n, BLOCK, DTYPE)
    bx1, by1, bx2, by2 = _load4(boxes_ptr, first, n, BLOCK, DTYPE)
    ax1, ay1, ax2, ay2 = _load4(anchors_ptr, first, n, BLOCK, DTYPE)
    bx, by, bw, bh = _centres(bx1, by1, bx2, by2)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2)
    gx = gx * wx / aw  # of the centre of the box, and minus that of the anchor
    gy = gy * wy / ah
    gw = gw * ww
    gh = gh * wh
    gbw = gw / bw
    gbh = gh / bh
    _store4(grad_boxes_ptr, first, n, 0.5 * gx - gbw, 0.5 * gy - gbh, 0.5 * gx + gbw, 0.5 * gy + gbh, BLOCK)
    gaw = -(gx * (bx - ax) + gw) / aw
    gah = -(gy * (by - ay) + gh) / ah
    _store4(grad_anchors_ptr, first, n, -0.5 * gx - gaw, -0.5 * gy - gah, -0.5 * gx + gaw, -0.5 * gy + gah, BLOCK)


@triton.jit
def decode_boxes_forward_kernel(
    deltas_ptr,
    anchors_ptr,
    sizes_ptr,
    out_ptr,
    n,
    wx,
    wy,
    ww,
    wh,
    max_log,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Centre (dx·aw + ax, …), size (exp(dw)·aw, …), as clipped corners. Grid ⌈n/BLOCK⌉; 48 B per box in fp32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    dx, dy, dw, dh = _load4(deltas_ptr, first, n, BLOCK, DTYPE)
    ax1, ay1, ax2, ay2 = _load4(anchors_ptr, first, n, BLOCK, DTYPE)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2)
    x = dx / wx * aw + ax
    y = dy / wy * ah + ay
    w = 0.5 * (tl.exp(_at_most(dw / ww, max_log)) * aw)
    h = 0.5 * (tl.exp(_at_most(dh / wh, max_log)) * ah)
    x1 = x - w
    y1 = y - h
    x2 = x + w
    y2 = y + h
    if CLIP:
        height, width = _load_sizes(sizes_ptr, first, n, BLOCK, DTYPE)
        x1 = _clip(x1, width)
        y1 = _clip(y1, height)
        x2 = _clip(x2, width)
        y2 = _clip(y2, height)
    _store4(out_ptr, first, n, x1, y1, x2, y2, BLOCK)


@triton.jit
def decode_boxes_backward_kernel(
    grad_ptr,
    deltas_ptr,
    anchors_ptr,
    sizes_ptr,
    grad_deltas_ptr,
    grad_anchors_ptr,
    n,
    wx,
    wy,
    ww,
    wh,
    max_log,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of deltas and anchors; zero where the forward clamped. Grid ⌈n/BLOCK⌉; 80 B per box in fp32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    g1, g2, g3, g4 = _load4(grad_ptr, first, n, BLOCK, DTYPE)
    dx, dy, dw, dh = _load4(deltas_ptr, first, n, BLOCK, DTYPE)
    ax1, ay1, ax2, ay2 = _load4(anchors_ptr, first, n, BLOCK, DTYPE)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2)
    dx = dx / wx
    dy = dy / wy
    dw = dw / ww
    dh = dh / wh
    growth_w = tl.exp(_at_most(dw, max_log))
    growth_h = tl.exp(_at_most(dh, max_log))
    if CLIP:
        height, width = _load_sizes(sizes_ptr, first, n, BLOCK, DTYPE)
        x = dx * aw + ax
        y = dy * ah + ay
        w = 0.5 * (growth_w * aw)
        h = 0.5 * (growth_h * ah)
        g1 = _pass_inside(g1, x - w, width)
        g2 = _pass_inside(g2, y - h, height)
        g3 = _pass_inside(g3, x + w, width)
        g4 = _pass_inside(g4, y + h, height)
    gx = g1 + g3
    gy = g2 + g4
    gw = 0.5 * (g3 - g1) * growth_w
    gh = 0.5 * (g4 - g2) * growth_h
    gdw = tl.where(dw <= max_log, gw * aw / ww, 0.0)
    gdh = tl.where(dh <= max_log, gh * ah / wh, 0.0)
    _store4(grad_deltas_ptr, first, n, gx * aw / wx, gy * ah / wy, gdw, gdh, BLOCK)
    gaw = gx * dx + gw
    gah = gy * dy + gh
    _store4(grad_anchors_ptr, first, n, 0.5 * gx - gaw, 0.5 * gy - gah, 0.5 * gx + gaw, 0.5 * gy + gah, BLOCK)


def _launch(kernel, rows: int, dtype: torch.dtype, *args, **constants) -> None:
    if rows:
        dtype = tl.float64 if dtype == torch.float64 else tl.float32
        kernel[(triton.cdiv(rows, BLOCK),)](*args, **constants, BLOCK=BLOCK, DTYPE=dtype, **OPTIONS)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: list[float]) -> Tensor:
    dtype, n = torch.promote_types(boxes.dtype, anchors.dtype), boxes.shape[0]
    out = torch.empty_like(boxes, dtype=dtype)
    _launch(encode_boxes_forward_kernel, n, dtype, boxes, anchors, out, n, *weights)
    return out


def encode_boxes_backward(grad: Tensor, boxes: Tensor, anchors: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    dtype, n = torch.promote_types(boxes.dtype, anchors.dtype), boxes.shape[0]
    out = torch.empty_like(boxes), torch.empty_like(anchors)
    _launch(encode_boxes_backward_kernel, n, dtype, grad, boxes, anchors, *out, n, *weights)
    return out


def decode_boxes(deltas: Tensor, anchors: Tensor, sizes: Tensor | None, weights: list[float], max_log: float) -> Tensor:
    dtype, n = torch.promote_types(deltas.dtype, anchors.dtype), deltas.shape[0]
    out = torch.empty_like(deltas, dtype=dtype)
    kernel, pointer = decode_boxes_forward_kernel, anchors if sizes is None else sizes
    _launch(kernel, n, dtype, deltas, anchors, pointer, out, n, *weights, max_log, CLIP=sizes is not None)
    return out


def decode_boxes_backward(
    grad: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor | None, weights: list[float], max_log: float
) -> tuple[Tensor, Tensor]:
    dtype, n = torch.promote_types(deltas.dtype, anchors.dtype), deltas.shape[0]
    out = torch.empty_like(deltas), torch.empty_like(anchors)
    kernel, pointer = decode_boxes_backward_kernel, anchors if sizes is None else sizes
    _launch(kernel, n, dtype, grad, deltas, anchors, pointer, *out, n, *weights, max_log, CLIP=sizes is not None)
    return out
