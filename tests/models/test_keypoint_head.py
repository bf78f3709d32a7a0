"""The keypoint head against torchvision's, against its definition, and inside whole models."""

import pytest
import torch
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference, keypointrcnn_loss
from torchvision.models.detection.roi_heads import keypoints_to_heatmap as torchvisions_heatmap
from torchvision.ops import MultiScaleRoIAlign

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.roi_heads.keypoint import KeypointHead, keypoints_to_heatmap
from fastrcnn.structures import DetectionBatch, ImageBatch, SampleBatch, TargetBatch

HEIGHT, WIDTH = 128, 160
PYRAMID = "(0.25, 0.125, 0.0625, 0.03125)"
HEAD = [
    *("MODEL.DEVICE", DEVICE, "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES", PYRAMID),
    *("MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "False", "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "56"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(24, 24, 24)", "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", "2"),
]


def head_of(*overrides):
    cfg = fastrcnn.load_config(None, [*HEAD, *overrides])
    return KeypointHead(cfg, 16, None).to(DEVICE, torch.float64)


def maps(batch=2):
    sizes = [(HEIGHT // stride, WIDTH // stride) for stride in (4, 8, 16, 32)]
    return [torch.randn(batch, 16, *size, dtype=torch.float64, device=DEVICE) for size in sizes]


def boxes_of(*shape):
    corner = torch.rand(*shape, 2) * 50
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2) * 70], -1).to(DEVICE, torch.float64)


def keypoints_in(boxes, count=17):
    """Most in the box, some outside, some on its right and lower edges, some not labelled."""
    place = torch.rand(*boxes.shape[:-1], count, 2, dtype=boxes.dtype, device=boxes.device) * 1.2 - 0.1
    corner, end = boxes[..., None, :2], boxes[..., None, 2:]
    points = corner + place * (end - corner)
    points[..., 3:5, :] = torch.where(torch.rand_like(points[..., 3:5, :]) < 0.5, end, points[..., 3:5, :])
    visibility = torch.randint(0, 3, (*points.shape[:-1], 1), device=boxes.device).to(boxes.dtype)
    return torch.cat([points, visibility], -1)


def images_of(batch=2):
    sizes = torch.tensor([[HEIGHT, WIDTH]] * batch, dtype=torch.int32, device=DEVICE)
    return ImageBatch(torch.zeros(batch, 3, HEIGHT, WIDTH, device=DEVICE), sizes, sizes)


def detections_of(boxes, count):
    """boxes [B, D, 4], of which count[b] are in use."""
    slot = torch.arange(boxes.shape[1], device=boxes.device)
    labels = (slot < torch.tensor(count, device=boxes.device)[:, None]).long()
    images = images_of(len(boxes))
    used = boxes * labels[..., None]
    return DetectionBatch(used, labels.double(), labels, labels.sum(1).int(), images.sizes, images.original_sizes)


def torchvisions(head):
    """torchvision's layers with the weights of ours, as a function of features and lists of boxes -> logits."""
    layers = KeypointRCNNHeads(16, (24, 24, 24)).double().to(DEVICE)
    predictor = KeypointRCNNPredictor(24, 17).double().to(DEVICE)
    for index in range(3):
        layers[2 * index].load_state_dict(getattr(head.feature_extractor, f"conv_fcn{index + 1}").state_dict())
    predictor.load_state_dict(head.predictor.state_dict())
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)

    def logits(features, boxes):
        named = {str(level): f for level, f in enumerate(features)}
        return predictor(layers(pooler(named, boxes, [(HEIGHT, WIDTH)] * len(boxes))))

    return logits, layers


def test_keypoints_to_heatmap_is_torchvisions():
    boxes = boxes_of(40)
    keypoints = keypoints_in(boxes)
    cell, inside = keypoints_to_heatmap(keypoints, boxes, 56)
    want, valid = torchvisions_heatmap(keypoints, boxes, 56)
    assert torch.equal(inside, valid.bool())
    assert torch.equal(cell, want)
    assert 0.3 < inside.float().mean() < 0.7
    on_edge = keypoints[..., 0] == boxes[:, None, 2]
    assert (cell[on_edge & inside] % 56 == 55).all()
    assert (on_edge & inside).any()
    none = keypoints_to_heatmap(keypoints, torch.zeros_like(boxes), 56)  # of an empty slot
    assert not none[0].any()
    assert not none[1].any()


