"""RetinaNet against torchvision's, and against its definition where torchvision does otherwise."""

import math

import pytest
import torch
from PIL import Image
from support import without_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.structures import ImageBatch, TargetBatch
from fastrcnn.weights.torchvision import convert

TORCHVISION = (
    "MODEL.DEVICE cpu MODEL.RETINANET_ON True MODEL.CONVENTIONS torchvision TEST.DETECTIONS_PER_IMG 300 "
    "MODEL.RETINANET.NUM_CLASSES 91 MODEL.RETINANET.STRADDLE_THRESH -1 MODEL.RETINANET.NMS_TH 0.5 "
    "MODEL.RETINANET.BBOX_REG_WEIGHTS (1,1,1,1) MODEL.RETINANET.BBOX_REG_WEIGHT 1 MODEL.RETINANET.BBOX_REG_BETA 0 "
    "MODEL.RETINANET.LOSS_PER_IMAGE True"
).split()
V2 = "MODEL.RETINANET.NORM GN MODEL.RETINANET.BOX_REG_LOSS giou".split()
LEVELS = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]  # of 128 × 160


class Features(torch.nn.Module):
    """In the place of a backbone: the same maps whatever the image."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, _):
        return {str(level): x for level, x in enumerate(self.maps)}


class ImageListLike:
    def __init__(self, images):
        self.tensors = torch.stack(list(images))
        self.image_sizes = [tuple(image.shape[-2:]) for image in images]


class Unchanged(torch.nn.Module):
    """In the place of resizing and normalising."""

    def forward(self, images, targets):
        return ImageListLike(images), targets


def features(images=2, channels=256, dtype=torch.float64):
    return [torch.randn(images, channels, h, w, dtype=dtype) for h, w in LEVELS]


def batch(dtype=torch.float64):
    sizes = torch.tensor([[128, 160], [96, 130]], dtype=torch.int32)
    return ImageBatch(torch.zeros(2, 3, 128, 160, dtype=dtype), sizes, sizes)


def ground_truth(dtype=torch.float64):
    """Two objects and an empty slot, and an image without objects."""
    boxes = torch.tensor([[[10.0, 12, 60, 70], [80, 20, 150, 110], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 3], dtype=dtype)
    labels = torch.tensor([[3, 90, 0], [0, 0, 0]])
    return TargetBatch(boxes, labels, torch.zeros(2, 3, dtype=torch.bool))


@pytest.fixture(params=["V1", "V2"])
def pair(request):
    """Ours and torchvision's with the same random weights, which detect something, in float64."""
    build = {"V1": retinanet_resnet50_fpn, "V2": retinanet_resnet50_fpn_v2}[request.param]
    theirs = build(weights=None, weights_backbone=None).double()
    for name, parameter in theirs.head.named_parameters():
        if "cls_logits" in name or "bbox_reg" in name:
            torch.nn.init.normal_(parameter, std=0.03 if "weight" in name else 0.5)
        elif parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    cfg = fastrcnn.load_config(None, [*TORCHVISION, *(V2 if request.param == "V2" else [])])
    ours = RetinaNet(cfg, 256).double()
    state = convert({f"head.{name}": value for name, value in theirs.head.state_dict().items()})
    ours.load_state_dict({name.removeprefix("rpn."): value for name, value in state.items()})
    return ours, theirs


def test_same_logits_and_deltas(pair):
    ours, theirs = pair
    maps = features()
    logits, deltas = ours.head(maps)
    want = theirs.head(maps)
    shapes = [(2, 9, 90, *grid) for grid in LEVELS]
    got = torch.cat([x.view(s).permute(0, 3, 4, 1, 2).flatten(1, 3) for x, s in zip(logits, shapes, strict=True)], 1)
    torch.testing.assert_close(got, want["cls_logits"][..., 1:])  # without the label 0
    got = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas], 1)
    torch.testing.assert_close(got, want["bbox_regression"])


