import copy
from dataclasses import replace

import pytest
import torch
from data.makers import annotation, write_coco

import fastrcnn
from fastrcnn.config import ConfigError, load_config
from fastrcnn.data import make_data_loader
from fastrcnn.engine import inference
from fastrcnn.engine.tta import View, detect_augmented, views
from fastrcnn.ops import heatmaps_to_keypoints, nms_padded
from fastrcnn.structures import ImageBatch, PersonKeypoints

SMALL = (
    "MODEL.DEVICE cpu MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.WEIGHT '' "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES 3 MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (16,) "
    "MODEL.RPN.MIN_SIZE 8 MODEL.RPN.POST_NMS_TOP_N_TEST 60 MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 60 "
    "MODEL.ROI_HEADS.DETECTIONS_PER_IMG 10 MODEL.ROI_HEADS.SCORE_THRESH 0.2 "
    "INPUT.MIN_SIZE_TEST 96 INPUT.MAX_SIZE_TEST 128 TEST.BBOX_AUG.ENABLED True "
    "DATALOADER.SIZE_DIVISIBILITY 32 DATALOADER.NUM_WORKERS 0 TEST.IMS_PER_BATCH 2"
).split()


def config(repository, name="e2e_mask_rcnn_R_50_FPN_1x", **aug):
    options = [part for key, value in aug.items() for part in (f"TEST.BBOX_AUG.{key}", str(value))]
    return load_config(name, [*SMALL, *options])


# what the layers of these names give is to have this standard deviation, one after another
DEVIATIONS = {
    "backbone.fpn.fpn_layer": 1.0, "rpn.head.conv": 1.0, "rpn.head.cls_logits": 1.0, "rpn.head.bbox_pred": 0.3,
    "fc6": 1.0, "fc7": 1.0, "cls_score": 1.5, "box.predictor.bbox_pred": 0.5, "fcn1": 1.0, "conv5_mask": 1.0,
    "kps_score_lowres": 3.0,
}  # fmt: skip


def build(cfg):
    """A model of random weights whose detections depend on the pixels, and are neither all the same nor too sure."""
    torch.manual_seed(1)
    model = fastrcnn.build_model(cfg).eval()
    batch = ImageBatch.from_images(photos(), cfg)
    for name, wanted in DEVIATIONS.items():
        layers = [module for path, module in model.named_modules() if name in path and hasattr(module, "weight")]
        found = {layer: [] for layer in layers}
        hooks = [each.register_forward_hook(lambda _, __, out, to=found[each]: to.append(out)) for each in layers]
        with torch.no_grad():
            model(batch)
            for layer, outputs in found.items():
                layer.weight *= wanted / torch.cat([out.flatten() for out in outputs]).std()
        for hook in hooks:
            hook.remove()
    return model


def photos(sizes=((96, 128), (90, 100))):
    """Coarse random patterns."""
    generator = torch.Generator().manual_seed(2)
    coarse = [torch.rand(1, 3, 6, 8, generator=generator) * 255 for _ in sizes]
    return [
        torch.nn.functional.interpolate(c, s, mode="bilinear")[0].byte() for c, s in zip(coarse, sizes, strict=True)
    ]


def fields(detections):
    names = ("boxes", "scores", "labels", "count", "masks", "keypoints", "keypoint_scores")
    return {name: value for name in names if (value := getattr(detections, name)) is not None}


def test_views_of_every_key(repository):
    plain, mirrored = View(96, 128, False), View(96, 128, True)
    assert views(config(repository)) == [plain]
    assert views(config(repository, H_FLIP=True)) == [plain, mirrored]
    scales = [View(64, 160, False), View(80, 160, False)]
    assert views(config(repository, SCALES=(64, 80), MAX_SIZE=160)) == [plain, *scales]
    both = [View(64, 4000, False), View(64, 4000, True)]
    assert views(config(repository, SCALES=(64,), SCALE_H_FLIP=True)) == [plain, *both]


def test_sizes_of_the_views(repository):
    cfg = config(repository)
    assert View(48, 4000, False).batch(photos(), cfg).sizes.tolist() == [[48, 64], [48, 53]]
    assert View(48, 56, False).batch(photos(), cfg).sizes.tolist() == [[42, 56], [48, 53]]
    straight, flipped = (View(96, 128, flip).batch(photos()[:1], cfg).pixels for flip in (False, True))
    assert torch.equal(straight.flip(3), flipped)


