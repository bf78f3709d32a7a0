"""Detects in images, folders, videos and cameras; writes pictures and videos of the detections, and their JSON."""

import argparse
import glob
import json
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path, PurePath
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pycocotools.mask
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastrcnn.cli.common import add_model_arguments, model_of
from fastrcnn.coco_demo import mask_montage
from fastrcnn.config import Config, conventions_of
from fastrcnn.engine import find_model
from fastrcnn.engine.logging import has_terminal
from fastrcnn.extras import MissingExtra
from fastrcnn.predictor import Predictor, read_image
from fastrcnn.structures import BoxList
from fastrcnn.video import (
    VIDEO_CODECS,
    VIDEO_SUFFIXES,
    VideoError,
    VideoReader,
    VideoWriter,
    Window,
    ahead,
    behind,
    newest,
)
from fastrcnn.visualization import KEYPOINT_LOGIT

EXAMPLES = """  fastrcnn demo photo.jpg
      with the last quick start, without one with torchvision's Mask R-CNN, whose weights are downloaded once
  fastrcnn demo photos "holiday/*.jpg" --weights output/my_run --output found MODEL.DEVICE cpu
      a folder with its folders and all files of a pattern, with your own model; pictures and detections.json in found
  fastrcnn demo clip.mp4 --output clip_found.mp4 --config-file torchvision/keypoint_rcnn_R_50_FPN
      a video becomes a video
  fastrcnn demo --webcam 0 --min-image-size 224
      the first camera in a window, until q or Esc; with --output camera.mp4 recorded without a window, until Ctrl-C
  fastrcnn demo photos --show-mask-heatmaps --masks-per-dim 3
      in place of the detections, the mask probabilities of the nine best of each image

Exit code: 0, or 1 if some images could not be read (the rest is done, and the end tells which and why), or 2 if none
could be read, or the arguments are wrong.
"""

OUTPUT = Path("output/demo")
FALLBACK = "torchvision/mask_rcnn_R_50_FPN"
JSON_NAME = "detections.json"
# what folders are searched for, besides videos; any file that is named itself is tried
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".avif", ".heic")
)
# of the pictures that are written; others become PNG. Full colour, so that lines stay sharp in JPEG
_PICTURE_OPTIONS: dict[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".png": {"compress_level": 1},
    ".webp": {"quality": 95},
    ".bmp": {},
}


class Input(NamedTuple):
    """An image or video file, or a camera."""

    source: Path | int
    name: PurePath  # what it is called below the output folder


class Item(NamedTuple):
    """An image, or a frame of a video."""

    input: Input
    image: Tensor | np.ndarray  # uint8 RGB, [3, h, w] or [h, w, 3]
    number: int | None = None  # of a frame, from 0
    time: float | None = None  # seconds
    frames_per_second: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image or video file, folder (searched with its folders) or pattern"
    )
    add_model_arguments(parser)
    parser.add_argument("--webcam", type=int, metavar="N", help="camera number N, 0 being the first, in place of INPUT")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder, empty or new, or for one image or video the file to write (default: output/demo, the next time "
        "output/demo-2, …)",
    )
    parser.add_argument(
        "--window", action="store_true", help="show the pictures too: any key for the next image, q or Esc to end"
    )
    parser.add_argument("--no-pictures", action="store_true", help=f"write {JSON_NAME} only")
    parser.add_argument("--confidence-threshold", type=float, default=0.7, metavar="SCORE", help="(default: 0.7)")
    parser.add_argument(
        "--min-image-size",
        type=int,
        metavar="PIXELS",
        help="shorter side of the images that the model sees: less is faster (default: INPUT.MIN_SIZE_TEST)",
    )
    parser.add_argument(
        "--show-mask-heatmaps", action="store_true", help="pictures of the mask probabilities of the best detections"
    )
    parser.add_argument("--masks-per-dim", type=int, default=2, metavar="N", help="N × N heat maps (default: 2)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward pass (default: 1)")


def run(args: argparse.Namespace) -> None:
    names, opts = split_arguments([*args.inputs, *args.opts])
    _check(args, names)
    live = args.webcam is not None
    inputs = [Input(args.webcam, PurePath(f"webcam-{args.webcam}.mp4"))] if live else None
    if live:
        VideoReader(args.webcam).close()  # what is wrong with it is told before the model is loaded
    total = None if live else count_frames(files_of(names))
    cfg, weights = choose_model(argparse.Namespace(config_file=args.config_file, weights=args.weights, opts=opts))
    if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON:
        raise ValueError("MODEL.RPN_ONLY is True: this model gives proposals, not detections")
    if args.show_mask_heatmaps and not cfg.MODEL.MASK_ON:
        raise ValueError("--show-mask-heatmaps wants a model with masks, and MODEL.MASK_ON is False")
    with ExitStack() as stack:
        window = None
        if args.window or (live and args.output is None):
            try:
                window = stack.enter_context(Window("fastrcnn demo"))
            except (VideoError, MissingExtra) as error:
                if args.window:
                    raise
                print(f"no window, so this records until Ctrl-C: {error}")
        watch_only = live and window is not None and args.output is None
        output = None if watch_only else output_path(args.output, inputs or files_of(names))
        predictor = Predictor(
            cfg,
            weights,
            min_image_size=args.min_image_size,
            confidence_threshold=args.confidence_threshold,
            batch_size=args.batch_size,
            keep_masks=args.show_mask_heatmaps,
        )
        print(f"{weights} on {predictor.device}")
        failures: list[str] = []
        items = read_items(inputs or files_of(names), failures)
        results = stack.enter_context(
            Results(
                output,
                predictor,
                masks_per_dim=args.masks_per_dim if args.show_mask_heatmaps else None,
                write_pictures=not args.no_pictures,
                draw=window is not None,
            )
        )
        queue = 2 * args.batch_size
        source = stack.enter_context(newest(items) if live else ahead(items, queue))
        shown = stack.enter_context(
            closing(behind(results.add, detected(predictor, source), 0 if live and window else queue))
        )
        bar = stack.enter_context(tqdm(total=total, unit="image", dynamic_ncols=True, disable=not has_terminal()))
        began = time.perf_counter()
        interrupted = False
        try:
            for item, picture in shown:
                bar.update()
                if window and not window.show(picture, wait=item.number is None):
                    break
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - began
    summarise(results, failures, seconds)
    if interrupted and not live:
        raise KeyboardInterrupt("interrupted; what was done until then is written")
    if failures:
        if not results.count:
            raise ValueError("nothing could be read")
        raise SystemExit(1)


