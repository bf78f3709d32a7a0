"""Boxes as offsets from anchors, and back (R-CNN's parametrisation, Girshick et al. 2014, appendix C)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrcnn.ops import _library
from fastrcnn.ops.reference import box_coder as reference
from fastrcnn.ops.reference.box_coder import MAX_LOG


def _forward_fake(first: Tensor, anchors: Tensor, *rest) -> Tensor:
    shape = torch.broadcast_shapes(first.shape, anchors.shape)
    return first.new_empty(shape, dtype=torch.promote_types(first.dtype, anchors.dtype))


def _backward_fake(grad: Tensor, first: Tensor, anchors: Tensor, *rest) -> tuple[Tensor, Tensor]:
    of_anchors = rest[-1]
    return first.new_empty(first.shape), anchors.new_empty(anchors.shape if of_anchors else 0)


def _launcher(name: str):
    """The kernels compute in float32: float64 is left to the definition."""

    def launch(*args):
        from triton_kernels import box_coder as kernels

        wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        return getattr(reference if wide else kernels, name)(*args)

    return launch


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boxes, anchors, *rest):
        ctx.save_for_backward(boxes, anchors)
        ctx.rest = rest
        with _library.below_autograd():
            return ENCODE(boxes, anchors, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        of_anchors = ctx.needs_input_grad[1]
        from_boxes, from_anchors = ENCODE_BACKWARD(grad, *ctx.saved_tensors, *ctx.rest, of_anchors)
        return from_boxes, from_anchors if of_anchors else None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, deltas, anchors, sizes, *rest):
        ctx.save_for_backward(deltas, anchors, sizes)
        ctx.rest = rest
        with _library.below_autograd():
            return DECODE(deltas, anchors, sizes, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        of_anchors = ctx.needs_input_grad[1]
        from_deltas, from_anchors = DECODE_BACKWARD(grad, *ctx.saved_tensors, *ctx.rest, of_anchors)
        return from_deltas, from_anchors if of_anchors else None, None, None, None, None, None


def _encode_autograd(boxes, anchors, *rest):
    if _library.needs_grad(boxes, anchors):
        return _Encode.apply(boxes, anchors, *rest)
    with _library.below_autograd():
        return ENCODE(boxes, anchors, *rest)


def _decode_autograd(deltas, anchors, *rest):
    if _library.needs_grad(deltas, anchors):
        return _Decode.apply(deltas, anchors, *rest)
    with _library.below_autograd():
        return DECODE(deltas, anchors, *rest)


# boxes, anchors, deltas [..., 4] and sizes [..., 2] (h, w) broadcast; size is one (h, w) for all boxes
ENCODE = _library.register(
    "encode_boxes(Tensor boxes, Tensor anchors, float[] weights, bool inclusive) -> Tensor",
    reference=reference.encode_boxes,
    fake=_forward_fake,
    triton=_launcher("encode_boxes"),
    autograd=_encode_autograd,
)
ENCODE_BACKWARD = _library.register(
    "encode_boxes_backward(Tensor grad, Tensor boxes, Tensor anchors, float[] weights, bool inclusive,"
    " bool of_anchors) -> (Tensor, Tensor)",
    reference=reference.encode_boxes_backward,
    fake=_backward_fake,
    triton=_launcher("encode_boxes_backward"),
)
DECODE = _library.register(
    "decode_boxes(Tensor deltas, Tensor anchors, Tensor? sizes, float[] weights, float max_log, SymInt[]? size,"
    " bool inclusive) -> Tensor",
    reference=reference.decode_boxes,
    fake=_forward_fake,
    triton=_launcher("decode_boxes"),
    autograd=_decode_autograd,
)
DECODE_BACKWARD = _library.register(
    "decode_boxes_backward(Tensor grad, Tensor deltas, Tensor anchors, Tensor? sizes, float[] weights, float max_log,"
    " SymInt[]? size, bool inclusive, bool of_anchors) -> (Tensor, Tensor)",
    reference=reference.decode_boxes_backward,
    fake=_backward_fake,
    triton=_launcher("decode_boxes_backward"),
)


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), inclusive: bool = False
) -> Tensor:
    """Offsets [..., 4] (dx, dy, dw, dh) that lead from anchors to boxes, both [..., 4] xyxy and broadcastable.

    dx, dy are in anchor sizes, dw, dh logarithms of the growth, each times its weight. inclusive: x2, y2 are the last
    pixel, so that a box is x2 − x1 + 1 wide (maskrcnn-benchmark's boxes). Differentiable once in boxes and anchors.
    float16 and bfloat16 are computed in float32; the result has the promoted dtype. Empty boxes give −inf or NaN.
    ValueError if a last dimension or weights does not have 4 entries, if a tensor is not of floating point or they are
    on several devices, or if the shapes do not broadcast.
    """
    _check_pair("boxes", boxes, anchors)
    return ENCODE(boxes, anchors, _four(weights), inclusive)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip_to: tuple[int, int] | Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """Boxes [..., 4] xyxy at the offsets deltas from anchors, both [..., 4] and broadcastable.

    The inverse of `encode_boxes`, but dw and dh are clamped at log(1000 / 16). clip_to: (h, w) of the image, or
    a tensor [..., 2] of them that broadcasts against boxes[..., :2]: the corners are clamped into the image, to w and h
    at most, or with inclusive boxes to the last pixels w − 1 and h − 1. inclusive: x2, y2 are the last pixel, of
    anchors and of results. Differentiable once in deltas and anchors; clamped values pass no gradient. float16 and
    bfloat16 are computed in float32; the result has the promoted dtype. NaN in a delta gives NaN in the box.
    ValueError if a last dimension or weights does not have 4 entries or clip_to not 2, if a tensor is not of floating
    point (clip_to may be of integers) or they are on several devices, or if the shapes do not broadcast.
    """
    return _decode(deltas, anchors, weights, clip_to, MAX_LOG, inclusive)


def _decode(deltas, anchors, weights, clip_to, max_log: float, inclusive: bool) -> Tensor:
    shape = _check_pair("deltas", deltas, anchors)
    if not isinstance(clip_to, Tensor):
        if clip_to is not None and len(clip_to) != 2:
            raise ValueError(f"clip_to must be (h, w) or a tensor [..., 2] of them, got {clip_to}")
        return DECODE(deltas, anchors, None, _four(weights), max_log, clip_to, inclusive)
    _library.check_one_device(deltas=deltas, clip_to=clip_to)
    if clip_to.shape[-1:] != (2,) or _broadcast(clip_to.shape[:-1], shape[:-1]) != shape[:-1]:
        raise ValueError(
            f"clip_to must be (h, w) or have a shape [..., 2] that broadcasts to {[*shape[:-1], 2]}, "
            f"got {list(clip_to.shape)}"
        )
    return DECODE(deltas, anchors, clip_to, _four(weights), max_log, None, inclusive)


def _check_pair(name: str, first: Tensor, anchors: Tensor) -> torch.Size:
    """The shape to which both broadcast."""
    pair = {name: first, "anchors": anchors}
    _library.check_floating(**pair)
    _library.check_one_device(**pair)
    shape = first.shape if first.shape == anchors.shape else _broadcast(first.shape, anchors.shape)
    if first.shape[-1:] != (4,) or anchors.shape[-1:] != (4,) or shape is None:
        raise ValueError(
            f"{name} and anchors must have broadcastable shapes [..., 4], "
            f"got {list(first.shape)} and {list(anchors.shape)}"
        )
    return shape


def _broadcast(first: torch.Size, second: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        return None


def _four(weights: Sequence[float]) -> list[float]:
    if len(weights) != 4:
        raise ValueError(f"weights must be 4 numbers (x, y, w, h), got {weights}")
    return [float(w) for w in weights]


class BoxCoder:
    """maskrcnn-benchmark's coder by name, arguments and layout: boxes [N, 4] against deltas [N, 4 · classes].

    weights: of (x, y, w, h). bbox_xform_clip: the largest dw, dh. inclusive: boxes as maskrcnn-benchmark has them,
    with x2, y2 the last pixel. By default they are exclusive (x2 − x1 wide) as everywhere in this package: pass
    inclusive=True along with that project's boxes or weights.
    """

    def __init__(self, weights: Sequence[float], bbox_xform_clip: float = MAX_LOG, inclusive: bool = False) -> None:
        self.weights = weights
        self.bbox_xform_clip = bbox_xform_clip
        self.inclusive = inclusive

    def encode(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Deltas [N, 4] that lead from proposals [N, 4] to reference_boxes [N, 4]. Errors as of `encode_boxes`."""
        return encode_boxes(reference_boxes, proposals, self.weights, self.inclusive)

    def decode(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [N, 4 · classes] at rel_codes [N, 4 · classes] (classes outermost) from boxes [N, 4].

        ValueError for other shapes, and as of `decode_boxes`.
        """
        if boxes.dim() != 2 or rel_codes.dim() != 2 or rel_codes.shape[1] % 4 or len(rel_codes) != len(boxes):
            raise ValueError(
                "rel_codes and boxes must have the shapes [N, 4 · classes] and [N, 4], "
                f"got {list(rel_codes.shape)} and {list(boxes.shape)}"
            )
        deltas = rel_codes.reshape(len(boxes), rel_codes.shape[1] // 4, 4)
        return _decode(deltas, boxes[:, None], self.weights, None, self.bbox_xform_clip, self.inclusive).flatten(1)
