"""Videos in and out, by OpenCV on its own, and the threads around a model."""

import importlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from fastrcnn.extras import MissingExtra
from fastrcnn.video import VideoError, VideoReader, VideoWriter, Window, ahead, behind, newest

cv2 = pytest.importorskip("cv2")

CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}
BITS = 6  # of the number of a frame, as black and white squares


def picture(number, size=(96, 64)):
    """RGB: the number in squares above, below a red square that moves to the right on blue."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for bit in range(BITS):
        image[:16, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    image[16:] = (20, 30, 200)
    image[32:48, number : number + 16] = (220, 30, 20)
    return image


def number_of(image):
    return sum(int(image[8, 16 * bit + 8].mean() > 128) << bit for bit in range(BITS))


def write_with_opencv(path, count, rate=12.5, size=(96, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODECS[path.suffix]), rate, size)
    for number in range(count):
        writer.write(picture(number, size)[..., ::-1].copy())
    writer.release()
    return path


def read_with_opencv(path):
    """RGB frames and the rate."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (result := capture.read())[0]:
        frames.append(result[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize("suffix", CODECS)
def test_reader_gives_every_frame_in_order_and_colour(tmp_path, suffix):
    path = write_with_opencv(tmp_path / f"clip{suffix}", 40)
    with VideoReader(path) as video:
        frames = list(video)
        assert (video.frames_per_second, video.expected) == (12.5, 40)
    assert [frame.number for frame in frames] == [number_of(frame.image) for frame in frames] == list(range(40))
    assert [frame.time for frame in frames] == pytest.approx([number / 12.5 for number in range(40)], abs=1e-3)
    for frame in frames[::13]:
        assert frame.image.shape == (64, 96, 3)
        assert abs(frame.image[40, frame.number + 8].astype(int) - (220, 30, 20)).max() < 30  # red, so not BGR
        assert abs(frame.image[56, 80].astype(int) - (20, 30, 200)).max() < 30


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv", ".mov"])
def test_writer_is_read_by_opencv(tmp_path, suffix):
    with VideoWriter(tmp_path / "new" / f"clip{suffix}", 7.5) as video:
        for number in range(30):
            video.write(picture(number, (97, 65)))
        assert video.count == 30
    frames, rate = read_with_opencv(tmp_path / "new" / f"clip{suffix}")
    assert rate == pytest.approx(7.5, rel=1e-3)
    assert [number_of(frame) for frame in frames] == list(range(30))
    assert {frame.shape for frame in frames} == {(64, 96, 3)}  # even sides
    assert abs(frames[20][40, 28].astype(int) - (220, 30, 20)).max() < 40


def test_broken_videos(tmp_path):
    with pytest.raises(VideoError, match=r"absent\.mp4 does not exist"):
        VideoReader(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    with pytest.raises(VideoError, match=r"text\.mp4 cannot be opened: it is damaged"):
        VideoReader(tmp_path / "text.mp4")
    whole = write_with_opencv(tmp_path / "whole.avi", 40).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 6 // 10])
    with VideoReader(tmp_path / "cut.avi") as video:
        numbers = [number_of(frame.image) for frame in video]
        assert video.expected == 40
    assert 10 < len(numbers) < 30
    assert numbers == list(range(len(numbers)))


def fake_capture(frames, rate=30.0, opened=True):
    """A stand-in for cv2.VideoCapture."""

    class Capture:
        def __init__(self, source):
            self.left = iter(frames)

        def isOpened(self):
            return opened

        def get(self, key):
            return rate if key == cv2.CAP_PROP_FPS else 0

        def read(self):
            image = next(self.left, None)
            return image is not None, image

        def release(self):
            pass

    return Capture


def test_video_without_frames(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setattr(cv2, "VideoCapture", fake_capture([]))
    with VideoReader(tmp_path / "clip.mp4") as video, pytest.raises(VideoError, match=r"clip\.mp4 has no frame"):
        list(video)


def test_cameras(monkeypatch):
    images = [picture(number)[..., ::-1] for number in range(3)]
    monkeypatch.setattr(cv2, "VideoCapture", fake_capture(images, rate=0.0))
    camera = VideoReader(0)
    assert camera.frames_per_second == 30
    frames = []
    with camera, pytest.raises(VideoError, match="camera 0 gives no more pictures"):
        frames.extend(camera)
    assert [number_of(frame.image) for frame in frames] == [0, 1, 2]
    monkeypatch.setattr(cv2, "VideoCapture", fake_capture([]))
    with VideoReader(1) as camera, pytest.raises(VideoError, match="camera 1 gives no picture: another program"):
        next(iter(camera))
    monkeypatch.setattr(cv2, "VideoCapture", fake_capture([], opened=False))
    with pytest.raises(VideoError, match=r"camera 2 cannot be opened.*--webcam 1 is the second"):
        VideoReader(2)


def test_a_slow_camera_keeps_the_clock(monkeypatch):
    """At half of the rate that it tells, every frame counts for two, so that a recording lasts as long as it took."""
    clock = iter([5.0, 5.1, 5.2, 5.3])
    monkeypatch.setattr("fastrcnn.video.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(cv2, "VideoCapture", fake_capture([picture(0)] * 4, rate=20.0))
    with VideoReader(0) as camera:
        frames = iter(camera)
        four = [next(frames) for _ in range(4)]
    assert [frame.number for frame in four] == [0, 2, 4, 6]
    assert [frame.time for frame in four] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_writers_mistakes(tmp_path):
    with pytest.raises(VideoError, match=r"clip\.gif: videos are written as \.mp4"):
        VideoWriter(tmp_path / "clip.gif", 30)
    with VideoWriter(tmp_path / "clip.mp4", 30) as video:
        video.write(picture(0))
        with pytest.raises(VideoError, match=r"clip\.mp4: the picture is 64x64"):
            video.write(picture(0, (64, 64)))
    with VideoWriter(tmp_path / "thin.mp4", 30) as video, pytest.raises(VideoError, match="1x64 cannot be encoded"):
        video.write(np.zeros((64, 1, 3), np.uint8))
    (tmp_path / "folder.mp4").mkdir()
    with VideoWriter(tmp_path / "folder.mp4", 30) as video, pytest.raises(VideoError, match="cannot be written"):
        video.write(picture(0))


def test_what_to_install(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    def without_library(name):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'fastrcnn\[video\]'"):
        VideoReader(0)
    monkeypatch.setattr(importlib, "import_module", without_library)
    with pytest.raises(MissingExtra, match=r"libGL\.so\.1.*opencv-python-headless.*libgl1"):
        Window("title")


def fake_windows(monkeypatch, keys, visible=1.0):
    """cv2's windows: the pictures shown, while the user presses these keys, -1 for none."""
    shown, keys = [], iter(keys)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "resizeWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "destroyWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image.copy()))
    monkeypatch.setattr(cv2, "waitKey", lambda _: next(keys))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: visible)
    return shown


def test_window(monkeypatch):
    shown = fake_windows(monkeypatch, [-1, ord("x"), -1, -1, ord(" "), ord("q"), 27])
    with Window("title") as window:
        assert window.show(picture(1))
        assert window.show(picture(2))
        assert window.show(picture(3), wait=True)  # until a key
        assert not window.show(picture(4))
        assert not window.show(picture(5), wait=True)
    assert [number_of(image) for image in shown] == [1, 2, 3, 4, 5]
    assert tuple(shown[0][40, 8]) == (20, 30, 220)  # OpenCV's order
    fake_windows(monkeypatch, [-1], visible=0.0)
    with Window("title") as window:
        assert not window.show(picture(1))  # closed with the mouse


def test_no_display_or_no_windows(monkeypatch):
    def raises(*_):
        raise cv2.error("The function is not implemented. Rebuild the library with Windows, GTK+ 2.x or Cocoa support")

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", raises)
    with pytest.raises(VideoError, match="uninstall opencv-python-headless; pip install opencv-python"):
        Window("title")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(VideoError, match="no display"):
        Window("title")


def test_ahead_runs_while_the_caller_works():
    events, third = [], threading.Event()

    def source():
        for number in range(6):
            events.append(f"decode {number}")
            if number == 3:
                third.set()
            yield number

    with ahead(source(), 3) as items:
        assert next(items) == 0
        assert third.wait(10)  # it went on without being asked
        events.append("model 0")
        assert list(items) == [1, 2, 3, 4, 5]
    assert events.index("decode 3") < events.index("model 0") < events.index("decode 4")  # 3 ahead, no more


def test_ahead_stops_and_closes():
    closed, taken = [], []

    def source():
        try:
            for number in range(1000):
                taken.append(number)
                yield number
        finally:
            closed.append(threading.current_thread())

    def interrupted():
        with ahead(source(), 4) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(taken) <= 5
    assert closed == [threading.main_thread()]


@pytest.mark.parametrize("around", [lambda items: ahead(items, 2), newest])
def test_errors_of_the_source_arrive(around):
    def source():
        yield 1
        raise OSError("the disk is gone")

    got = []
    with pytest.raises(OSError, match="the disk is gone"), around(source()) as items:
        got.extend(items)
    assert got == [1]


def test_newest_drops_what_nobody_waited_for():
    go, last = threading.Event(), threading.Event()

    def camera():
        yield 0
        assert go.wait(10)
        yield from range(1, 50)
        last.set()

    with newest(camera()) as items:
        assert next(items) == 0
        go.set()
        assert last.wait(10)  # the camera did not wait for the caller
        assert list(items) == [49]


def test_newest_stops_with_the_caller():
    def endless():
        while True:
            yield threading.active_count()

    with newest(endless()) as items:
        next(items)


def test_behind_works_while_the_caller_takes_more():
    events, go = [], threading.Event()

    def encode(number):
        assert go.wait(10)
        events.append(f"encode {number}")
        return -number

    def source():
        for number in range(6):
            events.append(f"model {number}")
            if number == 3:  # the first encoding is not done yet
                go.set()
            yield number

    assert list(behind(encode, source(), 3)) == [0, -1, -2, -3, -4, -5]
    assert events.index("model 3") < events.index("encode 0")
    assert [event for event in events if "encode" in event] == [f"encode {number}" for number in range(6)]


def test_behind_finishes_what_it_has_taken():
    done = []

    def source():
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(behind(done.append, source(), 8))
    assert done == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(behind(lambda number: 1 / number, [2, 1, 0], 2))
