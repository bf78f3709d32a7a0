"""The recall of class-agnostic proposals, as maskrcnn-benchmark and Detectron measure it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pycocotools.mask
from pycocotools.coco import COCO

from fastrcnn.structures import BoxList

# name -> smallest and largest area of an object, pixels
AREAS = {
    "": (0.0, 1e10),
    "s": (0.0, 32.0**2),
    "m": (32.0**2, 96.0**2),
    "l": (96.0**2, 1e10),
    "96-128": (96.0**2, 128.0**2),
    "128-256": (128.0**2, 256.0**2),
    "256-512": (256.0**2, 512.0**2),
    "512-inf": (512.0**2, 1e10),
}


def evaluate_proposals(
    coco_gt: COCO,
    proposals: Mapping[int, BoxList],
    limits: Sequence[int] = (100, 1000),
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """Average recall of class-agnostic boxes, keyed by image id: "AR@100", and by the objects' area "ARs@100",
    "ARm@100", "ARl@100", "AR96-128@100" and so on, see AREAS.

    The mean of the recall at IoU 0.5, 0.55, … 0.95, as maskrcnn-benchmark measures it: of the best `limit` boxes of an
    image, the pair with the highest IoU is matched first, then the next among the boxes and objects left; crowds do not
    count. Ordered by field `objectness`, or `scores`. -1 where there are no objects of that size. COCOeval with
    useCats = 0 matches in the order of the scores instead: the same wherever no box could be matched with two objects.
    """
    thresholds = np.arange(0.5, 0.96, 0.05)
    matched: dict[str, list[np.ndarray]] = {f"AR{name}@{limit}": [] for limit in limits for name in AREAS}
    for image_id in sorted(coco_gt.imgs) if image_ids is None else image_ids:
        objects = [a for a in coco_gt.imgToAnns.get(image_id, ()) if not a.get("iscrowd", 0)]
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
        areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in objects], dtype=np.float64)
        found = _ordered(proposals.get(image_id))
        ious = np.zeros((len(found), len(boxes)))
        if ious.size:
            ious[:] = pycocotools.mask.iou(found, boxes, [0] * len(boxes))
        for name, (low, high) in AREAS.items():
            chosen = ious[:, (areas >= low) & (areas <= high)]
            for limit in limits:
                matched[f"AR{name}@{limit}"].append(_greedy(chosen[:limit].copy()))
    measures = {}
    for name, ious in matched.items():
        best = np.concatenate(ious) if ious else np.zeros(0)
        measures[name] = float((best[None] >= thresholds[:, None]).mean()) if len(best) else -1.0
    return measures


def _ordered(boxlist: BoxList | None) -> np.ndarray:
    """float64 [N,4] xywh, best first."""
    if boxlist is None or not len(boxlist):
        return np.zeros((0, 4))
    order = boxlist.get_field("objectness" if boxlist.has_field("objectness") else "scores").argsort(
        descending=True, stable=True
    )
    boxes = boxlist.convert("xyxy").bbox[order].double().cpu().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _greedy(ious: np.ndarray) -> np.ndarray:
    """The IoU with which each object is matched, [G] of [N, G], in the order of matching; 0 for those that get no box.
    `ious` is overwritten."""
    best = np.zeros(ious.shape[1])
    for number in range(min(ious.shape)):
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        best[number] = ious[row, column]
        ious[row] = -1
        ious[:, column] = -1
    return best
