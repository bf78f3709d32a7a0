"""Non-maximum suppression: torchvision's `nms` and `batched_nms`, and `nms_padded` for many sets with fixed shapes."""

import torch
import torchvision  # noqa: F401  (brings torch.ops.torchvision)
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import nms as reference


def _fake_padded(boxes, scores, iou_threshold, max_output, labels=None, valid=None):
    sets = boxes.shape[0]
    return boxes.new_empty((sets, max_output), dtype=torch.int64), boxes.new_empty((sets,), dtype=torch.int32)


def _fake_ragged(boxes, *_):
    return boxes.new_empty((_library.new_dynamic_size(),), dtype=torch.int64)


def _triton_greedy(boxes, labels, order, counts, iou_threshold, max_output):
    """boxes [S, N, 4], labels [S, N] or None, order by falling score; the first counts of it take part, or all."""
    from triton_kernels import nms as kernels

    n = boxes.shape[1]
    if kernels.prefer_segmented(n, max_output):
        return kernels.nms_segmented(boxes, labels, order, counts, iou_threshold, max_output)
    if labels is None:
        boxes = reference.gather_boxes(boxes, order)
        return kernels.nms_bitmask(boxes, None, order, counts, iou_threshold, max_output)
    labels = labels.gather(1, order)
    if counts is not None:  # the others stay at the end
        out = torch.arange(n, device=order.device) >= counts[:, None]
        labels = labels.masked_fill(out, torch.iinfo(labels.dtype).max)
    labels, rank = labels.sort(stable=True)
    boxes = reference.gather_boxes(boxes, order.gather(1, rank))
    ranks, counts = kernels.nms_bitmask(boxes, labels, rank, counts, iou_threshold, max(n, max_output), padding=n)
    ranks = ranks.sort().values[:, :max_output]  # by falling score again
    padded = torch.cat([order, order.new_full((len(order), 1), -1)], 1)
    return padded.gather(1, ranks), counts.clamp(max=max_output)


def _triton_padded(boxes, scores, iou_threshold, max_output, labels=None, valid=None):
    # the kernels compute in float32
    if boxes.dtype == torch.float64 or not boxes.shape[1] or not max_output or not len(boxes):
        return reference.nms_padded(boxes, scores, iou_threshold, max_output, labels, valid)
    usable = reference.usable_boxes(boxes, scores, valid)
    order = reference.falling_order(scores, usable)
    return _triton_greedy(boxes, labels, order, usable.sum(1, dtype=torch.int32), iou_threshold, max_output)


def _triton_ragged(boxes, labels, scores, iou_threshold):
    order = reference.falling_order(scores)[None]
    labels = None if labels is None else labels[None]
    indices, counts = _triton_greedy(boxes[None], labels, order, None, iou_threshold, len(boxes))
    return indices[0, : counts.item()]


def _triton_nms(boxes, scores, iou_threshold):
    if boxes.dtype == torch.float64 or not len(boxes):
        return reference.nms(boxes, scores, iou_threshold)
    return _triton_ragged(boxes, None, scores, iou_threshold)


def _triton_batched(boxes, scores, idxs, iou_threshold):
    if boxes.dtype == torch.float64 or not len(boxes):
        return reference.batched_nms(boxes, scores, idxs, iou_threshold)
    idxs = idxs.byte() if idxs.dtype == torch.bool else idxs  # searchsorted has no bool
    return _triton_ragged(boxes, idxs, scores, iou_threshold)


