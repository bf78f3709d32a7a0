"""Box coder: encode and decode (with clipping), forward and backward, for exclusive and inclusive boxes.

A thread loads a box as one vector of 16 bytes (8 in half precision). What broadcasts, as anchors over images or over
classes do, is read in place: row (i // repeat) % rows of it belongs to box i, and comes out of L2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose

COUNTS = ["n", "anchor_rows", "size_repeat", "size_rows"]
REPEATS = ["anchor_repeat"]  # 1 for all but the boxes of several classes: then the division vanishes


@triton.jit
def load_boxes(ptr, row, inside, other, BLOCK: tl.constexpr):
    """Columns x1, y1, x2, y2, each [BLOCK] float32, of those rows of [n, 4]; `other` where not inside."""
    offsets = row.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    box = tl.load(ptr + offsets, mask=inside[:, None], other=other).to(tl.float32)
    xs, ys = tl.split(tl.reshape(box, (BLOCK, 2, 2)))  # [BLOCK, 2] each: (x1, x2), (y1, y2)
    x1, x2 = tl.split(xs)
    y1, y2 = tl.split(ys)
    return x1, y1, x2, y2


@triton.jit
def _store_boxes(ptr, row, inside, x1, y1, x2, y2, BLOCK: tl.constexpr):
    offsets = row.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    box = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (BLOCK, 4))
    tl.store(ptr + offsets, box.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _block(n, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The boxes of this program, and which of them exist."""
    index = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    return index, index < n


@triton.jit
def _shared_row(index, repeat, rows, SHARED: tl.constexpr):
    return (index // repeat) % rows if SHARED else index


@triton.jit
def _centres(x1, y1, x2, y2, INCLUSIVE: tl.constexpr):
    w = x2 - x1
    h = y2 - y1
    if INCLUSIVE:
        w += 1.0
        h += 1.0
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


@triton.jit
def _limits(sizes_ptr, index, inside, repeat, rows, height, width, SIZES: tl.constexpr, INCLUSIVE: tl.constexpr):
    """The largest y and x in the image of each box: from sizes [rows, 2] (h, w), or from height and width."""
    if SIZES:
        p = sizes_ptr + ((index // repeat) % rows).to(tl.int64) * 2
        height = tl.load(p, mask=inside, other=1).to(tl.float32)
        width = tl.load(p + 1, mask=inside, other=1).to(tl.float32)
    if INCLUSIVE:
        height -= 1.0
        width -= 1.0
    return height, width


@triton.jit
def _at_most(x, limit):
    return tl.where(x > limit, limit, x)  # keeps NaN, which tl.minimum may drop


@triton.jit
def _clip(x, limit):
    return _at_most(tl.where(x < 0, 0.0, x), limit)


@triton.jit
def _pass_inside(grad, x, limit):
    return tl.where((x >= 0) & (x <= limit), grad, 0.0)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=REPEATS)
def encode_boxes_forward_kernel(
    boxes_ptr,
    anchors_ptr,
    out_ptr,
    n,
    anchor_repeat,
    anchor_rows,
    wx,
    wy,
    ww,
    wh,
    SHARED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (wx (bx − ax) / aw, wy (by − ay) / ah, ww log(bw / aw), wh log(bh / ah)).

    Grid: blocks of boxes. Moves 48 B per box in fp32, 32 B and L2 reads if anchors are shared; 30 operations.
    """
    index, inside = _block(n, BLOCK, INDEX)
    row = _shared_row(index, anchor_repeat, anchor_rows, SHARED)
    bx1, by1, bx2, by2 = load_boxes(boxes_ptr, index, inside, 1.0, BLOCK)
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, row, inside, 1.0, BLOCK)
    bx, by, bw, bh = _centres(bx1, by1, bx2, by2, INCLUSIVE)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2, INCLUSIVE)
    dx = wx * (bx - ax) / aw
    dy = wy * (by - ay) / ah
    dw = ww * tl.log(bw / aw)
    dh = wh * tl.log(bh / ah)
    _store_boxes(out_ptr, index, inside, dx, dy, dw, dh, BLOCK)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=REPEATS)
def encode_boxes_backward_kernel(
    grad_ptr,
    boxes_ptr,
    anchors_ptr,
    grad_boxes_ptr,
    grad_anchors_ptr,
    n,
    anchor_repeat,
    anchor_rows,
    wx,
    wy,
    ww,
    wh,
    OF_ANCHORS: tl.constexpr,
    SHARED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of boxes, and of each box's anchor if OF_ANCHORS, from that of the deltas.

    Grid: blocks of boxes. Moves 64 B per box in fp32, 80 B with OF_ANCHORS, 16 B less if anchors are shared; 40
    operations.
    """
    index, inside = _block(n, BLOCK, INDEX)
    row = _shared_row(index, anchor_repeat, anchor_rows, SHARED)
    gx, gy, gw, gh = load_boxes(grad_ptr, index, inside, 1.0, BLOCK)
    bx1, by1, bx2, by2 = load_boxes(boxes_ptr, index, inside, 1.0, BLOCK)
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, row, inside, 1.0, BLOCK)
    bx, by, bw, bh = _centres(bx1, by1, bx2, by2, INCLUSIVE)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2, INCLUSIVE)
    gx = gx * wx / aw  # of the centre of the box, and minus that of the anchor
    gy = gy * wy / ah
    gw = gw * ww
    gh = gh * wh
    gbw = gw / bw
    gbh = gh / bh
    _store_boxes(grad_boxes_ptr, index, inside, 0.5 * gx - gbw, 0.5 * gy - gbh, 0.5 * gx + gbw, 0.5 * gy + gbh, BLOCK)
    if OF_ANCHORS:
        gaw = -(gx * (bx - ax) + gw) / aw
        gah = -(gy * (by - ay) + gh) / ah
        _store_boxes(
            grad_anchors_ptr, index, inside, -0.5 * gx - gaw, -0.5 * gy - gah, -0.5 * gx + gaw, -0.5 * gy + gah, BLOCK
        )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=REPEATS)
