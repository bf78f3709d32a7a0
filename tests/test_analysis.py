"""Counts against torchvision's published figures, formulas worked out by hand, and the tensors of a real step."""

import pytest
import torch
from config.small import batch, small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import get_model_weights
from torchvision.ops import DeformConv2d

import fastrcnn
from fastrcnn import analysis, ops
from fastrcnn.analysis import analyze

PUBLISHED = {
    "faster_rcnn_R_50_FPN": "fasterrcnn_resnet50_fpn",
    "faster_rcnn_R_50_FPN_V2": "fasterrcnn_resnet50_fpn_v2",
    "mask_rcnn_R_50_FPN_V2": "maskrcnn_resnet50_fpn_v2",
    "keypoint_rcnn_R_50_FPN": "keypointrcnn_resnet50_fpn",
    "retinanet_R_50_FPN": "retinanet_resnet50_fpn",
    "faster_rcnn_MobileNetV3_FPN": "fasterrcnn_mobilenet_v3_large_fpn",
}


def difference(name, parts):
    """What torchvision's figure has more than ours, in operations; its images were 800 × 800 noise, weights trained."""
    if name.startswith("mask"):  # it computes the masks of all 91 classes, and we that of the class found
        return 2 * 100 * 90 * 256 * 28 * 28
    if name.startswith("keypoint"):  # one person was found, and ours has all 100 slots
        return -0.99 * parts["roi_heads.keypoint"].inference.flops
    if name.startswith("retinanet"):  # it has 91 classes, ours leaves the background out
        cells = sum(side * side for side in (100, 50, 25, 13, 7))
        return 2 * 9 * 9 * 256 * cells
    if "Mobile" in name:  # no proposal had the score that this one demands
        return -parts["roi_heads.box"].inference.flops
    return 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_torchvision_published_the_same_operations_and_parameters(name):
    meta = get_model_weights(PUBLISHED[name]).DEFAULT.meta
    counted = analyze(fastrcnn.load_config(f"torchvision/{name}", ["MODEL.DEVICE", "cpu"]), 1, (800, 800))
    parts = {part.name: part for part in counted.parts}
    operations = counted.total.inference.flops - parts["operators"].inference.flops + difference(name, parts)
    assert operations / 2e9 == pytest.approx(meta["_ops"], abs=1e-3)  # a multiply-add is one there
    if name.startswith("retinanet"):
        assert counted.total.parameters == meta["num_params"] - (9 * 256 + 1) * 9
    elif "Mobile" not in name:  # of which the frozen batch norms are buffers there
        assert counted.total.parameters == meta["num_params"]


def test_stages_by_hand():
    """A ResNet-50 at 64 × 96 and its heads: convolutions are 2 · k² · in · out · h · w, layers 2 · in · out."""
    cfg = fastrcnn.load_config("torchvision/faster_rcnn_R_50_FPN", ["MODEL.DEVICE", "cpu"])
    counted = analyze(cfg, 2, (64, 96), train=True, depth=1)
    parts = {part.name: part for part in counted.parts}
    stem = 2 * 2 * 49 * 3 * 64 * 32 * 48
    assert parts["backbone.body.stem"].inference.flops == stem
    assert parts["backbone.body.stem"].training.flops == stem  # frozen: no gradient
    lateral = 2 * 2 * 256 * 256 * 16 * 24
    assert parts["backbone.fpn.fpn_inner1"].inference.flops == lateral
    assert parts["backbone.fpn.fpn_inner1"].training.flops == 2 * lateral  # its input is frozen and needs no gradient
    smooth = 2 * 2 * 9 * 256 * 256 * 16 * 24
    assert parts["backbone.fpn.fpn_layer1"].training.flops == 3 * smooth
    places = sum(h * w for h, w in [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)])
    head = 2 * 2 * places * 256 * (9 * 256 + 3 + 12)
    assert parts["rpn.head"].inference.flops == head
    assert parts["rpn.head"].training.flops == 3 * head
    proposals = 2 * 1000  # of 1,536 anchors an image
    dense = 2 * (256 * 49 * 1024 + 1024 * 1024)
    assert parts["roi_heads.box.feature_extractor"].inference.flops == proposals * dense
    assert parts["roi_heads.box.feature_extractor"].training.flops == 3 * 2 * 512 * dense
    assert parts["operators.multilevel_roi_align"].inference.flops == proposals * 256 * 49 * 4 * 8
    assert parts["operators.grid_anchors"].training.flops == 3 * places * 4
    assert counted.padded == (64, 96)
    assert sum(part.inference.flops for part in counted.parts) == counted.total.inference.flops
    assert sum(part.training.memory for part in counted.parts) == counted.total.training.memory