def _cpu_sorted(boxes: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    """boxes [n, 4], labels [n] in falling score order -> kept positions, in no order if there are several labels."""
    falling = -torch.arange(len(boxes), dtype=boxes.dtype)
    if labels is None or bool((labels == labels[:1]).all()):
        return torch.ops.torchvision.nms(boxes, falling, iou_threshold)
    labels, grouped = labels.sort(stable=True)
    sizes = labels.unique_consecutive(return_counts=True)[1].tolist()
    groups = zip(grouped.split(sizes), boxes[grouped].split(sizes), strict=True)
    return torch.cat([index[torch.ops.torchvision.nms(b, falling[: len(b)], iou_threshold)] for index, b in groups])


def _cpu_padded(boxes, scores, iou_threshold, max_output, labels=None, valid=None):
    usable = reference.usable_boxes(boxes, scores, valid)
    order = reference.falling_order(scores, usable)
    boxes = reference.gather_boxes(boxes, order)
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
        # torchvision compares its float32 quotient with a double: 3/10 would exceed 0.3
        iou_threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    labels = None if labels is None else labels.gather(1, order)
    keep = torch.zeros_like(usable)
    for s, count in enumerate(usable.sum(1).tolist()):
        kept = _cpu_sorted(boxes[s, :count], None if labels is None else labels[s, :count], iou_threshold)
        keep[s, kept] = True
    return reference.pad_kept(keep, order, max_output)


def _cpu_nms(boxes, scores, iou_threshold):
    if boxes.dtype != torch.float64:
        boxes, scores = boxes.float(), scores.float()  # torchvision's has no half precision on the CPU
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def _cpu_batched(boxes, scores, idxs, iou_threshold):
    order = reference.falling_order(scores)
    boxes = boxes[order] if boxes.dtype == torch.float64 else boxes[order].float()
    return order[_cpu_sorted(boxes, idxs[order], iou_threshold).sort().values]


_NMS = _library.register(
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    reference=reference.nms,
    fake=_fake_ragged,
    cpu=_cpu_nms,
    triton=_triton_nms,
)
_BATCHED_NMS = _library.register(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    reference=reference.batched_nms,
    fake=_fake_ragged,
    cpu=_cpu_batched,
    triton=_triton_batched,
)
_NMS_PADDED = _library.register(
    "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, SymInt max_output, Tensor? labels=None, "
    "Tensor? valid=None) -> (Tensor, Tensor)",
    reference=reference.nms_padded,
    fake=_fake_padded,
    cpu=_cpu_padded,
    triton=_triton_padded,
)


def _check_ragged(boxes: Tensor, scores: Tensor) -> None:
    """torchvision's own conditions, type of error and wording."""
    if boxes.dim() != 2:
        raise RuntimeError(f"boxes should be a 2d tensor, got {boxes.dim()}D")
    if boxes.shape[1] != 4:
        raise RuntimeError(f"boxes should have 4 elements in dimension 1, got {boxes.shape[1]}")
    if scores.dim() != 1:
        raise RuntimeError(f"scores should be a 1d tensor, got {scores.dim()}D")
    if boxes.shape[0] != scores.shape[0]:
        raise RuntimeError(
            "boxes and scores should have same number of elements in dimension 0, "
            f"got {boxes.shape[0]} and {scores.shape[0]}"
        )
    if boxes.dtype != scores.dtype:
        raise RuntimeError(f"boxes should have the same type as scores, got {boxes.dtype} and {scores.dtype}")
    _library.check_floating(RuntimeError, boxes=boxes)
    _library.check_one_device(RuntimeError, boxes=boxes, scores=scores)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices int64 [K] of the boxes that greedy NMS keeps, by falling score; as `torchvision.ops.nms`.

    boxes [N, 4] xyxy, scores [N] of the same floating dtype; half precision is computed in float32. A box goes if a
    kept box of higher score overlaps it with IoU > iou_threshold; of equal scores the earlier counts as higher.

    K depends on the data: on a GPU the call synchronises, and `torch.compile(fullgraph=True)` needs
    `torch._dynamo.config.capture_dynamic_output_shape_ops = True`. `nms_padded` has neither drawback.
    As torchvision has it, boxes that are not finite overlap nothing and are all kept, and NaN scores come first.
    RuntimeError on shapes, dtypes or devices that do not fit.
    """
    _check_ragged(boxes, scores)
    return _NMS(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` in which boxes of different idxs [N] do not suppress each other; as `torchvision.ops.batched_nms`.

    Categories, of any dtype, are compared, never added to the coordinates, so the result is exact for boxes and
    categories of any size, and boxes that are not finite do not touch the others.
    RuntimeError on shapes, dtypes or devices that do not fit; no boxes are an empty result whatever the rest is.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.int64)
    _check_ragged(boxes, scores)
    if idxs.shape != scores.shape:
        raise RuntimeError(f"idxs should have the shape of scores {tuple(scores.shape)}, got {tuple(idxs.shape)}")
    _library.check_one_device(RuntimeError, boxes=boxes, idxs=idxs)
    return _BATCHED_NMS(boxes, scores, idxs, iou_threshold)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy NMS of S independent sets in one call, with shapes known beforehand and no host synchronisation.

    boxes [S, N, 4] xyxy and scores [S, N], floating (IoU in float32, float64 stays); labels [S, N], any integer dtype:
    boxes of different labels do not suppress each other; valid bool [S, N]: the others take no part, and neither does
    a box whose coordinates or score are not finite.

    Returns indices int64 [S, max_output], by falling score and in order of appearance among equal ones, −1 where
    empty, and counts int32 [S]. ValueError on shapes, dtypes or devices that do not fit.

    Source: greedy NMS solved as a fixpoint, as Cluster-NMS does (arXiv 2005.03572), exact.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [S, N, 4], got {tuple(boxes.shape)}")
    for name, value in (("scores", scores), ("labels", labels), ("valid", valid)):
        if value is not None and value.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must be [S, N] = {tuple(boxes.shape[:2])}, got {tuple(value.shape)}")
    _library.check_floating(boxes=boxes, scores=scores)
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {valid.dtype}")
    _library.check_one_device(boxes=boxes, scores=scores, labels=labels, valid=valid)
    if max_output < 0:
        raise ValueError(f"max_output must not be negative, got {max_output}")
    return _NMS_PADDED(boxes, scores, iou_threshold, max_output, labels, valid)
