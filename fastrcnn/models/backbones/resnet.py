"""ResNet and ResNeXt bodies, with the names of maskrcnn-benchmark's state dict."""

from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.layers import FrozenBatchNorm2d, conv, conv_norm, group_norm

Norm = Callable[[int], nn.Module]
# depth -> (block, blocks per stage)
DEPTHS = {
    18: ("Basic", (2, 2, 2, 2)),
    34: ("Basic", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
}


def _norm(cfg: Any, key: str) -> Norm:
    """The norm that MODEL.RESNETS.TRANS_FUNC or STEM_FUNC names by its ending."""
    name = getattr(cfg.MODEL.RESNETS, key)
    prefix = {"TRANS_FUNC": "BottleneckWith", "STEM_FUNC": "StemWith"}[key]
    eps = conventions_of(cfg).frozen_bn_eps
    norms: dict[str, Norm] = {
        "FixedBatchNorm": lambda channels: FrozenBatchNorm2d(channels, eps),
        "GN": lambda channels: group_norm(channels, cfg),
        "BatchNorm": nn.BatchNorm2d,
    }
    if name.removeprefix(prefix) not in norms:
        known = ", ".join(prefix + n for n in norms)
        raise ConfigError(f"MODEL.RESNETS.{key} is {name!r}; it must be one of {known}")
    return norms[name.removeprefix(prefix)]


class Stem(nn.Module):
    """7×7 convolution with stride 2, norm, ReLU, 3×3 max pooling with stride 2."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.conv1 = conv(3, channels, 7, stride=2, bias=False)
        self.bn1 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(conv_norm(self.conv1, self.bn1, x)), 3, 2, 1)


class _Block(nn.Module):
    """relu(branch + x), with a 1×1 convolution on x where the shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm):
        super().__init__()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def join(self, branch: Tensor, x: Tensor) -> Tensor:
        return F.relu_(branch.add_(x if self.downsample is None else conv_norm(*self.downsample, x)))


class Basic(_Block):
    """Two 3×3 convolutions; the stride is on the first."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, norm: Norm, **_: Any):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = conv(in_channels, width, 3, stride=stride, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, out_channels, 3, bias=False)
        self.bn2 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu_(conv_norm(self.conv1, self.bn1, x))
        return self.join(conv_norm(self.conv2, self.bn2, branch), x)


class Bottleneck(_Block):
    """1×1, grouped 3×3, 1×1; the stride is on the first 1×1 (MSRA's weights) or on the 3×3 (torchvision's)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        norm: Norm,
        *,
        groups: int,
        stride_in_1x1: bool,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=second, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu_(conv_norm(self.conv1, self.bn1, x))
        branch = F.relu_(conv_norm(self.conv2, self.bn2, branch))
        return self.join(conv_norm(self.conv3, self.bn3, branch), x)


class ResNet(nn.Module):
    """[B, 3, H, W] -> the outputs of the four stages, strides 4, 8, 16, 32; `channels` lists their channels.

    MODEL.RESNETS.WIDTH_PER_GROUP sets the width of the first stage, doubled at each later one; RES2_OUT_CHANNELS the
    output of the first bottleneck stage (basic blocks put out their width).
    """

    def __init__(self, cfg: Any, depth: int):
        super().__init__()
        spec = cfg.MODEL.RESNETS
        if any(spec.STAGE_WITH_DCN):
            raise ConfigError("MODEL.RESNETS.STAGE_WITH_DCN: deformable convolution is not available")
        kind, counts = DEPTHS[depth]
        if kind == "Basic" and spec.NUM_GROUPS != 1:
            raise ConfigError(f"MODEL.RESNETS.NUM_GROUPS is {spec.NUM_GROUPS}; the blocks of R-{depth} have no groups")
        norm = _norm(cfg, "TRANS_FUNC")
        self.stem = Stem(spec.STEM_OUT_CHANNELS, _norm(cfg, "STEM_FUNC"))
        self.channels: list[int] = []
        in_channels = spec.STEM_OUT_CHANNELS
        for stage, count in enumerate(counts):
            width = spec.NUM_GROUPS * spec.WIDTH_PER_GROUP * 2**stage
            out_channels = width if kind == "Basic" else spec.RES2_OUT_CHANNELS * 2**stage
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    (Basic if kind == "Basic" else Bottleneck)(
                        in_channels,
                        width,
                        out_channels,
                        stride,
                        norm,
                        groups=spec.NUM_GROUPS,
                        stride_in_1x1=spec.STRIDE_IN_1X1,
                    )
                )
                in_channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(out_channels)
        self._freeze(cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT)

    def _freeze(self, at: int) -> None:
        """at = k freezes the stem and the stages before layer k; 0 or less freezes nothing."""
        if at > 5:
            raise ConfigError(f"MODEL.BACKBONE.FREEZE_CONV_BODY_AT is {at}; a ResNet has 5 parts")
        parts = [self.stem, self.layer1, self.layer2, self.layer3, self.layer4]
        self._frozen = parts[: max(at, 0)]
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode, so that the statistics of batch norm do not move either."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features
