"""Datasets in PASCAL VOC's layout: Annotations/*.xml, JPEGImages/*, ImageSets/Main/<split>.txt."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastrcnn.data.datasets.abstract import BadAnnotations, DataError, read_image, read_image_size
from fastrcnn.structures import BoxList

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class _Record:
    """One annotation file: rows of (x1, y1, x2, y2, label, difficult) and the image's (width, height)."""

    rows: tuple[tuple[float, ...], ...]
    size: tuple[int, int]


class PascalVOCDataset(Dataset):
    """The images that ImageSets/Main/<split>.txt names, in its order.

    An item is (image, BoxList, index), after `transforms(image, boxlist)`. Fields: labels int64 (1..K, in order of
    `classes`, VOC's 20 by default) and difficult (bool); with use_difficult=False those objects are left out. VOC's
    boxes count pixels from 1 and include the last one: (x1, y1, x2, y2) is read as (x1 − 1, y1 − 1, x2, y2).

    Objects that cannot be used, and those of classes that `classes` does not name, are left out, with one warning that
    counts them. DataError: a missing or broken file; without `classes`, a class that is not one of VOC's.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        use_difficult: bool = False,
        transforms: Callable[[Any, BoxList], tuple[Any, BoxList]] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(data_dir)
        self.split = split
        self.keep_difficult = use_difficult
        self.transforms = transforms
        self.classes = VOC_CLASSES if classes is None else tuple(classes)
        self._only_some = classes is not None
        self.categories: dict[int, str] = dict(enumerate(self.classes, 1))
        self._labels = {name: label for label, name in self.categories.items()}
        split_file = self.root / "ImageSets" / "Main" / f"{split}.txt"
        try:
            lines = split_file.read_text().splitlines()
        except OSError as error:
            raise DataError(f"split file {split_file} cannot be read: {error.strerror}") from None
        self.ids = [line.split()[0] for line in lines if line.strip()]
        self.id_to_img_map = dict(enumerate(self.ids))
        bad = BadAnnotations()
        self._records = [self._parse(image_id, bad) for image_id in self.ids]
        bad.warn(self.root / "Annotations")

    def _parse(self, image_id: str, bad: BadAnnotations) -> _Record:
        path = self.root / "Annotations" / f"{image_id}.xml"
        try:
            tree = ElementTree.parse(path).getroot()
        except FileNotFoundError:
            raise DataError(f"annotation file {path} (image id {image_id}) does not exist") from None
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(f"annotation file {path} (image id {image_id}) cannot be read: {error}") from None
        width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        if not (0 < width < math.inf and 0 < height < math.inf):  # also when NaN
            width, height = read_image_size(self._image_path(image_id), image_id)
        rows = []
        for number, entry in enumerate(tree.findall("object"), 1):
            name = (entry.findtext("name") or "").strip()
            if name not in self._labels and self._only_some:
                bad.add(f"class {name!r}, which `classes` does not name", f"object {number} of {path.name}")
                continue
            if name not in self._labels:
                raise DataError(
                    f"{path}: class {name!r} is not one of {', '.join(self.classes)}; "
                    "give the dataset's entry its classes, for example `classes: [cat, dog]`"
                )
            x1, y1, x2, y2 = (_number(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            box = (x1 - 1, y1 - 1, x2, y2)
            reason = _fault(box, width, height)
            if reason:
                bad.add(reason, f"object {number} of {path.name}")
                continue
            difficult = _number(entry.findtext("difficult")) == 1
            rows.append((*box, self._labels[name], difficult))
        return _Record(tuple(rows), (int(width), int(height)))

    def _image_path(self, image_id: str) -> Path:
        paths = [self.root / "JPEGImages" / f"{image_id}{suffix}" for suffix in IMAGE_SUFFIXES]
        return next((path for path in paths if path.exists()), paths[0])

    def __len__(self) -> int:
        return len(self.ids)

    def get_img_info(self, index: int) -> dict[str, int]:
        width, height = self._records[index].size
        return {"height": height, "width": width}

    def get_groundtruth(self, index: int) -> BoxList:
        """The annotations of an image, in its own pixels."""
        record = self._records[index]
        rows = torch.tensor(record.rows, dtype=torch.float32).reshape(-1, 6)
        if not self.keep_difficult:
            rows = rows[rows[:, 5] == 0]
        target = BoxList(rows[:, :4], record.size)
        target.add_field("labels", rows[:, 4].long())
        target.add_field("difficult", rows[:, 5].bool())
        return target.clip_to_image(remove_empty=True)

    def __getitem__(self, index: int) -> tuple[Any, BoxList, int]:
        image_id = self.ids[index]
        image: Any = read_image(self._image_path(image_id), image_id, self._records[index].size)
        target = self.get_groundtruth(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target, index


def _number(text: str | None) -> float:
    """The number in an XML element; NaN if there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _fault(box: tuple[float, float, float, float], width: float, height: float) -> str | None:
    """Why a box (exclusive corners) cannot be used, or None."""
    x1, y1, x2, y2 = box
    if not all(math.isfinite(side) for side in box):
        return "a missing or unreadable box"
    if x2 <= x1 or y2 <= y1:
        return "a box of zero or negative size"
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return "a box outside the image"
    return None
