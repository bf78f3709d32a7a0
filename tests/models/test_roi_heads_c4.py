"""C4 models: the last stage of the ResNet as the head on regions, which the mask head may share."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.roi_heads import ROIHeads
from fastrcnn.models.roi_heads.box import FastRCNNPredictor, ResNet50Conv5ROIFeatureExtractor
from fastrcnn.structures import ImageBatch, SampleBatch, TargetBatch

NARROW = (
    "MODEL.DEVICE cpu MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8 "
    "MODEL.ROI_BOX_HEAD.NUM_CLASSES 5 MODEL.ROI_MASK_HEAD.CONV_LAYERS (24,) MODEL.MASK_ON True"
).split()
CHANNELS = 4 * 32  # of layer3


def heads(*overrides):
    return ROIHeads(fastrcnn.load_config(None, [*NARROW, *overrides]), CHANNELS)


def example():
    features = [torch.randn(2, CHANNELS, 8, 10)]
    corner = torch.rand(2, 6, 2) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(2, 6, 2) * 40], 2)
    labels = torch.tensor([[3, 1, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]])
    samples = SampleBatch(boxes, labels, torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6), 3)
    masks = (torch.rand(2, 1, 128, 160) < 0.5).to(torch.uint8)
    targets = TargetBatch(boxes[:, :1] + 2, labels[:, :1], torch.zeros(2, 1, dtype=torch.bool), masks=masks)
    sizes = torch.tensor([[128, 160], [120, 150]], dtype=torch.int32)
    return features, ImageBatch(torch.zeros(2, 3, 128, 160), sizes, sizes), samples, targets


def test_extractor_and_predictor_are_torchvisions_layer4():
    theirs = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    cfg = fastrcnn.load_config(None, ["MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    ours = ResNet50Conv5ROIFeatureExtractor(cfg, 1024)
    predictor = FastRCNNPredictor(cfg, ours.out_channels)
    for name, buffer in theirs.layer4.named_buffers():
        if not name.endswith("bias"):
            nn.init.uniform_(buffer, 0.5, 1)
    ours.head.layer4.load_state_dict(theirs.layer4.state_dict())
    x = torch.randn(2, 1024, 14, 14)
    want = theirs.layer4(x)
    got = ours(x)
    assert got.shape == (2, 2048, 7, 7)
    assert (got - want).norm() < 1e-5 * want.norm()
    logits, deltas = predictor(got)
    pooled = theirs.avgpool(want).flatten(1)
    torch.testing.assert_close(logits, pooled @ predictor.cls_score.weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deltas, pooled @ predictor.bbox_pred.weight.T, rtol=1e-4, atol=1e-5)


def test_names_are_listed_once():
    model = heads()
    names = list(model.state_dict())
    assert "box.feature_extractor.head.layer4.0.conv1.weight" in names
    assert not any(name.startswith("mask.feature_extractor") for name in names)
    alone = heads("MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False")
    assert "mask.feature_extractor.head.layer4.0.conv1.weight" in alone.state_dict()


def test_shared_features_are_those_of_the_positives():
    """Reused in training: the loss and its gradients are those of extracting again."""
    model = heads()
    features, images, samples, targets = example()
    parameters = list(model.box.feature_extractor.parameters())
    _, extracted = model.box.losses(features, images, samples, targets)
    got = model.mask.losses(features, samples, targets, extracted)["loss_mask"]
    first = slice(samples.num_positive)
    again = model.box.extract(features, samples.boxes[:, first], samples.labels[:, first] > 0)
    want = model.mask.losses(
        features,
        SampleBatch(samples.boxes[:, first], samples.labels[:, first], samples.matched[:, first], torch.ones(2, 3), 3),
        targets,
        again,
    )["loss_mask"]
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_at_test_time_masks_are_of_the_detections():
    """The shared extractor sees the detected boxes, not the proposals."""
    model = heads("MODEL.ROI_HEADS.SCORE_THRESH", "0.0").eval()
    features, images, samples, _ = example()
    proposals = fastrcnn.structures.ProposalBatch(samples.boxes, torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool))
    found = model.detect(features, images, proposals)
    used = found.labels > 0
    x = model.box.extract(features, found.boxes, used)
    want = model.mask.predictor(x, found.labels.flatten()).sigmoid().unflatten(0, found.labels.shape)
    torch.testing.assert_close(found.masks[used], want[used])
    assert found.masks.shape[2:] == (14, 14)


def test_own_pooler_of_the_mask_head():
    """Without sharing the mask head reads its own POOLER_* keys."""
    keys = "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 28 "
    model = heads(*(keys + "MODEL.ROI_MASK_HEAD.RESOLUTION 28 MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO 2").split())
    assert (model.mask.pooler.side, model.mask.pooler.sampling_ratio) == (28, 2)
    assert (model.box.pooler.side, model.box.pooler.sampling_ratio) == (14, 0)


@pytest.mark.parametrize(("overrides", "side"), [((), 14), (("MODEL.RESNETS.RES5_DILATION", "2"), 28)])
def test_resolution_is_what_the_head_gives(overrides, side):
    features, images, samples, targets = example()
    for resolution in (14, 28):
        model = heads("MODEL.ROI_MASK_HEAD.RESOLUTION", str(resolution), *overrides)
        _, extracted = model.box.losses(features, images, samples, targets)
        if resolution == side:
            model.mask.losses(features, samples, targets, extracted)
        else:
            with pytest.raises(ConfigError, match=f"RESOLUTION is {resolution}; MaskRCNNC4Predictor gives {side}"):
                model.mask.losses(features, samples, targets, extracted)


def test_what_cannot_be_shared():
    with pytest.raises(ConfigError, match=r"ROI_MASK_HEAD\.POOLER_SAMPLING_RATIO is 2 and .*POOLER_SAMPLING_RATIO 0"):
        heads("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "2")


def test_a_copy_shares_within_itself():
    """The averaged model of a training is a deep copy: its mask head reads its own box head."""
    model = heads()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.box.feature_extractor.head.layer4[0].conv1.weight.zero_()
    features, _, samples, _ = example()
    arguments = features, samples.boxes, samples.weight > 0
    assert torch.equal(twin.mask.extract(*arguments), twin.box.extract(*arguments))
    assert not torch.equal(twin.mask.extract(*arguments), model.mask.extract(*arguments))
