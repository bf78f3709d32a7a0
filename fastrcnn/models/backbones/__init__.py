"""Backbones: [B, 3, H, W] images to a list of feature maps, finest first."""

import re
from typing import Any

from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones.fpn import FPN
from fastrcnn.models.backbones.resnet import DEPTHS, ResNet


class Backbone(nn.Module):
    """body and fpn; every map has out_channels channels."""

    def __init__(self, cfg: Any, depth: int):
        super().__init__()
        self.body = ResNet(cfg, depth)
        self.out_channels = cfg.MODEL.RESNETS.BACKBONE_OUT_CHANNELS
        self.fpn = FPN(cfg, self.body.channels, self.out_channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> 5 × [B, out_channels, h, w], strides 4, 8, 16, 32, 64."""
        return self.fpn(self.body(pixels))


def build_backbone(cfg: Any) -> Backbone:
    """The backbone that MODEL.BACKBONE.CONV_BODY names; ConfigError, with the names there are, for another."""
    name = cfg.MODEL.BACKBONE.CONV_BODY
    match = re.fullmatch(r"R-(\d+)-FPN", name)
    if match is None or int(match[1]) not in DEPTHS:
        known = ", ".join(f"R-{depth}-FPN" for depth in DEPTHS)
        raise ConfigError(f"MODEL.BACKBONE.CONV_BODY is {name!r}; it must be one of {known}")
    return Backbone(cfg, int(match[1]))
