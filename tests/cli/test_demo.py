"""fastrcnn demo: what it writes, compared with the model called by hand and with pycocotools."""

import contextlib
import io
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support import TINY

import fastrcnn
from fastrcnn.cli import demo, demo_inputs
from fastrcnn.coco_demo import mask_montage
from fastrcnn.config import dump_config
from fastrcnn.visualization import KEYPOINT_LOGIT

cv2 = pytest.importorskip("cv2")

KEYPOINTS = (
    "MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False "
    "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56 MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (8,) "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125)"
).split()
NAMES = {label: f"thing {label}" for label in range(1, 7)}
ALL = ("--confidence-threshold", "0")  # random weights are sure of nothing


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint with masks and keypoints, as training writes one."""
    torch.manual_seed(0)
    cfg = fastrcnn.load_config("quick_start", [*TINY, *KEYPOINTS])
    state = fastrcnn.build_model(cfg).state_dict()
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    torch.save({"model": state, "config": dump_config(cfg), "categories": NAMES}, path)
    return path


@pytest.fixture
def command(fastrcnn_command, weights, tmp_path, monkeypatch):
    """command(arguments…) → (exit code, stdout, stderr) of fastrcnn demo in an empty folder, with the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return lambda *arguments: fastrcnn_command("demo", *arguments, "--weights", weights)


