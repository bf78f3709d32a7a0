"""Backbones against torchvision's and timm's, deformable convolution against its definition."""

import itertools
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TheirP6P7

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.backbones import build_backbone
from fastrcnn.models.backbones.fpn import FPN
from fastrcnn.models.backbones.resnet import ResNet, ResNetHead
from fastrcnn.models.layers import DeformConv2d, SyncBatchNorm, conv_norm, smooth_l1
from fastrcnn.models.layers import FrozenBatchNorm2d as OurFrozenBatchNorm2d
from fastrcnn.weights.torchvision import convert

NORMS = {
    "FixedBatchNorm": FrozenBatchNorm2d,
    "BatchNorm": nn.BatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def config(*overrides):
    return fastrcnn.load_config(None, ["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.DEVICE", "cpu", *overrides])


def pair(depth, norm, *overrides, **theirs):
    """Our body and torchvision's with the same random weights and statistics."""
    names = ["MODEL.RESNETS.TRANS_FUNC", f"BottleneckWith{norm}", "MODEL.RESNETS.STEM_FUNC", f"StemWith{norm}"]
    ours = ResNet(config(*names, *overrides), depth)
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, norm_layer=NORMS[norm], **theirs)
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("fc."):
            continue
        fresh = value if not value.is_floating_point() else torch.rand_like(value) * 0.2 + 0.9
        state[name] = value if value.ndim == 4 else fresh
    model.load_state_dict(state, strict=False)
    ours.load_state_dict({("stem." + n if n.startswith(("conv1.", "bn1.")) else n): v for n, v in state.items()})
    layers = {f"layer{k}": str(k) for k in (1, 2, 3, 4)}
    return ours, IntermediateLayerGetter(model, layers)


