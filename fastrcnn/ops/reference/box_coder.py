"""Definition of the box coder: offsets between boxes and anchors, and back, with their gradients."""

import math

import torch
from torch import Tensor

MAX_LOG = math.log(1000.0 / 16)  # the largest growth of a side: a box of 16 px becomes one of 1000


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: list[float], inclusive: bool = False) -> Tensor:
    """boxes, anchors [..., 4], broadcastable -> deltas [..., 4] of the promoted dtype."""
    dtype = torch.promote_types(boxes.dtype, anchors.dtype)
    box, anchor = _centres(_widened(boxes, dtype), inclusive), _centres(_widened(anchors, dtype), inclusive)
    wx, wy, ww, wh = weights
    (bx, by, bw, bh), (ax, ay, aw, ah) = box, anchor
    deltas = (wx * (bx - ax) / aw, wy * (by - ay) / ah, ww * torch.log(bw / aw), wh * torch.log(bh / ah))
    return torch.stack(deltas, -1).to(dtype)


def encode_boxes_backward(
    grad: Tensor, boxes: Tensor, anchors: Tensor, weights: list[float], inclusive: bool, of_anchors: bool
) -> tuple[Tensor, Tensor]:
    """grad [..., 4] of the deltas -> gradients of boxes and of anchors (empty unless of_anchors)."""
    dtype = torch.promote_types(boxes.dtype, anchors.dtype)
    bx, by, bw, bh = _centres(_widened(boxes, dtype), inclusive)
    ax, ay, aw, ah = _centres(_widened(anchors, dtype), inclusive)
    gx, gy, gw, gh = (g * w for g, w in zip(_widened(grad, dtype).unbind(-1), weights, strict=True))
    gx, gy = gx / aw, gy / ah  # gradient of the centres of the boxes; minus that for the anchors
    from_boxes = _corner_grad(gx, gy, gw / bw, gh / bh, boxes)
    if not of_anchors:
        return from_boxes, anchors.new_empty(0)
    return from_boxes, _corner_grad(-gx, -gy, -(gx * (bx - ax) + gw) / aw, -(gy * (by - ay) + gh) / ah, anchors)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    sizes: Tensor | None,
    weights: list[float],
    max_log: float,
    size: list[int] | None = None,
    inclusive: bool = False,
) -> Tensor:
    """deltas, anchors [..., 4], broadcastable -> boxes [..., 4] of the promoted dtype.

    They are clipped to sizes [..., 2] (h, w), or to size, one (h, w) for all, or not at all.
    """
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    corners = _decoded(_widened(deltas, dtype), _widened(anchors, dtype), weights, max_log, inclusive)
    limits = _limits(sizes, size, corners[0].dtype, inclusive)
    if limits is not None:
        corners = [c.clamp(min=0).clamp(max=limit) for c, limit in zip(corners, limits, strict=True)]
    return torch.stack(corners, -1).to(dtype)


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
    """grad [..., 4] of the boxes -> gradients of deltas and of anchors (empty unless of_anchors).

    None passes where a value was clamped.
    """
    dtype = torch.promote_types(deltas.dtype, anchors.dtype)
    wide_deltas, wide_anchors = _widened(deltas, dtype), _widened(anchors, dtype)
    _, _, aw, ah = _centres(wide_anchors, inclusive)
    dx, dy, dw, dh = (d / w for d, w in zip(wide_deltas.unbind(-1), weights, strict=True))
    grads = _widened(grad, dtype).unbind(-1)
    limits = _limits(sizes, size, aw.dtype, inclusive)
    if limits is not None:
        corners = _decoded(wide_deltas, wide_anchors, weights, max_log, inclusive)
        grads = [torch.where((c >= 0) & (c <= limit), g, 0) for g, c, limit in zip(grads, corners, limits, strict=True)]
    g1, g2, g3, g4 = grads
    gx, gy = g1 + g3, g2 + g4  # of the centre
    gw, gh = 0.5 * (g3 - g1) * torch.exp(dw.clamp(max=max_log)), 0.5 * (g4 - g2) * torch.exp(dh.clamp(max=max_log))
    wx, wy, ww, wh = weights
    from_deltas = (
        gx * aw / wx,
        gy * ah / wy,
        torch.where(dw <= max_log, gw * aw / ww, 0),
        torch.where(dh <= max_log, gh * ah / wh, 0),
    )
    from_deltas = torch.stack(from_deltas, -1).sum_to_size(deltas.shape).to(deltas.dtype)
    if not of_anchors:
        return from_deltas, anchors.new_empty(0)
    return from_deltas, _corner_grad(gx, gy, gx * dx + gw, gy * dy + gh, anchors)


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Arithmetic is in float32 at least."""
    return x.to(torch.promote_types(dtype, torch.float32))


def _centres(boxes: Tensor, inclusive: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    if inclusive:
        w, h = w + 1, h + 1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def _limits(sizes: Tensor | None, size: list[int] | None, dtype: torch.dtype, inclusive: bool):
    """The largest x1, y1, x2, y2 that the images allow, or None without images."""
    if sizes is None and size is None:
        return None
    h, w = size if sizes is None else sizes.to(dtype).unbind(-1)
    if inclusive:
        h, w = h - 1, w - 1
    return w, h, w, h


def _corner_grad(gx: Tensor, gy: Tensor, gw: Tensor, gh: Tensor, like: Tensor) -> Tensor:
    """Gradient of (centre, size) -> gradient of the corners, summed to the shape of `like` and of its dtype."""
    corners = torch.stack((0.5 * gx - gw, 0.5 * gy - gh, 0.5 * gx + gw, 0.5 * gy + gh), -1)
    return corners.sum_to_size(like.shape).to(like.dtype)


def _decoded(deltas: Tensor, anchors: Tensor, weights: list[float], max_log: float, inclusive: bool) -> list[Tensor]:
    ax, ay, aw, ah = _centres(anchors, inclusive)
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(-1), weights, strict=True))
    x, y = dx * aw + ax, dy * ah + ay
    w, h = 0.5 * (torch.exp(dw.clamp(max=max_log)) * aw), 0.5 * (torch.exp(dh.clamp(max=max_log)) * ah)
    last = 1 if inclusive else 0
    return [x - w, y - h, x + w - last, y + h - last]