def picture(seed, size=(96, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(path, seed=0, size=(96, 64)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)
    return path


def clip(path, count=12, size=(96, 64)):
    """Frame n is grey of 20 n, modulo 240."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, size)
    for number in range(count):
        writer.write(np.full((size[1], size[0], 3), 20 * (number % 12), np.uint8))
    writer.release()
    return Path(path)


def frames_of(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (result := capture.read())[0]:
        frames.append(result[1][..., ::-1])
    return frames


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_a_folder_gives_its_pictures_and_json(command, weights):
    for number, name in enumerate(("photos/a.png", "photos/b/a.jpg", "photos/b/c.bmp", "photos/d.gif")):
        save(name, number, (96 + 10 * number, 64))
    for name in ("photos/notes.txt", "photos/.hidden/x.png", "photos/._a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("nothing to see")
    code, out, err = command("photos", *ALL, "--batch-size", "3", "MODEL.DEVICE", "cpu")
    assert (code, err) == (0, "")
    written = Path("output/demo")
    assert files_below(written) == ["a.png", "b/a.jpg", "b/c.bmp", "d.png", "detections.json"]
    assert "4 images, 20 detections" in out
    assert "output/demo/detections.json" in out
    assert str(weights) in out

    predictor = fastrcnn.Predictor(weights, confidence_threshold=0, batch_size=3)
    order = ["a.png", "d.gif", "b/a.jpg", "b/c.bmp"]
    images = [Image.open(Path("photos", name)).convert("RGB") for name in order]
    found = predictor(images)
    content = json.loads((written / "detections.json").read_text())
    assert content["categories"] == [{"id": label, "name": name} for label, name in NAMES.items()]
    assert [(image["file_name"], image["width"], image["height"]) for image in content["images"]] == [
        (name, *image.size) for name, image in zip(order, images, strict=True)
    ]
    for image, boxlist, name in zip(images, found, order, strict=True):
        drawn = np.asarray(Image.open(written / name.replace(".gif", ".png")).convert("RGB")).astype(int)
        want = np.asarray(predictor.draw(image, boxlist)).astype(int)
        # JPEG is not exact
        assert abs(drawn - want).mean() < 4 if name.endswith("jpg") else np.array_equal(drawn, want)
    entries = content["annotations"]
    assert [entry["id"] for entry in entries] == list(range(1, 21))
    for number, boxlist in enumerate(found, 1):
        mine = [entry for entry in entries if entry["image_id"] == number]
        corners = boxlist.bbox.tolist()
        assert len(mine) == 5
        for row, entry in enumerate(mine):
            x1, y1, x2, y2 = corners[row]
            assert entry["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
            assert entry["score"] == pytest.approx(float(boxlist.get_field("scores")[row]), abs=1e-5)
            assert entry["category_id"] == int(boxlist.get_field("labels")[row])
            assert entry["segmentation"] == boxlist.get_field("rle")[row]
            assert entry["area"] == coco_mask.decode(entry["segmentation"]).sum()
            points = np.array(entry["keypoints"]).reshape(17, 3)
            sure = boxlist.get_field("keypoint_scores")[row].numpy() > KEYPOINT_LOGIT
            # COCO's keypoints are indices of pixels
            assert points[:, :2] == pytest.approx(
                boxlist.get_field("keypoints").keypoints[row, :, :2].numpy() - 0.5, abs=1e-3
            )
            assert points[:, 2].tolist() == (1 + sure).tolist()
            assert entry["num_keypoints"] == sure.sum()


def test_json_is_for_pycocotools(command, capsys):
    save("photo.png")
    assert command("photo.png", *ALL)[0] == 0
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO("output/demo/detections.json")  # as annotations
        truth = COCO()
        truth.dataset = {"images": [{"id": 1, "width": 96, "height": 64}], "annotations": [], "info": {}}
        truth.dataset["categories"] = whole.dataset["categories"]
        truth.createIndex()
        results = truth.loadRes([dict(entry) for entry in whole.dataset["annotations"]])  # as results
    assert len(results.anns) == len(whole.anns) == 5
    for coco in (whole, results):
        for annotation in coco.loadAnns(coco.getAnnIds()):
            mask = coco.annToMask(annotation)
            assert mask.shape == (64, 96)
            assert mask.sum() == whole.anns[annotation["id"]]["area"] > 0


def test_unreadable_images_are_told_at_the_end(command):
    for number in range(3):
        save(f"photos/{number}.png", number)
    Path("photos/1.png").write_bytes(Path("photos/1.png").read_bytes()[:600])
    Path("photos/0a.jpg").write_text("no picture")
    Path("photos/film.mp4").write_text("no video")
    code, out, _ = command("photos", *ALL)
    assert code == 1
    assert files_below("output/demo") == ["0.png", "2.png", "detections.json"]
    lines = out.splitlines()
    assert lines[-4].startswith("3 could not be read")
    for line, name in zip(lines[-3:], ("0a.jpg", "1.png", "film.mp4"), strict=True):
        assert f"photos/{name} cannot be" in line
    code, _, err = command("photos/0a.jpg")
    assert code == 2
    assert err == "error: nothing could be read\n"


def test_what_is_there_is_never_replaced(command):
    save("a/x.png", 1)
    save("b/x.png", 2)
    save("x.jpg", 3)
    before = {name: Path(name).read_bytes() for name in ("a/x.png", "b/x.png", "x.jpg")}
    for _ in range(2):
        assert command("a", "b", "x.jpg", *ALL)[0] == 0
    assert (
        files_below("output/demo") == files_below("output/demo-2") == ["detections.json", "x-2.png", "x.jpg", "x.png"]
    )
    assert command(".", "--output", "found", *ALL)[0] == 0  # without what it has written itself
    assert files_below("found") == ["a/x.png", "b/x.png", "detections.json", "x.jpg"]
    for output, told in (
        ("found", "--output found is not empty"),
        (".", "--output . is not empty"),
        ("x.jpg", "--output x.jpg, or the .json beside it, is there already"),
        ("y.mp4", "--output y.mp4: x.jpg gives an image"),
        ("y.tif", "--output y.tif: the suffix is to be one of .jpg"),
    ):
        code, _, err = command("x.jpg", "--output", output)
        assert (code, err.startswith(f"error: {told}")) == (2, True), err
    code, _, err = command("a", "b", "--output", "y.png")
    assert (code, "one file, but there are several inputs" in err) == (2, True)
    assert before == {name: Path(name).read_bytes() for name in before}
    assert command("x.jpg", "--output", "new/y.png", *ALL)[0] == 0
    assert files_below("new") == ["y.json", "y.png"]


def test_patterns_and_no_pictures(command):
    for name in ("p/a1.png", "p/q/a2.png", "p/b.png"):
        save(name)
    code, _, _ = command("p/**/a*.png", "--no-pictures", *ALL)
    assert code == 0
    assert files_below("output/demo") == ["detections.json"]
    images = json.loads(Path("output/demo/detections.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a1.png", "a2.png"]


def test_heat_maps(command, weights):
    save("photo.png", size=(97, 64))
    code, _, err = command("photo.png", "--show-mask-heatmaps", "--masks-per-dim", "3", *ALL, "--min-image-size", "96")
    assert code == 0, err
    found = fastrcnn.Predictor(weights, keep_masks=True, min_image_size=96)("photo.png")
    want = mask_montage(found, found.get_field("mask"), 3)
    assert want.any()
    assert np.array_equal(np.asarray(Image.open("output/demo/photo.png")), want)


def test_a_video_gives_a_video(command, weights):
    clip("clip.avi")
    code, out, err = command("clip.avi", "--confidence-threshold", "0.9", "--batch-size", "5")
    assert code == 0, err
    frames = frames_of("output/demo/clip.avi")
    assert [round(frame.mean() / 20) for frame in frames] == list(range(12))
    assert {frame.shape for frame in frames} == {(64, 96, 3)}
    assert cv2.VideoCapture("output/demo/clip.avi").get(cv2.CAP_PROP_FPS) == 10
    images = json.loads(Path("output/demo/detections.json").read_text())["images"]
    assert [image["frame"] for image in images] == list(range(12))
    assert [image["time"] for image in images] == pytest.approx([0.1 * number for number in range(12)])
    assert {image["file_name"] for image in images} == {"clip.avi"}
    assert "12 images, 0 detections" in out
    save("photo.png", 5)
    code, _, _ = command("photo.png", "clip.avi", "--output", "both", *ALL)
    assert code == 0
    assert files_below("both") == ["clip.avi", "detections.json", "photo.png"]
    assert len(frames_of("both/clip.avi")) == 12
    code, _, _ = command("clip.avi", "--output", "small.webm", *ALL)
    assert code == 0
    assert len(frames_of("small.webm")) == 12
    assert len(json.loads(Path("small.json").read_text())["images"]) == 12


def test_a_cut_video_is_told(command):
    whole = clip("clip.avi", 40).read_bytes()
    Path("clip.avi").write_bytes(whole[: len(whole) // 2])
    code, out, _ = command("clip.avi", "--confidence-threshold", "1")
    count = len(frames_of("output/demo/clip.avi"))
    assert code == 1
    assert 5 < count < 35
    assert f"clip.avi: only {count} of 40 frames are there" in out


def test_without_opencv_images_are_done(command, monkeypatch):
    save("photos/a.png")
    clip("photos/clip.avi")
    monkeypatch.setitem(sys.modules, "cv2", None)
    told = "reading video photos/clip.avi: needs the package cv2: pip install 'fastrcnn[video]'"
    code, _, err = command("photos/clip.avi")
    assert (code, err) == (2, f"error: {told}\n")
    assert not Path("output").exists()
    code, out, _ = command("photos")
    assert (code, out.splitlines()[-1].strip()) == (1, told)
    assert files_below("output/demo") == ["a.png", "detections.json"]


def test_decoding_runs_ahead_of_the_model(command, monkeypatch):
    """While the model has the first image, the next are read; no more than the queue holds."""
    for number in range(8):
        save(f"photos/{number}.png", number)
    events, third = [], threading.Event()
    read, predict = demo_inputs.read_image, fastrcnn.Predictor._predict

    def recorded_read(path):
        events.append(f"read {path.stem}")
        if path.stem == "2":
            third.set()
        return read(path)

    def recorded_predict(self, images):
        assert third.wait(20)
        events.append("model")
        return predict(self, images)

    monkeypatch.setattr(demo_inputs, "read_image", recorded_read)
    monkeypatch.setattr(fastrcnn.Predictor, "_predict", recorded_predict)
    assert command("photos", *ALL)[0] == 0
    assert events.index("read 2") < events.index("model")
    for number in range(3, 8):  # a queue of two, and the one that the model has
        assert events[: events.index(f"read {number}")].count("model") >= number - 3


def test_errors_of_the_encoder_end_the_run(command, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    save("photo.png")
    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = command("photo.png")
    assert (code, err) == (2, "error: No space left on device\n")


VIDEO_CAPTURE = cv2.VideoCapture


class Camera:
    """Stands in for cv2.VideoCapture: grey pictures, each brighter, `count` of them, or until the user ends."""

    count = 5

    def __init__(self, number):
        self.number = -1

    def isOpened(self):
        return True

    def get(self, key):
        return 10.0 if key == cv2.CAP_PROP_FPS else 0

    def read(self):
        self.number += 1
        return self.number < self.count, np.full((64, 96, 3), 20 * self.number % 256, np.uint8)

    def release(self):
        pass


def test_a_camera_without_a_display_is_recorded(command, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(demo, "newest", lambda items: demo.ahead(items, 2))  # every picture, so that it can be tested
    code, out, _ = command("--webcam", "0", "--confidence-threshold", "1")
    monkeypatch.setattr(cv2, "VideoCapture", VIDEO_CAPTURE)
    assert code == 1
    assert "no window, so this records until Ctrl-C: there is no display" in out
    assert "camera 0 gives no more pictures" in out
    numbers = [image["frame"] for image in json.loads(Path("output/demo/detections.json").read_text())["images"]]
    shades = [round(frame.mean() / 20) for frame in frames_of("output/demo/webcam-0.mp4")]
    assert [shades[number] for number in numbers] == list(range(5))
    assert len(shades) == numbers[-1] + 1  # those that were dropped are filled


@pytest.fixture
def window(monkeypatch):
    """window(keys…) makes OpenCV's windows give these keys, and returns the list of the pictures that they show."""

    def open_window(*keys):
        shown, left = [], iter(keys)
        monkeypatch.setenv("DISPLAY", ":0")
        for name in ("namedWindow", "resizeWindow", "destroyWindow"):
            monkeypatch.setattr(cv2, name, lambda *_: None)
        monkeypatch.setattr(cv2, "imshow", lambda _, image: shown.append(image))
        monkeypatch.setattr(cv2, "waitKey", lambda _: next(left))
        monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
        return shown

    return open_window


def test_a_camera_in_a_window_until_q(command, monkeypatch, window):
    monkeypatch.setattr(Camera, "count", 10**9)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    shown = window(-1, -1, ord("q"))
    code, out, err = command("--webcam", "0", *ALL)
    assert (code, err) == (0, "")
    assert len(shown) == 3
    assert out.splitlines()[-1].startswith("3 images")
    assert not Path("output").exists()


def test_images_in_a_window_until_escape(command, window):
    for number in range(4):
        save(f"photos/{number}.png", number)
    shown = window(-1, ord(" "), -1, -1, 27)  # any key for the next image
    assert command("photos", "--window", *ALL)[0] == 0
    assert len(shown) == 2
    for number, image in enumerate(shown):
        assert np.array_equal(image[..., ::-1], np.asarray(Image.open(f"output/demo/{number}.png")))


def test_a_missing_camera(command, monkeypatch):
    monkeypatch.setattr(Camera, "isOpened", lambda self: False)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    code, _, err = command("--webcam", "3")
    assert code == 2
    assert err.startswith("error: camera 3 cannot be opened: see that it is plugged in")
    assert not Path("output").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name images, folders, patterns or videos, or a camera with --webcam 0"),
        (("photo.png", "--webcam", "0"), "name images, folders, patterns or videos, or a camera with --webcam 0"),
        (("absent.png",), "absent.png: there is no such file or folder"),
        (("nothing/*.png",), "nothing/*.png: there is no such file or folder, and the pattern fits none"),
        (("empty",), "there are no images or videos"),
        (("photo.png", "MODEL.DEVISE", "cpu"), "unknown key MODEL.DEVISE; the nearest is MODEL.DEVICE"),
        (("photo.png", "--batch-size", "0"), "--batch-size is 0"),
        (("photo.png", "--confidence-threshold", "70"), "--confidence-threshold is 70"),
        (("photo.png", "--window"), "no display"),
    ],
)
def test_mistakes(command, monkeypatch, arguments, told):
    monkeypatch.setattr("sys.platform", "linux")
    save("photo.png")
    Path("empty").mkdir()
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert told in err
    assert not Path("output").exists()


