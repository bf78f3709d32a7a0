"""Feature pyramid network (Lin et al., 2017), with the names of maskrcnn-benchmark's state dict."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.layers import conv, group_norm


def _lateral(cfg: Any, in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    layer = conv(in_channels, out_channels, kernel, bias=not cfg.MODEL.FPN.USE_GN)
    extra: list[nn.Module] = []
    if cfg.MODEL.FPN.USE_GN:
        extra.append(group_norm(out_channels, cfg))
    if cfg.MODEL.FPN.USE_RELU:
        extra.append(nn.ReLU(inplace=True))
    return nn.Sequential(layer, *extra) if extra else layer


class FPN(nn.Module):
    """Body outputs, finest first -> as many maps with `out_channels` channels, and one of half the coarsest size."""

    def __init__(self, cfg: Any, in_channels: list[int], out_channels: int):
        super().__init__()
        self.levels = len(in_channels)
        for level, channels in enumerate(in_channels, 1):
            self.add_module(f"fpn_inner{level}", _lateral(cfg, channels, out_channels, 1))
            self.add_module(f"fpn_layer{level}", _lateral(cfg, out_channels, out_channels, 3))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """L × [B, C_l, h, w] of any sizes -> L + 1 × [B, out_channels, h, w]."""
        top_down = None
        outputs: list[Tensor] = []
        for level in range(self.levels, 0, -1):
            lateral = getattr(self, f"fpn_inner{level}")(features[level - 1])
            if top_down is not None:
                # to the size of the finer map, so that no side needs to be a multiple of 32
                lateral = lateral + F.interpolate(top_down, size=lateral.shape[-2:], mode="nearest")
            top_down = lateral
            outputs.insert(0, getattr(self, f"fpn_layer{level}")(top_down))
        outputs.append(F.max_pool2d(outputs[-1], 1, 2))
        return outputs
