"""The whole detector, and how a config becomes one."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.backbones import build_backbone
from fastrcnn.models.roi_heads import ROIHeads
from fastrcnn.models.rpn import RPN
from fastrcnn.structures import DetectionBatch, ImageBatch, TargetBatch


class GeneralizedRCNN(nn.Module):
    """Backbone, region proposal network, region heads.

    No step between the images and the detections asks the device a question: every shape follows from the shapes of
    the inputs.
    """

    def __init__(self, cfg: Any):
        super().__init__()
        self.conventions = cfg.MODEL.CONVENTIONS
        self.backbone = build_backbone(cfg)
        self.rpn = RPN(cfg, self.backbone.out_channels)
        self.roi_heads = ROIHeads(cfg, self.backbone.out_channels)

    def forward(self, images: ImageBatch, targets: TargetBatch | None = None) -> dict[str, Tensor] | DetectionBatch:
        """Training: a dict of scalar losses, their sum is to be minimised (ValueError without targets).
        Evaluation: the detections in the frame of the padded batch."""
        if self.training and targets is None:
            raise ValueError("a model in training mode needs targets; call model.eval() for detections")
        if not self.training:
            return self._detect(images)
        features = self.backbone(images.pixels)
        proposals, losses = self.rpn(images, features, targets)
        return losses | self.roi_heads.losses(features, proposals, targets)

    @torch.no_grad()
    def _detect(self, images: ImageBatch) -> DetectionBatch:
        features = self.backbone(images.pixels)
        proposals, _ = self.rpn(images, features)
        return self.roi_heads.detect(features, images, proposals)


# what the config tree knows and this version does not have
_ABSENT = (
    "MODEL.RPN_ONLY",
    "MODEL.RETINANET_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS",
    "TEST.BBOX_AUG.ENABLED",
)


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


def build_model(cfg: Any) -> GeneralizedRCNN:
    """The model of a config, in channels_last, on MODEL.DEVICE (or on "meta" under `torch.device("meta")`).

    ConfigError, naming the key, for what is not there: a model family, a name, a device.
    """
    for key in _ABSENT:
        if operator.attrgetter(key)(cfg):
            raise ConfigError(f"{key} is True, but this is not available")
    model = GeneralizedRCNN(cfg).to(memory_format=torch.channels_last)
    if next(model.parameters()).is_meta:
        return model
    return model.to(resolve_device(cfg.MODEL.DEVICE))
