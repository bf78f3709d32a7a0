"""Which regions the heads learn from, and how regions read the feature maps."""

from typing import Any

import torch
from torch import Tensor

from fastrcnn import ops
from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.layers import gather_rows
from fastrcnn.structures import ProposalBatch, SampleBatch, TargetBatch


def label_regions(boxes: Tensor, valid: Tensor, targets: TargetBatch, high: float, low: float) -> tuple[Tensor, Tensor]:
    """boxes [B, N, 4], valid bool [B, N] -> labels int64 [B, N], 0 = background, −1 = neither, and the slot int64
    [B, N] of the object that each overlaps most."""
    matched, _ = ops.match_boxes(boxes, targets.boxes, targets.valid, high, low, allow_low_quality=False)
    slot = matched.clamp(min=0)
    labels = torch.where(matched >= 0, targets.labels.gather(1, slot), 0)
    return torch.where((matched == -2) | ~valid, -1, labels), slot


@torch.no_grad()
def sample_regions(proposals: ProposalBatch, targets: TargetBatch, spec: Any) -> SampleBatch:
    """Append the ground truth to the proposals, match, draw MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE regions an image."""
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    valid = torch.cat([proposals.valid, targets.valid], 1)
    labels, slot = label_regions(boxes, valid, targets, spec.FG_IOU_THRESHOLD, spec.BG_IOU_THRESHOLD)
    index, weight = ops.sample_balanced(labels, spec.BATCH_SIZE_PER_IMAGE, spec.POSITIVE_FRACTION)
    return SampleBatch(
        boxes=gather_rows(boxes, index),
        labels=labels.gather(1, index).clamp(min=0),
        matched=slot.gather(1, index),
        weight=weight,
        num_positive=min(int(spec.BATCH_SIZE_PER_IMAGE * spec.POSITIVE_FRACTION), index.shape[1]),
    )


class Pooler:
    """ROIAlign of [B, R, 4] boxes on the levels that the POOLER_* keys of a head name -> [B·R, C, side, side]."""

    def __init__(self, cfg: Any, head: Any):
        self.side = head.POOLER_RESOLUTION
        self.scales = list(head.POOLER_SCALES)
        self.sampling_ratio = head.POOLER_SAMPLING_RATIO
        self.conventions = conventions_of(cfg)

    def __call__(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        if len(self.scales) > len(features):
            raise ConfigError(f"POOLER_SCALES has {len(self.scales)} entries for {len(features)} feature maps")
        return ops.multilevel_roi_align(
            features[: len(self.scales)],
            boxes,
            (self.side, self.side),
            self.scales,
            self.sampling_ratio,
            self.conventions.roi_aligned,
            valid=valid,
            last_pixel=self.conventions.last_pixel,
        )
