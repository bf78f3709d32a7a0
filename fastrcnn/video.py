"""Frames of video files and cameras in, videos and windows out, and the threads that do both while a model works.

Everything here needs OpenCV (the extra `video`) except `ahead`, `newest` and `behind`. Pictures are uint8 RGB arrays
[height, width, 3], although OpenCV's own are BGR.
"""

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from PIL import Image

from fastrcnn.extras import MissingExtra, require

In = TypeVar("In")
Out = TypeVar("Out")

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"))
# what OpenCV's own build of FFmpeg can encode: it has no encoder of H.264, whose licence forbids that
VIDEO_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".webm": "VP90", ".avi": "MJPG"}
_USUAL_RATE = 30.0  # frames per second of what does not tell its own
_QUIT = (ord("q"), ord("Q"), 27)  # 27: Esc


class VideoError(ValueError):
    """A video, camera or window that cannot be used; the message names it and says what can be done."""


def opencv(why: str) -> ModuleType:
    """The module cv2; MissingExtra, which says what to install, where it is absent or cannot be loaded."""
    try:
        return require("cv2", extra="video", why=why)
    except MissingExtra as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError):
            raise
        raise MissingExtra(
            f"{why}: OpenCV is installed, but cannot be loaded: {cause}. Where there is no display: pip uninstall "
            "opencv-python; pip install opencv-python-headless. With one, install the library that is named "
            "(libGL.so.1: apt-get install libgl1)"
        ) from cause


class Frame(NamedTuple):
    """A picture of a video or camera."""

    number: int  # from 0; of a camera, as many as its rate gives until then, whether it keeps that rate or not
    time: float  # seconds from the first frame
    image: np.ndarray  # uint8 RGB [height, width, 3]


