"""maskrcnn-benchmark's README, with its import lines changed, and each method of COCODemo."""

import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate

import fastrcnn
from fastrcnn.coco_demo import COCODemo, mask_montage
from fastrcnn.config import Config
from fastrcnn.ops import paste_masks
from fastrcnn.structures import BoxList, ImageBatch
from fastrcnn.visualization import class_colour, draw_detections

README = """
from fastrcnn.config import cfg
from fastrcnn import COCODemo

config_file = "../configs/caffe2/e2e_mask_rcnn_R_50_FPN_1x_caffe2.yaml"

# update the config options with the config file
cfg.merge_from_file(config_file)
# manual override some options
cfg.merge_from_list(["MODEL.DEVICE", "cpu"])

coco_demo = COCODemo(
    cfg,
    min_image_size=800,
    confidence_threshold=0.7,
)
# load image and then run prediction
image = load_image()
predictions = coco_demo.run_on_opencv_image(image)
"""
SMALL = (
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.RESNETS.STEM_OUT_CHANNELS 4 "
    "MODEL.RESNETS.BACKBONE_OUT_CHANNELS 8 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) "
    "MODEL.ROI_HEADS.DETECTIONS_PER_IMG 20 "
    "MODEL.RPN.PRE_NMS_TOP_N_TEST 50 MODEL.RPN.POST_NMS_TOP_N_TEST 50 MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 50"
).split()
KEYPOINTS = (
    "MODEL.DEVICE cpu MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False "
    "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56 MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (8,) "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) MODEL.ROI_HEADS.DETECTIONS_PER_IMG 12"
).split()


def photo(width=150, height=120):
    """A BGR array."""
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rgb_tensor(image):
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)


@torch.inference_mode()
def detect(model, cfg):
    (found,) = model(ImageBatch.from_images([rgb_tensor(photo())], cfg)).to_boxlists()
    return found


def save_weights(cfg, path, label, spread):
    """Random weights that find this label in `photo()`, five times with a score above 0.7; the model."""
    torch.manual_seed(0)
    model = fastrcnn.build_model(cfg).eval()
    predictor = model.roi_heads.box.predictor.cls_score
    with torch.no_grad():
        row = predictor.weight[label] * spread
        predictor.weight.zero_()[label] = row
        predictor.bias.zero_()[label] = 6
        logits = detect(model, cfg).get_field("scores").logit()
        predictor.bias[label] += math.log(0.7 / 0.3) - (logits[4] + logits[5]) / 2
    torch.save({"model": model.state_dict()}, path)
    cfg.MODEL.WEIGHT = str(path)
    return model