def test_memory_of_two_convolutions_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, padding=1))
    x, hidden, out = (2 * channels * 16 * 16 * 4 for channels in (3, 8, 4))
    model.to("meta")
    with FakeTensorMode():
        analysis._give_device(model)
        image = torch.zeros(2, 3, 16, 16)
        forward = analysis._count(model, 0, lambda: torch.no_grad()(model)(image))
        step = analysis._count(model, 0, lambda: model(image).sum().backward())
    assert forward.peak == hidden + out
    assert forward.alive == {"0": hidden, "1": hidden, "2": hidden + out}
    assert step.saved == {"0": x, "1": hidden}  # the first keeps the image; the ReLU's result also serves the last
    first, last = 2 * 2 * 256 * 27 * 8, 2 * 2 * 256 * 72 * 4
    assert step.flops == {"0": 2 * first, "2": 3 * last}
    # at the ReLU's backward: the hidden map, the gradients after and before it, those of the last weights, and two sums
    gradients = sum(p.nbytes for p in model[2].parameters())
    assert step.peak == 3 * hidden + gradients + 2 * 4


SAVING = ["e2e_mask_rcnn_R_50_FPN_1x", "e2e_keypoint_rcnn_R_50_FPN_1x", "retinanet/retinanet_R-50-FPN_1x"]


@pytest.mark.parametrize("name", SAVING)
def test_what_is_saved_is_what_a_real_step_saves(name):
    """The bytes of all distinct storages that autograd keeps, weights left out, in a step that computes."""
    cfg = small(name)
    counted = analyze(cfg, 2, (128, 128), train=True)
    model = fastrcnn.build_model(cfg).train()
    images, _ = batch(cfg)
    targets = analysis._targets(cfg, images)
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert counted.total.training.memory == pytest.approx(sum(size for size, _ in kept.values()), rel=1e-3)


def test_operators_by_hand():
    boxes, scores = torch.rand(2, 5, 4), torch.rand(2, 5)
    features = [torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 4, 4)]
    deform = DeformConv2d(4, 6, 3, padding=1)

    def flops(call):
        with FakeTensorMode(allow_non_fake_inputs=True):
            return analysis._count(nn.Identity(), 1, call).flops

    assert flops(lambda: ops.nms_padded(boxes, scores, 0.5, 3)) == {"operators.nms_padded": 2 * 10 * 14}
    pool = lambda: ops.multilevel_roi_align(features, boxes, (2, 3), [0.5, 0.25], 2, True)  # noqa: E731
    pooled = 10 * 3 * 6
    assert flops(pool) == {"operators.multilevel_roi_align": pooled * 4 * 4 * 2}
    assert flops(lambda: pool().sum().backward()) == {"operators.multilevel_roi_align": 2 * pooled * 4 * 4 * 2}
    matching = flops(lambda: ops.match_boxes(boxes, boxes[:, :3], scores[:, :3] > 0, 0.5, 0.3, True))
    assert matching == {"operators.match_boxes": 2 * 5 * 3 * 14}
    assert flops(lambda: ops.decode_boxes(boxes, boxes)) == {"operators.decode_boxes": 10 * 26}
    assert flops(lambda: ops.decode_boxes(boxes, boxes, clip_to=(9, 9))) == {"operators.decode_boxes": 10 * 34}
    assert flops(lambda: ops.focal_loss(boxes, scores.long())) == {"operators.focal_loss": 40 * 30}
    logits, deltas = [torch.rand(2, 3, 4, 4)], [torch.rand(2, 12, 4, 4)]
    limits = {"pre_nms_top_n": 10, "post_nms_top_n": 5, "max_proposals": 5, "nms_threshold": 0.7, "min_size": 0}
    sizes = torch.tensor([[16, 16]] * 2)
    chosen = flops(lambda: ops.select_proposals(logits, deltas, [boxes[0, :3]], [(4, 4)], sizes, **limits))
    assert chosen == {"operators.select_proposals": 2 * (48 + 10 * 34 + 45 * 14)}
    moved = flops(lambda: deform(torch.rand(1, 4, 5, 5), torch.zeros(1, 18, 5, 5)))
    assert sum(moved.values()) == 25 * (4 * 9 * 8 + 2 * 6 * 36)


def test_parts_and_half_precision():
    plain = analyze(small("e2e_mask_rcnn_R_50_FPN_1x"), 1, (64, 64), train=True)
    assert [part.name for part in plain.parts][-3:] == ["roi_heads.mask", "operators", "other"]
    half = small("e2e_mask_rcnn_R_50_FPN_1x")
    half.DTYPE = "bfloat16"
    halved = analyze(half, 1, (64, 64), train=True)
    assert halved.total.inference.flops == plain.total.inference.flops
    assert halved.total.training.memory < 0.8 * plain.total.training.memory
    c4 = analyze(small("e2e_faster_rcnn_R_50_C4_1x"), 1, (64, 64))
    assert "backbone.fpn" not in {part.name for part in c4.parts}
    with pytest.raises(ValueError, match="must be positive"):
        analyze(half, 0)