def test_models_that_do_not_serve(command):
    save("photo.png")
    code, _, err = command("photo.png", "--show-mask-heatmaps", "MODEL.MASK_ON", "False")
    assert (code, "wants a model with masks" in err) == (2, True)
    code, _, err = command("photo.png", "MODEL.RPN_ONLY", "True")
    assert (code, "gives proposals, not detections" in err) == (2, True)


def test_arguments_are_split_at_the_first_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("MODEL.png").touch()
    arguments = ["a.png", "MODEL.png", "b", "OUTPUT_DIR", "x", "MODEL.DEVICE", "cpu"]
    assert demo.split_arguments(arguments) == (arguments[:3], arguments[3:])
    assert demo.split_arguments(["IMG_1.JPG"]) == (["IMG_1.JPG"], [])


def test_the_model_where_none_is_named(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = demo.argparse.Namespace(config_file=None, weights=None, opts=["MODEL.DEVICE", "cpu"])
    cfg, source = demo.choose_model(arguments)
    assert source == "torchvision://maskrcnn_resnet50_fpn/COCO_V1"
    assert cfg.MODEL.CONVENTIONS == "torchvision"
    assert "no quick start in output/, so this takes torchvision/mask_rcnn_R_50_FPN" in capsys.readouterr().out
    Path("output/quick_start").mkdir(parents=True)
    Path("output/quick_start/model_final.pth").symlink_to(weights)
    cfg, source = demo.choose_model(arguments)
    assert Path(source) == Path("output/quick_start/model_final.pth")


def test_ctrl_c_leaves_what_was_done(command, monkeypatch):
    """The video plays and the JSON can be read."""
    clip("clip.avi", 40)
    predict, calls = fastrcnn.Predictor._predict, iter(range(40))

    def interrupted(self, images):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(fastrcnn.Predictor, "_predict", interrupted)
    code, out, err = command("clip.avi", "--output", "found.avi", "--confidence-threshold", "1")
    assert (code, err) == (130, "interrupted; what was done until then is written\n")
    assert "7 images" in out
    assert len(json.loads(Path("found.json").read_text())["images"]) == 7
    assert [round(frame.mean() / 20) for frame in frames_of("found.avi")] == list(range(7))
