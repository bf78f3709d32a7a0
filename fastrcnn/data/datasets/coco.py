"""Datasets in COCO's JSON layout: boxes, polygons, RLE, crowds, keypoints."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
from collections.abc import Callable, Container
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from fastrcnn.data.datasets.abstract import BadAnnotations, DataError, read_image, read_image_size
from fastrcnn.structures import BoxList, Keypoints, PersonKeypoints, SegmentationMask
from fastrcnn.structures.keypoint import flip_map_of

MIN_KEYPOINTS_PER_IMAGE = 10
# category id → name, as torchvision lists them, gaps included
COCO_CATEGORIES = {
    number: name
    for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if number > 0 and name != "N/A"
}


class COCODataset(Dataset):
    """Images of folder `root` with the annotations of `ann_file`, in order of the image ids.

    An item is (image, BoxList, index), after `transforms(image, boxlist)`. Fields: labels int64 (1..K, in order of the
    category ids); masks if the file has any (bitmaps where an instance of the image is an RLE, else polygons);
    keypoints if its categories have; iscrowd (bool) with keep_crowd, without it crowds are left out.
    COCO's keypoints are indices of pixels; keypoint_shift moves them to the pixels' centres, as boxes are continuous (0
    leaves them as they are, see `Conventions`). The evaluation takes it off the predictions again.

    remove_images_without_annotations: leave out images with no object but crowds, with only boxes of at most one pixel,
    or, in a keypoint dataset, with fewer than 10 labelled keypoints (maskrcnn-benchmark's filter for training).

    json_category_ids: labels are the category ids of the file, as torchvision's models have them, gaps included.

    Annotations that cannot be used are left out, with one warning that counts them; of one whose keypoints alone cannot
    be used, those. An image size that is missing or no number is measured. DataError: a missing or broken annotation
    file or image.
    """

    def __init__(
        self,
        ann_file: str | Path,
        root: str | Path,
        remove_images_without_annotations: bool = False,
        transforms: Callable[[Any, BoxList], tuple[Any, BoxList]] | None = None,
        keep_crowd: bool = False,
        json_category_ids: bool = False,
        keypoint_shift: float = 0.5,
    ) -> None:
        self.ann_file = Path(ann_file)
        self.root = Path(root)
        self.transforms = transforms
        self.keep_crowd = keep_crowd
        self.keypoint_shift = keypoint_shift
        content, bad = self._read()
        bad.warn(self.ann_file)

        categories = sorted(content["categories"], key=lambda category: category["id"])
        labels = [c["id"] for c in categories] if json_category_ids else range(1, len(categories) + 1)
        if not all(isinstance(label, int) for label in labels):
            raise DataError(f"annotation file {self.ann_file}: category ids are {labels}; labels are whole numbers")
        self.categories: dict[int, str] = {k: str(c["name"]) for k, c in zip(labels, categories, strict=True)}
        self.contiguous_category_id_to_json_id = {k: c["id"] for k, c in zip(labels, categories, strict=True)}
        self.json_category_id_to_contiguous_id = {v: k for k, v in self.contiguous_category_id_to_json_id.items()}
        self._keypoint_names = _keypoint_names(categories, content["annotations"])
        self._has_masks = any(ann.get("segmentation") for ann in content["annotations"])

        per_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            per_image[annotation["image_id"]].append(annotation)
        images = sorted(content["images"], key=lambda image: image["id"])
        if remove_images_without_annotations:
            only_keypoints = all(category.get("keypoints") for category in categories)
            images = [image for image in images if _worth_training(per_image[image["id"]], only_keypoints)]
        self.ids = [image["id"] for image in images]
        self.id_to_img_map = dict(enumerate(self.ids))
        self._info = images
        # one tensor of bytes, which worker processes share, in place of millions of objects, which each would copy
        packed = [pickle.dumps([self._slim(ann) for ann in per_image[i]], pickle.HIGHEST_PROTOCOL) for i in self.ids]
        self._ends = torch.tensor([0, *(len(record) for record in packed)]).cumsum(0)
        self._records = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8) if packed else None

    def _read(self) -> tuple[dict[str, Any], BadAnnotations]:
        """The content of the file without unusable annotations, sizes of all images filled in."""
        try:
            content = json.loads(self.ann_file.read_bytes())
        except FileNotFoundError:
            raise DataError(f"annotation file {self.ann_file} does not exist") from None
        except (OSError, ValueError) as error:
            raise DataError(f"annotation file {self.ann_file} cannot be read: {error}") from None
        for name, keys in (("images", ("id", "file_name")), ("categories", ("id", "name")), ("annotations", ())):
            entries = content.get(name) if isinstance(content, dict) else None
            if not isinstance(entries, list):
                raise DataError(f"annotation file {self.ann_file} has no list {name!r}: it is not in COCO's layout")
            for number, entry in enumerate(entries):
                if not isinstance(entry, dict) or any(k not in entry for k in keys):
                    raise DataError(f"annotation file {self.ann_file}: {name}[{number}] needs {' and '.join(keys)}")
        for name in ("images", "categories"):
            ids = [entry["id"] for entry in content[name]]
            kinds = {str if isinstance(i, str) else float if _finite([i]) else None for i in ids}
            if None in kinds or len(kinds) > 1:
                odd = next((i for i in ids if not (isinstance(i, str) or _finite([i]))), ids[-1])
                raise DataError(
                    f"annotation file {self.ann_file}: {name} has the id {odd!r}; want all numbers or all text"
                )
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise DataError(f"annotation file {self.ann_file}: {name} has the id {twice!r} twice")
        for image in content["images"]:
            if not isinstance(image["file_name"], str):
                raise DataError(
                    f"annotation file {self.ann_file}: image id {image['id']} has the file_name {image['file_name']!r}"
                )
            size = [image.get("width"), image.get("height")]
            if not (_finite(size) and all(1 <= side < 2**31 and side == int(side) for side in size)):
                size = read_image_size(self.root / image["file_name"], image["id"])
            image["width"], image["height"] = map(int, size)
        for category in content["categories"]:
            if not (isinstance(category.get("keypoints"), list) and category["keypoints"]):
                category.pop("keypoints", None)
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        known = {category["id"] for category in content["categories"]}
        points = 3 * len(_keypoint_names(content["categories"], content["annotations"]))
        bad = BadAnnotations()
        usable = []
        for number, annotation in enumerate(content["annotations"], 1):
            where = f"annotation id {annotation.get('id')}, image id {annotation.get('image_id')}"
            reason = _fault(annotation, sizes, known)
            if reason:
                bad.add(reason, where)
                continue
            keypoints = annotation.get("keypoints", [0] * points)
            if not (_is_list(keypoints, points) and _finite(keypoints)):
                if keypoints is not None and keypoints != []:
                    bad.add("keypoints of the wrong number or with NaN (only these skipped)", where)
                annotation |= {"keypoints": [0] * points, "num_keypoints": 0}
            if not isinstance(annotation.get("id"), int | str):
                annotation["id"] = number
            annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
            if not annotation.get("segmentation") and annotation.get("segmentation") != []:
                annotation.pop("segmentation", None)  # null and the like are no outline, [] is an empty one
            if not _finite([annotation.get("area")]):
                annotation["area"] = _area(annotation)
            usable.append(annotation)
        content["annotations"] = usable
        return content, bad

    def _slim(self, annotation: dict[str, Any]) -> tuple[Any, ...]:
        """What an item needs of an annotation: box xyxy, label, iscrowd, segmentation, keypoints."""
        x, y, w, h = annotation["bbox"]
        label = self.json_category_id_to_contiguous_id[annotation["category_id"]]
        crowd = bool(annotation["iscrowd"])
        return (x, y, x + w, y + h), label, crowd, annotation.get("segmentation"), annotation.get("keypoints")

    @cached_property
    def coco(self) -> COCO:
        """pycocotools' view of the file, without the unusable annotations; read when first asked for."""
        coco = COCO()
        coco.dataset, _ = self._read()
        coco.dataset.setdefault("info", {})  # COCO.loadRes copies it
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "coco"}

    def __len__(self) -> int:
        return len(self.ids)

    def get_img_info(self, index: int) -> dict[str, Any]:
        """The image's entry in the file: height, width, id, file_name, …"""
        return self._info[index]

    def get_groundtruth(self, index: int) -> BoxList:
        """The annotations of an image, in its own pixels."""
        info = self._info[index]
        size = (int(info["width"]), int(info["height"]))
        start, end = self._ends[index : index + 2].tolist()
        objects = pickle.loads(self._records[start:end].numpy())
        if not self.keep_crowd:
            objects = [each for each in objects if not each[2]]
        boxes, labels, crowd, segmentations, keypoints = zip(*objects, strict=True) if objects else ((),) * 5
        target = BoxList(boxes, size)
        target.add_field("labels", torch.tensor(labels, dtype=torch.int64))
        if self._has_masks:
            mode = "mask" if any(isinstance(segmentation, dict) for segmentation in segmentations) else "poly"
            try:
                target.add_field("masks", SegmentationMask([each or [] for each in segmentations], size, mode))
            except ValueError as error:
                raise DataError(f"{self.ann_file}: masks of image id {info['id']}: {error}") from None
        if self._keypoint_names:
            target.add_field("keypoints", self._keypoints(keypoints, size))
        if self.keep_crowd:
            target.add_field("iscrowd", torch.tensor(crowd, dtype=torch.bool))
        return target.clip_to_image(remove_empty=True)

    def _keypoints(self, keypoints: tuple[list[float] | None, ...], size: tuple[int, int]) -> Keypoints:
        names = self._keypoint_names
        values = torch.zeros(len(keypoints), len(names), 3)
        for row, flat in zip(values, keypoints, strict=True):
            if flat is not None:
                row.copy_(torch.tensor(flat, dtype=torch.float32).reshape(row.shape))
        values[..., :2] += self.keypoint_shift
        values = torch.where(values[..., 2:] > 0, values, 0)
        if tuple(names) == PersonKeypoints.NAMES:
            return PersonKeypoints(values, size)
        return Keypoints(values, size, flip_map_of(names))

    def __getitem__(self, index: int) -> tuple[Any, BoxList, int]:
        info = self._info[index]
        image: Any = read_image(self.root / info["file_name"], info["id"], (info["width"], info["height"]))
        target = self.get_groundtruth(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target, index


def _fault(annotation: Any, sizes: dict[Any, tuple[int, int]], categories: set[Any]) -> str | None:
    """Why an annotation cannot be used, or None."""
    if not _is_in(annotation.get("image_id"), sizes):
        return "an unknown image id"
    if not _is_in(annotation.get("category_id"), categories):
        return "a category id outside the list"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return "an iscrowd that is neither 0 nor 1"
    box = annotation.get("bbox")
    if not _is_list(box, 4):
        return "no box [x, y, width, height]"
    if not _finite(box):
        return "NaN or infinity in the box"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "a box of zero or negative size"
    width, height = sizes[annotation["image_id"]]
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "a box outside the image"
    return _mask_fault(annotation.get("segmentation"), width, height)


def _mask_fault(segmentation: Any, width: int, height: int) -> str | None:
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width] or not all(isinstance(side, int) for side in size):
            return "an RLE of another size than the image"
        try:
            runs = _runs(counts) if isinstance(counts, str) else np.asarray(counts)
        except ValueError:  # lists of different lengths in a list
            return "a broken RLE"
        good = runs.ndim == 1 and runs.dtype.kind in "iuf" and (runs >= 0).all() and (runs <= width * height).all()
        return None if good and runs.sum() == width * height and (runs % 1 == 0).all() else "a broken RLE"
    if segmentation and not isinstance(segmentation, list):
        return "a segmentation that is neither polygons nor an RLE"
    far = 10 * (width + height)  # drawing a polygon takes memory by the length of its edges
    for part in segmentation or ():
        if not isinstance(part, list) or len(part) % 2:
            return "a broken polygon"
        if not _finite(part):
            return "NaN or infinity in a polygon"
        if part and max(max(part), -min(part)) > far:
            return "a polygon far outside the image"
    return None