def summarise(results: "Results", failures: Sequence[str], seconds: float) -> None:
    found = ", ".join(f"{count} {name}" for name, count in results.labels.most_common())
    print(
        f"{results.count} images, {results.labels.total()} detections{f' ({found})' if found else ''}, "
        f"{results.count / max(seconds, 1e-9):.2f} images/s"
    )
    if results.json is not None:
        print(
            f"written to {results.output} and {results.json}"
            if results.wrote_pictures
            else f"written to {results.json}"
        )
    if failures:
        print(f"{len(failures)} could not be read:")
        for reason in failures:
            print(f"  {reason}")


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    if (args.webcam is None) == (not names):
        raise ValueError("name images, folders, patterns or videos, or a camera with --webcam 0")
    for option, value in (("--batch-size", args.batch_size), ("--masks-per-dim", args.masks_per_dim)):
        if value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be between 0 and 1")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before and what is after the first argument that is, or is meant to be, a key of the configuration."""
    sections = vars(Config())
    for place, argument in enumerate(arguments):
        if argument.partition(".")[0] in sections and not Path(argument).exists():
            return list(arguments[:place]), list(arguments[place:])
    return list(arguments), []


def choose_model(args: argparse.Namespace) -> tuple[Config, str | Path]:
    """As `model_of`, but torchvision's Mask R-CNN where nothing is named and there is no quick start."""
    try:
        return model_of(args)
    except FileNotFoundError:
        if args.config_file is not None or args.weights is not None or "OUTPUT_DIR" in args.opts[::2]:
            raise
        print(f"there is no quick start in output/, so this takes {FALLBACK}; --weights names another model")
        return find_model(FALLBACK, overrides=args.opts)


def files_of(names: Iterable[str]) -> Iterator[Input]:
    """The files that paths and patterns mean, one after another; of folders the images and videos, sorted, with those
    of their folders, but neither hidden ones nor what this command wrote. FileNotFoundError for what is not there."""
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(os.path.expanduser(name), recursive=True))
        if not found:
            raise FileNotFoundError(f"{name}: there is no such file or folder, and the pattern fits none")
        for path in map(Path, found):
            if path.is_dir():
                yield from _in_folder(path)
            else:
                yield Input(path, PurePath(path.name))


def _in_folder(top: Path) -> Iterator[Input]:
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        if here != top and JSON_NAME in files:  # of an earlier run, or of this one
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                yield Input(here / name, (here / name).relative_to(top))


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def count_frames(inputs: Iterable[Input]) -> int:
    """How many images and frames there are, as far as the videos tell. ValueError if there are no files at all, or only
    videos and no OpenCV."""
    images = frames = 0
    missing: MissingExtra | None = None
    for path, _ in inputs:
        if not is_video(path):
            images += 1
            continue
        frames += 1
        try:
            with VideoReader(path) as video:
                frames += video.expected - 1
        except MissingExtra as error:
            missing = error
        except VideoError:
            pass  # told when it is its turn
    if missing and not images:
        raise missing
    if not images + frames:
        raise ValueError(
            f"there are no images or videos ({', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}) in these folders"
        )
    return images + frames


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


def read_items(inputs: Iterable[Input], failures: list[str]) -> Iterator[Item]:
    """The images and frames; what cannot be read is left out, and the reasons are appended to `failures`."""
    for input in inputs:
        try:
            if isinstance(input.source, int) or is_video(input.source):
                with VideoReader(input.source) as video:
                    number = -1
                    for number, seconds, image in video:
                        yield Item(input, image, number, seconds, video.frames_per_second)
                    if number + 1 < 0.95 * video.expected:  # some formats tell their length roughly
                        failures.append(f"video {input.source}: only {number + 1} of {video.expected} frames are there")
            else:
                yield Item(input, read_image(input.source))
        except (ValueError, OSError) as error:
            failures.append(str(error))


def detected(predictor: Predictor, items: Iterable[Item]) -> Iterator[tuple[Item, BoxList]]:
    """Each item with its detections."""
    waiting: deque[Item] = deque()

    def images() -> Iterator[Tensor | np.ndarray]:
        for item in items:
            waiting.append(item)
            yield item.image

    for detections in predictor.stream(images()):
        yield waiting.popleft(), detections


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