def test_same_logits_loss_and_gradients_as_torchvision():
    head, features = head_of("MODEL.CONVENTIONS", "torchvision"), maps()
    logits_of, layers = torchvisions(head)
    gt_boxes, regions = boxes_of(2, 4), boxes_of(2, 8)
    targets = TargetBatch(gt_boxes, torch.ones(2, 4).long(), torch.zeros(2, 4).bool(), keypoints=keypoints_in(gt_boxes))
    matched = torch.tensor([[1, 0, 3, 3, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]], device=DEVICE)
    regions[:, :4] = gt_boxes.gather(1, matched[:, :4, None].expand(-1, -1, 4)) + torch.randn_like(regions[:, :4])
    labels = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]], device=DEVICE)
    weight = torch.ones(2, 8, device=DEVICE)
    weight[0, 3] = 0  # an empty slot
    samples = SampleBatch(regions, labels, matched, weight, num_positive=4)
    loss = head.losses(features, samples, targets, None)["loss_kp"]

    used = [regions[0, :3], regions[1, :2]]
    keypoints = [targets.keypoints[0], targets.keypoints[1]]
    want = keypointrcnn_loss(logits_of(features, used), used, keypoints, [matched[0, :3], matched[1, :2]])
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    loss.backward()
    want.backward()
    for index in range(3):
        ours = getattr(head.feature_extractor, f"conv_fcn{index + 1}").weight.grad
        torch.testing.assert_close(ours, layers[2 * index].weight.grad, rtol=1e-6, atol=1e-12)


def test_same_keypoints_as_torchvision():
    """Of a batch in which one image has detections, one fewer, one none."""
    head, features, boxes = head_of("MODEL.CONVENTIONS", "torchvision"), maps(3), boxes_of(3, 6)
    detections = detections_of(boxes, [6, 2, 0])
    with torch.no_grad():
        head.detect(features, images_of(3), detections)
        used = [boxes[0], boxes[1, :2], boxes[2, :0]]
        want, scores = keypointrcnn_inference(torchvisions(head)[0](features, used), used)
    assert detections.keypoints.shape == (3, 6, 17, 3)
    assert detections.keypoint_scores.shape == (3, 6, 17)
    for image, count in enumerate((6, 2, 0)):
        torch.testing.assert_close(detections.keypoints[image, :count], want[image].double(), rtol=0, atol=1e-3)
        found = detections.keypoint_scores[image, :count]
        torch.testing.assert_close(found, scores[image].double(), rtol=1e-5, atol=1e-5)
        assert not detections.keypoints[image, count:].any()
        assert not detections.keypoint_scores[image, count:].any()


