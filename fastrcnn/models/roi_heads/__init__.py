"""The heads that look at regions: box, and mask where MODEL.MASK_ON."""

from typing import Any

from torch import Tensor, nn

from fastrcnn.config import ConfigError
from fastrcnn.models.roi_heads.box import BoxHead
from fastrcnn.models.roi_heads.mask import MaskHead
from fastrcnn.models.roi_heads.sampling import sample_regions
from fastrcnn.structures import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch


class ROIHeads(nn.Module):
    """Proposals to losses in training, to detections at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.spec = cfg.MODEL.ROI_HEADS
        self.box = BoxHead(cfg, in_channels)
        self.mask = None
        if cfg.MODEL.MASK_ON:
            if cfg.MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR:
                raise ConfigError(
                    "MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR is True; the heads of a feature pyramid need False"
                )
            self.mask = MaskHead(cfg, in_channels)

    def losses(self, features: list[Tensor], proposals: ProposalBatch, targets: TargetBatch) -> dict[str, Tensor]:
        """features L × [B, C, h, w] -> loss_classifier, loss_box_reg and, with a mask head, loss_mask."""
        samples = sample_regions(proposals, targets, self.spec)
        losses = self.box.losses(features, samples, targets.boxes)
        if self.mask is not None:
            losses |= self.mask.losses(features, samples, targets)
        return losses

    def detect(self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch) -> DetectionBatch:
        """features L × [B, C, h, w] -> up to DETECTIONS_PER_IMG detections an image, with masks of their class."""
        detections = self.box.detect(features, images, proposals)
        if self.mask is not None:
            detections.masks = self.mask.detect(features, detections)
        return detections
