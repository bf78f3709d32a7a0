"""The heads that look at regions: box, mask where MODEL.MASK_ON, keypoint where MODEL.KEYPOINT_ON."""

from typing import Any

from torch import Tensor, nn

from fastrcnn.config import conventions_of
from fastrcnn.models.roi_heads.box import BoxHead, CascadeBoxHead
from fastrcnn.models.roi_heads.keypoint import KeypointHead
from fastrcnn.models.roi_heads.mask import MaskHead
from fastrcnn.models.roi_heads.sampling import sample_regions
from fastrcnn.structures import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch


class ROIHeads(nn.Module):
    """Proposals to losses in training, to detections at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.spec = cfg.MODEL.ROI_HEADS
        self.conventions = conventions_of(cfg)
        self.box = (CascadeBoxHead if cfg.MODEL.CASCADE_ON else BoxHead)(cfg, in_channels)
        self.mask = MaskHead(cfg, in_channels, self.box) if cfg.MODEL.MASK_ON else None
        self.keypoint = KeypointHead(cfg, in_channels, self.box) if cfg.MODEL.KEYPOINT_ON else None

    def losses(
        self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch, targets: TargetBatch
    ) -> dict[str, Tensor]:
        """features L × [B, C, h, w] -> loss_classifier, loss_box_reg (per stage in a cascade) and, with these heads,
        loss_mask and loss_kp."""
        samples = sample_regions(proposals, targets, self.spec)
        losses, extracted = self.box.losses(features, images, samples, targets)
        if self.mask is not None:
            losses |= self.mask.losses(features, samples, targets, extracted)
        if self.keypoint is not None:
            losses |= self.keypoint.losses(features, samples, targets, extracted)
        return losses

    def detect(self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch) -> DetectionBatch:
        """features L × [B, C, h, w] -> up to DETECTIONS_PER_IMG detections an image, with masks of their class and
        keypoints."""
        detections = self.box.detect(features, images, proposals)
        if self.mask is not None:
            self.mask.detect(features, detections)
        if self.keypoint is not None:
            self.keypoint.detect(features, images, detections)
        detections.boxes = self.conventions.for_scaling(detections.boxes, images.sizes, images.original_sizes)
        return detections
