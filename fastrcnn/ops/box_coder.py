"""Boxes as offsets from anchors, and back (R-CNN's parametrisation, Girshick et al. 2014, appendix C)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrcnn.ops import _library
from fastrcnn.ops.reference import box_coder as reference
from fastrcnn.ops.reference.box_coder import MAX_LOG


def _promoted_fake(first: Tensor, anchors: Tensor, *rest) -> Tensor:
    return torch.empty_like(first, dtype=torch.promote_types(first.dtype, anchors.dtype))


def _backward_fake(grad: Tensor, first: Tensor, anchors: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(anchors)


def _launcher(name: str):
    def launch(*args):
        from triton_kernels import box_coder as kernels

        return getattr(kernels, name)(*args)

    return launch


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boxes, anchors, weights):
        ctx.save_for_backward(boxes, anchors)
        ctx.weights = weights
        with _library.below_autograd():
            return ENCODE(boxes, anchors, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *ENCODE_BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.weights), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, deltas, anchors, sizes, weights, max_log):
        ctx.save_for_backward(deltas, anchors, sizes)
        ctx.rest = weights, max_log
        with _library.below_autograd():
            return DECODE(deltas, anchors, sizes, weights, max_log)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *DECODE_BACKWARD(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None


def _encode_autograd(boxes, anchors, weights):
    if _library.needs_grad(boxes, anchors):
        return _Encode.apply(boxes, anchors, weights)
    with _library.below_autograd():
        return ENCODE(boxes, anchors, weights)


def _decode_autograd(deltas, anchors, *rest):
    if _library.needs_grad(deltas, anchors):
        return _Decode.apply(deltas, anchors, *rest)
    with _library.below_autograd():
        return DECODE(deltas, anchors, *rest)


# all tensors flat and contiguous: boxes, anchors, deltas [N, 4], sizes [N, 2] (h, w)
ENCODE = _library.register(
    "encode_boxes(Tensor boxes, Tensor anchors, float[] weights) -> Tensor",
    reference=reference.encode_boxes,
    fake=_promoted_fake,
    triton=_launcher("encode_boxes"),
    autograd=_encode_autograd,
)
ENCODE_BACKWARD = _library.register(
    "encode_boxes_backward(Tensor grad, Tensor boxes, Tensor anchors, float[] weights) -> (Tensor, Tensor)",
    reference=reference.encode_boxes_backward,
    fake=_backward_fake,
    triton=_launcher("encode_boxes_backward"),
)
DECODE = _library.register(
    "decode_boxes(Tensor deltas, Tensor anchors, Tensor? sizes, float[] weights, float max_log) -> Tensor",
    reference=reference.decode_boxes,
    fake=_promoted_fake,
    triton=_launcher("decode_boxes"),
    autograd=_decode_autograd,
)
DECODE_BACKWARD = _library.register(
    "decode_boxes_backward(Tensor grad, Tensor deltas, Tensor anchors, Tensor? sizes, float[] weights, float max_log)"
    " -> (Tensor, Tensor)",
    reference=reference.decode_boxes_backward,
    fake=_backward_fake,
    triton=_launcher("decode_boxes_backward"),
)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Offsets [..., 4] (dx, dy, dw, dh) that lead from anchors to boxes, both [..., 4] xyxy and broadcastable.

    dx, dy are in anchor sizes, dw, dh logarithms of the growth, each times its weight. Differentiable once in both.
    float16 and bfloat16 are computed in float32; the result has the promoted dtype. Empty boxes give −inf or NaN.
    ValueError if a last dimension or weights does not have 4 entries, RuntimeError if the shapes do not broadcast.
    """
    shape = _common_shape("boxes", boxes, anchors)
    flat = ENCODE(_flat(boxes, shape), _flat(anchors, shape), _four(weights))
    return flat.view(shape)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip_to: tuple[int, int] | Tensor | None = None,
) -> Tensor:
    """Boxes [..., 4] xyxy at the offsets deltas from anchors, the inverse of `encode_boxes`.

    deltas, anchors: [..., 4], broadcastable. dw and dh are clamped at log(1000 / 16). clip_to: (h, w) of the image, or
    a tensor [..., 2] of them that broadcasts against boxes[..., :2]: the corners are clamped into the image.
    Differentiable once in deltas and anchors; clamped values pass no gradient. float16 and bfloat16 are computed in
    float32; the result has the promoted dtype. NaN in a delta gives NaN in the box.
    ValueError if a last dimension or weights does not have 4 entries, or that of clip_to not 2; RuntimeError if the
    shapes do not broadcast.
    """
    return _decode(deltas, anchors, weights, clip_to, MAX_LOG)


def _decode(deltas, anchors, weights, clip_to, max_log: float) -> Tensor:
    shape = _common_shape("deltas", deltas, anchors)
    if isinstance(clip_to, Tensor):
        if clip_to.shape[-1:] != (2,):
            raise ValueError(f"clip_to must be (h, w) or have the shape [..., 2], got {list(clip_to.shape)}")
        sizes = clip_to
    elif clip_to is not None:
        sizes = torch.stack([deltas.new_full((), side, dtype=torch.int32) for side in clip_to])
    else:
        sizes = None
    if sizes is not None:
        sizes = sizes.expand(*shape[:-1], 2).reshape(-1, 2).contiguous()
    return DECODE(_flat(deltas, shape), _flat(anchors, shape), sizes, _four(weights), max_log).view(shape)


def _common_shape(name: str, first: Tensor, anchors: Tensor) -> torch.Size:
    if first.shape[-1:] != (4,) or anchors.shape[-1:] != (4,):
        raise ValueError(
            f"{name} and anchors must have the shape [..., 4], got {list(first.shape)} and {list(anchors.shape)}"
        )
    return torch.broadcast_shapes(first.shape, anchors.shape)


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    return x.expand(shape).reshape(-1, 4).contiguous()


def _four(weights: Sequence[float]) -> list[float]:
    if len(weights) != 4:
        raise ValueError(f"weights must be 4 numbers (x, y, w, h), got {weights}")
    return [float(w) for w in weights]


class BoxCoder:
    """maskrcnn-benchmark's coder: boxes [N, 4] against deltas [N, 4 · classes] (classes outermost).

    weights: of (x, y, w, h). bbox_xform_clip: the largest dw, dh.
    """

    def __init__(self, weights: Sequence[float], bbox_xform_clip: float = MAX_LOG) -> None:
        self.weights = weights
        self.bbox_xform_clip = bbox_xform_clip

    def encode(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Deltas [N, 4] that lead from proposals [N, 4] to reference_boxes [N, 4]. Errors as of `encode_boxes`."""
        return encode_boxes(reference_boxes, proposals, self.weights)

    def decode(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [N, 4 · classes] at rel_codes [N, 4 · classes] from boxes [N, 4].

        RuntimeError or ValueError for other shapes, and for weights that are not 4.
        """
        deltas = rel_codes.reshape(boxes.shape[0], rel_codes.shape[1] // 4, 4)
        return _decode(deltas, boxes[:, None], self.weights, None, self.bbox_xform_clip).flatten(1)