def decode_boxes_forward_kernel(
    deltas_ptr,
    anchors_ptr,
    sizes_ptr,
    out_ptr,
    n,
    anchor_repeat,
    anchor_rows,
    size_repeat,
    size_rows,
    height,
    width,
    wx,
    wy,
    ww,
    wh,
    max_log,
    CLIP: tl.constexpr,
    SIZES: tl.constexpr,
    SHARED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Centre (dx aw + ax, …), size (exp(dw) aw, …), as corners, clipped to (height, width) or SIZES [size_rows, 2].

    Grid: blocks of boxes. Moves 48 B per box in fp32, 32 B and L2 reads if anchors are shared; 40 operations.
    """
    index, inside = _block(n, BLOCK, INDEX)
    row = _shared_row(index, anchor_repeat, anchor_rows, SHARED)
    dx, dy, dw, dh = load_boxes(deltas_ptr, index, inside, 1.0, BLOCK)
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, row, inside, 1.0, BLOCK)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2, INCLUSIVE)
    x = dx / wx * aw + ax
    y = dy / wy * ah + ay
    w = 0.5 * (tl.exp(_at_most(dw / ww, max_log)) * aw)
    h = 0.5 * (tl.exp(_at_most(dh / wh, max_log)) * ah)
    x1 = x - w
    y1 = y - h
    x2 = x + w
    y2 = y + h
    if INCLUSIVE:
        x2 -= 1.0
        y2 -= 1.0
    if CLIP:
        bottom, right = _limits(sizes_ptr, index, inside, size_repeat, size_rows, height, width, SIZES, INCLUSIVE)
        x1 = _clip(x1, right)
        y1 = _clip(y1, bottom)
        x2 = _clip(x2, right)
        y2 = _clip(y2, bottom)
    _store_boxes(out_ptr, index, inside, x1, y1, x2, y2, BLOCK)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=REPEATS)
def decode_boxes_backward_kernel(
    grad_ptr,
    deltas_ptr,
    anchors_ptr,
    sizes_ptr,
    grad_deltas_ptr,
    grad_anchors_ptr,
    n,
    anchor_repeat,
    anchor_rows,
    size_repeat,
    size_rows,
    height,
    width,
    wx,
    wy,
    ww,
    wh,
    max_log,
    CLIP: tl.constexpr,
    SIZES: tl.constexpr,
    OF_ANCHORS: tl.constexpr,
    SHARED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of deltas, and of each box's anchor if OF_ANCHORS; zero where the forward clamped.

    Grid: blocks of boxes. Moves 64 B per box in fp32, 80 B with OF_ANCHORS, 16 B less if anchors are shared; 60
    operations.
    """
    index, inside = _block(n, BLOCK, INDEX)
    row = _shared_row(index, anchor_repeat, anchor_rows, SHARED)
    g1, g2, g3, g4 = load_boxes(grad_ptr, index, inside, 1.0, BLOCK)
    dx, dy, dw, dh = load_boxes(deltas_ptr, index, inside, 1.0, BLOCK)
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, row, inside, 1.0, BLOCK)
    ax, ay, aw, ah = _centres(ax1, ay1, ax2, ay2, INCLUSIVE)
    dx = dx / wx
    dy = dy / wy
    dw = dw / ww
    dh = dh / wh
    growth_w = tl.exp(_at_most(dw, max_log))
    growth_h = tl.exp(_at_most(dh, max_log))
    if CLIP:
        bottom, right = _limits(sizes_ptr, index, inside, size_repeat, size_rows, height, width, SIZES, INCLUSIVE)
        x = dx * aw + ax
        y = dy * ah + ay
        w = 0.5 * (growth_w * aw)
        h = 0.5 * (growth_h * ah)
        x2 = x + w
        y2 = y + h
        if INCLUSIVE:
            x2 -= 1.0
            y2 -= 1.0
        g1 = _pass_inside(g1, x - w, right)
        g2 = _pass_inside(g2, y - h, bottom)
        g3 = _pass_inside(g3, x2, right)
        g4 = _pass_inside(g4, y2, bottom)
    gx = g1 + g3
    gy = g2 + g4
    gw = 0.5 * (g3 - g1) * growth_w
    gh = 0.5 * (g4 - g2) * growth_h
    gdw = tl.where(dw <= max_log, gw * aw / ww, 0.0)
    gdh = tl.where(dh <= max_log, gh * ah / wh, 0.0)
    _store_boxes(grad_deltas_ptr, index, inside, gx * aw / wx, gy * ah / wy, gdw, gdh, BLOCK)
    if OF_ANCHORS:
        gaw = gx * dx + gw
        gah = gy * dy + gh
        _store_boxes(
            grad_anchors_ptr, index, inside, 0.5 * gx - gaw, 0.5 * gy - gah, 0.5 * gx + gaw, 0.5 * gy + gah, BLOCK
        )


