"""ResNets and the pyramid against torchvision's."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.backbones import build_backbone
from fastrcnn.models.backbones.fpn import FPN
from fastrcnn.models.backbones.resnet import ResNet
from fastrcnn.models.layers import FrozenBatchNorm2d as OurFrozenBatchNorm2d
from fastrcnn.models.layers import conv_norm, smooth_l1

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
    ours = ResNet(config(*names, "MODEL.BACKBONE.FREEZE_CONV_BODY_AT", "0", *overrides), depth)
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


@pytest.mark.parametrize("at", [0, 2, 3])
def test_freezing(at):
    body = ResNet(config("MODEL.BACKBONE.FREEZE_CONV_BODY_AT", str(at)), 18)
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == set(["stem", "layer1", "layer2", "layer3"][:at])


def test_batch_norm_of_frozen_parts_stands_still():
    overrides = "MODEL.RESNETS.TRANS_FUNC BottleneckWithBatchNorm MODEL.RESNETS.STEM_FUNC StemWithBatchNorm".split()
    body = ResNet(config(*overrides), 18).train()
    before = {name: buffer.clone() for name, buffer in body.named_buffers()}
    body(torch.randn(2, 3, 64, 64))
    moved = {name.split(".")[0] for name, buffer in body.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


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


def test_pyramid_equals_torchvision():
    channels = [8, 16, 24, 32]
    ours = FPN(config(), channels, 12)
    theirs = FeaturePyramidNetwork(channels, 12, extra_blocks=LastLevelMaxPool())
    state = {}
    for k in range(4):
        for name, our_name in (("inner_blocks", "fpn_inner"), ("layer_blocks", "fpn_layer")):
            for part in ("weight", "bias"):
                state[f"{our_name}{k + 1}.{part}"] = theirs.state_dict()[f"{name}.{k}.0.{part}"]
    ours.load_state_dict(state)
    # sides that are no multiples of 32
    features = [torch.randn(2, c, 50 // 2**k, 37 // 2**k) for k, c in enumerate(channels)]
    want = theirs({str(k): f for k, f in enumerate(features)})
    for got, expected in zip(ours(features), want.values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_features_are_channels_last():
    overrides = "MODEL.BACKBONE.CONV_BODY R-18-FPN MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16".split()
    backbone = build_backbone(config(*overrides))
    backbone.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in backbone(x))


def test_unknown_names_list_what_there_is():
    with pytest.raises(ConfigError, match=r"CONV_BODY is 'R-51-FPN'.*R-50-FPN"):
        build_backbone(config("MODEL.BACKBONE.CONV_BODY", "R-51-FPN"))
    with pytest.raises(ConfigError, match=r"TRANS_FUNC is 'Bottleneck'.*BottleneckWithGN"):
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
