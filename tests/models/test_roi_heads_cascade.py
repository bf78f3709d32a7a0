"""Cascade R-CNN against its definition, image by image and region by region."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align

import fastrcnn
from fastrcnn.models.roi_heads import ROIHeads
from fastrcnn.models.roi_heads.sampling import sample_regions
from fastrcnn.structures import ImageBatch, ProposalBatch, TargetBatch

KEYS = """
MODEL.DEVICE cpu MODEL.CASCADE_ON True MODEL.CLS_AGNOSTIC_BBOX_REG True MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 12
MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPN2MLPFeatureExtractor MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 3 MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16
MODEL.ROI_BOX_HEAD.POOLER_SCALES (0.125,) MODEL.ROI_BOX_HEAD.NUM_CLASSES 5 MODEL.ROI_HEADS.SCORE_THRESH 0.15
"""
IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SIZES = [(96, 120), (128, 80), (100, 100)]  # (h, w)


def build(*overrides):
    model = ROIHeads(fastrcnn.load_config(None, [*KEYS.split(), *overrides]), 8).double()
    for predictor in model.box.predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.7)
    return model


def example():
    features = torch.randn(3, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor(SIZES, dtype=torch.int32)
    images = ImageBatch(torch.zeros(3, 3, 128, 128), sizes, sizes)
    gt = torch.zeros(3, 2, 4, dtype=torch.float64)
    gt[0] = torch.tensor([[10, 10, 60, 70], [50, 30, 110, 90]])
    gt[1, 0] = torch.tensor([20.0, 20, 70, 110])
    targets = TargetBatch(gt, torch.tensor([[2, 4], [1, 0], [0, 0]]), torch.zeros(3, 2, dtype=torch.bool))
    noise = torch.randn(3, 8, 4, dtype=torch.float64) * 4
    boxes = gt[:, :1] + noise
    boxes[:, 4:] = gt[:, 1:] + noise[:, 4:]
    corner = torch.rand(3, 4, 2, dtype=torch.float64) * 50
    boxes = torch.cat([boxes, torch.cat([corner, corner + 30], 2)], 1)
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 5)
    boxes[1, 3] = torch.tensor([100.0, 20, 125, 50])  # right of an image 80 pixels wide: no area after clipping
    return [features], images, targets, ProposalBatch(boxes, torch.rand(3, 12), torch.rand(3, 12) < 0.9)


def stage(model, features, image, boxes, k):
    rois = torch.cat([torch.full((len(boxes), 1), image, dtype=torch.float64), boxes], 1)
    pooled = roi_align(features[0], rois, 3, 0.125, 2, True)
    pooled.register_hook(lambda gradient: gradient / 3) if pooled.requires_grad else None
    logits, deltas = model.box.predictor[k](model.box.feature_extractor[k](pooled))
    refined = BoxCoder(WEIGHTS[k]).decode_single(deltas[:, 4:], boxes)
    return logits, deltas[:, 4:], clip_boxes_to_image(refined.detach(), SIZES[image])


def plain_losses(model, features, samples, targets):
    """Loops over stages and images; of each stage sums over the images and the number of regions left."""
    sums = {f"{name}_stage{k}": 0.0 for k in range(3) for name in ("loss_classifier", "loss_box_reg")}
    counts = [0, 0, 0]
    for image in range(3):
        used = samples.weight[image] > 0
        boxes, labels, matched = samples.boxes[image, used], samples.labels[image, used], samples.matched[image, used]
        present = targets.labels[image] > 0
        gt_boxes, gt_labels = targets.boxes[image, present], targets.labels[image, present]
        for k in range(3):
            if k > 0:
                boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)]
                labels = torch.zeros(len(boxes), dtype=torch.int64)
                if len(gt_boxes):
                    iou, matched = box_iou(boxes, gt_boxes).max(1)
                    labels = torch.where(iou >= IOUS[k], gt_labels[matched], 0)
            counts[k] += len(boxes)
            logits, deltas, refined = stage(model, features, image, boxes, k)
            sums[f"loss_classifier_stage{k}"] += F.cross_entropy(logits, labels, reduction="sum")
            chosen = labels > 0
            if chosen.any():
                wanted = BoxCoder(WEIGHTS[k]).encode_single(targets.boxes[image, matched[chosen]], boxes[chosen])
                sums[f"loss_box_reg_stage{k}"] += F.smooth_l1_loss(deltas[chosen], wanted, reduction="sum")
            boxes = refined
    return {name: value / counts[int(name[-1])] for name, value in sums.items()}, counts


def test_losses_and_gradients():
    model = build().train()
    features, images, targets, proposals = example()
    samples = sample_regions(proposals, targets, model.spec)
    got, _ = model.box.losses(features, images, samples, targets)
    want, counts = plain_losses(model, features, samples, targets)
    assert counts[1] < counts[0]  # a region was lost
    assert all(want[f"loss_box_reg_stage{k}"] > 0 for k in range(3))
    assert got.keys() == want.keys()
    variables = [features[0], *model.parameters()]
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")
        gradients = (torch.autograd.grad(x[name], variables, retain_graph=True, allow_unused=True) for x in (got, want))
        for a, b in zip(*gradients, strict=True):
            if b is None:
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, b)


@torch.no_grad()
def test_detections():
    model = build().eval()
    features, images, _, proposals = example()
    found = model.detect(features, images, proposals)
    assert found.count.sum() > 10
    for image in range(3):
        boxes, total = proposals.boxes[image, proposals.valid[image]], 0
        for k in range(3):
            logits, _, boxes = stage(model, features, image, boxes, k)
            total = total + logits.softmax(1) / 3
        region, label = (total[:, 1:] > 0.15).nonzero().unbind(1)
        scores = total[:, 1:][region, label]
        kept = batched_nms(boxes[region], scores, label, 0.5)
        count = found.count[image]
        assert count == len(kept)
        torch.testing.assert_close(found.scores[image, :count], scores[kept])
        assert torch.equal(found.labels[image, :count], label[kept] + 1)
        torch.testing.assert_close(found.boxes[image, :count], boxes[region[kept]])


def test_names_are_numbered():
    names = build().state_dict()
    for k in range(3):
        assert f"box.feature_extractor.{k}.fc6.weight" in names
        assert names[f"box.predictor.{k}.bbox_pred.weight"].shape[0] == 8


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_stages(count):
    keys = "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", str(IOUS[:count])
    model = build(*keys, "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", str(WEIGHTS[:count]))
    features, images, targets, proposals = example()
    assert len(model.losses(features, images, proposals, targets)) == 2 * count
