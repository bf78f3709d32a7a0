"""The same weights on the same photos give torchvision's detections, losses and gradients."""

import pytest
import torch
from PIL import Image
from support import DEVICE
from torchvision.models.detection import FasterRCNN, MaskRCNN, fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn import ops
from fastrcnn.data.datasets import COCODataset
from fastrcnn.weights.torchvision import convert

BUILDERS = {"faster": fasterrcnn_resnet50_fpn, "mask": maskrcnn_resnet50_fpn}
CLASSES = {"faster": FasterRCNN, "mask": MaskRCNN}


def config(repository, kind, *overrides):
    path = repository / "configs" / "torchvision" / f"{kind}_rcnn_R_50_FPN.yaml"
    return fastrcnn.load_config(path, ["MODEL.DEVICE", DEVICE, *overrides])


def photos(test_data, count):
    paths = sorted((test_data / "coco_open" / "val2017").glob("*.jpg"))[:count]
    return [pil_to_tensor(Image.open(p).convert("RGB")) for p in paths]


@torch.no_grad()
def perturb(model, image):
    """Random weights that detect: batch norm calibrated on a photo, logits spread out, boxes moved."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.backbone.train()
    model.backbone(image)
    model.eval()
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.2))
    for layer, target in (
        (model.rpn.head.cls_logits, 1.0),
        (model.rpn.head.bbox_pred, 0.3),
        (model.roi_heads.box_predictor.cls_score, 3.0),
        (model.roi_heads.box_predictor.bbox_pred, 1.0),
        (getattr(model.roi_heads.mask_predictor, "mask_fcn_logits", None), 2.0),
    ):
        if layer is not None:
            spread(model, layer, target, image)


@torch.no_grad()
def spread(model, layer, deviation, image):
    """Scale a layer so that its output has this standard deviation."""
    seen = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.flatten()))
    model([image[0]])
    handle.remove()
    factor = deviation / torch.cat(seen).std()
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_same_detections(kind, test_data, repository):
    images = photos(test_data, 2)
    # room for all detections: which of two equal ones is the last that fits is not determined
    sizes = {"min_size": 256, "max_size": 400, "box_detections_per_img": 1000, "box_score_thresh": 0.3}
    theirs = BUILDERS[kind](weights=None, weights_backbone=None, **sizes)
    perturb(theirs, images[0][None].float() / 255)
    overrides = "INPUT.MIN_SIZE_TEST 256 INPUT.MAX_SIZE_TEST 400 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 1000".split()
    overrides += "MODEL.ROI_HEADS.SCORE_THRESH 0.3".split()
    cfg = config(repository, kind, *overrides, "MODEL.RESNETS.FROZEN_BN_EPS", "1e-5")
    ours = fastrcnn.build_model(cfg).eval()
    report = fastrcnn.weights.load(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    theirs.to(DEVICE)

    with torch.inference_mode():
        want = theirs([i.to(DEVICE).float() / 255 for i in images])
        got = ours(fastrcnn.ImageBatch.from_images(images, cfg).to(DEVICE)).to_boxlists()
    assert sum(len(w["scores"]) for w in want) > 50  # otherwise nothing is compared
    for w, g, image in zip(want, got, images, strict=True):
        w = {k: v.cpu() for k, v in w.items()}
        assert len(g) == len(w["scores"]) < 1000
        if len(g) == 0:
            continue
        scores, labels = g.get_field("scores"), g.get_field("labels")
        assert (scores[:-1] >= scores[1:]).all()
        same = (labels[:, None] == w["labels"]) & ((scores[:, None] - w["scores"]).abs() < 1e-4)
        distance = (g.bbox[:, None] - w["boxes"]).abs().amax(2)
        distance, partner = torch.where(same, distance, torch.inf).min(1)
        # two boxes that suppress each other and have equal scores up to rounding: either may be the one that stays
        tied = same & (box_iou(g.bbox, w["boxes"]) > cfg.MODEL.ROI_HEADS.NMS)
        found = distance < 0.05
        assert (found | tied.any(1)).all()
        assert found.float().mean() > 0.98
        assert partner[found].unique().numel() == found.sum()  # one to one
        if kind == "mask":
            masks, want_masks = g.get_field("mask")[found], w["masks"][partner[found], 0]
            # pasted at their boxes: one that ends within rounding of a pixel's border may be drawn a pixel further
            pasted = ops.paste_masks(masks, w["boxes"][partner[found]], image.shape[-2:], threshold=None)
            assert (pasted - want_masks).abs().max() < 1e-3
            pasted = ops.paste_masks(masks, g.bbox[found], image.shape[-2:], threshold=None)
            assert ((pasted - want_masks).abs().amax((1, 2)) < 1e-3).float().mean() > 0.95


def exhaustive(kind):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    everything = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    few = {"rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 80}
    model = CLASSES[kind](backbone, 91, min_size=224, max_size=320, **everything, **few)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.2, 0.5)  # keeps random activations bounded
    return model.train()


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_same_losses_and_gradients_when_sampling_is_exhaustive(kind, test_data, repository):
    folder = test_data / "coco_open"
    dataset = COCODataset(folder / "annotations" / "instances_train2017.json", folder / "train2017")
    samples = [dataset[i][:2] for i in (3, 5)]
    boxlists, images = [], []
    for (image, target), size in zip(samples, ((320, 224), (224, 256)), strict=True):
        images.append(pil_to_tensor(image.resize(size)))
        target = target.resize(size)
        target.add_field("masks", target.get_field("masks").convert("mask"))
        boxlists.append(target)
    boxlists.append(boxlists[0][:0])  # an image without objects is a negative
    images.append(images[1].flip(2))

    theirs = exhaustive(kind)
    overrides = "MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0 MODEL.RESNETS.FROZEN_BN_EPS 1e-5".split()
    overrides += "MODEL.RPN.BATCH_SIZE_PER_IMAGE 1000000 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 1000000".split()
    overrides += "MODEL.RPN.PRE_NMS_TOP_N_TRAIN 60 MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 80".split()
    cfg = config(repository, kind, *overrides)
    ours = fastrcnn.build_model(cfg).train()
    fastrcnn.weights.load(ours, theirs.state_dict())
    theirs.to(DEVICE)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        theirs.to(dtype)
        ours.to(dtype)
        pixels = [i.to(DEVICE, dtype) / 255 for i in images]
        targets = [
            {
                "boxes": b.bbox.to(DEVICE, dtype),
                "labels": b.get_field("labels").to(DEVICE),
                "masks": b.get_field("masks").get_mask_tensor().to(DEVICE),
            }
            for b in boxlists
        ]
        want = theirs(pixels, targets)

        batch = fastrcnn.ImageBatch.from_tensors(images, [i.shape[-2:] for i in images], cfg)
        padded = fastrcnn.TargetBatch.from_boxlists(boxlists, batch)
        prepared = theirs.transform(pixels)[0].tensors
        torch.testing.assert_close(batch.pixels.to(DEVICE, dtype), prepared, rtol=1e-6, atol=1e-6)
        batch.pixels, padded.boxes = prepared, padded.boxes.to(dtype)
        got = ours(batch.to(DEVICE), padded.to(DEVICE))
        assert got.keys() == want.keys()
        for name, value in want.items():
            error = (got[name] - value).abs() / value.abs()
            assert error < tolerance, f"{name}: relative error {error:.1e} in {dtype}"

    # in float64: a difference of 1e-7 anywhere turns some ReLUs of 50 layers, which moves gradients by 1e-3
    sum(want.values()).backward()
    sum(got.values()).backward()
    gradients = convert({n: p.grad for n, p in theirs.named_parameters()})
    own = {n: p.grad for n, p in ours.named_parameters()}
    assert own.keys() == gradients.keys()
    for name, value in gradients.items():
        error = (own[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-6, f"{name}: relative error {error:.1e} of the gradient"


def test_published_weights_have_no_eps(repository):
    """torchvision sets eps to 0 when it loads its COCO V1 weights (`overwrite_eps`), and so does the convention."""
    norm = next(m for m in fastrcnn.build_model(config(repository, "faster")).modules() if hasattr(m, "running_var"))
    norm.running_var.fill_(0.25)
    assert torch.allclose(norm(torch.ones(1, norm.weight.numel(), 1, 1, device=DEVICE)), torch.tensor(2.0))
