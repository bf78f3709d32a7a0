"""No step between images and detections reads a value back: it traces with tensors that have no values."""

import pytest
import torch
from support import without_values
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastrcnn

SMALL = (
    "MODEL.DEVICE cpu MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16"
).split()


def inputs(kind: str) -> tuple[fastrcnn.ImageBatch, fastrcnn.TargetBatch]:
    sizes = torch.tensor([[128, 160], [96, 130]], dtype=torch.int32)
    images = fastrcnn.ImageBatch(torch.rand(2, 3, 128, 160), sizes, sizes * 2)
    boxes = torch.tensor([[[10.0, 10, 60, 60], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = torch.tensor([[3, 0], [0, 0]])
    targets = fastrcnn.TargetBatch(boxes, labels, torch.zeros(2, 2, dtype=torch.bool))
    if kind in ("polygons", "batch norm"):
        edges = torch.tensor([[10.0, 10, 60, 10], [60, 10, 35, 60], [35, 60, 10, 10], [0, 0, 0, 0]]).repeat(2, 2, 1, 1)
        parts = torch.tensor([0, 0, 0, -1]).repeat(2, 2, 1)
        targets.polygons = fastrcnn.structures.PolygonBatch(edges, parts, 1)
    elif kind in ("masks", "torchvision"):
        targets.masks = torch.ones(2, 2, 128, 160, dtype=torch.uint8)
    return images, targets


NAMES = {
    "boxes": "e2e_faster_rcnn_R_50_FPN_1x",
    "torchvision": "torchvision/mask_rcnn_R_50_FPN",
    "batch norm": "quick_start",
}


def config(repository, kind: str):
    name = NAMES.get(kind, "e2e_mask_rcnn_R_50_FPN_1x")
    return fastrcnn.load_config(name, SMALL)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["boxes", "polygons", "masks", "torchvision", "batch norm"])
def test_steps_trace_without_values(kind, precision, repository):
    cfg = config(repository, kind)
    model = fastrcnn.build_model(cfg)
    mode = FakeTensorMode()
    without_values(model, mode)
    images, targets = (batch._map(mode.from_tensor) for batch in inputs(kind))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with mode, autocast:
        with pytest.raises(DataDependentOutputException):  # the mode does catch a read
            torch.ones(1).item()
        losses = model.train()(images, targets)
        assert all(loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        detections = model.eval()(images)
        slots = cfg.MODEL.ROI_HEADS.DETECTIONS_PER_IMG
        assert detections.boxes.shape == (2, slots, 4)
        assert detections.masks is None if kind == "boxes" else detections.masks.shape == (2, slots, 28, 28)


@pytest.mark.parametrize("kind", ["boxes", "polygons", "masks"])
def test_losses_with_and_without_objects_are_finite(kind, repository):
    """The second image of the batch has no objects; a batch of nothing but such images works too."""
    model = fastrcnn.build_model(config(repository, kind)).train()
    images, targets = inputs(kind)
    losses = model(images, targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()), losses
    targets.labels.zero_()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == 0
    assert losses["loss_objectness"] > 0


def test_training_needs_targets(repository):
    model = fastrcnn.build_model(config(repository, "boxes")).train()
    with pytest.raises(ValueError, match="needs targets"):
        model(inputs("boxes")[0])


def test_builds_on_meta(repository):
    with torch.device("meta"):
        model = fastrcnn.build_model(config(repository, "polygons"))
    assert all(p.is_meta for p in model.parameters())


def test_compiles_into_one_graph(repository):
    """Training and inference alike, with the results of eager."""
    model = fastrcnn.build_model(config(repository, "polygons"))
    images, targets = inputs("polygons")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, model):
        torch.manual_seed(0)
        model.train()
        losses = call(images, targets)
        model.zero_grad()
        sum(losses.values()).backward()
        gradient = model.backbone.body.layer2[0].conv1.weight.grad.clone()
        model.eval()
        detections = call(images)
        found.append((losses, gradient, detections.boxes, detections.masks))
    torch.testing.assert_close(found[0], found[1])


def test_batch_norm_in_the_heads_compiles_too(repository):
    """It learns from valid regions alone, by a state that is set around the call."""
    overrides = "MODEL.ROI_BOX_HEAD.CONV_HEAD_DIM 8 MODEL.ROI_MASK_HEAD.CONV_LAYERS (8,8)"
    path = "torchvision/mask_rcnn_R_50_FPN_V2"
    model = fastrcnn.build_model(fastrcnn.load_config(path, [*SMALL, *overrides.split()])).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for call in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.load_state_dict(state)
        torch.manual_seed(0)
        losses = call(*inputs("polygons"))
        found.append((losses, model.roi_heads.mask.feature_extractor.mask_fcn1[1].running_mean.clone()))
    torch.testing.assert_close(found[0], found[1])
