"""Feature pyramid network (Lin et al., 2017), with the names of maskrcnn-benchmark's state dict."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.layers import conv, make_norm, norm_name


class LastLevelMaxPool(nn.Module):
    """One level more: every second value of the coarsest."""

    def forward(self, coarsest_input: Tensor, coarsest: Tensor) -> list[Tensor]:
        return [F.max_pool2d(coarsest, 1, 2)]


class LastLevelP6P7(nn.Module):
    """Two levels more, each by a 3×3 convolution with stride 2: P6 of C5, or of P5, and P7 of P6 (RetinaNet)."""

    def __init__(self, in_channels: int, out_channels: int, use_c5: bool):
        super().__init__()
        self.use_c5 = use_c5
        self.p6 = conv(in_channels if use_c5 else out_channels, out_channels, 3, stride=2)
        self.p7 = conv(out_channels, out_channels, 3, stride=2)

    def forward(self, coarsest_input: Tensor, coarsest: Tensor) -> list[Tensor]:
        p6 = self.p6(coarsest_input if self.use_c5 else coarsest)
        return [p6, self.p7(F.relu(p6))]


def _lateral(cfg: Any, in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    norm = norm_name(cfg.MODEL.FPN)
    layer = conv(in_channels, out_channels, kernel, bias=not norm)
    extra: list[nn.Module] = []
    if norm:
        extra.append(make_norm(norm, out_channels, cfg, "MODEL.FPN.NORM"))
    if cfg.MODEL.FPN.USE_RELU:
        extra.append(nn.ReLU(inplace=True))
    return nn.Sequential(layer, *extra) if extra else layer


class FPN(nn.Module):
    """Body outputs, finest first -> maps with MODEL.RESNETS.BACKBONE_OUT_CHANNELS channels, as many and those of the
    top: one of half the coarsest size, or RetinaNet's P6 and P7.

    RetinaNet's pyramid leaves the finest output out, so its names begin at fpn_inner2.
    """

    def __init__(self, cfg: Any, in_channels: list[int], retinanet: bool = False):
        super().__init__()
        self.out_channels = cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS
        self.levels = range(2 if retinanet else 1, len(in_channels) + 1)
        for level in self.levels:
            self.add_module(f"fpn_inner{level}", _lateral(cfg, in_channels[level - 1], self.out_channels, 1))
            self.add_module(f"fpn_layer{level}", _lateral(cfg, self.out_channels, self.out_channels, 3))
        if retinanet:
            self.top_blocks = LastLevelP6P7(in_channels[-1], self.out_channels, cfg.MODEL.RETINANET.USE_C5)
        else:
            self.top_blocks = LastLevelMaxPool()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """L × [B, C_l, h, w] of any sizes -> the pyramid, finest first, each [B, out_channels, h, w]."""
        top_down = None
        outputs: list[Tensor] = []
        for level in reversed(self.levels):
            lateral = getattr(self, f"fpn_inner{level}")(features[level - 1])
            if top_down is not None:
                # to the size of the finer map, so that no side needs to be a multiple of 32
                lateral = lateral + F.interpolate(top_down, size=lateral.shape[-2:], mode="nearest")
            top_down = lateral
            outputs.insert(0, getattr(self, f"fpn_layer{level}")(top_down))
        return outputs + self.top_blocks(features[-1], outputs[-1])
