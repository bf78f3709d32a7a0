"""Parts of a model by name, so that new ones plug in without a change to this package (docs/extending.md)."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from fastrcnn.config import ConfigError

Part = TypeVar("Part", bound=Callable[..., Any])


class Registry(dict[str, Callable[..., Any]]):
    """Name → class or factory function."""

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that files its class or function under `name`; ValueError if the name is taken."""

        def file(part: Part) -> Part:
            if name in self:
                raise ValueError(f"{name!r} is registered already, as {self[name]}")
            self[name] = part
            return part

        return file

    def find(self, name: str, key: str) -> Callable[..., Any]:
        """The part that the config key `key` names; ConfigError, with the names there are, for another."""
        if name not in self:
            raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join(self)}")
        return self[name]


# factory(cfg) -> module with `out_channels` (int, of every map), [B, 3, H, W] -> list of maps, finest first
BACKBONES = Registry()
# class(cfg, in_channels, anchors per place): L maps -> L × [B, A, h, w] logits, L × [B, 4A, h, w] deltas
RPN_HEADS = Registry()
# class(cfg, in_channels) with `out_channels`: pooled [N, C, side, side] -> what the predictor takes
ROI_BOX_FEATURE_EXTRACTORS = Registry()
ROI_MASK_FEATURE_EXTRACTORS = Registry()
ROI_KEYPOINT_FEATURE_EXTRACTORS = Registry()
# class(cfg, in_channels)
ROI_BOX_PREDICTOR = Registry()
ROI_MASK_PREDICTOR = Registry()
ROI_KEYPOINT_PREDICTOR = Registry()
# class(cfg): (images, targets) -> losses or detections
META_ARCHITECTURES = Registry()


def import_parts(cfg: Any) -> None:
    """Import the modules that MODEL.IMPORT names, which register their parts; ConfigError for one that cannot be."""
    for name in cfg.MODEL.IMPORT:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"MODEL.IMPORT names {name!r}, which cannot be imported: {error}") from error
