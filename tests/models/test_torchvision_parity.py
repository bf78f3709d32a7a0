"""The same weights on the same photos give torchvision's detections, losses and gradients."""

import pytest
import torch
from PIL import Image
from support import DEVICE
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d
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
MOBILE = "faster_rcnn_MobileNetV3_FPN"
LOSSES = {"loss_keypoint": "loss_kp", "classification": "loss_retina_cls", "bbox_regression": "loss_retina_reg"}


def some(*always):
    """All models; those that are not named are compared by the tests that take minutes."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.nightly) for name in MODELS]


def config(repository, name, *overrides):
    # what torchvision's new models have; its published weights are used with 0
    eps = ["MODEL.RESNETS.FROZEN_BN_EPS", "1e-5"] if "R_50" in name else []
    path = f"torchvision/{name}"
    return fastrcnn.load_config(path, ["MODEL.DEVICE", DEVICE, *eps, *overrides])


def photos(test_data, count):
    paths = sorted((test_data / "coco_open" / "val2017").glob("*.jpg"))[:count]
    images = [Image.open(p).convert("RGB") for p in paths]
    for image in images:
        image.thumbnail((400, 400))
    return [pil_to_tensor(image) for image in images]


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
    spread(model, "head.classification_head.cls_logits", 1.0, image, bias=-5.0)
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
def spread(model, path, deviation, image, bias=0.0):
    """Scale and shift a layer so that each channel of its output has the mean `bias`, and all this deviation."""
    layer = at(model, path)
    if layer is None:
        return
    seen = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.transpose(0, 1).flatten(1)))
    model([image])
    handle.remove()
    values = torch.cat(seen, 1)
    mean = values.mean(1)
    factor = deviation / (values - mean[:, None]).std()
    layer.weight.mul_(factor)
    layer.bias.copy_((layer.bias - mean) * factor + bias)


@torch.no_grad()
def silence_label_0(model):
    """Their RetinaNet has logits of a label 0, which no object has; trained ones are silent, and ours has none."""
    logits = at(model, "head.classification_head.cls_logits")
    if logits is not None:
        logits.weight.unflatten(0, (9, -1))[:, 0] = 0
        logits.bias.unflatten(0, (9, -1))[:, 0] = -1000


def pair(repository, name, image):
    """Their model and ours of the same weights, and our config."""
    sizes = {"min_size": 256, "max_size": 400}
    overrides = ["INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "400"]
    if "retinanet" in name:
        sizes |= {"score_thresh": 0.3}
        overrides += ["MODEL.RETINANET.INFERENCE_TH", "0.3"]
    else:
        few = {"box_detections_per_img": 30, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 100}
        sizes |= {"box_score_thresh": 0.2, **few}
        overrides += ["MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "30", "MODEL.ROI_HEADS.SCORE_THRESH", "0.2"]
        overrides += ["MODEL.RPN.PRE_NMS_TOP_N_TEST", "100", "MODEL.RPN.FPN_POST_NMS_TOP_N_TEST", "100"]
    theirs = get_model(MODELS[name], weights=None, weights_backbone=None, **sizes)
    perturb(theirs, image.float() / 255)
    silence_label_0(theirs)
    cfg = config(repository, name, *overrides)
    ours = fastrcnn.build_model(cfg).eval()
    report = fastrcnn.weights.load(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    return theirs, ours, cfg


def assert_within(tolerance, got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name", some(MOBILE, "mask_rcnn_R_50_FPN", "keypoint_rcnn_R_50_FPN", "retinanet_R_50_FPN"))
def test_same_detections(name, test_data, repository):
    images = photos(test_data, 2)
    theirs, ours, cfg = pair(repository, name, images[0])
    # in float64: where two boxes overlap by the threshold of an NMS but for 1e-7, either may stay
    theirs.to(DEVICE, torch.float64)
    ours.to(torch.float64)
    pixels = [i.to(DEVICE, torch.float64) / 255 for i in images]
    batch = fastrcnn.ImageBatch.from_images(images, cfg).to(DEVICE)
    prepared = theirs.transform(pixels)[0].tensors
    torch.testing.assert_close(batch.pixels.double(), prepared, rtol=1e-4, atol=1e-4)
    batch.pixels = prepared
    with torch.inference_mode():
        want = theirs(pixels)
        got = ours(batch).to_boxlists()
    assert sum(len(w["scores"]) for w in want) > 40  # otherwise little is compared
    for w, g, image in zip(want, got, images, strict=True):
        w = {k: v.cpu() for k, v in w.items()}
        assert len(g) == len(w["scores"])
        assert torch.equal(g.get_field("labels"), w["labels"])
        assert_within(1e-4, g.get_field("scores"), w["scores"])
        assert_within(0.05, g.bbox, w["boxes"])
        if "masks" in w:
            masks, want_masks = g.get_field("mask").double(), w["masks"][:, 0]
            # pasted at their boxes: one that ends within rounding of a pixel's border may be drawn a pixel further
            pasted = ops.paste_masks(masks, w["boxes"], image.shape[-2:], threshold=None)
            assert_within(1e-3, pasted, want_masks)
            pasted = ops.paste_masks(masks, g.bbox.double(), image.shape[-2:], threshold=None)
            assert ((pasted - want_masks).abs().amax((1, 2)) < 1e-3).float().mean() > 0.95
        if "keypoints" in w:
            assert_within(0.1, g.get_field("keypoints").keypoints, w["keypoints"])
            assert_within(1e-4, g.get_field("keypoint_scores"), w["keypoints_scores"])


def freeze_norms(module, low, high):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            torch.nn.init.uniform_(frozen.weight, low, high)
            setattr(module, name, frozen)
        else:
            freeze_norms(child, low, high)


def exhaustive(name):
    """Their model, which learns from all anchors and all of a few proposals."""
    settings = {"min_size": 160, "max_size": 224}
    if "retinanet" not in name:
        settings |= {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
        settings |= {"rpn_pre_nms_top_n_train": 30, "rpn_post_nms_top_n_train": 40}
    model = get_model(MODELS[name], weights=None, weights_backbone=None, **settings)
    if "V2" not in name:
        # as in the models with published weights; these scales neither blow random activations up nor let them vanish
        freeze_norms(model, *((1.5, 2.5) if name == MOBILE else (0.2, 0.5)))
    silence_label_0(model)
    return model.train()


def examples(test_data, name):
    """Three small photos, of which the last has no objects, and their ground truth."""
    folder = test_data / "coco_open"
    kind, chosen = ("person_keypoints", (2, 32)) if "keypoint" in name else ("instances", (3, 5))
    dataset = COCODataset(folder / "annotations" / f"{kind}_train2017.json", folder / "train2017", keypoint_shift=0)
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
        target["keypoints"] = boxlist.get_field("keypoints").keypoints.to(DEVICE)  # theirs have to be float32
    return target


@pytest.mark.parametrize("name", some(MOBILE))
def test_same_losses_and_gradients_when_sampling_is_exhaustive(name, test_data, repository):
    images, boxlists = examples(test_data, name)
    theirs = exhaustive(name)
    overrides = "MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0 MODEL.RPN.BATCH_SIZE_PER_IMAGE 1000000".split()
    overrides += "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 1000000".split()
    overrides += "MODEL.RPN.PRE_NMS_TOP_N_TRAIN 30 MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 40".split()
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
        # the bias of a keypoint's map has none but rounding: its softmax does not see what all cells have in common
        error = (own[key] - value).norm() / value.norm().clamp(min=1e-9)
        assert error < 1e-6, f"{key}: relative error {error:.1e} of the gradient"
    # batch norm that learns has seen the same: the heads' of regions alone, not of empty slots
    means = {n: value for n, value in convert(theirs.state_dict()).items() if n.endswith("running_mean")}
    torch.testing.assert_close({n: ours.state_dict()[n] for n in means}, means, rtol=1e-6, atol=1e-9)


def test_published_weights_have_no_eps(repository):
    """torchvision sets eps to 0 when it loads its COCO V1 weights (`overwrite_eps`), and so does the convention."""
    cfg = fastrcnn.load_config("torchvision/faster_rcnn_R_50_FPN", ["MODEL.DEVICE", DEVICE])
    norm = next(m for m in fastrcnn.build_model(cfg).modules() if hasattr(m, "running_var"))
    norm.running_var.fill_(0.25)
    assert torch.allclose(norm(torch.ones(1, norm.weight.numel(), 1, 1, device=DEVICE)), torch.tensor(2.0))