def test_last_pixel_of_the_box_in_the_conventions_of_the_original():
    """Its boxes end at their last pixel, also where they meet keypoints: everything is that of boxes one smaller."""
    original, plain = head_of("MODEL.CONVENTIONS", "maskrcnn-benchmark"), head_of("MODEL.CONVENTIONS", "torchvision")
    plain.load_state_dict(original.state_dict())
    features, boxes = maps()[:1], boxes_of(2, 3)
    original.pooler.scales = plain.pooler.scales = [0.25]
    smaller = boxes - torch.tensor([0, 0, 1, 1], device=DEVICE)
    found = [detections_of(b, [3, 3]) for b in (boxes, smaller)]
    for head, detections in zip((original, plain), found, strict=True):
        head.detect(features, images_of(), detections)
    torch.testing.assert_close(found[0].keypoints, found[1].keypoints)
    keypoints, labels = keypoints_in(smaller), torch.ones(2, 3, device=DEVICE).long()
    targets = TargetBatch(boxes, labels, labels == 0, keypoints=keypoints)
    matched = torch.arange(3, device=DEVICE).expand(2, 3)
    losses = [
        head.losses(features, SampleBatch(b, labels, matched, labels.float(), 3), targets, None)["loss_kp"]
        for head, b in ((original, boxes), (plain, smaller))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", ["no positive", "nothing labelled", "no objects in the batch"])
def test_loss_without_keypoints_is_zero(kind):
    head, boxes = head_of(), boxes_of(2, 3)
    labels = torch.full((2, 3), int(kind == "nothing labelled"), device=DEVICE)
    keypoints = keypoints_in(boxes)
    keypoints[..., 2] = 0 if kind == "nothing labelled" else 2
    keypoints = keypoints[:, :, :0] if kind == "no objects in the batch" else keypoints
    targets = TargetBatch(boxes, torch.ones_like(labels), labels < 0, keypoints=keypoints)
    samples = SampleBatch(boxes, labels, torch.zeros_like(labels), torch.ones(2, 3, device=DEVICE), 2)
    loss = head.losses(maps(), samples, targets, None)["loss_kp"]
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize(("found", "message"), [(None, "have no keypoints"), (5, "have 5 keypoints")])
def test_targets_of_another_kind_are_errors(found, message):
    head, boxes, labels = head_of(), boxes_of(1, 2), torch.ones(1, 2, device=DEVICE).long()
    keypoints = None if found is None else keypoints_in(boxes, found)
    targets = TargetBatch(boxes, labels, labels == 0, keypoints=keypoints)
    samples = SampleBatch(boxes, labels, labels * 0, labels.float(), 1)
    with pytest.raises(ValueError, match=rf"ROI_KEYPOINT_HEAD\.NUM_CLASSES is 17, but the targets {message}"):
        head.losses(maps(1), samples, targets, None)


def test_learns_where_the_keypoints_are():
    """What the loss asks for is what the detections then give, to the size of a cell."""
    keys = ("MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "5", "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS", "(32, 32)")
    head, features = head_of(*keys).float(), [f.float() for f in maps(1)]
    boxes = torch.tensor([[[10.0, 10, 66, 66], [40, 30, 150, 120]]], device=DEVICE)
    keypoints = torch.rand(1, 2, 5, 2, device=DEVICE) * (boxes[..., None, 2:] - boxes[..., None, :2] - 4) + 2
    keypoints = torch.cat([keypoints + boxes[..., None, :2], torch.full((1, 2, 5, 1), 2.0, device=DEVICE)], -1)
    labels = torch.ones(1, 2, device=DEVICE).long()
    targets = TargetBatch(boxes, labels, labels == 0, keypoints=keypoints)
    samples = SampleBatch(boxes, labels, torch.tensor([[0, 1]], device=DEVICE), labels.float(), 2)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(80):
        loss = head.losses(features, samples, targets, None)["loss_kp"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detections = detections_of(boxes, [2])
    with torch.no_grad():
        head.detect(features, images_of(1), detections)
    cell = (boxes[..., None, 2:] - boxes[..., None, :2]) / 56
    error = (detections.keypoints[..., :2] - keypoints[..., :2]).abs() / cell
    assert error.max() < 2, (loss.item(), error.max())


SMALL = (
    "MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 "
    "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 7 MODEL.ROI_HEADS.SCORE_THRESH 0.0"
).split()
SHARED = (  # C4: the keypoints are predicted from what the box head extracts
    "MODEL.BACKBONE.CONV_BODY R-18-C4 MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR ResNet50Conv5ROIFeatureExtractor "
    "MODEL.ROI_BOX_HEAD.PREDICTOR FastRCNNPredictor MODEL.ROI_BOX_HEAD.POOLER_SCALES (0.0625,) "
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 14 MODEL.RPN.USE_FPN False MODEL.RPN.ANCHOR_STRIDE (16,) "
    "MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR ResNet50Conv5ROIFeatureExtractor MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 28 "
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.0625,) MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR True"
).split()


def config(repository, *overrides):
    path = "quick_start"
    return fastrcnn.load_config(path, [*HEAD, "MODEL.MASK_ON", "False", *SMALL, *overrides])


def batch_of(device=DEVICE):
    sizes = torch.tensor([[128, 160], [96, 130]], dtype=torch.int32)
    images = ImageBatch(torch.randn(2, 3, 128, 160), sizes, sizes * 2)
    boxes = torch.tensor([[[10.0, 10, 60, 60], [30, 20, 120, 110]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    keypoints = torch.cat([boxes[:, :, None, :2] + 20 + torch.rand(2, 2, 17, 2) * 20, torch.ones(2, 2, 17, 1)], -1)
    labels = torch.tensor([[1, 1], [0, 0]])
    targets = TargetBatch(boxes, labels, labels < 0, keypoints=keypoints)
    return images.to(device), targets.to(device)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("extractor", [(), SHARED], ids=["own", "shared"])
def test_steps_trace_without_values(extractor, precision, repository):
    model = fastrcnn.build_model(config(repository, "MODEL.DEVICE", "cpu", *extractor))
    mode = FakeTensorMode()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.from_tensor(buffer)
    images, targets = (batch._map(mode.from_tensor) for batch in batch_of("cpu"))
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = model.train()(images, targets)
        assert losses["loss_kp"].shape == ()
        assert losses["loss_kp"].dtype == torch.float32
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        detections = model.eval()(images)
    assert detections.keypoints.shape == (2, 7, 17, 3)
    assert detections.keypoint_scores.shape == (2, 7, 17)


def test_whole_model_learns_and_detects(repository):
    model = fastrcnn.build_model(config(repository)).train()
    images, targets = batch_of()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in range(8):
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(losses["loss_kp"].item())
    assert all(p.grad is not None for p in model.parameters())
    assert history[-1] < 0.95 * history[0], history
    boxlists = model.eval()(images).to_boxlists()
    for boxlist in boxlists:
        assert len(boxlist) == 7
        points = boxlist.get_field("keypoints")
        assert isinstance(points, fastrcnn.structures.PersonKeypoints)
        assert points.size == boxlist.size
        low, high = boxlist.bbox[:, None, :2], boxlist.bbox[:, None, 2:]
        size = (high - low).clamp(min=2)  # in the frame of the original, twice as large: a pixel is two
        assert ((points.keypoints[..., :2] >= low) & (points.keypoints[..., :2] <= low + size)).all()
        assert boxlist.get_field("keypoint_scores").shape == (7, 17)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "28"], r"ROI_KEYPOINT_HEAD\.RESOLUTION is 28; KeypointRCNNPredictor"),
        (["MODEL.ROI_KEYPOINT_HEAD.PREDICTOR", "Nobody"], r"ROI_KEYPOINT_HEAD\.PREDICTOR is 'Nobody'.*KeypointRCNNPre"),
        (["MODEL.ROI_KEYPOINT_HEAD.FEATURE_EXTRACTOR", "Nobody"], r"FEATURE_EXTRACTOR is 'Nobody'.*KeypointRCNNFeatur"),
        (
            ["MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"],
            r"ROI_KEYPOINT_HEAD\.SHARE_BOX_FEATURE_EXTRACTOR is True, but MODEL\.ROI_KEYPOINT_HEAD\.FEATURE_EXTRACTOR",
        ),
    ],
)
def test_configs_that_do_not_fit_say_so(overrides, message, repository):
    images, targets = batch_of()
    with pytest.raises(ConfigError, match=message):
        fastrcnn.build_model(config(repository, *overrides)).train()(images, targets)


def test_shape_of_the_head_follows_the_config():
    sides = ("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "7", "MODEL.ROI_KEYPOINT_HEAD.RESOLUTION", "28")
    head = head_of("MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES", "4", *sides)
    valid = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    assert head.logits(head.extract(maps(), boxes_of(2, 3), valid)).shape == (6, 4, 28, 28)


def test_shared_layers_are_listed_once(repository):
    model = fastrcnn.build_model(config(repository, *SHARED))
    names = [n for n, _ in model.roi_heads.keypoint.named_parameters()]
    assert names == ["predictor.kps_score_lowres.weight", "predictor.kps_score_lowres.bias"]
