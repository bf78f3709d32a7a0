"""Building blocks that several parts of a model share."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from fastrcnn.config import ConfigError, conventions_of


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants; `conv_norm` folds it into its convolution."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = scale_and_shift(self)
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that can learn from some rows alone: `valid`, bool [N], while `of_rows` sets it."""

    valid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(stand_in(x, self.valid) if self.training and self.valid is not None else x)


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm with the statistics of all processes on GPUs; PyTorch has none on CPUs, where each process has its own
    statistics. `valid`: as of `BatchNorm2d`."""

    valid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.valid is not None:
            x = stand_in(x, self.valid)
        return nn.BatchNorm2d.forward(self, x) if x.device.type == "cpu" else super().forward(x)


def of_rows(module: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    """module(x) of x [N, ...], in which batch norm that learns has the statistics of the valid rows alone: bool, N in
    all. In a mask head most slots are empty."""
    norms = [m for m in module.modules() if isinstance(m, (BatchNorm2d, SyncBatchNorm))]
    for norm in norms:
        norm.valid = valid.flatten()
    try:
        return module(x)
    finally:
        for norm in norms:
            norm.valid = None


def stand_in(x: Tensor, valid: Tensor) -> Tensor:
    """x [N, C, h, w] with other values in the rows that are not valid, bool [N], such that mean and variance of a
    channel over all rows are those over the valid ones, and so are their gradients. Maps of one cell stay as they
    are."""
    cells = x.shape[2] * x.shape[3]
    if cells == 1:
        return x
    chosen, wide = valid[:, None, None, None], widen(x)
    count = (valid.sum() * cells).clamp(min=1)
    mean = torch.where(chosen, wide, 0).sum((0, 2, 3), keepdim=True) / count
    variance = torch.where(chosen, wide - mean, 0).square().sum((0, 2, 3), keepdim=True) / count
    spread = torch.linspace(-1, 1, cells, dtype=wide.dtype, device=x.device).view(x.shape[2:])
    spread = spread / spread.square().mean().sqrt()
    deviation = variance.clamp(min=1e-20).sqrt()  # the root has no gradient at 0
    return torch.where(chosen, x, (mean + deviation * spread).to(x.dtype))


class DeformConv2d(nn.Module):
    """3×3 convolution whose nine taps move, by offsets that another convolution computes (Dai et al., 2017); with
    `modulated`, each is weighted by a mask between 0 and 1 too (Zhu et al., 2018).

    The channels are divided into `offset_groups`, each with taps of its own. `offset` gives 18 channels per group, (dy,
    dx) of tap after tap in rows, then, with `modulated`, 9 mask logits per group. It begins at zero, which is a plain
    convolution, halved with `modulated`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
    ):
        super().__init__()
        if in_channels % offset_groups:
            raise ConfigError(
                f"MODEL.RESNETS.DEFORMABLE_GROUPS: {in_channels} channels do not divide into {offset_groups} groups"
            )
        self.moves = 18 * offset_groups
        channels = self.moves + 9 * offset_groups * modulated
        self.offset = conv(in_channels, channels, 3, stride=stride, dilation=dilation)
        nn.init.zeros_(self.offset.weight)
        self.conv = conv(in_channels, out_channels, 3, stride=stride, dilation=dilation, groups=groups, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]."""
        return self.convolve(x, self.weight, None)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another weight and bias."""
        dtype = x.dtype
        offset = self.offset(x)
        mask = offset[:, self.moves :].sigmoid() if offset.shape[1] > self.moves else None
        # torchvision has no half-precision implementation for every device
        x, offset, mask, weight, bias = (None if t is None else widen(t) for t in (x, offset, mask, weight, bias))
        layer = self.conv
        moved = deform_conv2d(
            x, offset[:, : self.moves], weight, bias, layer.stride, layer.padding, layer.dilation, mask
        )
        return moved.to(dtype)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The frozen or batch norm with constant statistics as x · scale + shift, each [C]."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def conv_norm(conv: nn.Conv2d | DeformConv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); a norm with constant statistics costs no pass over the activations, as weight · scale and a bias.

    The product is differentiable, so it serves training as well.
    """
    trained = isinstance(norm, (nn.BatchNorm2d, SyncBatchNorm))
    if not (isinstance(norm, FrozenBatchNorm2d) or (trained and not norm.training)):
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    if isinstance(conv, DeformConv2d):
        return conv.convolve(x, weight, shift)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def make_norm(name: str, channels: int, cfg: Any, key: str) -> nn.Module:
    """The norm of that name; ConfigError, which names the config key `key`, for another."""
    norms: dict[str, Callable[[], nn.Module]] = {
        "FixedBatchNorm": lambda: FrozenBatchNorm2d(channels, conventions_of(cfg).frozen_bn_eps),
        "BatchNorm": lambda: BatchNorm2d(channels),
        "SyncBatchNorm": lambda: SyncBatchNorm(channels),
        "GN": lambda: group_norm(channels, cfg),
    }
    if name not in norms:
        raise ConfigError(f"{key} asks for the norm {name!r}; it must be one of {', '.join(norms)}")
    return norms[name]()


def norm_name(spec: Any) -> str:
    """The norm that the keys NORM and USE_GN of a section of the config ask for, "" for none."""
    return spec.NORM or ("GN" if spec.USE_GN else "")


def group_norm(channels: int, cfg: Any) -> nn.GroupNorm:
    """MODEL.GROUP_NORM: NUM_GROUPS groups, or groups of DIM_PER_GP channels where that is positive."""
    spec = cfg.MODEL.GROUP_NORM
    groups = channels // spec.DIM_PER_GP if spec.DIM_PER_GP > 0 else spec.NUM_GROUPS
    if groups < 1 or channels % groups:
        raise ConfigError(f"MODEL.GROUP_NORM: {channels} channels do not divide into {groups} groups")
    return nn.GroupNorm(groups, channels, spec.EPSILON)


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    init: str = "caffe2",
) -> nn.Conv2d:
    """Convolution with "same" padding. init: "caffe2" (kaiming_uniform, a = 1, which is XavierFill), "msra"
    (kaiming_normal over the outputs, for a ReLU) or "small" (normal, deviation 0.01)."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=bias)
    if init == "caffe2":
        nn.init.kaiming_uniform_(layer.weight, a=1)
    elif init == "msra":
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=0.01)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear(in_features: int, out_features: int, std: float | None = None, bias: bool = True) -> nn.Linear:
    """Fully connected layer: normal with deviation std, or kaiming_uniform with a = 1; bias 0."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    if std is None:
        nn.init.kaiming_uniform_(layer.weight, a=1)
    else:
        nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def conv_stack(channels: list[int], cfg: Any, norm: str = "", dilation: int = 1) -> list[nn.Module]:
    """3×3 convolutions channels[0] → channels[1] → …, each with the norm of that name (none for ""), and a ReLU."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        layers.append(conv(fan_in, fan_out, 3, dilation=dilation, bias=not norm, init="msra"))
        if norm:
            layers.append(make_norm(norm, fan_out, cfg, "NORM of a head"))
        layers.append(nn.ReLU(inplace=True))
    return layers


def smooth_l1(error: Tensor, positive: Tensor, beta: float) -> Tensor:
    """error [B, K, 4], positive bool [B, K] -> 0.5 e²/β below β, |e| − 0.5 β above (|e| for β = 0), 0 if not positive.

    Masked before the square: the codes of empty slots may be infinite, and 0 · ∞ would spoil the gradient.
    """
    size = torch.where(positive[..., None], error, 0).abs()
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def widen(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, for what follows the network: losses, probabilities and boxes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Σ value·weight / Σ weight; 0 where all weights are 0. The shape is fixed, so no sync is needed."""
    return (value * weight).sum() / weight.sum().clamp(min=1)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, N, ...], index int64 [B, K] -> [B, K, ...]."""
    index = index.reshape(*index.shape, *([1] * (rows.ndim - 2))).expand(*index.shape, *rows.shape[2:])
    return rows.gather(1, index)
