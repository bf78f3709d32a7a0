"""What `fastrcnn demo` writes: pictures, videos, and the detections as JSON."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePath
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pycocotools.mask
import torch
from PIL import Image

from fastrcnn.cli.demo_inputs import IMAGE_SUFFIXES, JSON_NAME, Input, Item, is_video
from fastrcnn.coco_demo import mask_montage
from fastrcnn.config import conventions_of
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList
from fastrcnn.video import VIDEO_CODECS, VIDEO_SUFFIXES, VideoWriter
from fastrcnn.visualization import KEYPOINT_LOGIT

OUTPUT = Path("output/demo")
# of the pictures that are written; others become PNG. Full colour, so that lines stay sharp in JPEG
_PICTURE_OPTIONS: dict[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".png": {"compress_level": 1},
    ".webp": {"quality": 95},
    ".bmp": {},
}


def output_path(output: Path | None, inputs: Iterable[Input]) -> Path:
    """The folder or file to write: see --output. ValueError for what would mix with, or replace, what is there."""
    if output is None:
        output = OUTPUT
        while output.exists() and not _is_empty_folder(output):
            number = int(output.name.removeprefix(f"{OUTPUT.name}-")) if output != OUTPUT else 1
            output = OUTPUT.with_name(f"{OUTPUT.name}-{number + 1}")
        return output
    if _is_file_name(output):
        if output.suffix.lower() not in {*_PICTURE_OPTIONS, *VIDEO_CODECS}:
            known = ", ".join((*_PICTURE_OPTIONS, *VIDEO_CODECS))
            raise ValueError(f"--output {output}: the suffix is to be one of {known}")
        some = list(islice(inputs, 2))
        if len(some) != 1:
            raise ValueError(f"--output {output} is one file, but there are several inputs: name a folder")
        if output.exists() or output.with_suffix(".json").exists():
            raise ValueError(f"--output {output}, or the .json beside it, is there already: choose another name")
        video = isinstance(some[0].source, int) or is_video(some[0].source)
        if video != is_video(output):
            raise ValueError(f"--output {output}: {some[0].source} gives {'a video' if video else 'an image'}")
    elif output.exists() and not _is_empty_folder(output):
        raise ValueError(f"--output {output} is not empty: choose a new folder, so that nothing is replaced")
    return output


def _is_file_name(output: Path) -> bool:
    return output.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not output.is_dir()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


class Results:
    """Draws pictures and videos and writes them and the JSON; a context manager.

    output: a folder, or the file of one image or video, or None to write nothing. masks_per_dim: heat maps of this many
    masks each way in place of the detections. draw: whether to draw what is not written.
    """

    def __init__(
        self, output: Path | None, predictor: Predictor, masks_per_dim: int | None, write_pictures: bool, draw: bool
    ):
        self.output = output
        self.wrote_pictures = output is not None and write_pictures
        self.count = 0
        self.labels: Counter[str] = Counter()
        self.json: Path | None = None
        self._predictor = predictor
        self._masks_per_dim = masks_per_dim
        self._draws = draw or self.wrote_pictures
        self._one_file = output is not None and _is_file_name(output)
        self._video: tuple[Input, VideoWriter] | None = None
        self._detections: DetectionsFile | None = None
        if output is not None:
            self.json = output.with_suffix(".json") if self._one_file else output / JSON_NAME
            self.json.parent.mkdir(parents=True, exist_ok=True)
            shift = conventions_of(predictor.cfg).keypoint_shift
            self._detections = DetectionsFile(self.json, predictor.categories, shift)

    def add(self, result: tuple[Item, BoxList]) -> tuple[Item, np.ndarray | None]:
        """Draws and writes an item; returns it with its picture, uint8 RGB [h, w, 3]."""
        item, detections = result
        picture = None
        if self._draws:
            if self._masks_per_dim is not None:
                picture = mask_montage(detections, detections.get_field("mask"), self._masks_per_dim)
            else:
                picture = np.asarray(self._predictor.draw(item.image, detections))
        if self.wrote_pictures:
            self._write(item, picture)
        if self._detections is not None:
            self._detections.add(item, detections)
        self.count += 1
        self.labels.update(detections.get_field("names"))
        return item, picture

    def _write(self, item: Item, picture: np.ndarray) -> None:
        if item.number is None:
            path = self._free(item.input.name, _PICTURE_OPTIONS, ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, **_PICTURE_OPTIONS[path.suffix.lower()])
            return
        if self._video is None or self._video[0] is not item.input:
            self._close_video()
            path = self._free(item.input.name, VIDEO_CODECS, ".mp4")
            self._video = item.input, VideoWriter(path, item.frames_per_second)
        writer = self._video[1]
        while writer.count <= item.number:  # of a camera some were dropped
            writer.write(picture)

    def _free(self, name: PurePath, known: Iterable[str], other: str) -> Path:
        """Where to write the picture of this name: never where a file is, such as one from another folder."""
        if self._one_file:
            return self.output
        path = first = self.output / (name if name.suffix.lower() in known else name.with_suffix(other))
        number = 1
        while path.exists():
            number += 1
            path = first.with_stem(f"{first.stem}-{number}")
        return path

    def _close_video(self) -> None:
        if self._video is not None:
            self._video[1].close()
            self._video = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_video()
        if self._detections is not None:
            self._detections.close()


class DetectionsFile:
    """A JSON file in COCO's format for annotations, written as the detections come, so that memory does not grow.

    categories: label → name. keypoint_shift: taken off the keypoints, see `fastrcnn.Conventions`.
    """

    def __init__(self, path: Path, categories: Mapping[int, str], keypoint_shift: float):
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._images: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self._shift = keypoint_shift
        self._image_count = self._count = 0
        known = [{"id": label, "name": name} for label, name in categories.items()]
        self._file.write(f'{{"categories": {json.dumps(known)},\n"annotations": [')

    def add(self, item: Item, detections: BoxList) -> None:
        """The detections of an image, in pixels of the image."""
        width, height = detections.size
        image = {"id": self._image_count + 1, "file_name": item.input.name.as_posix(), "width": width, "height": height}
        if item.number is not None:
            image |= {"frame": item.number, "time": round(item.time, 3)}
        self._images.write((",\n" if self._image_count else "\n") + json.dumps(image))
        self._image_count += 1
        boxes = detections.convert("xywh").bbox.double().round(decimals=3).tolist()
        scores, labels = (detections.get_field(name).tolist() for name in ("scores", "labels"))
        for row, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
            entry = {"id": self._count + 1, "image_id": self._image_count, "category_id": label, "bbox": box}
            entry |= {"score": round(score, 5), "area": round(box[2] * box[3], 3), "iscrowd": 0}
            if detections.has_field("rle"):
                code = detections.get_field("rle")[row]
                entry |= {"area": int(pycocotools.mask.area(code)), "segmentation": code}
            if detections.has_field("keypoints"):
                points = detections.get_field("keypoints").keypoints[row, :, :2].double() - self._shift
                sure = detections.get_field("keypoint_scores")[row] > KEYPOINT_LOGIT
                values = torch.cat([points.round(decimals=3), 1.0 + sure[:, None]], 1)
                entry |= {"keypoints": values.flatten().tolist(), "num_keypoints": int(sure.sum())}
            self._file.write((",\n" if self._count else "\n") + json.dumps(entry))
            self._count += 1

    def close(self) -> None:
        self._file.write('\n],\n"images": [')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._file)
        self._images.close()
        self._file.write("\n]}\n")
        self._file.close()