def config(itemsize: int, streams: int) -> Launch:
    """block: boxes. itemsize: bytes of a number; streams: tensors [n, 4] that a kernel reads and writes.

    Two boxes per thread: four loads of 16 bytes in flight forward, six backward. At 30 to 48 registers a processor
    holds 40 to 64 warps, and so 80 KB and more in flight, several times what hides the latency of memory.
    """
    return choose("box_coder", Launch(256, 4), itemsize=itemsize, streams=streams)


def index_type(n: int) -> tl.dtype:
    """Of a box's number: 64 bits only where needed, since the divisions take several times longer then."""
    return tl.int64 if n > 1 << 30 else tl.int32


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: list[float], inclusive: bool) -> Tensor:
    shape = torch.broadcast_shapes(boxes.shape, anchors.shape)
    out = boxes.new_empty(shape, dtype=torch.promote_types(boxes.dtype, anchors.dtype))
    _launch(
        encode_boxes_forward_kernel,
        out,
        3,
        boxes_ptr=_own(boxes, shape),
        out_ptr=out,
        **_anchor_arguments(anchors, shape),
        **_weight_arguments(weights),
        INCLUSIVE=inclusive,
    )
    return out


def encode_boxes_backward(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: list[float], inclusive: bool, of_anchors: bool
) -> tuple[Tensor, Tensor]:
    grad_boxes, grad_anchors = _empty_grad(boxes, grad), _empty_grad(anchors, grad) if of_anchors else None
    _launch(
        encode_boxes_backward_kernel,
        grad,
        5 if of_anchors else 4,
        grad_ptr=grad.contiguous(),
        boxes_ptr=_own(boxes, grad.shape),
        grad_boxes_ptr=grad_boxes,
        grad_anchors_ptr=grad_anchors if of_anchors else grad_boxes,
        **_anchor_arguments(anchors, grad.shape),
        **_weight_arguments(weights),
        OF_ANCHORS=of_anchors,
        INCLUSIVE=inclusive,
    )
    return _summed(grad_boxes, boxes), _summed(grad_anchors, anchors) if of_anchors else anchors.new_empty(0)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    sizes: Tensor | None,
    weights: list[float],
    max_log: float,
    size: list[int] | None,
    inclusive: bool,
) -> Tensor:
    shape = torch.broadcast_shapes(deltas.shape, anchors.shape)
    out = deltas.new_empty(shape, dtype=torch.promote_types(deltas.dtype, anchors.dtype))
    _launch(
        decode_boxes_forward_kernel,
        out,
        3,
        deltas_ptr=_own(deltas, shape),
        out_ptr=out,
        max_log=max_log,
        **_anchor_arguments(anchors, shape),
        **_clip_arguments(sizes, size, out),
        **_weight_arguments(weights),
        INCLUSIVE=inclusive,
    )
    return out