class VideoReader:
    """The frames of a video file, or of the camera of this number, one after another; a context manager.

    frames_per_second: the file's average rate. expected: how many frames the file says it has, 0 where it does not tell
    (some formats tell it roughly). VideoError for what cannot be opened or gives no frame at all; a damaged file ends
    with its last frame that can be read.
    """

    def __init__(self, source: str | Path | int):
        cv2 = opencv(f"reading {'camera' if isinstance(source, int) else 'video'} {source}")
        self.source = source
        if not isinstance(source, int) and not Path(source).is_file():
            raise VideoError(f"video {source} does not exist")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            self._capture.release()
            if isinstance(source, int):
                raise VideoError(
                    f"camera {source} cannot be opened: see that it is plugged in, that no other program uses it, and "
                    "that this user may (on Linux: ls /dev/video*, group video); --webcam 1 is the second camera"
                )
            raise VideoError(f"video {source} cannot be opened: it is damaged, or this OpenCV does not know its format")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frames_per_second = rate if math.isfinite(rate) and rate > 0 else _USUAL_RATE
        self.expected = 0 if isinstance(source, int) else max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[Frame]:
        cv2 = opencv("reading videos and cameras")
        camera = isinstance(self.source, int)
        number, seconds, began = -1, 0.0, 0.0
        while True:
            there, image = self._capture.read()
            if not there:
                break
            number += 1
            if camera:
                now = time.monotonic()
                began = began if number else now
                seconds = now - began
                number = max(number, round(seconds * self.frames_per_second))
            else:
                told = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000  # which not every format and backend tells
                seconds = told if told > seconds else number / self.frames_per_second
            yield Frame(number, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        if camera:
            what = "gives no picture: another program may use it" if number < 0 else "gives no more pictures"
            raise VideoError(f"camera {self.source} {what}")
        if number < 0:
            raise VideoError(f"video {self.source} has no frame that can be read")

    def close(self) -> None:
        self._capture.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class VideoWriter:
    """A video file of pictures of one size, which plays as far as it was written once it is closed; a context manager.

    The suffix chooses format and codec: .mp4, .m4v, .mov and .mkv MPEG-4, .webm VP9, .avi Motion JPEG. Codecs want even
    sides, so that the last column or row of an odd picture is left out. VideoError for another suffix, a file that
    cannot be written, and a picture of another size.
    """

    def __init__(self, path: str | Path, frames_per_second: float):
        self.path = Path(path)
        self.frames_per_second = frames_per_second
        self.count = 0
        self._size: tuple[int, int] | None = None
        self._writer: Any = None
        if self.path.suffix.lower() not in VIDEO_CODECS:
            raise VideoError(f"{path}: videos are written as {', '.join(VIDEO_CODECS)}, not as {self.path.suffix!r}")

    def write(self, image: np.ndarray | Image.Image) -> None:
        """Appends a picture, uint8 RGB [height, width, 3] or of PIL."""
        cv2 = opencv("writing videos")
        image = np.asarray(image)
        size = (image.shape[1], image.shape[0])
        if self._writer is None:
            self._open(cv2, size)
        if size != self._size:
            raise VideoError(f"{self.path}: the picture is {size[0]}x{size[1]}, those before it are {self._size}")
        width, height = size[0] // 2 * 2, size[1] // 2 * 2
        self._writer.write(cv2.cvtColor(np.ascontiguousarray(image[:height, :width]), cv2.COLOR_RGB2BGR))
        self.count += 1

    def _open(self, cv2: ModuleType, size: tuple[int, int]) -> None:
        if min(size) < 2:
            raise VideoError(f"{self.path}: a video of {size[0]}x{size[1]} cannot be encoded, both sides need 2 pixels")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter_fourcc(*VIDEO_CODECS[self.path.suffix.lower()])
        even = (size[0] // 2 * 2, size[1] // 2 * 2)
        self._writer = cv2.VideoWriter(str(self.path), codec, self.frames_per_second, even)
        self._size = size
        if not self._writer.isOpened():
            raise VideoError(
                f"{self.path} cannot be written: the folder does not allow it, or this OpenCV lacks the codec "
                f"{VIDEO_CODECS[self.path.suffix.lower()]} (opencv-python of PyPI has it); .avi needs least"
            )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Window:
    """A window of the screen; a context manager. VideoError where there is no display, or no OpenCV that has windows.

    To be used from the main thread only, as some systems demand.
    """

    def __init__(self, title: str):
        cv2 = self._cv2 = opencv("showing a window")
        self.title = title
        # its Qt ends the whole process there
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise VideoError("there is no display for a window: DISPLAY is not set")
        try:
            flags = cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL
            cv2.namedWindow(title, flags)
        except cv2.error as error:
            raise VideoError(
                "this OpenCV has no windows: pip uninstall opencv-python-headless; pip install opencv-python"
            ) from error
        self._new = True

    def show(self, image: np.ndarray, wait: bool = False) -> bool:
        """Shows a picture, uint8 RGB [height, width, 3], with `wait` until a key is pressed. False once the user has
        pressed q or Esc or closed the window."""
        if self._new:
            self._cv2.resizeWindow(self.title, image.shape[1], image.shape[0])
            self._new = False
        self._cv2.imshow(self.title, self._cv2.cvtColor(np.ascontiguousarray(image), self._cv2.COLOR_RGB2BGR))
        while True:
            key = self._cv2.waitKey(100 if wait else 1)
            if (key >= 0 and key & 0xFF in _QUIT) or not self._open():
                return False
            if key >= 0 or not wait:
                return True

    def _open(self) -> bool:
        return self._cv2.getWindowProperty(self.title, self._cv2.WND_PROP_VISIBLE) >= 1

    def close(self) -> None:
        with suppress(self._cv2.error):  # the user has closed it
            self._cv2.destroyWindow(self.title)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def ahead(items: Iterable[In], size: int) -> Iterator[Iterator[In]]:
    """The same items, taken from `items` by a thread that is up to `size` items ahead; its errors arrive in their turn.

    At the end of the block the thread has stopped, and a generator is closed.
    """
    iterator, end = iter(items), object()

    def taken() -> Iterator[In]:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(size))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item

    pool = ThreadPoolExecutor(1, "ahead")
    try:
        yield taken()
    finally:
        pool.shutdown(cancel_futures=True)
        _close(iterator)


@contextmanager
def newest(items: Iterable[In]) -> Iterator[Iterator[In]]:
    """As `ahead`, for what does not wait, such as a camera: each time the newest item, those before it are dropped."""
    iterator = iter(items)
    slot: deque[In] = deque(maxlen=1)
    changed, stopped = threading.Event(), threading.Event()

    def take() -> None:
        try:
            for item in iterator:
                slot.append(item)
                changed.set()
                if stopped.is_set():
                    return
        finally:
            stopped.set()
            changed.set()

    def taken() -> Iterator[In]:
        last = False
        while not last:
            changed.wait()
            changed.clear()
            last = stopped.is_set()  # asked before the slot, so that no item comes after the answer
            if slot:
                yield slot.popleft()
        thread.result()

    pool = ThreadPoolExecutor(1, "newest")
    thread = pool.submit(take)
    try:
        yield taken()
    finally:
        stopped.set()
        pool.shutdown()
        _close(iterator)


def behind(function: Callable[[In], Out], items: Iterable[In], size: int) -> Iterator[Out]:
    """map(function, items), in which a thread calls `function` while the caller takes up to `size` further items.

    What was taken is finished even if `items` or the caller stops; errors of `function` arrive in their turn.
    """
    with ThreadPoolExecutor(1, "behind") as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _close(iterator: Iterator) -> None:
    if hasattr(iterator, "close"):
        iterator.close()
