"""PASCAL VOC's average precision of boxes at one IoU threshold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastrcnn.evaluation.coco import save_curves
from fastrcnn.ops import box_iou
from fastrcnn.structures import BoxList

_RECALLS = np.linspace(0, 1, 101)


def evaluate_voc(
    dataset: Any,
    predictions: Mapping[int, BoxList],
    output_folder: Path | str | None = None,
    *,
    iou_threshold: float = 0.5,
    use_07_metric: bool = False,
) -> dict[str, float]:
    """{"AP50": mean over classes, "AP50/<class>": …} of classes with objects that are not difficult; -1 if none has.

    `use_07_metric`: precision sampled at 11 recalls, as in VOC 2007 and in maskrcnn-benchmark; otherwise the area under
    the curve, as from VOC 2010 on. Rule of the development kit: the best scores first, a detection takes the object of
    its class with the highest IoU if that is at least the threshold; a second detection of an object is wrong, one of
    a difficult object does not count. IoU is that of continuous boxes (width = x2 − x1), so it differs slightly from
    the kit's, whose pixels are inclusive (+ 1). Writes result.txt and the precision–recall curves, bbox_curves.npz
    (see `save_curves`), into `output_folder`.
    """
    truths = [dataset.get_groundtruth(index).convert("xyxy") for index in range(len(dataset))]
    key = f"AP{round(100 * iou_threshold)}"
    measures: dict[str, float] = {key: -1.0}
    curves = []
    for label, name in dataset.categories.items():
        precision, recall = precision_recall(truths, predictions, label, iou_threshold)
        if recall is not None:
            measures[f"{key}/{name}"] = average_precision(precision, recall, use_07_metric)
        curves.append(_sampled(precision, recall))
    if len(measures) > 1:
        measures[key] = float(np.mean(list(measures.values())[1:]))
    if output_folder is not None:
        Path(output_folder).mkdir(parents=True, exist_ok=True)
        lines = [f"{name}: {value:.4f}" for name, value in measures.items()]
        rule = "11 recall points" if use_07_metric else "area under the curve"
        (Path(output_folder) / "result.txt").write_text("\n".join([f"mean {lines[0]} ({rule})", *lines[1:]]) + "\n")
        curves_file = Path(output_folder) / "bbox_curves.npz"
        save_curves(
            curves_file, list(dataset.categories.values()), [iou_threshold], _RECALLS, np.stack(curves, 1)[None]
        )
    return measures


def precision_recall(
    truths: list[BoxList], predictions: Mapping[int, BoxList], label: int, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Precision and recall [D] of a class after each of its detections, best score first; None without objects."""
    objects = 0
    scores: list[float] = []
    correct: list[int] = []  # 1 right, 0 wrong, -1 does not count
    for index, truth in enumerate(truths):
        same = truth.get_field("labels") == label
        boxes = truth.bbox[same]
        difficult = (truth.get_field("difficult") if truth.has_field("difficult") else torch.zeros(len(truth)))[
            same
        ].bool()
        objects += int((~difficult).sum())
        found = predictions.get(index)
        if found is None or not (found.get_field("labels") == label).any():
            continue
        found = found.convert("xyxy")[found.get_field("labels") == label]
        found = found[found.get_field("scores").argsort(descending=True, stable=True)]
        scores += found.get_field("scores").tolist()
        if not len(boxes):
            correct += [0] * len(found)
            continue
        best, which = box_iou(found.bbox.double(), boxes.double().to(found.bbox.device)).max(1)
        taken: set[int] = set()
        for iou, number in zip(best.tolist(), which.tolist(), strict=True):
            if iou < iou_threshold:
                correct.append(0)
            elif difficult[number]:
                correct.append(-1)
            else:
                correct.append(int(number not in taken))
                taken.add(number)
    if not objects:
        return np.zeros(0), None
    verdicts = np.array(correct, dtype=np.int64)[np.argsort(-np.array(scores), kind="stable")]
    right, wrong = np.cumsum(verdicts == 1), np.cumsum(verdicts == 0)
    return right / np.maximum(right + wrong, 1), right / objects


def _sampled(precision: np.ndarray, recall: np.ndarray | None) -> np.ndarray:
    """The best precision at each of _RECALLS or a higher recall, [R]; −1 for a class without objects."""
    if recall is None:
        return np.full(len(_RECALLS), -1.0)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(recall, _RECALLS)]


def average_precision(precision: np.ndarray, recall: np.ndarray, use_07_metric: bool) -> float:
    """Both [D], recall not falling. The precision at a recall is the best precision at that recall or a higher one."""
    if use_07_metric:
        return float(np.mean([precision[recall >= t].max(initial=0.0) for t in np.arange(11) / 10]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
