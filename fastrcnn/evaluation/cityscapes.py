"""Cityscapes' average precision of objects, by the rules of its official script, for masks and for boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask

from fastrcnn.data.datasets.cityscapes import FIRST_INSTANCE, IGNORED_IDS, Box, instances
from fastrcnn.structures import BoxList

OVERLAPS = np.arange(0.5, 1.0, 0.05)
MIN_REGION = 100  # square pixels


@dataclass(frozen=True, slots=True)
class _Matches:
    """The detections of a class in an image, and the number of objects that they should find.

    scores [D]; target int [D], the object that each overlaps most, −1 for none; overlap [D] with it; ignored [D], the
    share of each that lies on void, on groups of its class and on objects that are too small to count.
    """

    scores: np.ndarray
    target: np.ndarray
    overlap: np.ndarray
    ignored: np.ndarray
    objects: int


def evaluate_cityscapes(dataset: Any, predictions: Mapping[int, BoxList], iou_type: str) -> dict[str, float]:
    """{"AP", "AP50", "AP75", "AP/<class>", "AP50/<class>", "AP75/<class>"} of "segm" or "bbox"; −1 without objects.

    Rules of evalInstanceLevelSemanticLabeling: a detection finds an object of its class if it overlaps it with an IoU
    above the threshold (0.5, 0.55, … 0.95); of several the best counts and the others are wrong. One that finds nothing
    is wrong, unless more than the threshold's share of it lies on pixels that do not count. Objects below 100 pixels
    need not be found. AP is the area under the straight lines between the points of the precision-recall curve, means
    are over the classes with objects; caravan and trailer are not evaluated.

    "bbox": the same with the objects' boxes, of continuous corners, in the place of their pixels; void and groups stay
    pixels (those whose centre lies in the detected box). The official script has no such task.

    dataset: has `get_instance_ids(i)` (int [h, w] in the official coding), `categories` and
    `contiguous_category_id_to_json_id`. predictions: by index, fields scores, labels and, for "segm", rle.
    """
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}; Cityscapes is evaluated by bbox or segm")
    official = dataset.contiguous_category_id_to_json_id
    labels = {label: official[label] for label in dataset.categories if official[label] not in IGNORED_IDS}
    matches: dict[int, list[_Matches]] = {label: [] for label in labels}
    for index in range(len(dataset)):
        found, ids = predictions.get(index), dataset.get_instance_ids(index)
        objects = {number: box for number, box, _ in instances(ids)}
        for label, number in labels.items():
            same = BoxList([], ids.shape[::-1]) if found is None else found[found.get_field("labels") == label]
            own = {each: box for each, box in objects.items() if each // FIRST_INSTANCE == number}
            regions = _mask_regions if iou_type == "segm" else _box_regions
            scores = same.get_field("scores").double().cpu().numpy() if len(same) else np.zeros(0)
            matches[label].append(_match(scores, *regions(ids, own, [*IGNORED_IDS, number], same)))
    precisions = {name: _average_precisions(matches[k]) for k, name in dataset.categories.items() if k in labels}
    columns = {"AP": slice(None), "AP50": [0], "AP75": [5]}
    table = {
        metric: {name: float(values[column].mean()) for name, values in precisions.items() if values is not None}
        for metric, column in columns.items()
    }
    measures = {metric: float(np.mean(list(each.values()))) if each else -1.0 for metric, each in table.items()}
    return measures | {f"{metric}/{name}": value for metric, each in table.items() for name, value in each.items()}


def _mask_regions(ids: np.ndarray, objects: dict[int, Box], uncounted: list[int], found: BoxList) -> tuple:
    """ids [h, w]; objects: instance id → box, of one class, as the detections `found`.

    -> square pixels of the detections [D] and the objects [G], of what they share [D, G], and of the uncounted ids in
    the detections [D].
    """
    counts = np.bincount(ids.reshape(-1), minlength=FIRST_INSTANCE)
    masks = (pycocotools.mask.decode(code).astype(bool) for code in (found.get_field("rle") if len(found) else ()))
    histograms = np.array([np.bincount(ids[mask], minlength=len(counts)) for mask in masks]).reshape(-1, len(counts))
    own = list(objects)
    return histograms.sum(1), counts[own], histograms[:, own], histograms[:, uncounted].sum(1)


def _box_regions(ids: np.ndarray, objects: dict[int, Box], uncounted: list[int], found: BoxList) -> tuple:
    """As `_mask_regions`, of boxes; the uncounted ids stay pixels."""
    detected = found.convert("xyxy").bbox.double().cpu().numpy()
    boxes = np.array(list(objects.values()), dtype=np.float64).reshape(-1, 4)
    low = np.maximum(detected[:, None, :2], boxes[None, :, :2])
    shared = (np.minimum(detected[:, None, 2:], boxes[None, :, 2:]) - low).clip(min=0).prod(2)
    void = np.isin(ids, uncounted)
    pixels = np.array([void[_pixels(box)].sum() for box in detected])
    return _areas(detected), _areas(boxes), shared, pixels


def _match(scores: np.ndarray, sizes: np.ndarray, areas: np.ndarray, shared: np.ndarray, void: np.ndarray) -> _Matches:
    used = sizes > 0
    scores, sizes, shared, void = scores[used], sizes[used], shared[used], void[used]
    large = areas >= MIN_REGION
    ignored = (void + shared[:, ~large].sum(1)) / sizes
    overlap = (shared / (sizes[:, None] + areas - shared))[:, large]
    overlap = np.concatenate([np.zeros((len(scores), 1)), overlap], 1)  # with nothing
    return _Matches(scores, overlap.argmax(1) - 1, overlap.max(1), ignored, int(large.sum()))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)


def _pixels(box: np.ndarray) -> tuple[slice, slice]:
    """Those whose centre lies in the box."""
    x1, y1, x2, y2 = np.ceil(box - 0.5).clip(min=0).astype(int)
    return slice(y1, y2), slice(x1, x2)


def _average_precisions(matches: list[_Matches]) -> np.ndarray | None:
    """float64 [10], one for each of OVERLAPS; None where there are no objects."""
    objects = sum(each.objects for each in matches)
    if not objects:
        return None
    result = []
    for threshold in OVERLAPS:
        scores, correct = [], []
        for each in matches:
            hit = each.overlap > threshold
            best = np.zeros(len(hit), dtype=bool)
            for target in np.unique(each.target[hit]):
                candidates = np.flatnonzero(hit & (each.target == target))
                best[candidates[each.scores[candidates].argmax()]] = True
            counted = hit | (each.ignored <= threshold)
            scores.append(each.scores[counted])
            correct.append(best[counted])
        result.append(_area_under_curve(np.concatenate(scores), np.concatenate(correct), objects))
    return np.array(result)


def _area_under_curve(scores: np.ndarray, correct: np.ndarray, objects: int) -> float:
    """scores and correct [D], any order. A point for each distinct score; the first also counts at recall 0."""
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of equal scores
    right = np.cumsum(correct[order])[last]
    precision, recall = right / (last + 1), right / objects
    heights = np.concatenate([precision[:1], precision])
    return float((np.diff(recall, prepend=0.0) * (heights[1:] + heights[:-1]) / 2).sum())
