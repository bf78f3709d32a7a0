"""What `fastrcnn demo` reads: images, folders, patterns, videos and cameras."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastrcnn.extras import MissingExtra
from fastrcnn.predictor import read_image
from fastrcnn.video import VIDEO_SUFFIXES, VideoError, VideoReader

JSON_NAME = "detections.json"
# what folders are searched for, besides videos; any file that is named itself is tried
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".avif", ".heic")
)


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
