"""Blocks of FBNet (Wu et al., 2019), by the names that architectures use, with the names of maskrcnn-benchmark's state
dict."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.layers import conv, conv_norm, make_norm

NORMS = {"bn": "BatchNorm", "af": "FixedBatchNorm", "gn": "GN"}


def round_channels(channels: int, divisor: int) -> int:
    """The nearest multiple of divisor, the greater of two, at least one; every number is taken where divisor is 0."""
    divisor = max(divisor, 1)
    return max((2 * channels + divisor) // (2 * divisor), 1) * divisor


class Style(NamedTuple):
    """What MODEL.FBNET says about every block. norm: makes one, of so many channels."""

    norm: Callable[[int], nn.Module]
    divisor: int
    dw_skip_bn: bool
    dw_skip_relu: bool


def style_of(cfg: Any, norm_key: str = "BN_TYPE") -> Style:
    """norm_key: the key of MODEL.FBNET that names the norm: a key of NORMS, or empty for none."""
    spec = cfg.MODEL.FBNET
    name, key = getattr(spec, norm_key), f"MODEL.FBNET.{norm_key}"
    if name and name not in NORMS:
        raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join(NORMS)}, or empty")

    def norm(channels: int) -> nn.Module:
        return make_norm(NORMS[name], channels, cfg, key) if name else nn.Identity()

    return Style(norm, spec.WIDTH_DIVISOR, spec.DW_CONV_SKIP_BN, spec.DW_CONV_SKIP_RELU)


class ConvNorm(nn.Module):
    """Convolution without bias, named conv, norm, named bn, and perhaps a ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        norm: Callable[[int], nn.Module],
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ):
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False, init="msra")
        self.bn = norm(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm(self.conv, self.bn, x)
        return F.relu_(x) if self.relu else x


class SqueezeExcite(nn.Module):
    """Every channel times a factor between 0 and 1, which a small network computes of the means of all (Hu et al.,
    2018)."""

    def __init__(self, channels: int):
        super().__init__()
        middle = max(channels // 4, 8)
        layers = [conv(channels, middle, 1), nn.ReLU(inplace=True), conv(middle, channels, 1), nn.Sigmoid()]
        self.op = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.op(x)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, W], the same channels in another order: the first of each group, the second of each, …"""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class InvertedResidual(nn.Module):
    """1×1 to expansion × in_channels, kernel × kernel on each channel by itself, 1×1 to out_channels without ReLU.

    stride: of the middle; a negative one enlarges the map by so much before. groups: of both 1×1, with a shuffle of the
    channels between. cascade: two convolutions in the middle. se: squeeze-and-excitation at the end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float,
        stride: int,
        style: Style,
        kernel: int = 3,
        groups: int = 1,
        se: bool = False,
        cascade: bool = False,
    ):
        super().__init__()
        if kernel == 1 and stride > 1:
            raise ValueError(f"a block without depthwise convolution takes no stride {stride}")
        middle = round_channels(int(in_channels * expansion), style.divisor)
        self.groups = groups
        self.enlarge = max(-stride, 1)
        self.residual = stride == 1 and in_channels == out_channels
        self.pw = ConvNorm(in_channels, middle, 1, style.norm, groups=groups)

        def depthwise(stride: int, norm: bool = True, relu: bool = True) -> ConvNorm:
            make = style.norm if norm else nn.Identity
            return ConvNorm(middle, middle, kernel, make, stride=stride, groups=middle, relu=relu)

        stride, last = max(stride, 1), (not style.dw_skip_bn, not style.dw_skip_relu)
        if kernel == 1:
            self.dw: nn.Module = nn.Identity()
        elif cascade:
            self.dw = nn.Sequential(OrderedDict(dw1=depthwise(stride), dw2=depthwise(1, *last)))
        else:
            self.dw = depthwise(stride, *last)
        self.pwl = ConvNorm(middle, out_channels, 1, style.norm, groups=groups, relu=False)
        self.se4 = SqueezeExcite(out_channels) if se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw(x)
        if self.groups > 1:
            y = shuffle(y, self.groups)
        if self.enlarge > 1:
            y = F.interpolate(y, scale_factor=self.enlarge, mode="nearest")
        y = self.pwl(self.dw(y))
        return self.se4(y + x if self.residual else y)


