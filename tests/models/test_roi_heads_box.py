"""Box and mask heads of torchvision's V2 models, and the losses of boxes, against their definitions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

import fastrcnn
from fastrcnn import ops
from fastrcnn.models.layers import BatchNorm2d, of_rows
from fastrcnn.models.roi_heads.box import BoxHead, FPNXconv1fcFeatureExtractor, iou_loss
from fastrcnn.models.roi_heads.mask import MaskRCNNFPNFeatureExtractor
from fastrcnn.structures import ImageBatch, ProposalBatch, SampleBatch, TargetBatch

V2 = """
MODEL.DEVICE cpu MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 12
MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 20
MODEL.ROI_BOX_HEAD.NORM BatchNorm MODEL.ROI_MASK_HEAD.NORM BatchNorm MODEL.ROI_MASK_HEAD.CONV_LAYERS (12,12,12)
MODEL.ROI_BOX_HEAD.NUM_CLASSES 5 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 6 MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA 0.25
"""


def config(*overrides):
    return fastrcnn.load_config(None, [*V2.split(), *overrides])


def same_weights(ours, theirs):
    """Both list the same layers in the same order."""
    for name, buffer in theirs.named_buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2) if name.endswith("var") else nn.init.normal_(buffer)
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_heads_with_batch_norm_are_torchvisions(kind, training):
    """In evaluation, where the norms are folded, as in training."""
    if kind == "box":
        ours = FPNXconv1fcFeatureExtractor(config(), 8)
        theirs = FastRCNNConvFCHead((8, 7, 7), [12] * 4, [20], norm_layer=nn.BatchNorm2d)
    else:
        ours = MaskRCNNFPNFeatureExtractor(config(), 8)
        theirs = MaskRCNNHeads(8, [12] * 3, 1, norm_layer=nn.BatchNorm2d)
    same_weights(ours, theirs)
    ours.double().train(training)
    theirs.double().train(training)
    x = torch.randn(6, 8, 7, 7, dtype=torch.float64, requires_grad=True)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    gradients = (
        torch.autograd.grad((y * weight).sum(), [x, *model.parameters()]) for y, model in ((got, ours), (want, theirs))
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def example(dtype=torch.float64):
    """Two images, five regions each: positives, background, and an empty slot whose codes are not finite."""
    corner = torch.rand(2, 5, 2, dtype=dtype) * 40
    boxes = torch.cat([corner, corner + 10 + torch.rand(2, 5, 2, dtype=dtype) * 40], 2)
    boxes[:, 4] = 0
    labels = torch.tensor([[3, 1, 0, 0, 2], [4, 0, 0, 0, 0]])
    gt = torch.cat([boxes[:, :2, :2] + 3, boxes[:, :2, 2:] - 2], 2)
    matched = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    weight = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    samples = SampleBatch(boxes, labels, matched, weight, 3)
    targets = TargetBatch(gt, torch.ones(2, 2).long(), torch.zeros(2, 2, dtype=torch.bool))
    logits = torch.randn(2, 5, 5, dtype=dtype, requires_grad=True)
    deltas = (torch.randn(2, 5, 5, 4, dtype=dtype) * 0.4).requires_grad_()
    return logits, deltas, samples, targets


def head_losses(*overrides, weights=(10.0, 10.0, 5.0, 5.0)):
    head = BoxHead(config(*overrides), 8)
    arguments = example()
    return head.losses_of(*arguments, weights), arguments


def test_losses_are_torchvisions():
    for beta in (0.25, 1 / 9):
        got, (logits, deltas, samples, targets) = head_losses("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", str(beta))
        used = samples.weight > 0
        gt = targets.boxes.gather(1, samples.matched[..., None].expand(-1, -1, 4))
        wanted = ops.encode_boxes(gt[used], samples.boxes[used], (10.0, 10.0, 5.0, 5.0))
        classification, box = fastrcnn_loss(logits[used], deltas[used].flatten(1), [samples.labels[used]], [wanted])
        torch.testing.assert_close(got["loss_classifier"], classification)
        same = torch.isclose(got["loss_box_reg"], box)
        assert same == (beta == 1 / 9)  # which is in the text of torchvision's loss


@pytest.mark.parametrize(
    ("kind", "definition"),
    [("giou", generalized_box_iou_loss), ("diou", distance_box_iou_loss), ("ciou", complete_box_iou_loss)],
)
def test_iou_losses_are_torchvisions(kind, definition):
    """Of the positives, over the number of regions; empty slots have no part in it."""
    keys = "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS", kind, "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS_WEIGHT", "10.0"
    got, (_, deltas, samples, targets) = head_losses(*keys)
    chosen = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    own = deltas[(*chosen, samples.labels[chosen])]
    boxes = ops.decode_boxes(own, samples.boxes[chosen], (10.0, 10.0, 5.0, 5.0))
    want = 10 * definition(boxes, targets.boxes[chosen[0], samples.matched[chosen]], reduction="sum") / 8
    torch.testing.assert_close(got["loss_box_reg"], want)
    gradient, wanted = (torch.autograd.grad(loss, deltas, retain_graph=True)[0] for loss in (got["loss_box_reg"], want))
    torch.testing.assert_close(gradient, wanted)
    assert (gradient.abs().sum((2, 3)) > 0).tolist() == [[True, True, False, False, False], [True, *[False] * 4]]


def test_iou_losses_of_boxes_apart():
    boxes, gt = torch.rand(50, 4, dtype=torch.float64), torch.rand(50, 4, dtype=torch.float64)
    boxes, gt = (torch.cat([b[:, :2] * 20, b[:, :2] * 20 + 1 + b[:, 2:] * 9], 1) for b in (boxes, gt))
    for kind, definition in (("giou", generalized_box_iou_loss), ("diou", distance_box_iou_loss)):
        torch.testing.assert_close(iou_loss(kind, boxes, gt), definition(boxes, gt))


@torch.no_grad()
@pytest.mark.parametrize("method", ["", "linear", "gaussian"])
def test_soft_nms_in_the_head(method):
    """The head's detections are `soft_nms_padded` of all (box, class) pairs over the threshold."""
    head = BoxHead(config("MODEL.ROI_HEADS.SOFT_NMS", method, "MODEL.ROI_HEADS.NMS", "0.3"), 8)
    logits, deltas, samples, _ = example(torch.float32)
    proposals = ProposalBatch(samples.boxes, samples.weight, samples.weight > 0)
    sizes = torch.tensor([[90, 90], [90, 90]], dtype=torch.int32)
    images = ImageBatch(torch.zeros(2, 3, 96, 96), sizes, sizes)
    weights = (10.0, 10.0, 5.0, 5.0)
    found = head.keep(*head.rank(logits.softmax(2), deltas, proposals, images, weights), images)
    scores = logits.softmax(2)[:, :4, 1:].flatten(1)
    boxes = ops.decode_boxes(deltas[:, :4, 1:], samples.boxes[:, :4, None], weights, clip_to=(90, 90)).flatten(1, 2)
    labels = torch.arange(1, 5).repeat(2, 4)
    if method:
        kept, want, count = ops.soft_nms_padded(boxes, scores, 6, method, 0.3, 0.5, 0.001, labels, scores > 0.05)
    else:
        kept, count = ops.nms_padded(boxes, scores, 0.3, 6, labels, scores > 0.05)
        want = torch.where(kept >= 0, scores.gather(1, kept.clamp(min=0)), 0)
    assert torch.equal(found.count, count)
    torch.testing.assert_close(found.scores, want)
    for image, n in enumerate(count.tolist()):
        assert torch.equal(found.labels[image, :n], labels[image, kept[image, :n]])
        torch.testing.assert_close(found.boxes[image, :n], boxes[image, kept[image, :n]])