@pytest.mark.parametrize(
    ("depth", "norm", "overrides", "theirs"),
    [
        (18, "FixedBatchNorm", (), {}),
        (18, "BatchNorm", (), {}),
        (34, "GN", (), {}),
        (50, "FixedBatchNorm", (), {}),
        (50, "GN", (), {}),
        (101, "FixedBatchNorm", (), {}),
        (152, "FixedBatchNorm", (), {}),
        (
            50,
            "FixedBatchNorm",
            ("MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
            {"groups": 32, "width_per_group": 8},
        ),
    ],
    ids=["18", "18-batch-norm", "34-group-norm", "50", "50-group-norm", "101", "152", "50-32x8d"],
)
def test_body_equals_torchvision(depth, norm, overrides, theirs):
    ours, model = pair(depth, norm, *overrides, **theirs)
    x = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        ours.train(mode)
        model.train(mode)
        for got, want in zip(ours(x), model(x).values(), strict=True):
            # relative to the map: random weights let activations grow from block to block
            assert (got - want).norm() < 1e-5 * want.norm()


def test_stride_in_1x1_moves_the_stride():
    body = ResNet(config("MODEL.RESNETS.STRIDE_IN_1X1", "True"), 50)
    assert body.layer2[0].conv1.stride == (2, 2)
    assert body.layer2[0].conv2.stride == (1, 1)


def backbone(name, *overrides):
    return build_backbone(
        config("MODEL.BACKBONE.CONV_BODY", name, "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "16", *overrides)
    )


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize(
    ("top", "strides", "last"),
    [
        ("C4", [16], "layer3"),
        ("C5", [32], "layer4"),
        ("FPN", [4, 8, 16, 32, 64], "layer4"),
        ("FPN-RETINANET", [8, 16, 32, 64, 128], "layer4"),
    ],
)
def test_every_resnet(depth, top, strides, last):
    with torch.device("meta"):
        model = backbone(f"R-{depth}-{top}")
        maps = model(torch.empty(2, 3, 128, 256))
    assert [(m.shape[2], m.shape[3]) for m in maps] == [(128 // s, 256 // s) for s in strides]
    assert {m.shape[1] for m in maps} == {model.out_channels}
    wide = {"C4": 1024, "C5": 2048}.get(top)
    assert model.out_channels == (16 if wide is None else wide if depth >= 50 else wide // 4)
    assert list(model.body._modules)[-1] == last


def parts_that_stand(model):
    """Names of the body's children none of whose parameters train; a child with some is an error."""
    found = {}
    for name, parameter in model.body.named_parameters():
        found.setdefault(name.split(".")[1 if name.startswith("net.") else 0], set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values())
    return [name for name, values in found.items() if values == {False}]


TRAINED = "MODEL.RESNETS.TRANS_FUNC BottleneckWithBatchNorm MODEL.RESNETS.STEM_FUNC StemWithBatchNorm".split()


@pytest.mark.parametrize(
    ("name", "at", "stands"),
    [
        ("R-18-FPN", -1, []),
        ("R-18-FPN", 0, []),
        ("R-18-C4", 2, ["stem", "layer1"]),
        ("R-18-FPN-RETINANET", 3, ["stem", "layer1", "layer2"]),
        ("R-18-C5", 5, ["stem", "layer1", "layer2", "layer3", "layer4"]),
        # as torchvision's with 3 of 6 trainable layers
        ("MobileNetV3-Large-FPN", 3, [str(k) for k in range(7)]),
        ("torchvision:resnet18-FPN", 1, ["stem"]),
        ("torchvision:resnet18-FPN", 2, ["stem", "layer1"]),
    ],
)
def test_frozen_parts_stand_still(name, at, stands):
    model = backbone(name, "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", str(at), *TRAINED).train()
    assert parts_that_stand(model) == stands
    before = {name: buffer.clone() for name, buffer in model.body.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    moved = {n.split(".")[0] for n, buffer in model.body.named_buffers() if not torch.equal(buffer, before[n])}
    assert moved.isdisjoint(stands)
    assert moved | set(stands) == {n.split(".")[0] for n, _ in model.body.named_parameters()}


def test_freezing_more_than_there_is():
    with pytest.raises(ConfigError, match="FREEZE_CONV_BODY_AT is 5; R-18-C4 has 4 parts"):
        backbone("R-18-C4", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "5")


@pytest.mark.parametrize("dilation", [1, 2])
def test_last_stage_in_body_and_head(dilation):
    """C5, and C4 followed by the head, are torchvision's layer4; with dilation, its layer4 without stride."""
    overrides = ("MODEL.RESNETS.RES5_DILATION", str(dilation))
    ours, theirs = pair(50, "FixedBatchNorm", *overrides, replace_stride_with_dilation=[False, False, dilation == 2])
    if dilation == 2:  # torchvision dilates from the second block on
        theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (2, 2)
    head = ResNetHead(config("MODEL.BACKBONE.CONV_BODY", "R-50-C4", *overrides), 1024)
    head.load_state_dict({n: v for n, v in ours.state_dict().items() if n.startswith("layer4.")})
    assert head.out_channels == 2048
    x = torch.randn(1, 3, 64, 96)
    want = list(theirs(x).values())
    for got in (ours(x)[3], head(want[2])):
        assert got.shape == (1, 2048, 4 // (3 - dilation), 6 // (3 - dilation))
        assert (got - want[3]).norm() < 1e-5 * want[3].norm()


def test_head_follows_the_depth_and_the_deformable_stages():
    cfg = config(*"MODEL.BACKBONE.CONV_BODY R-18-C4 MODEL.RESNETS.STAGE_WITH_DCN (False,False,False,True)".split())
    head = ResNetHead(cfg, 256)
    assert [type(block).__name__ for block in head.layer4] == ["Basic", "Basic"]
    assert all(isinstance(block.conv2, DeformConv2d) for block in head.layer4)
    assert head(torch.randn(3, 256, 14, 14)).shape == (3, 512, 7, 7)


def test_folding_keeps_values_and_gradients():
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False, dtype=torch.float64)
    norm = OurFrozenBatchNorm2d(4, 1e-5).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight)
    want = norm(layer(x))
    got = conv_norm(layer, norm, x)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top", ["max pool", "P6 of C5", "P6 of P5"])
@pytest.mark.parametrize("norm", ["", "BatchNorm", "GN"])
def test_pyramid_equals_torchvision(top, norm):
    channels = [8, 16, 24, 32]
    retinanet, use_c5 = top != "max pool", top == "P6 of C5"
    normed = ["MODEL.FPN.USE_GN", "True"] if norm == "GN" else ["MODEL.FPN.NORM", norm]
    overrides = [*normed, "MODEL.RETINANET.USE_C5", str(use_c5), "MODEL.GROUP_NORM.NUM_GROUPS", "4"]
    ours = FPN(config("MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "12", *overrides), channels, retinanet)
    extra = TheirP6P7(32 if use_c5 else 12, 12) if retinanet else LastLevelMaxPool()
    norms = {"": None, "BatchNorm": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(4, channels)}
    theirs = FeaturePyramidNetwork(channels[retinanet:], 12, extra, norms[norm])
    state = {}
    for name, value in theirs.state_dict().items():
        kind, k, *rest = name.split(".")
        if kind == "extra_blocks":
            state[f"top_blocks.{k}.{rest[0]}"] = value
        else:
            end = ".".join(rest if norm else rest[1:])
            state[f"fpn_{kind.removesuffix('_blocks')}{int(k) + 1 + retinanet}.{end}"] = value
    ours.load_state_dict(state)
    # sides that are no multiples of 32
    features = [torch.randn(2, c, 50 // 2**k, 37 // 2**k) for k, c in enumerate(channels)]
    want = theirs({str(k): f for k, f in enumerate(features[retinanet:])})
    for got, expected in zip(ours(features), want.values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_relu_in_the_pyramid():
    maps = FPN(config("MODEL.FPN.USE_RELU", "True"), [8, 16, 24, 32])
    assert list(maps.state_dict())[:2] == ["fpn_inner1.0.weight", "fpn_inner1.0.bias"]
    features = [torch.randn(1, 8 * k, 64 // 2**k, 64 // 2**k) for k in (1, 2, 3, 4)]
    assert all((m >= 0).all() and (m == 0).any() for m in maps(features))


@pytest.mark.parametrize(
    ("name", "theirs", "stands"),
    [
        ("R-18-FPN", lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None), 2),
        (
            "R-50-FPN",
            lambda: resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d),
            2,
        ),
        (
            "R-50-FPN-RETINANET",
            lambda: resnet_fpn_backbone(
                backbone_name="resnet50", weights=None, returned_layers=[2, 3, 4], extra_blocks=TheirP6P7(256, 256)
            ),
            2,
        ),
        (
            "MobileNetV3-Large-FPN",
            lambda: mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=3),
            3,
        ),
        (
            "torchvision:resnext50_32x4d-FPN",
            lambda: resnet_fpn_backbone(backbone_name="resnext50_32x4d", weights=None),
            2,
        ),
    ],
    ids=["R-18", "R-50-batch-norm", "R-50-retinanet", "mobilenet", "resnext"],
)
def test_backbones_of_torchvisions_detectors(name, theirs, stands):
    """Converted weights give the same maps, and the same parameters train."""
    theirs = theirs()
    for norm in theirs.body.modules():
        if hasattr(norm, "running_var"):
            norm.running_var.uniform_(0.5, 1.5)
            norm.running_mean.normal_(std=0.1)
    trained = any(isinstance(norm, nn.BatchNorm2d) for norm in theirs.body.modules())
    overrides = ["MODEL.BACKBONE.FREEZE_CONV_BODY_AT", str(stands), "MODEL.RETINANET.USE_C5", "False"]
    ours = backbone(name, "MODEL.RESNETS.BACKBONE_OUT_CHANNELS", "256", *overrides, *(TRAINED if trained else ()))
    state = {f"backbone.{n}": value for n, value in theirs.state_dict().items()}
    if "RETINANET" in name:  # what tells the converter
        state["head.classification_head.cls_logits.weight"] = state["head.classification_head.cls_logits.bias"] = (
            torch.zeros(18)
        )
        state["head.regression_head.bbox_reg.bias"] = torch.zeros(36)
    state = {n.removeprefix("backbone."): v for n, v in convert(state).items() if n.startswith("backbone.")}
    result = ours.load_state_dict(state, strict=False)
    assert all(n.endswith("num_batches_tracked") for n in (*result.missing_keys, *result.unexpected_keys))
    trains = {
        n for n, p in convert({f"backbone.{n}": p for n, p in theirs.named_parameters()}).items() if p.requires_grad
    }
    if "RETINANET" not in name:
        assert trains == {f"backbone.{n}" for n, p in ours.named_parameters() if p.requires_grad}
    x = torch.rand(2, 3, 128, 160)
    for got, want in zip(ours.eval()(x), theirs.eval()(x).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("shufflenet_v2_x0_5", ["maxpool", "stage2", "stage3", "conv5"]),
        ("regnet_y_400mf", [f"trunk_output.block{k}" for k in (1, 2, 3, 4)]),
        ("efficientnet_b0", ["features.2", "features.3", "features.5", "features.8"]),
        ("swin_t", ["features.1", "features.3", "features.5", "features.7"]),  # with the channels last
    ],
)
def test_bodies_of_torchvision(name, nodes):
    ours = backbone(f"torchvision:{name}-FPN").eval()
    theirs = torchvision.models.get_model(name, weights=None).eval()
    names = {n.removeprefix("features.").removeprefix("trunk_output."): v for n, v in theirs.state_dict().items()}
    result = ours.body.load_state_dict(names, strict=False)
    assert not result.missing_keys
    assert all(n.startswith(("fc.", "classifier.", "head.", "norm.")) for n in result.unexpected_keys)
    x = torch.rand(1, 3, 64, 96)
    want = list(create_feature_extractor(theirs, nodes)(x).values())
    want = [m.permute(0, 3, 1, 2) for m in want] if name == "swin_t" else want
    torch.testing.assert_close(ours.body(x), want)
    assert ours.body.channels == [m.shape[1] for m in want]
    assert [m.shape[2:] for m in ours(x)] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)] + [(1, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19-FPN", "nearest of torchvision are resnet1"),
        ("torchvision:resnet18", "wanted torchvision:NAME-TOP"),
        ("elsewhere:resnet18-FPN", "wanted torchvision:NAME-TOP"),
        ("torchvision:alexnet-FPN", "a side of 224 becomes 55 in its layer 0"),
        ("torchvision:vit_b_16-FPN", "its layers are no chain"),
    ],
)
def test_what_is_no_body(name, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        backbone(name)


def test_library_bodies_without_batch_norm_of_their_own():
    with pytest.raises(ConfigError, match="takes FixedBatchNorm, BatchNorm or SyncBatchNorm"):
        backbone("torchvision:resnet18-FPN", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithGN")
    body = backbone("torchvision:resnet18-FPN", "MODEL.RESNETS.TRANS_FUNC", "BottleneckWithSyncBatchNorm").body
    kinds = {type(m) for m in body.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {SyncBatchNorm}


@pytest.mark.parametrize(("override", "eps"), [((), 1e-5), (("MODEL.RESNETS.FROZEN_BN_EPS", "1e-3"), 1e-3)])
def test_frozen_norms_of_a_library_body(override, eps):
    """They hold their statistics and parameters still, with the epsilon of torchvision's detectors."""
    model = backbone("MobileNetV3-Large-FPN", "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0", *override).train()
    norms = [m for m in model.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(n.eps == eps and not n.training and not n.weight.requires_grad for n in norms)
    assert all(m.weight.requires_grad for m in model.body.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto"])
def test_bodies_of_timm(name):
    timm = pytest.importorskip("timm")
    ours = backbone(f"timm:{name}-FPN").eval()
    theirs = timm.create_model(name, features_only=True).eval()
    names = {f"net.{n}": value for n, value in theirs.state_dict().items() if f"net.{n}" in ours.body.state_dict()}
    ours.body.load_state_dict(names)
    x = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(ours.body(x), theirs(x)[-4:])
    stands = parts_that_stand(backbone("timm:resnet18-FPN", *TRAINED))
    assert stands == ["conv1", "bn1", "layer1"]


def test_timm_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm:resnet18-FPN needs the package timm"):
        backbone("timm:resnet18-FPN")


def tap_by_tap(x, offset, mask, weight, stride, dilation, groups, offset_groups):
    """Deformable convolution from its definition: bilinear samples, 0 outside, one at a time."""
    batch, channels, height, width = x.shape
    out = torch.zeros(batch, weight.shape[0], *offset.shape[2:], dtype=x.dtype)

    def sample(b, c, y, x0):
        total = 0.0
        for yy in (math.floor(y), math.floor(y) + 1):
            for xx in (math.floor(x0), math.floor(x0) + 1):
                if 0 <= yy < height and 0 <= xx < width:
                    total += (1 - abs(y - yy)) * (1 - abs(x0 - xx)) * x[b, c, yy, xx].item()
        return total

    for b, o, i, j in itertools.product(*map(range, out.shape)):
        for c, tap in itertools.product(range(channels // groups), range(9)):
            channel = o // (weight.shape[0] // groups) * (channels // groups) + c
            group = channel // (channels // offset_groups)
            dy, dx = offset[b, 18 * group + 2 * tap : 18 * group + 2 * tap + 2, i, j].tolist()
            y = i * stride - dilation + tap // 3 * dilation + dy
            x0 = j * stride - dilation + tap % 3 * dilation + dx
            factor = 1.0 if mask is None else mask[b, 9 * group + tap, i, j].item()
            out[b, o, i, j] += weight[o, c, tap // 3, tap % 3] * factor * sample(b, channel, y, x0)
    return out


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "offset_groups"), [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 4), (1, 1, 2, 1)]
)
def test_deformable_convolution_by_its_definition(modulated, stride, dilation, groups, offset_groups):
    spec = {"stride": stride, "dilation": dilation, "groups": groups, "offset_groups": offset_groups}
    layer = DeformConv2d(4, 6, **spec, modulated=modulated).double()
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "offset.weight": ((27 if modulated else 18) * offset_groups, 4, 3, 3),
        "offset.bias": ((27 if modulated else 18) * offset_groups,),
        "conv.weight": (6, 4 // groups, 3, 3),
    }
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.conv(x) / (2 if modulated else 1))  # as it begins
    nn.init.normal_(layer.offset.weight, std=0.3)
    nn.init.normal_(layer.offset.bias)
    with torch.no_grad():
        found = layer.offset(x)
        mask = found[:, 18 * offset_groups :].sigmoid() if modulated else None
        want = tap_by_tap(x, found[:, : 18 * offset_groups], mask, layer.weight, **spec)
    torch.testing.assert_close(layer(x), want)
    norm = OurFrozenBatchNorm2d(6, 1e-5).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    torch.testing.assert_close(conv_norm(layer, norm, x), norm(want))


@pytest.mark.parametrize("depth", [18, 50])
def test_deformable_stages_begin_as_plain_ones(depth):
    stages = "MODEL.RESNETS.STAGE_WITH_DCN (False,True,False,True) MODEL.RESNETS.DEFORMABLE_GROUPS 2".split()
    plain = ResNet(config(), depth)
    moved = ResNet(config(*stages), depth)
    deformable = {n.split(".")[0] for n, m in moved.named_modules() if isinstance(m, DeformConv2d)}
    assert deformable == {"layer2", "layer4"}
    state = {}
    for name, value in plain.state_dict().items():
        inside = name.split(".")[0] in deformable and ".conv2." in name
        state[name.replace(".conv2.", ".conv2.conv.") if inside else name] = value
    assert all(".conv2.offset." in name for name in moved.load_state_dict(state, strict=False).missing_keys)
    x = torch.randn(1, 3, 64, 64)
    for got, want in zip(moved(x), plain(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    sum(m.square().mean() for m in moved(x)).backward()
    assert all(p.grad is not None for p in moved.parameters())
    assert moved.layer2[0].conv2.offset.weight.grad.abs().sum() > 0


def test_synchronised_batch_norm_on_a_cpu(tmp_path):
    """Batch norm, also where there are processes, for which PyTorch's own raises."""
    names = [line.replace("BatchNorm", "SyncBatchNorm") for line in TRAINED]
    torch.manual_seed(0)
    ours = ResNet(config(*names), 18)
    torch.manual_seed(0)
    plain = ResNet(config(*TRAINED), 18)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in ours.modules()) == 20
    x = torch.randn(2, 3, 64, 64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for mode in (True, False):
            torch.testing.assert_close(ours.train(mode)(x), plain.train(mode)(x))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


KINDS = {
    "R-18-C4": (),
    "R-18-FPN": (*TRAINED, "MODEL.FPN.NORM", "BatchNorm"),
    "R-18-FPN-RETINANET": (
        *"MODEL.RESNETS.STAGE_WITH_DCN (False,True,True,True) MODEL.RESNETS.WITH_MODULATED_DCN True".split(),
        *"MODEL.RESNETS.DEFORMABLE_GROUPS 2".split(),
    ),
    "MobileNetV3-Large-FPN": (),
    "torchvision:convnext_tiny-FPN": (),
}


@pytest.mark.parametrize("name", KINDS)
def test_steps_trace_without_values(name):
    """In float32 and bfloat16; every parameter that trains gets a gradient."""
    model = backbone(name, *KINDS[name]).to(memory_format=torch.channels_last)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for precision in (torch.float32, torch.bfloat16):
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            model.zero_grad()
            x = torch.empty(2, 3, 64, 96).to(memory_format=torch.channels_last)
            maps = model.train()(x)
            assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
            sum(m.float().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_in_bfloat16(modulated):
    layer = DeformConv2d(8, 8, modulated=modulated)
    nn.init.normal_(layer.offset.bias)
    x = torch.randn(2, 8, 12, 12)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert (got - want).norm() < 0.02 * want.norm()


def test_unknown_names_list_what_there_is():
    with pytest.raises(ConfigError, match=r"CONV_BODY is 'R-51-FPN'.*R-50-FPN"):
        build_backbone(config("MODEL.BACKBONE.CONV_BODY", "R-51-FPN"))
    with pytest.raises(ConfigError, match=r"TRANS_FUNC asks for the norm 'Bottleneck'.*GN"):
        ResNet(config("MODEL.RESNETS.TRANS_FUNC", "Bottleneck"), 18)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1(beta):
    error = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(1, 10, 4).requires_grad_()
    positive = torch.arange(10)[None] < 7
    got = smooth_l1(error, positive, beta)
    want = nn.functional.smooth_l1_loss(error[:, :7], torch.zeros(1, 7, 4).double(), beta=beta, reduction="none")
    torch.testing.assert_close(got[:, :7], want)
    assert (got[:, 7:] == 0).all()
    spoiled = torch.where(positive[..., None], error.detach(), torch.inf).requires_grad_()
    smooth_l1(spoiled, positive, beta).sum().backward()
    assert spoiled.grad.isfinite().all()