def test_same_losses_and_gradients(pair):
    ours, theirs = pair
    with torch.no_grad():  # the logits of the label 0 would add to torchvision's loss
        layer = theirs.head.classification_head.cls_logits
        layer.weight.view(9, 91, -1)[:, 0] = 0
        layer.bias.view(9, 91)[:, 0] = -1000
    maps, targets = features(), ground_truth()
    got = ours.losses(batch(), maps, targets)
    theirs.backbone = Features(maps)
    lists = [
        {"boxes": b[v], "labels": i[v]} for b, i, v in zip(targets.boxes, targets.labels, targets.valid, strict=True)
    ]
    theirs.transform = Unchanged()
    want = theirs.train()([torch.zeros(3, 128, 160).double(), torch.zeros(3, 128, 160).double()], lists)
    names = {"loss_retina_cls": "classification", "loss_retina_reg": "bbox_regression"}
    assert got.keys() == names.keys()
    for name, other in names.items():
        torch.testing.assert_close(got[name], want[other], rtol=1e-9, atol=0)
    sum(got.values()).backward()
    sum(want.values()).backward()
    gradients = convert({f"head.{n}": p.grad for n, p in theirs.head.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[f"rpn.{name}"], rtol=1e-7, atol=1e-9)


def test_same_detections(pair):
    ours, theirs = pair
    maps, images = features(), batch()
    got = ours.eval().detect(images, maps).to_boxlists()
    theirs.eval()
    outputs = theirs.head(maps)
    outputs["cls_logits"] = outputs["cls_logits"].clone()
    outputs["cls_logits"][..., 0] = -1000
    counts = [9 * h * w for h, w in LEVELS]
    padded = ImageListLike(images.pixels)
    anchors = [a.split(counts) for a in theirs.anchor_generator(padded, maps)]
    split = {name: value.split(counts, 1) for name, value in outputs.items()}
    want = theirs.postprocess_detections(split, anchors, [tuple(size) for size in images.sizes.tolist()])
    for w, g in zip(want, got, strict=True):
        assert len(g) == 300
        torch.testing.assert_close(g.get_field("scores"), w["scores"])
        assert torch.equal(g.get_field("labels"), w["labels"])
        torch.testing.assert_close(g.bbox, w["boxes"].float())


@torch.no_grad()
def detecting(build, image, **options):
    """torchvision's whole model with random weights that detect: norms calibrated on a photo, outputs spread out."""
    model = build(weights=None, weights_backbone=None, min_size=256, max_size=400, **options)
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.2, 0.2)
    prepared = model.transform([image])[0].tensors
    model.backbone.train()(prepared)
    maps = list(model.eval().backbone(prepared).values())
    for tower in (model.head.classification_head.conv, model.head.regression_head.conv):
        for parameter in tower.parameters():
            if parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    logits, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    for layer, key, deviation in ((logits, "cls_logits", 1.5), (boxes, "bbox_regression", 0.3)):
        layer.bias.zero_()
        layer.weight.mul_(deviation / model.head(maps)[key].std())
    logits.bias.fill_(-4).view(9, 91)[:, 0] = -1000
    logits.weight.view(9, 91, -1)[:, 0] = 0
    return model


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_same_detections_on_photos(version, test_data):
    paths = sorted((test_data / "coco_open" / "val2017").glob("*.jpg"))[:2]
    images = [pil_to_tensor(Image.open(path).convert("RGB")) for path in paths]
    build = {"V1": retinanet_resnet50_fpn, "V2": retinanet_resnet50_fpn_v2}[version]
    theirs = detecting(build, images[0].float() / 255, score_thresh=0.3, detections_per_img=2000)
    model = "MODEL.BACKBONE.CONV_BODY R-50-FPN-RETINANET MODEL.RESNETS.BACKBONE_OUT_CHANNELS 256 "
    model += (
        f"MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RETINANET.USE_C5 {version == 'V2'} DATALOADER.SIZE_DIVISIBILITY 32 "
    )
    model += "INPUT.ANTIALIAS False INPUT.TO_BGR255 False INPUT.PIXEL_MEAN (0.485,0.456,0.406) "
    model += "INPUT.PIXEL_STD (0.229,0.224,0.225) INPUT.MIN_SIZE_TEST 256 INPUT.MAX_SIZE_TEST 400 "
    model += "MODEL.RESNETS.FROZEN_BN_EPS 1e-5 MODEL.RETINANET.INFERENCE_TH 0.3 TEST.DETECTIONS_PER_IMG 2000"
    cfg = fastrcnn.load_config(None, [*TORCHVISION, *(V2 if version == "V2" else []), *model.split()])
    ours = fastrcnn.build_model(cfg).eval()
    report = fastrcnn.weights.load(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    with torch.inference_mode():
        want = theirs([image.float() / 255 for image in images])
        got = ours(fastrcnn.ImageBatch.from_images(images, cfg)).to_boxlists()
    assert sum(len(w["scores"]) for w in want) > 50
    for w, g in zip(want, got, strict=True):
        same = g.get_field("labels")[:, None] == w["labels"]
        same &= (g.get_field("scores")[:, None] - w["scores"]).abs() < 1e-4
        distance = torch.where(same, (g.bbox[:, None] - w["boxes"]).abs().amax(2), torch.inf)
        # of two boxes that suppress each other and have equal scores up to rounding, either may stay
        assert (distance.amin(1) < 0.05).float().mean() > 0.98
        assert (distance.amin(0) < 0.05).float().mean() > 0.98


def small(*overrides, dtype=torch.float64):
    """Five classes and 8 channels, everything as in maskrcnn-benchmark."""
    base = "MODEL.DEVICE cpu MODEL.RETINANET_ON True MODEL.RETINANET.NUM_CLASSES 6 MODEL.RETINANET.NUM_CONVS 1".split()
    return RetinaNet(fastrcnn.load_config(None, [*base, *overrides]), 8).to(dtype)


def small_targets():
    targets = ground_truth()
    targets.labels.clamp_(max=5)
    return targets


@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_losses_by_definition(loss):
    """maskrcnn-benchmark's: focal loss over positives and images, box loss over 4 · positives, codes times 10 and 5."""
    model = small("MODEL.RETINANET.STRADDLE_THRESH", "-1", "MODEL.RETINANET.BOX_REG_LOSS", loss)
    images, maps, targets = batch(), features(channels=8), small_targets()
    logits, deltas = model.head(maps)
    logits = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 5) for x in logits], 1)
    deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas], 1)
    anchors = model.anchors(images, maps)
    coder, cost, error, positives = BoxCoder((10.0, 10.0, 5.0, 5.0)), 0.0, 0.0, 0
    for image in range(2):
        boxes, labels = targets.boxes[image][targets.valid[image]], targets.labels[image][targets.valid[image]]
        matched = torch.full((len(anchors),), -1)
        if len(boxes):
            matched = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
        positive = matched >= 0
        dense = torch.zeros_like(logits[image])
        dense[positive, labels[matched[positive]] - 1] = 1
        cost += sigmoid_focal_loss(logits[image][matched != -2], dense[matched != -2], reduction="sum")
        positives += int(positive.sum())
        if loss == "giou":
            found = coder.decode_single(deltas[image][positive], anchors[positive])
            error += generalized_box_iou_loss(found, boxes[matched[positive]], reduction="sum")
        elif len(boxes):
            wanted = coder.encode_single(boxes[matched[positive]], anchors[positive])
            distance = (deltas[image][positive] - wanted).abs()
            error += torch.where(distance < 0.11, distance**2 / 0.22, distance - 0.055).sum()
    assert positives > 10
    got = model.losses(images, maps, targets)
    torch.testing.assert_close(got["loss_retina_cls"], cost / (positives + 2))
    torch.testing.assert_close(got["loss_retina_reg"], error / (4 * positives))


