"""The region proposal network against torchvision's, each of its keys, and models that have nothing else."""

import pytest
import torch
from support import without_values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.registry import RPN_HEADS
from fastrcnn.models.rpn import RPN
from fastrcnn.structures import ImageBatch, TargetBatch

LEVELS = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]  # of 128 × 160
PYRAMID = "MODEL.DEVICE cpu MODEL.RPN.USE_FPN True MODEL.RPN.ANCHOR_STRIDE (4,8,16,32,64)".split()


def features(levels=LEVELS, channels=16):
    return [torch.randn(2, channels, h, w, dtype=torch.float64) for h, w in levels]


def batch(dtype=torch.float64):
    sizes = torch.tensor([[128, 160], [96, 130]], dtype=torch.int32)
    return ImageBatch(torch.zeros(2, 3, 128, 160, dtype=dtype), sizes, sizes)


def ground_truth(dtype=torch.float64):
    boxes = torch.tensor([[[10.0, 12, 60, 70], [80, 20, 150, 110], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 3], dtype=dtype)
    return TargetBatch(boxes, torch.tensor([[3, 9, 0], [0, 0, 0]]), torch.zeros(2, 3, dtype=torch.bool))


def network(*overrides, channels=16, base=PYRAMID):
    return RPN(fastrcnn.load_config(None, [*base, *overrides]), channels).double()


@torch.no_grad()
def spread(*modules):
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("convolutions", [1, 2])
def test_same_as_torchvision(convolutions):
    """Proposals in both modes, losses when all anchors are sampled, and gradients."""
    anchors = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    head = RPNHead(16, 3, convolutions)
    counts = [{"training": n, "testing": m} for n, m in ((60, 50), (40, 30))]
    theirs = RegionProposalNetwork(anchors, head, 0.7, 0.3, 10**6, 0.5, *counts, 0.7).double()
    theirs.min_size = 2.0
    spread(theirs)
    limits = "PRE_NMS_TOP_N_TRAIN 60 PRE_NMS_TOP_N_TEST 50 FPN_POST_NMS_TOP_N_TRAIN 40 FPN_POST_NMS_TOP_N_TEST 30 "
    limits += f"MIN_SIZE 2 STRADDLE_THRESH -1 BATCH_SIZE_PER_IMAGE 1000000 NUM_CONVS {convolutions} "
    limits += "FPN_POST_NMS_PER_BATCH False"
    words = limits.split()
    overrides = [w for k, v in zip(words[::2], words[1::2], strict=True) for w in (f"MODEL.RPN.{k}", v)]
    ours = network(*overrides, "MODEL.CONVENTIONS", "torchvision")
    names = {f"conv.{k}.0.": f"conv.{k}." if convolutions > 1 else "conv." for k in range(convolutions)}

    def renamed(values):
        for theirs, own in names.items():
            values = {name.replace(theirs, own): value for name, value in values.items()}
        return values

    ours.head.load_state_dict(renamed(head.state_dict()))
    images, maps, targets = batch(), features(), ground_truth()
    padded = ImageList(images.pixels, [tuple(size) for size in images.sizes.tolist()])
    slots = zip(targets.boxes, targets.labels, targets.valid, strict=True)
    lists = [{"boxes": boxes[valid], "labels": labels[valid]} for boxes, labels, valid in slots]
    maps_by_name = {str(level): x for level, x in enumerate(maps)}
    for training in (True, False):
        proposals, losses = ours.train(training)(images, maps, targets if training else None)
        wanted, wanted_losses = theirs.train(training)(padded, maps_by_name, lists if training else None)
        for image, want in enumerate(wanted):
            torch.testing.assert_close(proposals.boxes[image][proposals.valid[image]], want.detach())
        assert losses.keys() == wanted_losses.keys()
        if training:
            for found in (losses, ours.losses(images, maps, targets)):  # torchvision's labels are float32
                torch.testing.assert_close(found, wanted_losses, check_dtype=False, rtol=1e-6, atol=1e-7)
            sum(losses.values()).backward()
            sum(wanted_losses.values()).backward()
    gradients = renamed({name: p.grad for name, p in head.named_parameters()})
    torch.testing.assert_close({name: p.grad for name, p in ours.head.named_parameters()}, gradients)


CHANGES = {
    "ANCHOR_SIZES": "(16,32,64,128,256)",
    "ASPECT_RATIOS": "(0.4,1.0,2.5)",
    "ANCHOR_STRIDE": "(5,8,16,32,64)",
    "STRADDLE_THRESH": "20",
    "FG_IOU_THRESHOLD": "0.4",
    "BG_IOU_THRESHOLD": "0.1",
    "BATCH_SIZE_PER_IMAGE": "10",
    "POSITIVE_FRACTION": "0.01",
    "SMOOTH_L1_BETA": "1.0",
    "PRE_NMS_TOP_N_TRAIN": "9",
    "PRE_NMS_TOP_N_TEST": "9",
    "POST_NMS_TOP_N_TRAIN": "9",
    "POST_NMS_TOP_N_TEST": "9",
    "NMS_THRESH": "0.2",
    "MIN_SIZE": "40",
    "SCORE_THRESH": "0.95",
    "FPN_POST_NMS_TOP_N_TRAIN": "9",
    "FPN_POST_NMS_TOP_N_TEST": "9",
    "FPN_POST_NMS_PER_BATCH": "False",
    "HEAD_CHANNELS": "24",
    "NUM_CONVS": "3",
}


def run(*overrides):
    """What depends on a key in training, and at test time."""
    torch.manual_seed(5)
    few = "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 50 MODEL.RPN.STRADDLE_THRESH -1".split()
    model = network(*few, *overrides)
    torch.manual_seed(6)
    spread(model)
    torch.manual_seed(7)
    images, maps = batch(), features()
    torch.manual_seed(8)
    proposals, losses = model(images, maps, ground_truth())
    found = model.eval().detect(images, maps)
    trained = [*losses.values(), proposals.boxes.sum(), proposals.valid.sum()]
    return torch.stack(trained).detach(), torch.stack(
        [found.boxes.sum(), found.scores.sum(), found.count.sum()]
    ).detach()


@pytest.mark.parametrize("name", CHANGES)
def test_keys_have_an_effect(name):
    changed = [not torch.allclose(a, b) for a, b in zip(run(f"MODEL.RPN.{name}", CHANGES[name]), run(), strict=True)]
    losses_only = ("STRADDLE_THRESH", "FG_IOU", "BG_IOU", "BATCH", "POSITIVE", "SMOOTH", "FPN_POST_NMS_PER_BATCH")
    in_training = not name.endswith("_TEST")
    at_test = not name.endswith("_TRAIN") and not name.startswith(losses_only)
    assert changed == [in_training, at_test]


@pytest.mark.parametrize("training", [True, False])
def test_one_level_has_no_limit_over_levels(training):
    """A C4 model: 15 anchors at each place, POST_NMS_TOP_N of each image."""
    limits = "MODEL.RPN.POST_NMS_TOP_N_TRAIN 20 MODEL.RPN.POST_NMS_TOP_N_TEST 20 MODEL.RPN.NMS_THRESH 0.99 "
    limits += "MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 3 MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 3"
    model = network(*limits.split(), base=()).train(training)
    assert model.head.cls_logits.out_channels == 15
    proposals, _ = model(batch(), features([(8, 10)]))
    assert proposals.valid.sum(1).tolist() == [20, 20]


def test_levels_need_a_pyramid():
    with pytest.raises(ConfigError, match=r"several levels need a pyramid, MODEL\.RPN\.USE_FPN True"):
        network("MODEL.RPN.USE_FPN", "False")
    with pytest.raises(ConfigError, match=r"MODEL\.RPN has anchors for 5 levels, the backbone gives 1"):
        network()(batch(), features(LEVELS[:1]))
    with pytest.raises(ConfigError, match=r"NUM_CONVS is 0"):
        network("MODEL.RPN.NUM_CONVS", "0")


def test_straddling_counts_the_last_pixel_of_legacy_boxes():
    """Their anchor (x1, y1, x2, y2) is inside where x2 < width; here its x2 is one more."""
    exact = "MODEL.RPN.STRADDLE_THRESH 0 MODEL.RPN.ANCHOR_SIZES (16,) MODEL.RPN.ASPECT_RATIOS (1.0,)".split()
    images, maps = batch(), features([(8, 10)])
    for conventions, inside in (("maskrcnn-benchmark", 8 * 10), ("modern", 7 * 9)):
        model = network("MODEL.CONVENTIONS", conventions, *exact, base=())
        matched = model.match(model.anchors(images, maps), images, ground_truth())
        # anchors of 16 pixels that fill the image, or those shifted by half an anchor
        assert (matched[0] != -2).sum() == inside


def test_head_by_name():
    @RPN_HEADS.register("constant")
    class Constant(nn.Module):
        def __init__(self, cfg, in_channels, num_anchors):
            super().__init__()
            self.count = num_anchors

        def forward(self, maps):
            return [x.new_zeros(len(x), self.count, *x.shape[2:]) for x in maps], [
                x.new_zeros(len(x), 4 * self.count, *x.shape[2:]) for x in maps
            ]

    try:
        model = network("MODEL.RPN.RPN_HEAD", "constant").eval()
        assert (model.detect(batch(), features()).scores[0, :5] == 0.5).all()
    finally:
        del RPN_HEADS["constant"]
    with pytest.raises(ConfigError, match=r"MODEL\.RPN\.RPN_HEAD is 'constant'; it must be one of .*SingleConvRPNHead"):
        network("MODEL.RPN.RPN_HEAD", "constant")


def whole(*overrides):
    """A narrow model of proposals only."""
    narrow = "MODEL.BACKBONE.CONV_BODY R-18-FPN MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.STEM_OUT_CHANNELS 8 "
    narrow += "MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.RPN_ONLY True"
    return fastrcnn.build_model(fastrcnn.load_config(None, [*PYRAMID, *narrow.split(), *overrides]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("body", ["R-18-FPN", "R-50-C4"])
def test_model_of_proposals_traces_without_values(body, precision):
    c4 = "MODEL.RPN.USE_FPN False MODEL.RPN.ANCHOR_STRIDE (16,) MODEL.RESNETS.RES2_OUT_CHANNELS 16".split()
    mode, model = FakeTensorMode(), whole("MODEL.BACKBONE.CONV_BODY", body, *(c4 if body.endswith("C4") else []))
    assert not [name for name in model.state_dict() if name.startswith("roi_heads")]
    without_values(model, mode)
    images, targets = (part._map(mode.from_tensor) for part in (batch(torch.float32), ground_truth(torch.float32)))
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = model.train()(images, targets)
        assert {name: loss.shape for name, loss in losses.items()} == {"loss_objectness": (), "loss_rpn_box_reg": ()}
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found = model.eval()(images)
        assert found.labels is None
        assert found.scores.dtype == torch.float32


def test_model_of_proposals(monkeypatch):
    model = whole()
    spread(model.rpn)
    images, targets = batch(torch.float32), ground_truth(torch.float32)
    boxlists = model.eval()(images).to_boxlists()
    assert [b.fields() for b in boxlists] == [["objectness"]] * 2
    proposals, _ = model.rpn(images, model.backbone(images.pixels))
    for boxlist, boxes, valid in zip(boxlists, proposals.boxes, proposals.valid, strict=True):
        assert torch.equal(boxlist.bbox, boxes[valid])
        scores = boxlist.get_field("objectness")
        assert (scores[:-1] >= scores[1:]).all()
    monkeypatch.setattr(model.rpn, "_select", None)  # training needs no proposals
    assert set(model.train()(images, targets)) == {"loss_objectness", "loss_rpn_box_reg"}


def test_unknown_architecture():
    with pytest.raises(ConfigError, match=r"META_ARCHITECTURE is 'DETR'; it must be one of GeneralizedRCNN"):
        whole("MODEL.META_ARCHITECTURE", "DETR")
    with pytest.raises(ConfigError, match=r"MODEL\.KEYPOINT_ON needs heads on regions, which MODEL\.RPN_ONLY leaves"):
        whole("MODEL.KEYPOINT_ON", "True")