def _runs(text: str) -> np.ndarray:
    """int64 [N], the run lengths of a compressed RLE; [] if it is broken, for which pycocotools reads past its end.

    Six bits a character, +48, the low five those of the number, the sixth set where it goes on; from the fourth number
    on the difference to the last but one.
    """
    nothing = np.zeros(0, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return nothing
    last = np.flatnonzero(codes < 32)
    first = np.concatenate(([0], last[:-1] + 1))
    length = last - first + 1
    if length.max() > 6:  # 30 bits
        return nothing
    place = np.arange(len(codes)) - np.repeat(first, length)
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    values -= np.where(codes[last] & 16, 1 << (5 * length), 0)  # the sign
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values


def _is_in(value: Any, known: Container[Any]) -> bool:
    return isinstance(value, str | int | float) and value in known  # anything else might have no hash


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _finite(values: list[Any]) -> bool:
    """Whether all are numbers, neither NaN nor infinite."""
    try:
        return math.isfinite(sum(values))  # one NaN or infinity spoils the sum
    except (TypeError, OverflowError):
        return False


def _area(annotation: dict[str, Any]) -> float:
    """Area in square pixels by the mask, or by the box where there is none; COCO's size classes need it."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        return float(coco_mask.area(rle))
    if segmentation:
        area = 0.0
        for part in segmentation:
            x, y = np.array(part).reshape(-1, 2).T
            area += abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
        return float(area)
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _keypoint_names(categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> tuple[str, ...]:
    for category in categories:
        if category.get("keypoints"):
            return tuple(map(str, category["keypoints"]))
    return PersonKeypoints.NAMES if any(annotation.get("keypoints") for annotation in annotations) else ()


def _worth_training(annotations: list[dict[str, Any]], only_keypoints: bool) -> bool:
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    if all(min(annotation["bbox"][2:]) <= 1 for annotation in objects):
        return False
    labelled = sum(visibility > 0 for ann in objects for visibility in ann.get("keypoints", ())[2::3])
    return not only_keypoints or labelled >= MIN_KEYPOINTS_PER_IMAGE