def decode_boxes_backward(
    grad: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    sizes: Tensor | None,
    weights: list[float],
    max_log: float,
    size: list[int] | None,
    inclusive: bool,
    of_anchors: bool,
) -> tuple[Tensor, Tensor]:
    grad_deltas, grad_anchors = _empty_grad(deltas, grad), _empty_grad(anchors, grad) if of_anchors else None
    _launch(
        decode_boxes_backward_kernel,
        grad,
        5 if of_anchors else 4,
        grad_ptr=grad.contiguous(),
        deltas_ptr=_own(deltas, grad.shape),
        grad_deltas_ptr=grad_deltas,
        grad_anchors_ptr=grad_anchors if of_anchors else grad_deltas,
        max_log=max_log,
        **_anchor_arguments(anchors, grad.shape),
        **_clip_arguments(sizes, size, grad),
        **_weight_arguments(weights),
        OF_ANCHORS=of_anchors,
        INCLUSIVE=inclusive,
    )
    return _summed(grad_deltas, deltas), _summed(grad_anchors, anchors) if of_anchors else anchors.new_empty(0)


def _launch(kernel, result: Tensor, streams: int, **arguments) -> None:
    n = result.numel() // 4
    if n:
        launch = config(result.element_size(), streams)
        grid = (triton.cdiv(n, launch.block),)
        kernel[grid](n=n, **arguments, INDEX=index_type(n), BLOCK=launch.block, **launch.options)


def _anchor_arguments(anchors: Tensor, shape: Sequence[int]) -> dict[str, Any]:
    rows, repeat = repeated_rows(anchors, shape)
    shared = rows.shape[0] != math.prod(shape[:-1])
    return {"anchors_ptr": rows, "anchor_repeat": repeat, "anchor_rows": rows.shape[0], "SHARED": shared}


def _clip_arguments(sizes: Tensor | None, size: list[int] | None, result: Tensor) -> dict[str, Any]:
    height, width = size or (0, 0)
    rows, repeat = (result, 1) if sizes is None else repeated_rows(sizes, result.shape)
    return {
        "sizes_ptr": rows,
        "size_repeat": repeat,
        "size_rows": rows.shape[0],
        "height": float(height),
        "width": float(width),
        "CLIP": sizes is not None or size is not None,
        "SIZES": sizes is not None,
    }


def _weight_arguments(weights: list[float]) -> dict[str, float]:
    return dict(zip(("wx", "wy", "ww", "wh"), weights, strict=True))


def _own(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x with one row per box."""
    return x.expand(shape).contiguous()


def repeated_rows(x: Tensor, shape: Sequence[int]) -> tuple[Tensor, int]:
    """x [..., k], which broadcasts to shape in all but the last dimension -> rows [r, k] and `repeat`.

    Row (i // repeat) % r belongs to box i. No row is copied if x is contiguous and what it broadcasts over stands only
    before or after its own dimensions.
    """
    own, all_sides = [1] * (len(shape) - x.dim()) + [*x.shape[:-1]], [*shape[:-1]]
    repeat = 1
    while own and own[-1] == 1:
        own.pop()
        repeat *= all_sides.pop()
    first = next((d for d, side in enumerate(own) if side != 1), 0)
    rows = x.reshape(*own[first:], x.shape[-1]).expand(*all_sides[first:], x.shape[-1])
    return rows.reshape(-1, x.shape[-1]).contiguous(), repeat


def _empty_grad(x: Tensor, grad: Tensor) -> Tensor:
    """A gradient per box; in float32 where those of x are sums of several."""
    return torch.empty(grad.shape, dtype=x.dtype if x.shape == grad.shape else torch.float32, device=x.device)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    return grad.sum_to_size(x.shape).to(x.dtype)
