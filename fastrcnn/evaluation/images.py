"""Images one by one: which objects were found, and which detections are right, at one IoU of boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask
import torch

from fastrcnn.evaluation.coco import rounded_xywh
from fastrcnn.structures import BoxList


def match_detections(target: BoxList, detections: BoxList, iou_threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which object each detection of an image finds: (found int64 [D], ignored bool [D]).

    found: index in `target`, −1 for none. COCO's rule at one IoU of boxes: the best scores first, each takes the free
    object of its class that it overlaps most. One that finds none, but lies on a crowd (field iscrowd; the share of
    the detection counts) or finds a difficult object (field difficult), is ignored: neither right nor wrong. Boxes
    without labels are all of one class.
    """
    count, objects = len(detections), len(target)
    found, ignored = np.full(count, -1), np.zeros(count, dtype=bool)
    crowd, aside = _flags(target, "iscrowd"), set_aside(target)
    if not count or not objects:
        return found, ignored
    boxes = [rounded_xywh(boxlist).cpu().numpy() for boxlist in (detections, target)]
    ious = pycocotools.mask.iou(*boxes, crowd.astype(np.uint8))
    if detections.has_field("labels") and target.has_field("labels"):
        same = np.asarray(detections.get_field("labels"))[:, None] == np.asarray(target.get_field("labels"))[None]
        ious = np.where(same, ious, -1)
    free = ~aside
    for number in scores_of(detections).argsort(descending=True, stable=True).tolist():
        for candidates in (free, aside):
            overlaps = np.where(candidates, ious[number], -1)
            best = int(overlaps.argmax())
            if overlaps[best] >= iou_threshold:
                found[number], ignored[number] = best, aside[best]
                free[best] = False
                break
    return found, ignored


def scores_of(boxlist: BoxList) -> torch.Tensor:
    """float32 [N]: field scores, of proposals objectness."""
    return boxlist.get_field("scores" if boxlist.has_field("scores") else "objectness")


def set_aside(target: BoxList) -> np.ndarray:
    """bool [G]: the objects that need not be found, crowds and difficult ones."""
    return _flags(target, "iscrowd") | _flags(target, "difficult")


def _flags(target: BoxList, field: str) -> np.ndarray:
    flags = target.get_field(field) if target.has_field(field) else np.zeros(len(target))
    return np.asarray(flags, dtype=bool)


@dataclass(frozen=True)
class Judged:
    """The detections of an image against its objects: scores [R] of the right and [W] of the wrong ones, and how many
    objects were to be found."""

    index: int
    right: np.ndarray
    wrong: np.ndarray
    objects: int

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Right, wrong and missed."""
        right = int((self.right >= threshold).sum())
        return right, int((self.wrong >= threshold).sum()), self.objects - right

    def f1(self, threshold: float) -> float | None:
        """None without objects and detections."""
        right, wrong, missed = self.counts(threshold)
        return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else None


def judge(index: int, target: BoxList, detections: BoxList, iou_threshold: float = 0.5) -> Judged:
    """Image `index` as `match_detections` sees it."""
    found, ignored = match_detections(target, detections, iou_threshold)
    scores = scores_of(detections).cpu().numpy()
    objects = int((~set_aside(target)).sum())
    return Judged(index, scores[(found >= 0) & ~ignored], scores[found < 0], objects)


def best_threshold(judged: Sequence[Judged]) -> float:
    """The score from which on the detections of all images together have the best F1; 0.5 where none is right."""
    scores = np.concatenate([np.concatenate([j.right, j.wrong]) for j in judged] or [np.zeros(0)])
    correct = np.concatenate([np.repeat([True, False], [len(j.right), len(j.wrong)]) for j in judged] or [np.zeros(0)])
    if not correct.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(correct[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of equal scores
    f1 = 2 * right / (np.arange(len(right)) + 1 + sum(j.objects for j in judged))
    return float(scores[last][f1[last].argmax()])
