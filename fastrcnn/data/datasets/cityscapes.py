"""Cityscapes in its own layout: leftImg8bit/<split>/<city>/*.png and gtFine/<split>/<city>/*_instanceIds.png, …"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastrcnn.data.datasets.abstract import IMAGE_ERRORS, DataError, read_image, read_image_size
from fastrcnn.structures import BoxList, SegmentationMask

# ids of the official label table: the classes whose objects are told apart, and what the evaluation leaves out
LABEL_IDS = {
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "caravan": 29, "trailer": 30, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
IGNORED_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
EVALUATED_CLASSES = tuple(name for name, label in LABEL_IDS.items() if label not in IGNORED_IDS)
FIRST_INSTANCE = 1000  # a pixel of object n of label l is 1000 · l + n; smaller values are l itself: stuff, or a group
Box = tuple[float, float, float, float]  # x1, y1, x2, y2, the second corner exclusive
_SUFFIXES = {"mask": "instanceIds.png", "poly": "polygons.json"}


class CityScapesDataset(Dataset):
    """The images of img_dir/<split>/<city> with the annotations of ann_dir/<split>/<city>, in order of their names.

    An item is (image, BoxList, index), after `transforms(image, boxlist)`. Fields: masks, and labels int64 (1..K, in
    order of `classes`: all ten by default; the official evaluation has EVALUATED_CLASSES, without caravan and trailer).
    mode "mask" reads the visible pixels of each object from *_instanceIds.png, "poly" the drawn outlines, which may go
    on behind other objects, from *_polygons.json. A box is the smallest around the object's pixels. Groups (cargroup,
    …) are no objects.

    min_area: objects whose box has fewer square pixels are left out. mini: only every (n // mini + 1)-th of n images.
    remove_images_without_annotations: leave out images with no box of more than one pixel each way; reads all files.

    Polygons of fewer than three corners and those outside the image are left out. DataError: a missing or broken file;
    annotations of another size than the image.
    """

    def __init__(
        self,
        img_dir: str | Path,
        ann_dir: str | Path,
        split: str,
        mode: str = "mask",
        transforms: Callable[[Any, BoxList], tuple[Any, BoxList]] | None = None,
        min_area: float = 0,
        mini: int | None = None,
        classes: Sequence[str] | None = None,
        remove_images_without_annotations: bool = False,
    ) -> None:
        if mode not in _SUFFIXES:
            raise DataError(f"Cityscapes: mode is {mode!r}; want one of {', '.join(_SUFFIXES)}")
        self.mode = mode
        self.transforms = transforms
        self.min_area = min_area
        self.classes = tuple(LABEL_IDS if classes is None else classes)
        if unknown := set(self.classes).difference(LABEL_IDS):
            raise DataError(f"Cityscapes has no objects of class {min(unknown)!r}; there are {', '.join(LABEL_IDS)}")
        self.categories: dict[int, str] = dict(enumerate(self.classes, 1))
        self.contiguous_category_id_to_json_id = {k: LABEL_IDS[name] for k, name in self.categories.items()}
        self._labels = {LABEL_IDS[name]: label for label, name in self.categories.items()}
        self._image_dir, self._ann_dir = Path(img_dir) / split, Path(ann_dir) / split
        images = sorted(self._image_dir.glob("*/*_leftImg8bit.png"))
        if mini is not None:
            images = images[:: len(images) // mini + 1]
        self._images = images
        self._sizes = [read_image_size(path, _frame(path)) for path in images]
        if remove_images_without_annotations:
            with ThreadPoolExecutor() as pool:
                worth = list(pool.map(self._worth_training, range(len(images))))
            self._images = [path for path, keep in zip(images, worth, strict=True) if keep]
            self._sizes = [size for size, keep in zip(self._sizes, worth, strict=True) if keep]
        self.id_to_img_map = {index: _frame(path) for index, path in enumerate(self._images)}

    @cached_property
    def _annotations(self) -> dict[str, Path]:
        """City_sequence_frame, and the ending → file, for gtFine and gtCoarse alike."""
        paths = sorted(self._ann_dir.glob("*/*"))
        return {f"{_frame(path)}_{path.name.rpartition('_')[2]}": path for path in paths}

    def _annotation(self, index: int, mode: str) -> Path:
        frame = _frame(self._images[index])
        path = self._annotations.get(f"{frame}_{_SUFFIXES[mode]}")
        if path is None:
            raise DataError(f"annotation file {self._ann_dir}/*/{frame}_*_{_SUFFIXES[mode]} does not exist")
        return path

    def _worth_training(self, index: int) -> bool:
        return any(min(x2 - x1, y2 - y1) > 1 for (x1, y1, x2, y2), _, _ in self._objects(index))

    def _objects(self, index: int) -> Iterator[tuple[Box, int, np.ndarray]]:
        """(box, label 1..K, bitmap of the box or polygon in pixel indices) of each object to be used."""
        objects = instances(self.get_instance_ids(index)) if self.mode == "mask" else self._polygons(index)
        for number, (x1, y1, x2, y2), outline in objects:
            label = self._labels.get(number // FIRST_INSTANCE)
            if label is not None and (x2 - x1) * (y2 - y1) >= self.min_area:
                yield (x1, y1, x2, y2), label, outline

    def _polygons(self, index: int) -> Iterator[tuple[int, Box, np.ndarray]]:
        """As `instances`, with polygons [V, 2] in the place of bitmaps; objects of a class are not told apart."""
        path, (width, height) = self._annotation(index, "poly"), self._sizes[index]
        try:
            content = json.loads(path.read_bytes())
            size = (content["imgWidth"], content["imgHeight"])
            entries = [(each["label"], np.array(each["polygon"], dtype=np.float64)) for each in content["objects"]]
            if not all(np.isfinite(points).all() for _, points in entries):
                raise ValueError("a polygon with NaN or infinity")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"annotation file {path} cannot be read: {error!r}") from None
        if size != (width, height):
            raise DataError(f"annotation file {path} is for {size[0]}x{size[1]}; the image is {width}x{height}")
        for name, points in entries:
            if name not in LABEL_IDS or len(points) < 3:
                continue
            low, high = points.min(0).clip(0), (points.max(0) + 1).clip(max=(width, height))
            if (high > low).all():
                yield FIRST_INSTANCE * LABEL_IDS[name], (*low.tolist(), *high.tolist()), points

    def get_instance_ids(self, index: int) -> np.ndarray:
        """int32 [h, w]: what each pixel belongs to, see FIRST_INSTANCE; of both modes, for the evaluation."""
        path = self._annotation(index, "mask")
        ids = read_instance_ids(path)
        if ids.shape[::-1] != self._sizes[index]:
            width, height = self._sizes[index]
            raise DataError(f"annotation file {path} is {ids.shape[1]}x{ids.shape[0]}; the image is {width}x{height}")
        return ids

    def __len__(self) -> int:
        return len(self._images)

    def get_img_info(self, index: int) -> dict[str, Any]:
        width, height = self._sizes[index]
        return {"height": height, "width": width, "id": self.id_to_img_map[index]}

    def get_groundtruth(self, index: int) -> BoxList:
        """The annotations of an image, in its own pixels."""
        size = (width, height) = self._sizes[index]
        objects = list(self._objects(index))
        boxes, labels, outlines = zip(*objects, strict=True) if objects else ((),) * 3
        target = BoxList(boxes, size)
        target.add_field("labels", torch.tensor(labels, dtype=torch.int64))
        if self.mode == "poly":
            # the corners are indices of pixels, whose centres lie half a pixel further
            target.add_field("masks", SegmentationMask([[points + 0.5] for points in outlines], size))
        else:
            bitmaps = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
            for bitmap, (x1, y1, x2, y2), pixels in zip(bitmaps, boxes, outlines, strict=True):
                bitmap[y1:y2, x1:x2] = torch.from_numpy(pixels)
            target.add_field("masks", SegmentationMask(bitmaps, size, "mask"))
        return target

    def __getitem__(self, index: int) -> tuple[Any, BoxList, int]:
        image: Any = read_image(self._images[index], self.id_to_img_map[index], self._sizes[index])
        target = self.get_groundtruth(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target, index


def _frame(path: Path) -> str:
    """City, sequence and frame, as in aachen_000000_000019, of any of a frame's files."""
    return "_".join(path.name.split("_")[:3])


def read_instance_ids(path: Path) -> np.ndarray:
    """int32 [h, w] of an *_instanceIds.png; DataError for a file that is missing or broken."""
    try:
        with Image.open(path) as file:
            ids = np.array(file)
    except (*IMAGE_ERRORS, ValueError) as error:
        raise DataError(f"annotation file {path} cannot be read: {error}") from None
    if ids.ndim != 2:
        raise DataError(f"annotation file {path} has colours; instance ids are one number a pixel")
    return ids.astype(np.int32)


def instances(ids: np.ndarray) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Instance ids [h, w] → (instance id, box, bool bitmap [y2 − y1, x2 − x1]) of each object, in order of the ids."""
    counts = np.bincount(ids.reshape(-1))
    for number in (np.flatnonzero(counts[FIRST_INSTANCE:]) + FIRST_INSTANCE).tolist():
        if number // FIRST_INSTANCE in LABEL_IDS.values():
            inside = ids == number
            (y1, y2), (x1, x2) = (np.flatnonzero(inside.any(axis))[[0, -1]].tolist() for axis in (1, 0))
            yield number, (x1, y1, x2 + 1, y2 + 1), inside[y1 : y2 + 1, x1 : x2 + 1]
