"""Building blocks that several parts of a model share."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.config import ConfigError


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


def scale_and_shift(norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The norm with constant statistics as x · scale + shift, each [C]."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); a norm with constant statistics costs no pass over the activations, as weight · scale and a bias.

    The product is differentiable, so it serves training as well.
    """
    constant = isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and not norm.training)
    if not constant:
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


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


def conv_stack(channels: list[int], cfg: Any, use_gn: bool, dilation: int = 1) -> list[nn.Module]:
    """3×3 convolutions channels[0] → channels[1] → …, each with group norm where asked for, and a ReLU."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        layers.append(conv(fan_in, fan_out, 3, dilation=dilation, bias=not use_gn, init="msra"))
        if use_gn:
            layers.append(group_norm(fan_out, cfg))
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
