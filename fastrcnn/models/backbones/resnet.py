"""ResNet and ResNeXt bodies, with the names of maskrcnn-benchmark's state dict."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones.backbone import TOPS, Backbone
from fastrcnn.models.layers import DeformConv2d, conv, conv_norm, make_norm
from fastrcnn.models.registry import BACKBONES

Make = Callable[..., nn.Module]
# depth -> (block, blocks per stage)
DEPTHS = {
    18: ("Basic", (2, 2, 2, 2)),
    34: ("Basic", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
}


def norm_of(cfg: Any, key: str) -> Callable[[int], nn.Module]:
    """The norm that MODEL.RESNETS.TRANS_FUNC or STEM_FUNC names by its ending, as a function of the channels."""
    name = getattr(cfg.MODEL.RESNETS, key).removeprefix({"TRANS_FUNC": "BottleneckWith", "STEM_FUNC": "StemWith"}[key])
    return lambda channels: make_norm(name, channels, cfg, f"MODEL.RESNETS.{key}")


class Stem(nn.Module):
    """7×7 convolution with stride 2, norm, ReLU, 3×3 max pooling with stride 2."""

    def __init__(self, channels: int, norm: Make):
        super().__init__()
        self.conv1 = conv(3, channels, 7, stride=2, bias=False)
        self.bn1 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(conv_norm(self.conv1, self.bn1, x)), 3, 2, 1)


class _Block(nn.Module):
    """relu(branch + x), with a 1×1 convolution on x where the shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Make):
        super().__init__()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        return F.relu_(branch.add_(x if self.downsample is None else conv_norm(*self.downsample, x)))


class Basic(_Block):
    """Two 3×3 convolutions; the stride is on the first. `inner` makes the second."""

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, dilation: int, norm: Make, inner: Make
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = conv(in_channels, width, 3, stride=stride, dilation=dilation, bias=False)
        self.bn1 = norm(width)
        self.conv2 = inner(width, out_channels, dilation=dilation)
        self.bn2 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu_(conv_norm(self.conv1, self.bn1, x))
        return self.join(conv_norm(self.conv2, self.bn2, branch), x)


class Bottleneck(_Block):
    """1×1, 3×3, 1×1; the stride is on the first 1×1 (MSRA's weights) or on the 3×3 (torchvision's), which `inner`
    makes."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        dilation: int,
        norm: Make,
        inner: Make,
        stride_in_1x1: bool,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = inner(width, width, stride=second, dilation=dilation)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu_(conv_norm(self.conv1, self.bn1, x))
        branch = F.relu_(conv_norm(self.conv2, self.bn2, branch))
        return self.join(conv_norm(self.conv3, self.bn3, branch), x)


def make_stage(cfg: Any, depth: int, stage: int, in_channels: int) -> tuple[nn.Sequential, int]:
    """The blocks of layer1 … layer4 of a ResNet, and the channels that they put out.

    MODEL.RESNETS.WIDTH_PER_GROUP sets the width of the first stage, doubled at each later one; RES2_OUT_CHANNELS the
    output of the first bottleneck stage (basic blocks put out their width).
    """
    spec = cfg.MODEL.RESNETS
    kind, counts = DEPTHS[depth]
    if kind == "Basic" and spec.NUM_GROUPS != 1:
        raise ConfigError(f"MODEL.RESNETS.NUM_GROUPS is {spec.NUM_GROUPS}; the blocks of R-{depth} have no groups")
    width = spec.NUM_GROUPS * spec.WIDTH_PER_GROUP * 2 ** (stage - 1)
    out_channels = width if kind == "Basic" else spec.RES2_OUT_CHANNELS * 2 ** (stage - 1)
    if spec.STAGE_WITH_DCN[stage - 1]:
        inner: Make = partial(
            DeformConv2d,
            groups=spec.NUM_GROUPS,
            offset_groups=spec.DEFORMABLE_GROUPS,
            modulated=spec.WITH_MODULATED_DCN,
        )
    else:
        inner = partial(conv, kernel=3, groups=spec.NUM_GROUPS, bias=False)
    block: Make = Basic if kind == "Basic" else partial(Bottleneck, stride_in_1x1=spec.STRIDE_IN_1X1)
    dilation = spec.RES5_DILATION if stage == 4 else 1
    blocks = []
    for index in range(counts[stage - 1]):
        stride = 2 if stage > 1 and index == 0 and dilation == 1 else 1
        blocks.append(block(in_channels, width, out_channels, stride, dilation, norm_of(cfg, "TRANS_FUNC"), inner))
        in_channels = out_channels
    return nn.Sequential(*blocks), out_channels


class ResNet(nn.Module):
    """[B, 3, H, W] -> the outputs of the stages up to `last`, strides 4, 8, 16, 32; `channels` lists their channels."""

    def __init__(self, cfg: Any, depth: int, last: int = 4):
        super().__init__()
        channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
        self.stem = Stem(channels, norm_of(cfg, "STEM_FUNC"))
        self.channels: list[int] = []
        for stage in range(1, last + 1):
            blocks, channels = make_stage(cfg, depth, stage, channels)
            self.add_module(f"layer{stage}", blocks)
            self.channels.append(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for stage in range(1, len(self.channels) + 1):
            x = getattr(self, f"layer{stage}")(x)
            features.append(x)
        return features


class ResNetHead(nn.Module):
    """The last stage of a ResNet, layer4, as the head of a C4 model: [N, in_channels, side, side] -> [N, out_channels,
    side / 2, side / 2], or of the same side with MODEL.RESNETS.RES5_DILATION.

    Of the depth that MODEL.BACKBONE.CONV_BODY names, of 50 for other bodies; all bottleneck ResNets have the same.
    """

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        match = re.match(r"R-(\d+)-", cfg.MODEL.BACKBONE.CONV_BODY)
        self.layer4, self.out_channels = make_stage(cfg, int(match[1]) if match else 50, 4, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x)


def _build(cfg: Any, depth: int, top: str) -> Backbone:
    body = ResNet(cfg, depth, TOPS[top])
    return Backbone(cfg, body, [[part] for part in body.children()], top)


for _depth in DEPTHS:
    for _top in TOPS:
        BACKBONES.register(f"R-{_depth}-{_top}")(partial(_build, depth=_depth, top=_top))
