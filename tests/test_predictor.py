"""Images in every form give the same detections, in the frame of the image."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn.ops import paste_masks
from fastrcnn.structures import ImageBatch
from fastrcnn.visualization import draw_detections


@pytest.fixture(scope="module")
def cfg(repository):
    overrides = "MODEL.DEVICE cpu MODEL.ROI_HEADS.SCORE_THRESH 0.1 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5".split()
    return fastrcnn.load_config(repository / "configs" / "quick_start.yaml", overrides)


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
    cfg = fastrcnn.load_config(repository / "configs" / "quick_start.yaml", overrides.split())
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


def test_bad_input(cfg, model, tmp_path):
    state = model.state_dict()
    predictor = fastrcnn.Predictor(cfg, state)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predictor(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match=r"absent\.jpg"):
        predictor(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match=r"wanted uint8 RGB \[height, width, 3\]"):
        predictor(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="needs weights"):
        fastrcnn.Predictor(cfg)
    del state["rpn.head.conv.weight"]
    with pytest.raises(ValueError, match=r"do not fill the model[\s\S]*missing +rpn\.head\.conv\.weight"):
        fastrcnn.Predictor(cfg, state)
