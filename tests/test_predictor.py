"""Images in every form give the same detections, in the frame of the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn.config import dump_config, find_config
from fastrcnn.data.datasets.abstract import read_image_size
from fastrcnn.engine import category_names
from fastrcnn.ops import paste_masks
from fastrcnn.structures import ImageBatch
from fastrcnn.visualization import draw_detections


@pytest.fixture(scope="module")
def cfg(repository):
    overrides = "MODEL.DEVICE cpu MODEL.ROI_HEADS.SCORE_THRESH 0.1 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5".split()
    return fastrcnn.load_config("quick_start", overrides)


@pytest.fixture(scope="module")
def model(cfg):
    torch.manual_seed(0)
    return fastrcnn.build_model(cfg).eval()


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_form_of_an_image(cfg, model, tmp_path):
    predictor = fastrcnn.Predictor(cfg, model.state_dict(), batch_size=2)
    image = picture(200, 100)
    image.save(tmp_path / "image.png")
    forms = [tmp_path / "image.png", str(tmp_path / "image.png"), image, np.array(image), pil_to_tensor(image)]
    first, *others = [predictor(form) for form in forms]
    assert len(first) > 0
    assert first.size == (200, 100)
    for other in others:
        assert torch.equal(other.bbox, first.bbox)
        assert other.get_field("rle") == first.get_field("rle")
    several = predictor(iter(forms[2:5]))  # of one size, so the padding is the same
    assert len(several) == 3
    for other in several:
        torch.testing.assert_close(other.bbox, first.bbox, rtol=1e-4, atol=1e-3)


def test_is_the_model_on_a_batch(cfg, model):
    image = picture(150, 120)
    with torch.inference_mode():
        (want,) = model(ImageBatch.from_images([pil_to_tensor(image)], cfg)).to_boxlists()
    got = fastrcnn.Predictor(cfg, model.state_dict())(image)
    torch.testing.assert_close(got.bbox, want.bbox)
    pasted = paste_masks(want.get_field("mask"), want.bbox, (120, 150), continuous=True)
    assert [int(coco_mask.area(code)) for code in got.get_field("rle")] == pasted.flatten(1).sum(1).tolist()


def test_keypoints(repository):
    overrides = (
        "MODEL.DEVICE cpu MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False "
        "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56 MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (8,) "
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) MODEL.ROI_HEADS.SCORE_THRESH 0.1 "
        "MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5"
    )
    cfg = fastrcnn.load_config("quick_start", overrides.split())
    image = picture(200, 100)
    boxlist = fastrcnn.Predictor(cfg, fastrcnn.build_model(cfg).state_dict())(image)
    points = boxlist.get_field("keypoints")
    assert len(boxlist) == len(points) > 0
    assert points.keypoints.shape == (len(boxlist), 17, 3)
    assert points.size == image.size
    assert boxlist.get_field("keypoint_scores").shape == (len(boxlist), 17)
    assert len(boxlist.get_field("rle")) == len(boxlist)
    assert draw_detections(image, boxlist, {}).size == image.size


def test_detections_carry_no_graph(cfg, model):
    (boxlist,) = model(ImageBatch.from_images([pil_to_tensor(picture(128, 128))], cfg)).to_boxlists()
    assert not boxlist.bbox.requires_grad
    assert not boxlist.get_field("mask").requires_grad


def test_options(cfg, model):
    image = picture(200, 100)
    every = fastrcnn.Predictor(cfg, model.state_dict())(image)
    scores = every.get_field("scores")
    threshold = float(scores[2])
    predictor = fastrcnn.Predictor(
        cfg, model.state_dict(), device="cpu", confidence_threshold=threshold, bgr=True, keep_masks=True
    )
    some = predictor(np.array(image)[:, :, ::-1])  # BGR, with negative strides
    assert len(some) == int((scores >= threshold).sum()) < len(every)
    assert torch.equal(some.bbox, every.bbox[: len(some)])
    assert some.get_field("rle") == every.get_field("rle")[: len(some)]
    with torch.inference_mode():
        (raw,) = model(ImageBatch.from_images([pil_to_tensor(image)], cfg)).to_boxlists()
    assert torch.equal(some.get_field("mask"), raw.get_field("mask")[: len(some)].reshape(len(some), 28, 28))
    assert predictor.draw(image, some).tobytes() == draw_detections(image, every, {}, threshold).tobytes()
    larger = fastrcnn.Predictor(cfg, model.state_dict(), min_image_size=160)
    assert larger.cfg.INPUT.MIN_SIZE_TEST == 160 != cfg.INPUT.MIN_SIZE_TEST
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST = 160
    assert torch.equal(larger(image).bbox, fastrcnn.Predictor(cfg, model.state_dict())(image).bbox)


def test_proposals():
    cfg = fastrcnn.load_config("quick_start", "MODEL.DEVICE cpu MODEL.RPN_ONLY True MODEL.MASK_ON False".split())
    state = fastrcnn.build_model(cfg).state_dict()
    every = fastrcnn.Predictor(cfg, state)(picture(200, 100))
    threshold = float(every.get_field("objectness").median())
    some = fastrcnn.Predictor(cfg, state, confidence_threshold=threshold)(picture(200, 100))
    assert 0 < len(some) == int((every.get_field("objectness") >= threshold).sum()) < len(every)
    assert not some.has_field("names")


def test_stream_holds_one_batch_at_a_time(cfg, model):
    taken = []

    def images():
        for number in range(5):
            taken.append(number)
            yield picture(64, 64)

    predictor = fastrcnn.Predictor(cfg, model.state_dict(), batch_size=2)
    stream = predictor.stream(images())
    assert taken == []
    next(stream)
    assert taken == [0, 1]
    assert len(list(stream)) == 4
    assert len(taken) == 5
    assert predictor([]) == []


def test_photos_are_turned_upright(cfg, model, tmp_path):
    """Orientation 6 of the EXIF standard: the camera was turned, and the viewer turns by 90° clockwise."""
    upright = picture(160, 96)
    stored = upright.rotate(90, expand=True)  # anticlockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "phone.png", exif=exif)
    assert Image.open(tmp_path / "phone.png").size == (96, 160)
    predictor = fastrcnn.Predictor(cfg, model.state_dict())
    want = predictor(upright)
    for image in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        got = predictor(image)
        assert got.size == (160, 96)
        assert torch.equal(got.bbox, want.bbox)
    assert read_image_size(tmp_path / "phone.png", 1) == (160, 96)


def test_a_run_a_checkpoint_and_a_recipe(cfg, model, tmp_path, monkeypatch):
    """All ways to name one model; the names of the classes travel with the checkpoint."""
    content = {"model": model.state_dict(), "config": dump_config(cfg), "categories": {1: "disc", 2: "bar"}}
    torch.save(content, tmp_path / "model_final.pth")
    image = picture(128, 128)
    want = fastrcnn.Predictor(cfg, model.state_dict())(image)
    overrides = Path("changed.yaml")
    monkeypatch.chdir(tmp_path)
    overrides.write_text(f"OUTPUT_DIR: {tmp_path}\n_BASE_: {find_config('quick_start')}\nMODEL: {{DEVICE: cpu}}\n")
    for config, weights in (
        (tmp_path, None),
        (tmp_path / "model_final.pth", None),
        (None, tmp_path),
        (overrides, None),
        ("quick_start", tmp_path / "model_final.pth"),
        ("configs/quick_start.yaml", str(tmp_path)),
        (cfg, tmp_path / "model_final.pth"),
    ):
        got = fastrcnn.Predictor(config, weights, device="cpu")(image)
        assert torch.equal(got.bbox[: len(want)], want.bbox[: len(got)])
        labels = got.get_field("labels").tolist()
        assert got.get_field("names") == [{1: "disc", 2: "bar"}.get(label, str(label)) for label in labels]
    with pytest.raises(ValueError, match="the nearest is quick_start"):
        fastrcnn.Predictor("quick_strat", tmp_path)


@pytest.mark.parametrize(
    ("recipe", "options", "label", "name"),
    [
        ("torchvision/faster_rcnn_R_50_FPN", [], 90, "toothbrush"),
        ("e2e_mask_rcnn_R_50_FPN_1x", [], 80, "toothbrush"),
        ("e2e_keypoint_rcnn_R_50_FPN_1x", [], 1, "person"),
        ("retinanet/retinanet_R-50-FPN_1x", [], 80, "toothbrush"),
        ("pascal_voc/e2e_faster_rcnn_R_50_C4_1x_1_gpu_voc", [], 20, "tvmonitor"),
        ("rpn_R_50_FPN_1x", [], 1, None),
        ("quick_start", ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "9"], 1, None),
    ],
)
def test_names_of_published_classes(recipe, options, label, name):
    names = category_names("weights.pth", fastrcnn.load_config(recipe, options))
    assert names.get(label) == name
    assert label + 1 not in names


def test_bad_input(cfg, model, tmp_path):
    cfg = cfg.clone()
    state = model.state_dict()
    predictor = fastrcnn.Predictor(cfg, state)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predictor(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match=r"absent\.jpg"):
        predictor(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match=r"wanted uint8 RGB \[height, width, 3\]"):
        predictor(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"wanted uint8 RGB \[3, height, width\]"):
        predictor(torch.zeros(3, 4, 4))
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights: no checkpoint in .* and MODEL\.WEIGHT is empty"):
        fastrcnn.Predictor(cfg)
    with pytest.raises(ValueError, match="name a configuration or weights"):
        fastrcnn.Predictor()
    del state["rpn.head.conv.weight"]
    with pytest.raises(ValueError, match=r"do not fill the model[\s\S]*missing +rpn\.head\.conv\.weight"):
        fastrcnn.Predictor(cfg, state)
