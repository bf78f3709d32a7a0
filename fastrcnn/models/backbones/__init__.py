"""Backbones: [B, 3, H, W] images to a list of feature maps, finest first."""

from typing import Any

from torch import nn

from fastrcnn.models.backbones import fbnet, resnet  # noqa: F401  (register their parts)
from fastrcnn.models.backbones.library import library_backbone
from fastrcnn.models.registry import BACKBONES


def build_backbone(cfg: Any) -> nn.Module:
    """The backbone that MODEL.BACKBONE.CONV_BODY names; ConfigError, with the names there are, for another."""
    name = cfg.MODEL.BACKBONE.CONV_BODY
    if ":" in name:
        return library_backbone(cfg)
    return BACKBONES.find(name, "MODEL.BACKBONE.CONV_BODY")(cfg)