def test_readme_of_maskrcnn_benchmark(tmp_path, monkeypatch):
    cfg = Config()
    monkeypatch.setattr("fastrcnn.config.cfg", cfg)
    monkeypatch.chdir(tmp_path)  # no checkpoint in OUTPUT_DIR, the current folder
    cfg.merge_from_list(SMALL)
    cfg.merge_from_file("../configs/caffe2/e2e_mask_rcnn_R_50_FPN_1x_caffe2.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
    cfg.INPUT.MIN_SIZE_TEST = 800
    model = save_weights(cfg, tmp_path / "caffe2.pth", label=17, spread=1)
    merge = cfg.merge_from_file
    local = ["MODEL.WEIGHT", cfg.MODEL.WEIGHT]
    monkeypatch.setattr(type(cfg), "merge_from_file", lambda self, name: (merge(name), self.merge_from_list(local)))
    image = photo()
    names = {"load_image": lambda: image}
    exec(README, names)

    found = detect(model, cfg)
    pasted = paste_masks(found.get_field("mask"), found.bbox - found.bbox.new_tensor([0, 0, 1, 1]), (120, 150))
    found.add_field("rle", [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in pasted])
    assert (found.get_field("scores") > 0.7).sum() == 5 < len(found)
    want = draw_detections(rgb_tensor(image), found, {17: "dog"}, threshold=0.7)
    assert names["coco_demo"].CATEGORIES[17] == "dog"
    assert np.array_equal(names["predictions"], np.asarray(want)[..., ::-1])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    cfg = fastrcnn.load_config("quick_start", [*KEYPOINTS, *SMALL, "OUTPUT_DIR", str(folder / "none")])
    cfg.INPUT.MIN_SIZE_TEST = 96
    save_weights(cfg, folder / "weights.pth", label=3, spread=40)
    cfg.INPUT.MIN_SIZE_TEST = 128
    demo = COCODemo(cfg, min_image_size=96)
    assert (cfg.INPUT.MIN_SIZE_TEST, demo.cfg.INPUT.MIN_SIZE_TEST) == (128, 96)  # cfg was copied
    return demo


@pytest.fixture(scope="module")
def found(demo):
    return demo.compute_prediction(photo())


def test_prediction_has_the_masks_of_the_image(demo, found):
    assert found.size == (150, 120)
    masks = found.get_field("mask")
    assert (masks.dtype, tuple(masks.shape)) == (torch.uint8, (len(found), 1, 120, 150))
    continuous = paste_masks(found.get_field("mask_probabilities"), found.bbox, (120, 150), continuous=True)
    assert torch.equal(masks[:, 0].bool(), continuous)


def test_top_predictions(demo, found):
    scores = found.get_field("scores")
    shuffled = found[torch.randperm(len(found))]
    top = demo.select_top_predictions(shuffled)
    assert len(top) == 5 < len(found)
    assert top.get_field("scores").tolist() == sorted(scores.tolist(), reverse=True)[:5]
    assert torch.equal(top.get_field("mask"), found.get_field("mask")[: len(top)])


def test_overlays_together_are_the_picture(demo, found):
    """Masks below boxes below keypoints below names; each overlay changes only what is its own."""
    image = photo()
    before = image.copy()
    top = demo.select_top_predictions(found)
    picture = image
    for overlay in (demo.overlay_mask, demo.overlay_boxes, demo.overlay_keypoints, demo.overlay_class_names):
        changed = overlay(picture, top)
        assert not np.array_equal(changed, picture)
        picture = changed
    assert np.array_equal(picture, demo.run_on_opencv_image(image))
    assert np.array_equal(image, before)


def test_overlays_draw_in_bgr(demo):
    image = np.full((100, 120, 3), 100, np.uint8)
    one = BoxList([[20.0, 40.0, 70.0, 90.0]], (120, 100))
    one.add_field("labels", torch.tensor([2]))
    one.add_field("scores", torch.tensor([0.9]))
    mask = np.zeros((100, 120), np.uint8, order="F")
    mask[50:80, 30:60] = 1
    one.add_field("rle", [coco_mask.encode(mask)])
    blue_first = class_colour(2)[::-1]
    assert demo.compute_colors_for_labels(torch.tensor([2, 1])).tolist() == [[*blue_first], [*class_colour(1)[::-1]]]
    boxes = demo.overlay_boxes(image, one)
    assert tuple(boxes[40, 50]) == blue_first
    changed = (boxes != 100).any(2)
    assert changed.sum() == 2 * 50 + 2 * 48  # the box's border pixels
    masked = demo.overlay_mask(image, one)
    assert ((masked != 100).any(2) == mask.astype(bool)).all()
    assert tuple(masked[50, 40]) == blue_first  # its outline


def test_mask_montage_is_a_grid_of_heat_maps(demo, found):
    demo.show_mask_heatmaps, demo.masks_per_dim = True, 3
    try:
        montage = demo.run_on_opencv_image(photo())
    finally:
        demo.show_mask_heatmaps, demo.masks_per_dim = False, 2
    top = demo.select_top_predictions(found)
    assert montage.shape == (120, 150, 3)
    colours = (colormaps["inferno"](np.arange(256))[:, :3] * 255).round()[:, ::-1]
    for number in range(9):
        row, column = divmod(number, 3)
        cell = montage[40 * row : 40 * row + 40, 50 * column : 50 * column + 50].astype(float)
        if number >= len(top):
            assert not cell.any()
            continue
        mask, box = top.get_field("mask_probabilities")[number][None], top.bbox[number][None]
        large = paste_masks(mask, box, (120, 150), threshold=None, continuous=True)
        small = interpolate(large[None], (40, 50), mode="area")[0, 0].numpy()
        assert abs(cell - colours[(small * 255).round().astype(int)]).mean() < 6


def test_montage_of_pasted_masks_and_mistakes():
    two = BoxList([[0.0, 0, 40, 40], [40, 0, 80, 40]], (81, 41))
    masks = torch.zeros(2, 41, 81, dtype=torch.bool)
    masks[0, :, :41] = True
    montage = mask_montage(two, masks, 2)
    assert montage.shape == (41, 81, 3)
    assert (montage[:20, :19] == montage[0, 0]).all()
    assert montage[0, 0].min() > 150
    assert montage[:20, 22:40].max() < 5
    assert not montage[21:].any()
    with pytest.raises(ValueError, match="masks_per_dim is 0"):
        mask_montage(two, masks, 0)


def test_names_of_ones_own(demo, tmp_path):
    class Mine(COCODemo):
        CATEGORIES = ("__background", "a", "b", "c", "d", "e", "f")

    cfg = demo.cfg.clone()
    mine = Mine(cfg)
    assert mine.CATEGORIES[3] == "c"
    top = demo.select_top_predictions(demo.compute_prediction(photo()))
    assert not np.array_equal(mine.overlay_class_names(photo(), top), demo.overlay_class_names(photo(), top))
    names = {label: f"name {label}" for label in range(1, 7)}
    torch.save({**torch.load(cfg.MODEL.WEIGHT), "categories": names}, tmp_path / "named.pth")
    cfg.MODEL.WEIGHT = str(tmp_path / "named.pth")
    assert list(COCODemo(cfg).CATEGORIES) == ["__background", *names.values()]
    assert len(COCODemo.CATEGORIES) == 81
