"""COCO's measures by pycocotools."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.evaluation.masks import encode_bitmaps
from fastrcnn.structures import BoxList, SegmentationMask

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
METRICS = {
    "bbox": _METRICS,
    "segm": _METRICS,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
_OKS_SIGMA = 0.05  # for keypoints other than COCO's 17: about their mean, as no spread of annotators is known


def evaluate_coco(
    coco_gt: COCO,
    results: Sequence[dict],
    iou_type: str,
    image_ids: Sequence[int] | None = None,
    curves: Path | None = None,
) -> dict[str, float]:
    """COCOeval with its defaults: METRICS[iou_type] in its order, then "AP/<class>" for each class with ground truth.

    `results` are in COCO's result format (xywh boxes, category and image ids of `coco_gt`). -1 where there is no ground
    truth to measure (COCO's convention), 0 where there are no results. `image_ids`: these images only. Neither
    `coco_gt` nor `results` is changed. ValueError: a result of an unknown image, ground truth without what is measured.
    `curves`: file for the precision–recall curves, see `save_curves`.
    """
    if iou_type not in METRICS:
        raise ValueError(f"iou_type is {iou_type!r}, wanted one of {', '.join(METRICS)}")
    ids = sorted(coco_gt.imgs) if image_ids is None else sorted(image_ids)
    if unknown := {result["image_id"] for result in results}.difference(ids):
        raise ValueError(f"{iou_type} results of images that are not evaluated, for instance image id {min(unknown)}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = _ground_truth(coco_gt, iou_type, ids)
        if results:
            detections = truth.loadRes([dict(result) for result in results])
        else:
            detections = _coco(truth.dataset["images"], [], truth.dataset["categories"])
        evaluation = COCOeval(truth, detections, iou_type)
        if iou_type == "keypoints":
            counts = {category["id"]: len(category["keypoints"]) for category in truth.dataset["categories"]}
            if odd := {len(result["keypoints"]) // 3 for result in results}.difference(counts.values()):
                raise ValueError(f"results have {min(odd)} keypoints, the ground truth has {max(counts.values())}")
            evaluation.params.catIds = sorted(counts)
            if set(counts.values()) != {17}:
                evaluation.params.kpt_oks_sigmas = np.full(max(counts.values()), _OKS_SIGMA)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    measures = dict(zip(METRICS[iou_type], map(float, evaluation.stats), strict=True))
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]: all areas, most detections
    for number, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, number]
        if (values > -1).any():
            measures[f"AP/{truth.cats[category_id]['name']}"] = float(values[values > -1].mean())
    if curves is not None:
        parameters = evaluation.params
        names = [truth.cats[category_id]["name"] for category_id in parameters.catIds]
        save_curves(curves, names, parameters.iouThrs, parameters.recThrs, precision)
    return measures


def save_curves(
    path: Path, classes: Sequence[str], thresholds: np.ndarray, recall: np.ndarray, precision: np.ndarray
) -> None:
    """A .npz file with `classes`, IoU `thresholds` [T], `recall` [R] and `precision` [T, R, K], float32: the best
    precision at that recall or a higher one, 0 where it is not reached, −1 for a class without objects."""
    np.savez_compressed(
        path,
        classes=np.array(list(classes), dtype=np.str_),
        thresholds=np.asarray(thresholds, dtype=np.float32),
        recall=np.asarray(recall, dtype=np.float32),
        precision=np.asarray(precision, dtype=np.float32),
    )


def _coco(images: list[dict], annotations: list[dict], categories: list[dict]) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
    return coco


def _ground_truth(coco: COCO, iou_type: str, image_ids: Sequence[int]) -> COCO:
    """Copies for COCOeval, which turns polygons into RLE in place; ids from 1, as it takes 0 for "no match"."""
    categories = list(coco.dataset["categories"])
    if iou_type == "keypoints":
        categories = [category for category in categories if "keypoints" in category]
        if len({len(category["keypoints"]) for category in categories}) != 1:
            raise ValueError(
                "keypoints: wanted ground truth with categories that all have the same number of keypoints"
            )
    known = {category["id"]: category for category in categories}
    annotations = []
    for image_id in image_ids:
        for original in coco.imgToAnns.get(image_id, ()):
            if original["category_id"] not in known:
                continue
            annotation = {"iscrowd": 0, **original, "id": len(annotations) + 1}
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
            if iou_type == "segm":
                annotation["segmentation"] = _checked_segmentation(original, coco.imgs[image_id])
            elif iou_type == "keypoints":
                points = 3 * len(known[original["category_id"]]["keypoints"])
                annotation.setdefault("keypoints", [0] * points)
                annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
            annotations.append(annotation)
    return _coco([coco.imgs[image_id] for image_id in image_ids], annotations, categories)


def _checked_segmentation(annotation: dict, image: dict) -> list | dict:
    if "segmentation" not in annotation:
        raise ValueError(
            f"annotation {annotation.get('id')} of image id {image['id']} has no segmentation to evaluate masks with"
        )
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        return segmentation
    parts = [part for part in segmentation if len(part) >= 6]  # pycocotools takes four numbers for a box
    return parts or encode_bitmaps(torch.zeros(1, image["height"], image["width"]))[0]


def to_coco_results(dataset: Any, predictions: Mapping[int, BoxList], iou_type: str) -> list[dict]:
    """Predictions per index of the dataset, in pixels of the original images, → COCO's result format.

    Boxes become xywh, labels the category ids of the annotation file. Fields: scores, labels, and `rle` for "segm",
    `keypoints` ([N,K,3] or `Keypoints`) for "keypoints", from which the dataset's `keypoint_shift` (default 0.5) is
    taken off. Those two have no `bbox`, so that COCO takes the area of the mask or of the keypoints.
    """
    return [
        {"image_id": image_id, "category_id": category_id, **value, "score": score}
        for index in sorted(predictions)
        if len(predictions[index])
        for image_id, category_id, value, score in _rows(dataset, index, predictions[index], iou_type)
    ]


def _rows(dataset: Any, index: int, boxlist: BoxList, iou_type: str) -> Iterator[tuple[int, int, dict, float]]:
    wanted = {"bbox": (), "segm": ("rle",), "keypoints": ("keypoints",)}[iou_type]
    for field in ("scores", "labels", *wanted):
        if not boxlist.has_field(field):
            raise ValueError(f"prediction {index} has no field {field!r}, which {iou_type} results need")
    values: list[dict]
    if iou_type == "bbox":
        values = [{"bbox": box} for box in rounded_xywh(boxlist).tolist()]
    elif iou_type == "segm":
        values = [{"segmentation": code} for code in boxlist.get_field("rle")]
    else:
        values = [{"keypoints": points} for points in _points(dataset, boxlist).flatten(1).round(decimals=3).tolist()]
    to_json = getattr(dataset, "contiguous_category_id_to_json_id", None)
    labels = boxlist.get_field("labels").tolist()
    image_id = image_id_of(dataset, index)
    for label, value, score in zip(labels, values, boxlist.get_field("scores").tolist(), strict=True):
        if to_json is not None and label not in to_json:
            if not 1 <= label <= max(to_json):
                raise ValueError(
                    f"prediction {index} (image id {image_id}) has label {label}, wanted one of 1..{max(to_json)}"
                )
            continue  # a gap in the ids of COCO's files: torchvision's models have a class there that means nothing
        yield image_id, label if to_json is None else to_json[label], value, score


def rounded_xywh(boxlist: BoxList) -> torch.Tensor:
    """float64 [N,4], rounded to 0.001 pixels: the error of float32 corners would flip IoUs that lie on a threshold."""
    boxes = boxlist.convert("xyxy").bbox.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).round(decimals=3)


def _points(dataset: Any, boxlist: BoxList) -> torch.Tensor:
    """float64 [N,K,3] in COCO's convention, which puts 0 in the middle of the first pixel; ours is 0.5 there."""
    keypoints = boxlist.get_field("keypoints")
    values = (keypoints if isinstance(keypoints, torch.Tensor) else keypoints.keypoints).double()
    shift = getattr(dataset, "keypoint_shift", 0.5)
    return values - values.new_tensor([shift, shift, 0])


def image_id_of(dataset: Any, index: int) -> int:
    """The id that the annotation file gives to the image; the index itself for a dataset without ids."""
    ids = getattr(dataset, "id_to_img_map", None)
    return index if ids is None else ids[index]


def target_of(dataset: Any, index: int) -> BoxList:
    """The ground truth of an image in its original pixels: `get_groundtruth(index)` where there is one, which reads no
    image, else the target of `dataset[index]`."""
    info = dataset.get_img_info(index)
    size = (int(info["width"]), int(info["height"]))
    target = dataset.get_groundtruth(index) if hasattr(dataset, "get_groundtruth") else dataset[index][1]
    return target if tuple(target.size) == size else target.resize(size)


def coco_from_targets(dataset: Any) -> COCO:
    """The targets of any dataset, as of `target_of`, as a COCO object in memory, with the ids that `to_coco_results`
    gives."""
    images, annotations = [], []
    for index in range(len(dataset)):
        target = target_of(dataset, index).convert("xyxy")
        target = target[target.bbox.isfinite().all(1)]
        inside = target.clip_to_image(remove_empty=False).bbox
        target = target[(inside[:, 2:] > inside[:, :2]).all(1)]  # the loader leaves these boxes out as well
        image_id = image_id_of(dataset, index)
        images.append({"id": image_id, "width": target.size[0], "height": target.size[1]})
        annotations += [{"image_id": image_id, **annotation} for annotation in _annotations(dataset, target)]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    to_json = getattr(dataset, "contiguous_category_id_to_json_id", None) or {}
    labels = {annotation["category_id"] for annotation in annotations}
    names = getattr(dataset, "categories", None) or {label: f"class {label}" for label in sorted(labels)}
    categories: list[dict] = [{"id": to_json.get(label, label), "name": name} for label, name in names.items()]
    if unknown := labels.difference(category["id"] for category in categories):
        raise ValueError(f"the dataset's targets have label {min(unknown)}, its categories are {sorted(names)}")
    points = max((len(annotation.get("keypoints", ())) // 3 for annotation in annotations), default=0)
    for category in categories if points else ():
        category["keypoints"] = [str(number) for number in range(points)]
    return _coco(images, annotations, categories)


def _annotations(dataset: Any, target: BoxList) -> Iterator[dict]:
    to_json = getattr(dataset, "contiguous_category_id_to_json_id", None) or {}
    boxes = rounded_xywh(target)
    sides, areas = boxes.tolist(), boxes[:, 2:].prod(1).tolist()
    crowd = target.get_field("iscrowd").tolist() if target.has_field("iscrowd") else [0] * len(target)
    codes = _codes(target.get_field("masks")) if target.has_field("masks") else None
    points = _points(dataset, target).flatten(1).tolist() if target.has_field("keypoints") else None
    for number, label in enumerate(target.get_field("labels").tolist()):
        annotation = {
            "category_id": to_json.get(label, label),
            "bbox": sides[number],
            "area": areas[number],
            "iscrowd": int(crowd[number]),
        }
        if codes is not None:
            annotation |= {"segmentation": codes[number], "area": float(pycocotools.mask.area(codes[number]))}
        if points is not None:
            annotation["keypoints"] = points[number]
        yield annotation


def _codes(masks: SegmentationMask) -> list[dict]:
    return encode_bitmaps(masks.convert("mask").get_mask_tensor())
