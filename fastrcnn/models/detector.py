"""The whole detector, and how a config becomes one."""

from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones import build_backbone
from fastrcnn.models.registry import META_ARCHITECTURES, import_parts
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.roi_heads import ROIHeads
from fastrcnn.models.rpn import RPN
from fastrcnn.structures import DetectionBatch, ImageBatch, TargetBatch


@META_ARCHITECTURES.register("GeneralizedRCNN")
class GeneralizedRCNN(nn.Module):
    """Backbone, region proposal network, region heads; without the heads with MODEL.RPN_ONLY, and with
    MODEL.RETINANET_ON a RetinaNet in the place of both.

    No step between the images and the detections asks the device a question: every shape follows from the shapes of
    the inputs.
    """

    def __init__(self, cfg: Any):
        super().__init__()
        model = cfg.MODEL
        self.conventions = model.CONVENTIONS
        self.backbone = build_backbone(cfg)
        self.rpn = (RetinaNet if model.RETINANET_ON else RPN)(cfg, self.backbone.out_channels)
        alone = "RETINANET_ON" if model.RETINANET_ON else "RPN_ONLY" if model.RPN_ONLY else None
        for key in ("MASK_ON", "KEYPOINT_ON"):
            if alone and getattr(model, key):
                raise ConfigError(f"MODEL.{key} needs heads on regions, which MODEL.{alone} leaves out")
        self.roi_heads = None if alone else ROIHeads(cfg, self.backbone.out_channels)

    def forward(self, images: ImageBatch, targets: TargetBatch | None = None) -> dict[str, Tensor] | DetectionBatch:
        """Training: a dict of scalar losses, their sum is to be minimised (ValueError without targets).
        Evaluation: the detections in the frame of the padded batch; with MODEL.RPN_ONLY proposals, without labels."""
        if self.training and targets is None:
            raise ValueError("a model in training mode needs targets; call model.eval() for detections")
        if not self.training:
            return self._detect(images)
        features = self.backbone(images.pixels)
        if self.roi_heads is None:
            return self.rpn.losses(images, features, targets)
        proposals, losses = self.rpn(images, features, targets)
        return losses | self.roi_heads.losses(features, images, proposals, targets)

    @torch.no_grad()
    def _detect(self, images: ImageBatch) -> DetectionBatch:
        features = self.backbone(images.pixels)
        if self.roi_heads is None:
            return self.rpn.detect(images, features)
        proposals, _ = self.rpn(images, features)
        return self.roi_heads.detect(features, images, proposals)


def resolve_device(name: str) -> torch.device:
    """MODEL.DEVICE as a device: "auto" is the GPU where there is one; a GPU that is not there is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {name!r}, which is no device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"MODEL.DEVICE is {name!r}, but no GPU is available here; use MODEL.DEVICE cpu")
    return device


def build_model(cfg: Any) -> nn.Module:
    """The model of a config, in channels_last, on MODEL.DEVICE (or on "meta" under `torch.device("meta")`).

    ConfigError, naming the key, for what is not there: a model family, a name, a device.
    """
    import_parts(cfg)
    build = META_ARCHITECTURES.find(cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    model = build(cfg).to(memory_format=torch.channels_last)
    if next(model.parameters()).is_meta:
        return model
    return model.to(resolve_device(cfg.MODEL.DEVICE))
