"""What every backbone is: a body, perhaps with a pyramid on top, the first parts of it frozen."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones.fpn import FPN

# ending of a backbone's name -> the last stage that it needs: stage k gives the map of stride 2 ** (k + 1)
TOPS = {"C4": 3, "C5": 4, "FPN": 4, "FPN-RETINANET": 4}


class Backbone(nn.Module):
    """[B, 3, H, W] -> maps of out_channels channels, finest first: the last of the body's, or those of its pyramid.

    body: gives a list of maps, finest first, whose channels `body.channels` lists. parts: its layers in the order of
    MODEL.BACKBONE.FREEZE_CONV_BODY_AT, each a list of modules. top: a key of TOPS. frozen: modules that never train.
    """

    def __init__(
        self, cfg: Any, body: nn.Module, parts: list[list[nn.Module]], top: str, frozen: Sequence[nn.Module] = ()
    ):
        super().__init__()
        self.body = body
        self.fpn = FPN(cfg, body.channels, top == "FPN-RETINANET") if top.startswith("FPN") else None
        self.out_channels: int = body.channels[-1] if self.fpn is None else self.fpn.out_channels
        at = cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT
        if at > len(parts):
            raise ConfigError(
                f"MODEL.BACKBONE.FREEZE_CONV_BODY_AT is {at}; {cfg.MODEL.BACKBONE.CONV_BODY} has {len(parts)} parts"
            )
        self._frozen = [*frozen, *(module for part in parts[: max(at, 0)] for module in part)]
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode, so that the statistics of batch norm do not move either."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.body(pixels)
        return maps[-1:] if self.fpn is None else self.fpn(maps)
