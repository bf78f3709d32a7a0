"""Parts of the heads against their definitions."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, clip_boxes_to_image

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.config.conventions import CONVENTIONS
from fastrcnn.models.anchors import cell_anchors, cell_anchors_of_levels, level_strides
from fastrcnn.models.roi_heads.box import BoxHead
from fastrcnn.models.roi_heads.mask import MaskRCNNC4Predictor, mask_targets
from fastrcnn.models.roi_heads.sampling import sample_regions
from fastrcnn.models.rpn import RPN
from fastrcnn.ops import grid_anchors
from fastrcnn.structures import ImageBatch, ProposalBatch, TargetBatch


def test_rounded_anchors_are_torchvisions():
    generator = AnchorGenerator(((32,), (64, 100)), ((0.5, 1.0, 2.0),) * 2)
    got = cell_anchors_of_levels([32, (64, 100)], (0.5, 1.0, 2.0), (4, 8), CONVENTIONS["torchvision"])
    for own, theirs in zip(got, generator.cell_anchors, strict=True):
        assert torch.equal(own, theirs)


def test_exact_anchors_have_their_area_and_ratio():
    anchors = cell_anchors([32, 64], (0.5, 2.0), 16, CONVENTIONS["modern"])
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.tensor([32.0, 32, 64, 64]) ** 2)  # sizes in the outer loop
    torch.testing.assert_close(height / width, torch.tensor([0.5, 2, 0.5, 2]))
    assert (anchors[:, :2] == -anchors[:, 2:]).all()


def test_strides():
    grids = [(200, 272), (13, 17)]
    assert level_strides((4, 64), (800, 1088), grids, CONVENTIONS["modern"]) == [(4, 4), (64, 64)]
    assert level_strides((4, 64), (800, 1088), grids, CONVENTIONS["torchvision"]) == [(4, 4), (61, 64)]
    with pytest.raises(ConfigError, match=r"ANCHOR_SIZES has 5 entries and MODEL\.RPN\.ANCHOR_STRIDE 2"):
        cell_anchors_of_levels([1, 2, 3, 4, 5], (1.0,), (4, 8), CONVENTIONS["modern"])


def test_mask_logits_of_one_class_are_a_channel_of_all(repository):
    cfg = fastrcnn.load_config("quick_start")
    predictor = MaskRCNNC4Predictor(cfg, 64)
    x, labels = torch.randn(5, 64, 14, 14), torch.tensor([0, 3, 6, 3, 1])
    everything = predictor.mask_fcn_logits(F.relu(predictor.conv5_mask(x)))
    torch.testing.assert_close(predictor(x, labels), everything[torch.arange(5), labels], rtol=1e-4, atol=1e-5)


def test_sampling_regions():
    spec = fastrcnn.load_config(None, ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"]).MODEL.ROI_HEADS
    gt = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]], [[0, 0, 5, 5], [0, 0, 0, 0]]])
    labels, crowd = torch.tensor([[4, 2], [7, 0]]), torch.tensor([[False, False], [True, False]])
    targets = TargetBatch(gt, labels, crowd)
    boxes = torch.tensor([[1.0, 0, 10, 10], [21, 20, 40, 40], [50, 50, 60, 60], [0, 0, 5, 5], [0, 0, 10, 10]])
    valid = torch.tensor([[True, True, True, True, False], [True] * 5])
    samples = sample_regions(ProposalBatch(boxes.expand(2, 5, 4), torch.ones(2, 5), valid), targets, spec)
    assert samples.num_positive == 2
    for image in range(2):
        used = samples.weight[image] > 0
        found = samples.boxes[image, used]
        # at most a quarter positive; the crowd and the empty slot are neither learnt nor offered as regions
        positive = samples.labels[image, used] > 0
        assert positive.tolist() == ([True, True, False, False] if image == 0 else [False] * 5)
        slots = samples.matched[image, used][positive]
        assert torch.equal(samples.labels[image, used][positive], labels[image, slots])
        assert (box_iou(found[positive], gt[image]).gather(1, slots[:, None]) >= 0.5).all()


def test_bitmap_targets_are_thresholded_unless_soft():
    masks = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    masks[0, 0, :, 5:] = 1
    targets = TargetBatch(torch.zeros(1, 1, 4), torch.ones(1, 1).long(), torch.zeros(1, 1).bool(), masks=masks)
    boxes = torch.tensor([[[0.0, 0, 16, 16]]])
    matched = torch.zeros(1, 1, dtype=torch.int64)
    hard = mask_targets(targets, boxes, matched, 7, CONVENTIONS["modern"])
    soft = mask_targets(targets, boxes, matched, 7, CONVENTIONS["torchvision"])
    assert hard.unique().tolist() == [0, 1]
    assert hard[0, 0, 3].tolist() == [0, 0, 1, 1, 1, 1, 1]  # the edge at 5 lies at 2.19 of 7
    assert ((soft > 0) & (soft < 1)).any()


@pytest.mark.parametrize("border", [0, 20])
def test_anchors_over_the_border_are_not_learnt(border):
    overrides = f"MODEL.RPN.STRADDLE_THRESH {border} MODEL.RPN.ANCHOR_SIZES (32,) MODEL.RPN.ANCHOR_STRIDE (16,)".split()
    rpn = RPN(fastrcnn.load_config(None, overrides), 8)
    anchors = grid_anchors([(6, 8)], [(16, 16)], rpn.cells)
    sizes = torch.tensor([[96, 128], [64, 100]], dtype=torch.int32)
    images = ImageBatch(torch.zeros(2, 3, 96, 128), sizes, sizes)
    targets = TargetBatch(torch.zeros(2, 1, 4), torch.zeros(2, 1).long(), torch.zeros(2, 1).bool())
    matched = rpn.match(anchors, images, targets)
    for image, (height, width) in enumerate(sizes.tolist()):
        for anchor, (x1, y1, x2, y2) in enumerate(anchors.tolist()):
            inside = x1 >= -border and y1 >= -border and x2 < width + border and y2 < height + border
            assert matched[image, anchor] == (-1 if inside else -2)
    assert 0 < (matched == -1).sum() < matched.numel()


def test_class_agnostic_boxes(repository):
    """One box for all classes: the deltas after the background's four."""
    path = "quick_start"
    cfg = fastrcnn.load_config(path, "MODEL.CLS_AGNOSTIC_BBOX_REG True MODEL.ROI_HEADS.SCORE_THRESH 0.0".split())
    head = BoxHead(cfg, 64)
    boxes = torch.tensor([[[10.0, 10, 50, 60], [70, 20, 120, 90]]])
    logits = torch.full((1, 2, 7), -9.0)
    logits[0, 0, 3] = logits[0, 1, 5] = 9.0
    deltas = torch.randn(1, 2, 2, 4) * 0.3
    sizes = torch.tensor([[128, 128]], dtype=torch.int32)
    images = ImageBatch(torch.zeros(1, 3, 128, 128), sizes, sizes)
    proposals = ProposalBatch(boxes, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    found = head.keep(*head.rank(logits.softmax(2), deltas, proposals, images, (10.0, 10.0, 5.0, 5.0)), images)
    sure = found.scores[0] > 0.9
    assert sorted(found.labels[0, sure].tolist()) == [3, 5]
    coder = TorchvisionBoxCoder((10.0, 10.0, 5.0, 5.0))
    want = clip_boxes_to_image(coder.decode_single(deltas[0, :, 1], boxes[0]), (128, 128))
    order = found.labels[0, sure].argsort()
    torch.testing.assert_close(found.boxes[0, sure][order], want)


VARIANTS = {
    "group norm": "MODEL.FPN.USE_GN True MODEL.ROI_BOX_HEAD.USE_GN True MODEL.ROI_MASK_HEAD.USE_GN True",
    "relu": "MODEL.FPN.USE_RELU True",
    "convolutions": "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor "
    "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 64",
    "1x1": "MODEL.ROI_MASK_HEAD.PREDICTOR MaskRCNNConv1x1Predictor MODEL.ROI_MASK_HEAD.RESOLUTION 14",
    "batch norm": "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPNXconv1fcFeatureExtractor "
    "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 64 MODEL.ROI_BOX_HEAD.NORM BatchNorm MODEL.ROI_MASK_HEAD.NORM BatchNorm",
    "agnostic": "MODEL.CLS_AGNOSTIC_BBOX_REG True",
    "giou": "MODEL.ROI_BOX_HEAD.BOX_REG_LOSS giou",
    "cascade": "MODEL.CASCADE_ON True MODEL.CLS_AGNOSTIC_BBOX_REG True",
    "legacy": "MODEL.CONVENTIONS maskrcnn-benchmark",
    "R-34 with group norm": "MODEL.BACKBONE.CONV_BODY R-34-FPN MODEL.RESNETS.TRANS_FUNC BottleneckWithGN",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn(name, repository):
    """A few steps on one image lower the loss, and every parameter has a part in it."""
    path = "quick_start"
    cfg = fastrcnn.load_config(path, ["MODEL.DEVICE", "cpu", *VARIANTS[name].split()])
    model = fastrcnn.build_model(cfg).train()
    sizes = torch.tensor([[96, 96]], dtype=torch.int32)
    images = ImageBatch(torch.randn(1, 3, 96, 96), sizes, sizes)
    masks = torch.zeros(1, 1, 96, 96, dtype=torch.uint8)
    masks[0, 0, 20:60, 30:70] = 1
    boxes = torch.tensor([[[30.0, 20, 70, 60]]])
    targets = TargetBatch(boxes, torch.tensor([[2]]), torch.zeros(1, 1).bool(), masks=masks)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    history = []
    for _ in range(6):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert history[-1] < 0.9 * history[0], history


CASCADE = ["MODEL.CASCADE_ON", "True", "MODEL.CLS_AGNOSTIC_BBOX_REG", "True"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.ROI_BOX_HEAD.PREDICTOR", "FPNPredictr"], r"ROI_BOX_HEAD\.PREDICTOR is 'FPNPredictr'.*FPNPredictor"),
        (
            ["MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"],
            r"SHARE_BOX_FEATURE_EXTRACTOR is True, but MODEL\.ROI_M",
        ),
        (["MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskPredictr"], r"ROI_MASK_HEAD\.PREDICTOR is 'MaskPredictr'.*C4Predictor"),
        (["MODEL.CASCADE_ON", "True"], r"needs MODEL\.CLS_AGNOSTIC_BBOX_REG True"),
        ([*CASCADE, "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"], r"SHARE_BOX_FEATURE_EXTRACTOR False"),
        ([*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"], r"IOUS has 2 stages, BBOX_REG_WEIGHTS 3"),
        (["MODEL.ROI_BOX_HEAD.NORM", "BatchNorm"], r"NORM is 'BatchNorm'; FPN2MLPFeatureExtractor takes GN or none"),
        (["MODEL.ROI_MASK_HEAD.NORM", "BN"], r"norm 'BN'; it must be one of .*BatchNorm"),
        (["MODEL.RPN.ANCHOR_SIZES", "(8, 16, 32, 64, (128, 256))"], r"every level needs as many sizes"),
        (["MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "6"], r"FREEZE_CONV_BODY_AT is 6"),
        (["MODEL.DEVICE", "warp"], r"MODEL\.DEVICE is 'warp', which is no device"),
    ],
)
def test_what_is_not_there_says_so(overrides, message, repository):
    path = "e2e_mask_rcnn_R_50_FPN_1x"
    cfg = fastrcnn.load_config(path, ["MODEL.DEVICE", "cpu", *overrides])
    with pytest.raises(ConfigError, match=message), torch.device("meta" if "warp" not in overrides else "cpu"):
        fastrcnn.build_model(cfg)
