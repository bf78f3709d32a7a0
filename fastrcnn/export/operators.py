"""The operators of a detector's inference as compositions of PyTorch's and torchvision's own, with sizes that need not
be known: what an exported program consists of, so that it runs without this package."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  (brings torch.ops.torchvision)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrcnn.ops.reference import anchors, box_coder, keypoints, nms, roi_align, soft_nms


class PortableOperators(TorchFunctionMode):
    """Context in which `torch.ops.fastrcnn.*` are traced as their `DEFINITIONS`, but for those of `keep`."""

    def __init__(self, keep: Iterable[Any] = ()):
        super().__init__()
        self.definitions = {operator: how for operator, how in DEFINITIONS.items() if operator not in set(keep)}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in self.definitions:
            return function(*args, **(kwargs or {}))
        with self:  # definitions use operators too
            return self.definitions[function](*args, **(kwargs or {}))


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fastrcnn.ops.nms_padded`, by one `torchvision::nms` over all sets and labels.

    Each has a place of its own in the plane; in float64 the shift loses nothing of float32 coordinates that matters.
    """
    usable = nms.usable_boxes(boxes, scores, valid)
    order = nms.falling_order(scores, usable)
    boxes = torch.where(usable[..., None], boxes, 0).double()
    boxes = nms.gather_boxes(boxes, order).flatten(0, 1)
    sets, count = order.shape
    group = torch.arange(sets, device=order.device)[:, None].expand(sets, count)
    if labels is not None:
        group = group * (labels.amax() - labels.amin() + 1) + labels.gather(1, order)
    boxes = boxes + (group.flatten() * (boxes.amax() - boxes.amin() + 1))[:, None]
    rows = usable.gather(1, order).flatten().nonzero()[:, 0]
    # and two boxes without area, of no set: torchvision says to compilers that at least two are kept
    rows = torch.cat([rows, rows.new_full((2,), sets * count)])
    boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])[rows]
    kept = torch.ops.torchvision.nms(boxes, -rows.to(boxes.dtype), iou_threshold)
    # written as numbers: not every translation has a scatter of booleans
    rank = rows.new_zeros(sets * count + 1).scatter(0, rows[kept], 1)[:-1].view(sets, count)
    keep, rank = rank > 0, rank.cumsum(1)
    slot = torch.where(keep & (rank <= max_output), rank - 1, max_output)  # what does not stay goes to a slot to spare
    indices = torch.full((sets, max_output + 1), -1, device=order.device).scatter(1, slot, order)
    return indices[:, :max_output], rank[:, -1].clamp(max=max_output).to(torch.int32)