@pytest.mark.parametrize("name", ["e2e_mask_rcnn_R_50_FPN_1x", "e2e_keypoint_rcnn_R_50_FPN_1x", "soft"])
def test_the_plain_view_alone_gives_plain_detections(repository, name):
    cfg = config(repository, "e2e_mask_rcnn_R_50_FPN_1x" if name == "soft" else name)
    if name == "soft":
        cfg.MODEL.ROI_HEADS.SOFT_NMS = "gaussian"
    model = build(cfg)
    with torch.no_grad():
        want = model(ImageBatch.from_images(photos(), cfg))
    got = detect_augmented(model, photos(), cfg)
    assert (want.count > 3).all()
    torch.testing.assert_close(fields(got), fields(want), rtol=0, atol=0)
    assert torch.equal(got.sizes, want.sizes)
    assert torch.equal(got.original_sizes, want.original_sizes)
    model.roi_heads.mask = None
    if name == "soft":
        assert detect_augmented(model, photos(), cfg).masks is None


@pytest.mark.parametrize("conventions", ["modern", "maskrcnn-benchmark"])
@pytest.mark.parametrize("name", ["e2e_mask_rcnn_R_50_FPN_1x", "e2e_keypoint_rcnn_R_50_FPN_1x"])
def test_mirrored_images_give_mirrored_detections(repository, name, conventions):
    """With H_FLIP an image and its mirror image are the same two views. Widths are multiples of the largest stride, so
    that the grids of the two are mirror images as well."""
    cfg = config(repository, name, H_FLIP=True)
    cfg.MODEL.CONVENTIONS = conventions
    model = build(cfg)
    images = photos(((96, 128), (96, 96)))
    got = detect_augmented(model, images, cfg)
    mirrored = detect_augmented(model, [image.flip(2) for image in images], cfg)
    assert got.count.tolist() == mirrored.count.tolist()
    assert (got.count > 3).all()
    width = got.sizes[:, 1]
    for b, n in enumerate(got.count.tolist()):
        boxes = mirrored.boxes[b, :n].clone()
        boxes[:, [0, 2]] = width[b] - boxes[:, [2, 0]]
        torch.testing.assert_close(got.boxes[b, :n], boxes, rtol=0, atol=0.05)
        torch.testing.assert_close(got.scores[b, :n], mirrored.scores[b, :n], rtol=0, atol=1e-4)
        assert torch.equal(got.labels[b, :n], mirrored.labels[b, :n])
        if got.masks is not None:
            torch.testing.assert_close(got.masks[b, :n], mirrored.masks[b, :n].flip(2), rtol=0, atol=1e-3)
        if got.keypoints is not None:
            swapped = mirrored.keypoint_scores[b, :n][:, list(PersonKeypoints.FLIP_MAP)]
            torch.testing.assert_close(got.keypoint_scores[b, :n], swapped, rtol=0, atol=1e-3)
            points = mirrored.keypoints[b, :n][:, list(PersonKeypoints.FLIP_MAP)]
            # of the legacy conventions the first pixel is 0 and the last width − 1
            points[..., 0] = width[b] - int(conventions != "modern") - points[..., 0]
            solid = (got.boxes[b, :n, 2:] - got.boxes[b, :n, :2] > 1).all(1)
            near = ((got.keypoints[b, :n] - points).abs() < 0.5).all(2)[solid]
            assert near.float().mean() > 0.95  # a flat heat map may have two maxima
            assert len(near) > 1


@pytest.mark.parametrize("conventions", ["modern", "maskrcnn-benchmark"])
def test_merged_boxes_and_masks_by_hand(repository, conventions):
    """Two sizes, the second mirrored too: the union of the candidates of three runs, NMS, masks averaged."""
    cfg = config(repository, SCALES=(48,), SCALE_H_FLIP=True)
    cfg.MODEL.CONVENTIONS = conventions
    last = int(conventions != "modern")  # there the last pixel is scaled, which lies 1 before the box's end
    model = build(cfg)
    images = photos(((96, 128),))
    got = detect_augmented(model, images, cfg)
    boxes, scores, labels, valid, kept = [], [], [], [], []
    with torch.no_grad():
        for min_size, flip in ((96, False), (48, False), (48, True)):
            view = copy.deepcopy(cfg)
            view.INPUT.MIN_SIZE_TEST, view.INPUT.MAX_SIZE_TEST = min_size, 4000
            batch = ImageBatch.from_images([images[0].flip(2)] if flip else images, view)
            features = model.backbone(batch.pixels)
            found = model.roi_heads.box.candidates(features, batch, model.rpn(batch, features)[0])
            place = found[0] * 96 / min_size
            place[..., 2:] += last * (1 - 96 / min_size)
            if flip:
                place = torch.stack([128 - place[..., 2], place[..., 1], 128 - place[..., 0], place[..., 3]], -1)
            for parts, value in zip((boxes, scores, labels, valid), (place, *found[1:]), strict=True):
                parts.append(value)
            kept.append((features, flip, min_size / 96))
        boxes, scores, labels, valid = (torch.cat(parts, 1) for parts in (boxes, scores, labels, valid))
        slots, count = nms_padded(boxes, scores, cfg.MODEL.ROI_HEADS.NMS, 10, labels, valid)
        n = count.item()
        assert got.count.item() == n > 3
        slots = slots[0, :n]
        torch.testing.assert_close(got.boxes[0, :n], boxes[0, slots], rtol=0, atol=1e-3)
        torch.testing.assert_close(got.scores[0, :n], scores[0, slots])
        assert torch.equal(got.labels[0, :n], labels[0, slots])
        masks, head = 0, model.roi_heads.mask
        for features, flip, scale in kept:
            place = got.boxes[:, :n] * scale
            place[..., 2:] += last * (1 - scale)
            if flip:
                width = 128 * scale
                place = torch.stack([width - place[..., 2], place[..., 1], width - place[..., 0], place[..., 3]], -1)
            x = head.extract(features, place, torch.ones(1, n, dtype=torch.bool))
            mask = head.logits(x, got.labels[:, :n]).sigmoid()
            masks = masks + (mask.flip(3) if flip else mask) / 3
    torch.testing.assert_close(got.masks[:, :n], masks, rtol=0, atol=1e-4)
    assert slots.max() >= boxes.shape[1] // 3  # not only of the plain view