class Chain(nn.Sequential):
    """Layers one after the other, and their input added to the result where the shapes allow."""

    def __init__(self, *layers: nn.Module, residual: bool):
        super().__init__(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x if self.residual else y


def basic_block(in_channels: int, out_channels: int, *, expansion: float, stride: int, style: Style) -> Chain:
    """Two 3×3 convolutions; the expansion plays no part."""
    return Chain(
        conv(in_channels, in_channels, 3, stride=stride, bias=False, init="msra"),
        style.norm(in_channels),
        nn.ReLU(inplace=True),
        conv(in_channels, out_channels, 3, bias=False, init="msra"),
        style.norm(out_channels),
        residual=stride == 1 and in_channels == out_channels,
    )


class Shift(nn.Module):
    """Each channel moved by one of the offsets of a 5×5 window, a 25th of them by each, those left over by none."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        share, rest = divmod(channels, 25)
        offsets = [offset for offset in range(25) for _ in range(share + rest * (offset == 12))]
        kernel = torch.zeros(channels, 25)
        kernel[torch.arange(channels), torch.tensor(offsets)] = 1
        self.register_buffer("kernel", kernel.reshape(channels, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), stride=self.stride, padding=2, groups=x.shape[1])


def shift_block(in_channels: int, out_channels: int, *, expansion: float, stride: int, style: Style) -> Chain:
    """An inverted residual whose middle shifts instead of convolving (Wu et al., 2018)."""
    middle = round_channels(int(in_channels * expansion), 8)
    return Chain(
        conv(in_channels, middle, 1, bias=False, init="msra"),
        style.norm(middle),
        nn.ReLU(inplace=True),
        Shift(middle, stride),
        conv(middle, out_channels, 1, bias=False, init="msra"),
        style.norm(out_channels),
        residual=stride == 1 and in_channels == out_channels,
    )


def skip(in_channels: int, out_channels: int, *, expansion: float, stride: int, style: Style) -> nn.Sequential:
    """Nothing, or a 1×1 convolution where the shapes differ; the expansion plays no part."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride != 1 or in_channels != out_channels:
        layers["conv"] = ConvNorm(in_channels, out_channels, 1, style.norm, stride=stride)
    return nn.Sequential(layers)


_EXPANSIONS: dict[str, dict[str, Any]] = {f"e{factor}": {"expansion": factor} for factor in (1, 3, 6)}
_SHUFFLES = {"s4": {"expansion": 4, "groups": 4}, "s2": {"expansion": 1, "groups": 2}}
# what follows "ir_" in a name -> the options of the inverted residual
_RESIDUALS: dict[str, dict[str, Any]] = {
    **{f"k{kernel}": {"kernel": kernel} for kernel in (1, 3, 5, 7)},
    **{
        f"k{kernel}_{name}{'_se' * se}": {"kernel": kernel, "se": se, **options}
        for kernel in (3, 5)
        for name, options in (_EXPANSIONS | _SHUFFLES).items()
        for se in (False, True)
    },
    **{f"k7_{name}": {"kernel": 7, **options} for name, options in _EXPANSIONS.items()},
    **{f"k{kernel}_sep": {"kernel": kernel, "cascade": True} for kernel in (3, 7)},
    **{f"k33_{name}": {"kernel": 3, "cascade": True, **options} for name, options in _EXPANSIONS.items()},
    **{f"k7_sep_{name}": {"kernel": 7, "cascade": True, **options} for name, options in _EXPANSIONS.items()},
}
# name -> what makes the block, and the options that the name stands for
PRIMITIVES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "skip": (skip, {}),
    "basic_block": (basic_block, {}),
    "shift_5x5": (shift_block, {}),
    "shuffle": (InvertedResidual, {"groups": 4}),
    **{f"ir_{suffix}": (InvertedResidual, options) for suffix, options in _RESIDUALS.items()},
}


def make_block(
    name: str, in_channels: int, out_channels: int, *, expansion: float, stride: int, style: Style
) -> nn.Module:
    """The block of that name; ConfigError for another name, or for channels or a stride that it cannot take."""
    if name not in PRIMITIVES:
        raise ConfigError(f"FBNet has no block {name!r}; it must be one of {', '.join(PRIMITIVES)}")
    make, options = PRIMITIVES[name]
    if stride == 0 or (stride < 0 and make is not InvertedResidual):
        raise ConfigError(f"the block {name} takes no stride {stride}")
    try:
        return make(in_channels, out_channels, **({"expansion": expansion, "stride": stride, "style": style} | options))
    except ValueError as error:
        raise ConfigError(f"the block {name}, {in_channels} to {out_channels} channels: {error}") from error
