"""The same weights on the same photos give torchvision's detections, losses and gradients."""

import pytest
import torch
from PIL import Image
from support import DEVICE
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn import ops
from fastrcnn.data.datasets import COCODataset
from fastrcnn.weights.torchvision import convert

MODELS = {
    "faster_rcnn_R_50_FPN": "fasterrcnn_resnet50_fpn",
    "faster_rcnn_R_50_FPN_V2": "fasterrcnn_resnet50_fpn_v2",
    "faster_rcnn_MobileNetV3_FPN": "fasterrcnn_mobilenet_v3_large_fpn",
    "mask_rcnn_R_50_FPN": "maskrcnn_resnet50_fpn",
    "mask_rcnn_R_50_FPN_V2": "maskrcnn_resnet50_fpn_v2",
    "keypoint_rcnn_R_50_FPN": "keypointrcnn_resnet50_fpn",
    "retinanet_R_50_FPN": "retinanet_resnet50_fpn",
    "retinanet_R_50_FPN_V2": "retinanet_resnet50_fpn_v2",
}
LOSSES = {
    "loss_keypoint": "loss_kp",
    "classification": "loss_retina_cls",
    "bbox_regression": "loss_retina_reg",
}


def some(*always):
    """All models; those that are not named here are compared with the tests that take minutes."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.nightly) for name in MODELS]


def config(repository, name, *overrides):
    # what torchvision's new models have; its published weights are used with 0
    eps = ["MODEL.RESNETS.FROZEN_BN_EPS", "1e-5"] if "R_50" in name else []
    path = repository / "configs" / "torchvision" / f"{name}.yaml"
    return fastrcnn.load_config(path, ["MODEL.DEVICE", DEVICE, *eps, *overrides])


def photos(test_data, count):
    paths = sorted((test_data / "coco_open" / "val2017").glob("*.jpg"))[:count]
    return [pil_to_tensor(Image.open(p).convert("RGB")) for p in paths]


def at(model, path):
    """The layer, None where there is no such."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


@torch.no_grad()
def perturb(model, image):
    """Random weights that detect: batch norm calibrated on a photo, logits spread out, boxes moved."""
    model.eval()
    calibrate(model, "backbone", image)
    spread(model, "rpn.head.cls_logits", 2.0, image)
    spread(model, "rpn.head.bbox_pred", 0.3, image)
    calibrate(model, "roi_heads.box_head", image)
    spread(model, "roi_heads.box_predictor.cls_score", 3.0, image)
    spread(model, "roi_heads.box_predictor.bbox_pred", 1.0, image)
    calibrate(model, "roi_heads.mask_head", image)
    spread(model, "roi_heads.mask_predictor.mask_fcn_logits", 2.0, image)
    spread(model, "roi_heads.keypoint_predictor.kps_score_lowres", 2.0, image)
    spread(model, "head.classification_head.cls_logits", 1.0, image, bias=-4.0)
    spread(model, "head.regression_head.bbox_reg", 0.3, image)


@torch.no_grad()
def calibrate(model, path, image):
    part = at(model, path)
    norms = [m for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)] if part else []
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    part.train()
    model([image])
    part.eval()
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2))


@torch.no_grad()
def spread(model, path, deviation, image, bias=None):
    """Scale a layer so that its output has this standard deviation."""
    layer = at(model, path)
    if layer is None:
        return
    seen = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.flatten()))
    model([image])
    handle.remove()
    factor = deviation / torch.cat(seen).std()
    layer.weight.mul_(factor)
    if bias is None:
        layer.bias.mul_(factor)
    else:
        layer.bias.fill_(bias)