@pytest.mark.parametrize(
    "aug",
    [{"H_FLIP": True}, {"SCALES": (64,)}, {"SCALES": (64,), "MAX_SIZE": 70}, {"SCALES": (64,), "SCALE_H_FLIP": True}],
)
def test_every_key_has_an_effect(repository, aug):
    cfg, less = config(repository, **aug), config(repository, **dict(list(aug.items())[:-1]))
    model = build(cfg)
    got, without = (detect_augmented(model, photos(), each) for each in (cfg, less))
    assert not torch.equal(got.scores, without.scores)


def test_models_that_cannot(repository):
    cfg = config(repository, "retinanet/retinanet_R-50-FPN_1x")
    model = fastrcnn.build_model(cfg).eval()
    with pytest.raises(ConfigError, match=r"TEST\.BBOX_AUG\.ENABLED needs a model with heads on regions"):
        detect_augmented(model, photos(), cfg)
    cfg = config(repository, "e2e_keypoint_rcnn_R_50_FPN_1x", H_FLIP=True)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES = 5
    with pytest.raises(ConfigError, match="of 5 keypoints it is not known"):
        detect_augmented(build(cfg), photos(), cfg)


def test_through_the_loader_to_the_evaluation(repository, tmp_path, monkeypatch):
    """TEST.BBOX_AUG.ENABLED alone does it; with the plain view the detections are those of the plain loader."""
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    square = [[20, 20, 80, 20, 80, 80, 20, 80]]
    write_coco(
        tmp_path,
        [annotation(1, (20, 20, 60, 60), segmentation=square)],
        images=((1, 128, 96), (2, 96, 96)),  # at these sizes nothing is resized
    )
    cfg = config(repository)
    cfg.DATASETS.REGISTER = {"mine": {"img_dir": "images", "ann_file": "annotations.json"}}
    cfg.DATASETS.TEST = ("mine",)
    model, results = build(cfg), {}
    for enabled, flip in ((False, False), (True, False), (True, True)):
        cfg.TEST.BBOX_AUG.ENABLED, cfg.TEST.BBOX_AUG.H_FLIP = enabled, flip
        (loader,) = make_data_loader(cfg, is_train=False)
        measures = inference.inference(model, loader, cfg, tmp_path / "out")
        assert set(measures) == {"bbox", "segm"}
        results[enabled, flip] = inference.load_predictions(tmp_path / "out" / "predictions.pth")
    for index, want in results[False, False].items():
        got = results[True, False][index]
        assert got.size == want.size
        torch.testing.assert_close(got.bbox, want.bbox, rtol=0, atol=1e-3)
        assert got.get_field("rle") == want.get_field("rle")
        assert not torch.equal(results[True, True][index].get_field("scores"), want.get_field("scores"))


def test_heat_maps_are_averaged(repository):
    cfg = config(repository, "e2e_keypoint_rcnn_R_50_FPN_1x", SCALES=(48,))
    cfg.MODEL.CONVENTIONS = "modern"
    model = build(cfg)
    (image,) = photos(((96, 128),))
    got = detect_augmented(model, [image], cfg)
    logits = []
    for min_size in (96, 48):
        batch = View(min_size, 4000, False).batch([image], cfg)
        seen = replace(got, boxes=got.boxes * min_size / 96)
        logits.append(model.roi_heads.keypoint.heatmaps(model.backbone(batch.pixels), seen))
    points, scores = heatmaps_to_keypoints((logits[0] + logits[1]) / 2, got.boxes[0], (96, 128))
    n = got.count.item()
    assert n > 3
    torch.testing.assert_close(got.keypoints[0, :n], points[:n], rtol=0, atol=1e-3)
    torch.testing.assert_close(got.keypoint_scores[0, :n], scores[:n], rtol=1e-4, atol=1e-4)