@pytest.mark.parametrize("loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_nothing_to_learn(loss):
    model = small("MODEL.RETINANET.BOX_REG_LOSS", loss)
    targets = small_targets()
    targets.labels.zero_()
    losses = model.losses(batch(), features(channels=8), targets)
    sum(losses.values()).backward()
    assert losses["loss_retina_cls"] > 0
    assert losses["loss_retina_reg"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_first_scores_are_the_prior():
    model = small("MODEL.RETINANET.PRIOR_PROB", "0.02", "MODEL.RETINANET.INFERENCE_TH", "0.0")
    assert torch.allclose(model.head.cls_logits.bias, torch.tensor(-math.log(49)).double())
    maps = [torch.zeros_like(f) for f in features(channels=8)]
    scores = model.eval().detect(batch(), maps).scores
    torch.testing.assert_close(scores, torch.full_like(scores, 0.02))


def test_anchors_are_maskrcnn_benchmarks():
    """Golden values, with the last pixel inclusive there."""
    cells = small("MODEL.CONVENTIONS", "maskrcnn-benchmark").cells[0] - torch.tensor([0.0, 0, 1, 1])
    want = """
        -18 -8 25 15       -23.7183 -11.1191 30.7183 18.1191   -30.9228 -15.0488 37.9228 22.0488
        -12 -12 19 19      -16.1587 -16.1587 23.1587 23.1587   -21.3984 -21.3984 28.3984 28.3984
        -8 -20 15 27       -11.1191 -26.2381 18.1191 33.2381   -15.0488 -34.0976 22.0488 41.0976
    """
    torch.testing.assert_close(
        cells, torch.tensor([float(x) for x in want.split()]).double().view(9, 4), atol=1e-4, rtol=0
    )


CHANGES = {
    "ANCHOR_SIZES": "(16,32,64,128,256)",
    "ASPECT_RATIOS": "(0.4,1.0,2.5)",
    "ANCHOR_STRIDES": "(10,16,32,64,128)",
    "STRADDLE_THRESH": "20",
    "OCTAVE": "3.0",
    "BBOX_REG_WEIGHT": "2.0",
    "BBOX_REG_WEIGHTS": "(1,1,1,1)",
    "BBOX_REG_BETA": "0.5",
    "BOX_REG_LOSS": "giou",
    "LOSS_PER_IMAGE": "True",
    "FG_IOU_THRESHOLD": "0.7",
    "BG_IOU_THRESHOLD": "0.1",
    "LOSS_ALPHA": "0.5",
    "LOSS_GAMMA": "1.0",
    "PRE_NMS_TOP_N": "3",
    "INFERENCE_TH": "0.97",
    "NMS_TH": "0.9",
}


def run(*overrides):
    torch.manual_seed(5)
    model = small("MODEL.RETINANET.STRADDLE_THRESH", "-1", *overrides)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    images, maps = batch(), features(channels=8)
    losses = model.losses(images, maps, small_targets())
    found = model.eval().detect(images, maps)
    return torch.stack([*losses.values(), found.boxes.sum(), found.scores.sum()])


@pytest.mark.parametrize("name", CHANGES)
def test_keys_have_an_effect(name):
    assert not torch.allclose(run(f"MODEL.RETINANET.{name}", CHANGES[name]), run())


def test_keys_of_the_shape():
    spec = "MODEL.RETINANET.NUM_CLASSES 4 MODEL.RETINANET.SCALES_PER_OCTAVE 2 MODEL.RETINANET.NUM_CONVS 3"
    head = small(*spec.split(), "MODEL.RETINANET.NORM", "GN", "MODEL.GROUP_NORM.NUM_GROUPS", "4").head
    assert head.cls_logits.out_channels == 6 * 3
    assert head.bbox_pred.out_channels == 6 * 4
    names = {name.rpartition(".")[0] for name in head.state_dict()}
    towers = {f"{kind}_tower.{k}" for kind in ("cls", "bbox") for k in (0, 1, 3, 4, 6, 7)}
    assert names == towers | {"cls_logits", "bbox_pred"}
    assert small("TEST.DETECTIONS_PER_IMG", "7").eval().detect(batch(), features(channels=8)).boxes.shape == (2, 7, 4)


def whole(*overrides):
    narrow = (
        "MODEL.BACKBONE.CONV_BODY R-18-FPN-RETINANET MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.STEM_OUT_CHANNELS 8 "
    )
    narrow += "MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.RETINANET_ON True MODEL.RPN_ONLY True MODEL.DEVICE cpu"
    return fastrcnn.load_config(None, [*narrow.split(), *overrides])


@pytest.mark.parametrize("overrides", ["", "MODEL.RETINANET.USE_C5 False MODEL.RETINANET.BOX_REG_LOSS giou"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_traces_without_values(precision, overrides):
    mode, model = FakeTensorMode(), fastrcnn.build_model(whole(*overrides.split()))
    without_values(model, mode)
    images, targets = (part._map(mode.from_tensor) for part in (batch(torch.float32), ground_truth(torch.float32)))
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = model.train()(images, targets)
        assert {name: loss.shape for name, loss in losses.items()} == {"loss_retina_cls": (), "loss_retina_reg": ()}
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found = model.eval()(images)
        assert found.boxes.shape == (2, 100, 4)
        assert found.scores.dtype == torch.float32


def test_learns_one_image():
    scratch = "MODEL.RETINANET.NUM_CLASSES 6 MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0 MODEL.RETINANET.NORM BatchNorm "
    scratch += "MODEL.RESNETS.STEM_FUNC StemWithBatchNorm MODEL.RESNETS.TRANS_FUNC BottleneckWithBatchNorm"
    model = fastrcnn.build_model(whole(*scratch.split()))
    images, targets = batch(torch.float32), ground_truth(torch.float32)
    images.pixels.normal_()
    targets.labels.clamp_(max=5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    history = []
    for _ in range(20):
        loss = sum(model.train()(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0], history


def test_heads_on_regions_are_refused():
    with pytest.raises(ConfigError, match=r"MODEL\.MASK_ON needs heads on regions, which MODEL\.RETINANET_ON leaves"):
        fastrcnn.build_model(whole("MODEL.MASK_ON", "True"))
    with pytest.raises(ConfigError, match=r"ANCHOR_SIZES has 2 entries and MODEL\.RETINANET\.ANCHOR_STRIDES 5"):
        small("MODEL.RETINANET.ANCHOR_SIZES", "(32, 64)")
    with pytest.raises(ConfigError, match=r"MODEL\.RETINANET has anchors for 5 levels, the backbone gives 2"):
        small().anchors(batch(), features(channels=8)[:2])