def pair(repository, name, images, score=0.3):
    """Their model and ours of the same weights, and our config; with room for all detections: which of two equal ones
    is the last that fits is not determined."""
    sizes = {"min_size": 256, "max_size": 400}
    overrides = ["INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "400"]
    if "retinanet" in name:
        sizes |= {"detections_per_img": 2000, "score_thresh": score}
        overrides += ["TEST.DETECTIONS_PER_IMG", "2000", "MODEL.RETINANET.INFERENCE_TH", str(score)]
    else:
        sizes |= {"box_detections_per_img": 1000, "box_score_thresh": score}
        overrides += ["MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "1000", "MODEL.ROI_HEADS.SCORE_THRESH", str(score)]
    theirs = get_model(MODELS[name], weights=None, weights_backbone=None, **sizes)
    perturb(theirs, images[0].float() / 255)
    cfg = config(repository, name, *overrides)
    ours = fastrcnn.build_model(cfg).eval()
    report = fastrcnn.weights.load(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    return theirs.to(DEVICE), ours, cfg


@pytest.mark.parametrize("name", MODELS)
def test_same_detections(name, test_data, repository):
    images = photos(test_data, 2)
    theirs, ours, cfg = pair(repository, name, images)
    with torch.inference_mode():
        want = theirs([i.to(DEVICE).float() / 255 for i in images])
        got = ours(fastrcnn.ImageBatch.from_images(images, cfg).to(DEVICE)).to_boxlists()
    assert sum(len(w["scores"]) for w in want) > 50  # otherwise nothing is compared
    iou = cfg.MODEL.RETINANET.NMS_TH if cfg.MODEL.RETINANET_ON else cfg.MODEL.ROI_HEADS.NMS
    for w, g, image in zip(want, got, images, strict=True):
        w = {k: v.cpu() for k, v in w.items()}
        print(name, len(g), len(w["scores"]))
        assert len(g) == len(w["scores"]) < 1000
        if len(g) == 0:
            continue
        scores, labels = g.get_field("scores"), g.get_field("labels")
        assert (scores[:-1] >= scores[1:]).all()
        same = (labels[:, None] == w["labels"]) & ((scores[:, None] - w["scores"]).abs() < 1e-4)
        distance = (g.bbox[:, None] - w["boxes"]).abs().amax(2)
        distance, partner = torch.where(same, distance, torch.inf).min(1)
        # two boxes that suppress each other and have equal scores up to rounding: either may be the one that stays
        tied = same & (box_iou(g.bbox, w["boxes"]) > iou)
        found = distance < 0.05
        assert (found | tied.any(1)).all()
        assert found.float().mean() > 0.98
        assert partner[found].unique().numel() == found.sum()  # one to one
        if "masks" in w:
            masks, want_masks = g.get_field("mask")[found], w["masks"][partner[found], 0]
            # pasted at their boxes: one that ends within rounding of a pixel's border may be drawn a pixel further
            pasted = ops.paste_masks(masks, w["boxes"][partner[found]], image.shape[-2:], threshold=None)
            assert (pasted - want_masks).abs().max() < 1e-3
            pasted = ops.paste_masks(masks, g.bbox[found], image.shape[-2:], threshold=None)
            assert ((pasted - want_masks).abs().amax((1, 2)) < 1e-3).float().mean() > 0.95
        if "keypoints" in w:
            moved = (g.get_field("keypoints").keypoints[found] - w["keypoints"][partner[found]]).abs().amax(2)
            print(moved.max(), (moved < 0.1).float().mean(), moved.numel())
            error = (g.get_field("keypoint_scores")[found] - w["keypoints_scores"][partner[found]]).abs()
            print(error.max())
            assert moved.max() < 0.1


def freeze_norms(module):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            torch.nn.init.uniform_(frozen.weight, 0.2, 0.5)  # keeps random activations bounded
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def exhaustive(name):
    """Their model, which learns from all anchors and all of a few proposals."""
    settings = {"min_size": 160, "max_size": 224}
    if "retinanet" not in name:
        settings |= {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
        settings |= {"rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 80}
    model = get_model(MODELS[name], weights=None, weights_backbone=None, **settings)
    if "V2" not in name:
        freeze_norms(model)  # as in the models with published weights
    if "retinanet" in name:  # theirs has a label 0, which would be learnt too
        logits = model.head.classification_head.cls_logits
        with torch.no_grad():
            logits.weight.unflatten(0, (9, -1))[:, 0] = 0
            logits.bias.unflatten(0, (9, -1))[:, 0] = -1000
    return model.train()


def examples(test_data, name):
    """Three small photos, of which the last has no objects, and their ground truth."""
    folder = test_data / "coco_open"
    kind, chosen = ("person_keypoints", (0, 10)) if "keypoint" in name else ("instances", (3, 5))
    dataset = COCODataset(
        folder / "annotations" / f"{kind}_train2017.json", folder / "train2017", keypoint_shift=0.0
    )
    boxlists, images = [], []
    for index, size in zip(chosen, ((224, 160), (160, 192)), strict=True):
        image, target = dataset[index][:2]
        images.append(pil_to_tensor(image.resize(size)))
        target = target.resize(size)
        target.add_field("masks", target.get_field("masks").convert("mask"))
        boxlists.append(target)
    return [*images, images[1].flip(2)], [*boxlists, boxlists[0][:0]]


def their_targets(boxlist, dtype):
    target = {
        "boxes": boxlist.bbox.to(DEVICE, dtype),
        "labels": boxlist.get_field("labels").to(DEVICE),
        "masks": boxlist.get_field("masks").get_mask_tensor().to(DEVICE),
    }
    if boxlist.has_field("keypoints"):
        target["keypoints"] = boxlist.get_field("keypoints").keypoints.to(DEVICE, dtype)
    return target


@pytest.mark.parametrize("name", MODELS)
def test_same_losses_and_gradients_when_sampling_is_exhaustive(name, test_data, repository):
    images, boxlists = examples(test_data, name)
    theirs = exhaustive(name)
    overrides = "MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0 MODEL.RPN.BATCH_SIZE_PER_IMAGE 1000000".split()
    overrides += "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 1000000".split()
    overrides += "MODEL.RPN.PRE_NMS_TOP_N_TRAIN 60 MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 80".split()
    cfg = config(repository, name, *overrides)
    ours = fastrcnn.build_model(cfg).train()
    fastrcnn.weights.load(ours, theirs.state_dict())

    # in float64: a difference of 1e-7 anywhere turns some ReLUs of 50 layers, which moves gradients by 1e-3
    dtype = torch.float64
    theirs.to(DEVICE, dtype)
    ours.to(dtype)
    pixels = [i.to(DEVICE, dtype) / 255 for i in images]
    want = theirs(pixels, [their_targets(b, dtype) for b in boxlists])

    batch = fastrcnn.ImageBatch.from_tensors(images, [i.shape[-2:] for i in images], cfg)
    targets = fastrcnn.TargetBatch.from_boxlists(boxlists, batch)
    prepared = theirs.transform(pixels)[0].tensors
    torch.testing.assert_close(batch.pixels.to(DEVICE, dtype), prepared, rtol=1e-6, atol=1e-6)
    batch.pixels, targets.boxes = prepared, targets.boxes.to(dtype)
    if targets.keypoints is not None:
        targets.keypoints = targets.keypoints.to(dtype)
    got = ours(batch.to(DEVICE), targets.to(DEVICE))
    want = {LOSSES.get(key, key): value for key, value in want.items()}
    assert got.keys() == want.keys()
    for key, value in want.items():
        error = (got[key] - value).abs() / value.abs()
        assert error < 1e-6, f"{key}: relative error {error:.1e}"

    sum(want.values()).backward()
    sum(got.values()).backward()
    gradients = convert({n: p.grad for n, p in theirs.named_parameters()})
    own = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    for key, value in gradients.items():
        error = (own[key] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-6, f"{key}: relative error {error:.1e} of the gradient"
    # batch norm that learns has seen the same: the heads' of regions alone, not of empty slots
    means = {n: value for n, value in convert(theirs.state_dict()).items() if n.endswith("running_mean")}
    torch.testing.assert_close({n: ours.state_dict()[n] for n in means}, means, rtol=1e-6, atol=1e-9)


def test_published_weights_have_no_eps(repository):
    """torchvision sets eps to 0 when it loads its COCO V1 weights (`overwrite_eps`), and so does the convention."""
    cfg = fastrcnn.load_config(repository / "configs/torchvision/faster_rcnn_R_50_FPN.yaml", ["MODEL.DEVICE", DEVICE])
    norm = next(m for m in fastrcnn.build_model(cfg).modules() if hasattr(m, "running_var"))
    norm.running_var.fill_(0.25)
    assert torch.allclose(norm(torch.ones(1, norm.weight.numel(), 1, 1, device=DEVICE)), torch.tensor(2.0))