def test_cross_entropy_counts_all_sampled_regions():
    got, (logits, _, samples, _) = head_losses()
    used = samples.weight > 0
    torch.testing.assert_close(got["loss_classifier"], F.cross_entropy(logits[used], samples.labels[used]))


def test_empty_slots_have_no_part_in_the_statistics_of_batch_norm():
    regions = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    slots = torch.zeros(14, 6, 5, 5, dtype=torch.float64)
    places = [0, 1, 6, 7]
    slots[places] = regions
    valid = torch.zeros(2, 7, dtype=torch.bool)
    valid.view(-1)[places] = True
    results = []
    for given, usable in ((regions, torch.ones(1, 4, dtype=torch.bool)), (slots, valid)):
        torch.manual_seed(0)
        extractor = nn.Sequential(nn.Conv2d(6, 8, 3), BatchNorm2d(8), nn.ReLU()).double()
        given = given.clone().requires_grad_()
        out = of_rows(extractor, given, usable)[usable.flatten()]
        (out**2).sum().backward()
        results.append((out, given.grad[usable.flatten()], extractor[1].running_mean))
        extractor.eval()
        assert torch.equal(of_rows(extractor, given, usable), extractor(given))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert of_rows(extractor.train(), slots, torch.zeros_like(valid)).isfinite().all()  # without any region
