"""Definition of the box coder: offsets between boxes and anchors, and back, with their gradients."""

import math

import torch
from torch import Tensor

MAX_LOG = math.log(1000.0 / 16)  # the largest growth of a side: a box of 16 px becomes one of 1000


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: list[float]) -> Tensor:
    """boxes, anchors [N, 4] -> deltas [N, 4] of the promoted dtype."""
    dtype = torch.promote_types(boxes.dtype, anchors.dtype)
    box, anchor = _centres(_widened(boxes, dtype)), _centres(_widened(anchors, dtype))
    wx, wy, ww, wh = weights
    (bx, by, bw, bh), (ax, ay, aw, ah) = box, anchor
    deltas = (wx * (bx - ax) / aw, wy * (by - ay) / ah, ww * torch.log(bw / aw), wh * torch.log(bh / ah))
    return torch.stack(deltas, -1).to(dtype)


def encode_boxes_backward(grad: Tensor, boxes: Tensor, anchors: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    """grad [N, 4] of the deltas -> gradients of boxes and of anchors."""
    dtype = torch.promote_types(boxes.dtype, anchors.dtype)
    (bx, by, bw, bh), (ax, ay, aw, ah) = _centres(_widened(boxes, dtype)), _centres(_widened(anchors, dtype))
    gx, gy, gw, gh = _weighted(_widened(grad, dtype), weights)
    gx, gy = gx / aw, gy / ah  # gradient of the centres of the boxes; minus that for the anchors
    from_boxes = _corner_grad(gx, gy, gw / bw, gh / bh)
    from_anchors = _corner_grad(-gx, -gy, -(gx * (bx - ax) + gw) / aw, -(gy * (by - ay) + gh) / ah)
    return from_boxes.to(boxes.dtype), from_anchors.to(anchors.dtype)


def decode_boxes(deltas: Tensor, anchors: Tensor, sizes: Tensor | None, weights: list[float], max_log: float) -> Tensor:
    """deltas, anchors [N, 4], sizes [N, 2] (h, w) or None -> boxes [N, 4] of the promoted dtype."""
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    corners = _decoded(_widened(deltas, dtype), _widened(anchors, dtype), weights, max_log)
    if sizes is not None:
        h, w = sizes.to(corners[0].dtype).unbind(-1)
        corners = [torch.minimum(c.clamp(min=0), limit) for c, limit in zip(corners, (w, h, w, h), strict=True)]
    return torch.stack(corners, -1).to(dtype)


def decode_boxes_backward(
    grad: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor | None, weights: list[float], max_log: float
) -> tuple[Tensor, Tensor]:
    """grad [N, 4] of the boxes -> gradients of deltas and of anchors; none passes where a value was clamped."""
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    wide_deltas, wide_anchors = _widened(deltas, dtype), _widened(anchors, dtype)
    _, _, aw, ah = _centres(wide_anchors)
    dx, dy, dw, dh = (d / w for d, w in zip(wide_deltas.unbind(-1), weights, strict=True))
    grads = _widened(grad, dtype).unbind(-1)
    if sizes is not None:
        h, w = sizes.to(aw.dtype).unbind(-1)
        corners = _decoded(wide_deltas, wide_anchors, weights, max_log)
        grads = [
            torch.where((c >= 0) & (c <= limit), g, 0) for g, c, limit in zip(grads, corners, (w, h, w, h), strict=True)
        ]
    g1, g2, g3, g4 = grads
    gx, gy = g1 + g3, g2 + g4  # of the centre
    gw, gh = 0.5 * (g3 - g1) * torch.exp(dw.clamp(max=max_log)), 0.5 * (g4 - g2) * torch.exp(dh.clamp(max=max_log))
    from_anchors = _corner_grad(gx, gy, gx * dx + gw, gy * dy + gh)
    wx, wy, ww, wh = weights
    from_deltas = (
        gx * aw / wx,
        gy * ah / wy,
        torch.where(dw <= max_log, gw * aw / ww, 0),
        torch.where(dh <= max_log, gh * ah / wh, 0),
    )
    return torch.stack(from_deltas, -1).to(deltas.dtype), from_anchors.to(anchors.dtype)


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Arithmetic is in float32 at least."""
    return x.to(torch.promote_types(dtype, torch.float32))


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def _weighted(x: Tensor, weights: list[float]) -> list[Tensor]:
    return [column * w for column, w in zip(x.unbind(-1), weights, strict=True)]


def _corner_grad(gx: Tensor, gy: Tensor, gw: Tensor, gh: Tensor) -> Tensor:
    """Gradient of (centre, size) -> gradient of the corners."""
    return torch.stack((0.5 * gx - gw, 0.5 * gy - gh, 0.5 * gx + gw, 0.5 * gy + gh), -1)


def _decoded(deltas: Tensor, anchors: Tensor, weights: list[float], max_log: float) -> list[Tensor]:
    ax, ay, aw, ah = _centres(anchors)
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(-1), weights, strict=True))
    x, y = dx * aw + ax, dy * ah + ay
    w, h = 0.5 * (torch.exp(dw.clamp(max=max_log)) * aw), 0.5 * (torch.exp(dh.clamp(max=max_log)) * ah)
    return [x - w, y - h, x + w, y + h]
