"""Keypoint head: for each keypoint of a detected object a heat map over its box (Mask R-CNN, He et al. 2017, §5)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.models.layers import conv, gather_rows, weighted_mean, widen
from fastrcnn.models.registry import ROI_KEYPOINT_FEATURE_EXTRACTORS, ROI_KEYPOINT_PREDICTOR
from fastrcnn.models.roi_heads.box import BoxHead
from fastrcnn.models.roi_heads.second import SecondHead
from fastrcnn.structures import DetectionBatch, ImageBatch, SampleBatch, TargetBatch


@ROI_KEYPOINT_FEATURE_EXTRACTORS.register("KeypointRCNNFeatureExtractor")
class KeypointRCNNFeatureExtractor(nn.Module):
    """[N, C, side, side] -> 3×3 convolutions of CONV_LAYERS channels, named conv_fcn1, conv_fcn2, …"""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        channels = [in_channels, *cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS]
        self.depth = len(channels) - 1
        self.out_channels = channels[-1]
        for index in range(self.depth):
            self.add_module(f"conv_fcn{index + 1}", conv(channels[index], channels[index + 1], 3, init="msra"))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = F.relu_(getattr(self, f"conv_fcn{index + 1}")(x))
        return x


@ROI_KEYPOINT_PREDICTOR.register("KeypointRCNNPredictor")
class KeypointRCNNPredictor(nn.Module):
    """[N, C, side, side] -> logits [N, K, 4 side, 4 side]: a 4×4 transposed convolution, then bilinear interpolation,
    each of which doubles the resolution."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, keypoints, 4, 2, padding=1)
        nn.init.kaiming_normal_(self.kps_score_lowres.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.kps_score_lowres.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(widen(self.kps_score_lowres(x)), scale_factor=2.0, mode="bilinear", align_corners=False)


def keypoints_to_heatmap(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """keypoints [..., K, 3], boxes [..., 4] -> the cell of each in a side × side map of its box, row by row, int64
    [..., K], and whether it is labelled and in the box, bool [..., K]; 0 and False for the others.

    A keypoint on the right or lower edge belongs to the last cell.
    """
    points, corner, end = keypoints[..., :2], boxes[..., None, :2], boxes[..., None, 2:]
    cell = ((points - corner) * (side / (end - corner))).floor()
    cell = torch.where(points == end, side - 1, cell)
    inside = ((cell >= 0) & (cell < side)).all(-1) & (keypoints[..., 2] > 0)
    column, row = torch.where(inside[..., None], cell, 0).long().unbind(-1)
    return row * side + column, inside


class KeypointHead(SecondHead):
    """Positive regions to a loss in training; detections to keypoints at test time."""

    def __init__(self, cfg: Any, in_channels: int, box: BoxHead):
        registries = ROI_KEYPOINT_FEATURE_EXTRACTORS, ROI_KEYPOINT_PREDICTOR
        super().__init__(cfg, "ROI_KEYPOINT_HEAD", *registries, in_channels, box)

    def logits(self, x: Tensor) -> Tensor:
        """x [N, C, s, s] -> logits [N, K, S, S]."""
        return self.checked(self.predictor(x))

    def losses(
        self, features: list[Tensor], samples: SampleBatch, targets: TargetBatch, extracted: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy over the cells of the heat map, mean over the positives' keypoints that are labelled and lie in
        the region -> a scalar, 0 without any.

        extracted [B·R, ...]: what the box head extracted from the samples, used where the two heads share it.
        """
        # positives come first in the samples, so a fixed slice holds them all
        chosen = slice(samples.num_positive)
        boxes, matched = samples.boxes[:, chosen], samples.matched[:, chosen]
        positive = (samples.labels[:, chosen] > 0) & (samples.weight[:, chosen] > 0)
        wanted = gather_rows(self._learnt(targets), matched)
        cell, inside = keypoints_to_heatmap(wanted, self.conventions.corners(boxes), self.spec.RESOLUTION)
        inside = inside & positive[..., None]
        x = self.of_positives(features, samples, extracted, inside.any(2))
        error = F.cross_entropy(self.logits(x).flatten(0, 1).flatten(1), cell.flatten(), reduction="none")
        return {"loss_kp": weighted_mean(error, inside.flatten().to(error.dtype))}

    def _learnt(self, targets: TargetBatch) -> Tensor:
        """[B, G, K, 3]"""
        wanted = self.spec.NUM_CLASSES
        found = None if targets.keypoints is None else targets.keypoints.shape[2]
        if found == 0:  # a batch without objects
            return targets.boxes.new_zeros(*targets.labels.shape, wanted, 3)
        if found != wanted:
            raise ValueError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_CLASSES is {wanted}, but the targets have {found or 'no'} keypoints"
            )
        return targets.keypoints

    def detect(self, features: list[Tensor], images: ImageBatch, detections: DetectionBatch) -> None:
        """Give the detections keypoints [B, D, K, 3], (x, y, 1), and keypoint_scores [B, D, K], their logits."""
        self.place(self.heatmaps(features, detections), images, detections)

    def heatmaps(self, features: list[Tensor], detections: DetectionBatch) -> Tensor:
        """-> logits [B·D, K, S, S] over the boxes of the detections."""
        return self.logits(self.extract(features, detections.boxes, detections.labels > 0))

    def place(self, logits: Tensor, images: ImageBatch, detections: DetectionBatch) -> None:
        """Give the detections the keypoints of the heat maps."""
        valid = detections.labels > 0
        boxes = self.conventions.corners(detections.boxes).flatten(0, 1)
        keypoints, scores = ops.heatmaps_to_keypoints(logits, boxes, tuple(images.pixels.shape[-2:]))
        shape = *valid.shape, self.spec.NUM_CLASSES
        detections.keypoints = torch.where(valid[..., None, None], keypoints.view(*shape, 3), 0)
        detections.keypoint_scores = torch.where(valid[..., None], scores.view(shape), 0)