def select_proposals(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Tensor],
    image_sizes: Tensor,
    strides: Sequence[float],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    max_proposals: int,
    nms_threshold: float,
    min_size: float,
    weights: Sequence[float],
    per_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fastrcnn.ops.select_proposals` without per_batch, which is for training.

    P does not depend on the size of the images: the slots that a small one cannot fill are invalid.
    """
    found = []
    for level, (level_logits, level_deltas, cells) in enumerate(zip(logits, deltas, cell_anchors, strict=True)):
        images, count, _, width = level_logits.shape
        flat = level_logits.permute(0, 2, 3, 1).flatten(1).float()
        flat = torch.where(flat.isfinite(), flat, float("-inf"))
        best, index = flat.topk(torch.sym_min(pre_nms_top_n, flat.shape[1]), dim=1)
        codes = level_deltas.permute(0, 2, 3, 1).reshape(images, -1, 4).float()
        codes = codes.gather(1, index[..., None].expand(-1, -1, 4))
        place = index // count
        stride_y, stride_x = strides[2 * level : 2 * level + 2]
        shift = torch.stack([place % width * stride_x, place // width * stride_y], -1)
        places = cells.float()[index % count] + shift.repeat(1, 1, 2)
        boxes = box_coder.decode_boxes(codes, places, image_sizes[:, None], list(weights), box_coder.MAX_LOG)
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = best.isfinite() & codes.isfinite().all(-1) & (sides >= min_size).all(-1)
        per_level = min(pre_nms_top_n, post_nms_top_n)
        kept, _ = torch.ops.fastrcnn.nms_padded.default(boxes, best, nms_threshold, per_level, valid=valid)
        slot = kept.clamp(min=0)
        found.append((nms.gather_boxes(boxes, slot), torch.where(kept >= 0, best.gather(1, slot), float("-inf"))))
    boxes, best = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    best, order = (x[:, :max_proposals] for x in best.sort(dim=1, descending=True, stable=True))
    valid = best.isfinite()
    boxes = torch.where(valid[..., None], nms.gather_boxes(boxes, order), 0)
    return boxes, torch.where(valid, best.sigmoid(), 0), valid


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    last_pixel: bool = False,
) -> Tensor:
    """As `fastrcnn.ops.multilevel_roi_align`, by one `torchvision::roi_align` per level on the boxes of that level."""
    canonical = canonical_size, canonical_level
    shapes = [feature.shape for feature in features]
    regions = roi_align.locate(shapes, boxes, valid, output_size, scales, sampling_ratio, aligned, *canonical)
    corners = boxes.flatten(0, 1) if boxes.ndim == 3 else boxes[:, 1:]
    if last_pixel:
        corners = torch.cat([corners[:, :2], corners[:, 2:] - 1], 1)
    rois = torch.cat([regions.image[:, None].to(corners.dtype), corners], 1)
    out = features[0].new_zeros((rois.shape[0], features[0].shape[1], *output_size))
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (regions.usable & (regions.level == level)).nonzero()[:, 0]
        part = torch.ops.torchvision.roi_align(feature, rois[rows], scale, *output_size, sampling_ratio, aligned)
        out = out.index_put((rows,), part)
    return out


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """As `fastrcnn.ops.heatmaps_to_keypoints`, over the positions of all boxes in one list.

    Memory: about 2 K + 16 numbers per position, so per pixel of the boxes.
    """
    corner, sides, counts = keypoints.grid(boxes, height, width)
    detections, kinds, side, _ = heatmaps.shape
    columns, rows = counts.long().unbind(1)
    table = heatmaps.permute(0, 2, 3, 1).reshape(-1, kinds)  # row: detection, y, x

    # resized in x: for each column of each box the `side` values of the heat map's rows
    box, column = _positions(columns)
    line = torch.arange(side, device=box.device)
    wide = 0
    for index, weight in keypoints.taps(column.to(counts.dtype), counts[box, 0], side):
        wide = wide + weight[:, None, None] * table[(box[:, None] * side + line) * side + index[:, None]]  # [T, S, K]
    wide, first = wide.flatten(0, 1), columns.cumsum(0) - columns

    # resized in y: for each position of each box
    box, position = _positions(columns * rows)
    column, row = position % columns[box], position // columns[box]
    values = 0
    for index, weight in keypoints.taps(row.to(counts.dtype), counts[box, 1], side):
        values = values + weight[:, None] * wide[(first[box] + column) * side + index]  # [T, K]

    owner = box[:, None].expand(-1, kinds)
    scores = heatmaps.new_full((detections, kinds), float("-inf")).scatter_reduce(0, owner, values, "amax")
    last = (columns * rows)[:, None].expand(-1, kinds)
    place = torch.where(values == scores[box], position[:, None], last[box])
    place = last.scatter_reduce(0, owner, place, "amin").clamp(max=last - 1)  # a NaN is equal to nothing
    return keypoints.to_points(place % columns[:, None], place // columns[:, None], corner, sides, counts), scores


def _positions(counts: Tensor) -> tuple[Tensor, Tensor]:
    """counts int64 [N] -> of the places of all N one after another: whose it is, and its number there, [sum]."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(owner.shape[0], device=counts.device) - (counts.cumsum(0) - counts)[owner]


DEFINITIONS: dict[Any, Callable] = {
    torch.ops.fastrcnn.decode_boxes.default: box_coder.decode_boxes,
    torch.ops.fastrcnn.grid_anchors.default: anchors.grid_anchors,
    torch.ops.fastrcnn.heatmaps_to_keypoints.default: heatmaps_to_keypoints,
    torch.ops.fastrcnn.multilevel_roi_align.default: multilevel_roi_align,
    torch.ops.fastrcnn.nms_padded.default: nms_padded,
    torch.ops.fastrcnn.select_proposals.default: select_proposals,
    torch.ops.fastrcnn.soft_nms_padded.default: soft_nms.soft_nms_padded,
}
