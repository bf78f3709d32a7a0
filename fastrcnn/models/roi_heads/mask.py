"""Mask head: a small bitmap of the object in each detected box (Mask R-CNN, He et al. 2017)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, Conventions, conventions_of
from fastrcnn.models.layers import conv, conv_stack, widen
from fastrcnn.models.roi_heads.box import choose
from fastrcnn.models.roi_heads.sampling import Pooler
from fastrcnn.structures import DetectionBatch, SampleBatch, TargetBatch


class MaskRCNNFPNFeatureExtractor(nn.Module):
    """[N, C, side, side] -> 3×3 convolutions of CONV_LAYERS channels, named mask_fcn1, mask_fcn2, …"""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_MASK_HEAD
        self.depth = len(spec.CONV_LAYERS)
        self.out_channels = spec.CONV_LAYERS[-1]
        channels = [in_channels, *spec.CONV_LAYERS]
        for index in range(self.depth):
            stack = conv_stack(channels[index : index + 2], cfg, spec.USE_GN, spec.DILATION)[:-1]
            self.add_module(f"mask_fcn{index + 1}", nn.Sequential(*stack) if spec.USE_GN else stack[0])

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = F.relu_(getattr(self, f"mask_fcn{index + 1}")(x))
        return x


class _MaskPredictor(nn.Module):
    """The 1×1 convolution to one logit per class; only the channel of the class asked for is ever computed."""

    scale = 1  # of the mask's side to the side of the features

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.mask_fcn_logits = conv(in_channels, cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES, 1, init="msra")

    def upsample(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x [N, C, side, side], labels int64 [N] -> logits [N, M, M] of those classes."""
        x = self.upsample(x)
        weight = self.mask_fcn_logits.weight[labels, :, 0, 0].to(x.dtype)  # [N, C]
        logits = torch.einsum("nchw,nc->nhw", x, weight)
        return widen(logits) + self.mask_fcn_logits.bias[labels, None, None]


class MaskRCNNConv1x1Predictor(_MaskPredictor):
    """At the resolution of the features."""


class MaskRCNNC4Predictor(_MaskPredictor):
    """After a 2×2 transposed convolution that doubles the resolution."""

    scale = 2

    def __init__(self, cfg: Any, in_channels: int):
        channels = cfg.MODEL.ROI_MASK_HEAD.CONV_LAYERS[-1]
        super().__init__(cfg, channels)
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        nn.init.kaiming_normal_(self.conv5_mask.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv5_mask.bias)

    def upsample(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv5_mask(x))


EXTRACTORS = {c.__name__: c for c in (MaskRCNNFPNFeatureExtractor,)}
PREDICTORS = {c.__name__: c for c in (MaskRCNNC4Predictor, MaskRCNNConv1x1Predictor)}


def mask_targets(targets: TargetBatch, boxes: Tensor, matched: Tensor, side: int, conventions: Conventions) -> Tensor:
    """The outline of the matched object inside each box, boxes [B, R, 4], matched int64 [B, R] -> [B, R, M, M].

    Polygons are rasterised by pycocotools' rule; bitmaps are resampled by ROIAlign, and thresholded at 0.5 as in
    detectron2 unless the conventions keep the fractions.
    """
    if targets.polygons is not None:
        p = targets.polygons
        return ops.rasterize_polygons(p.edges, p.parts, p.num_parts, boxes, matched, side)
    if targets.masks is None:
        raise ValueError("MODEL.MASK_ON is True, but the targets have neither polygons nor masks")
    slots = targets.masks.shape[1]
    image = torch.arange(len(boxes), device=boxes.device)[:, None]
    rois = torch.cat([(image * slots + matched)[..., None].to(boxes.dtype), boxes], 2).flatten(0, 1)
    maps = targets.masks.flatten(0, 1)[:, None].to(boxes.dtype)
    crops = ops.roi_align(maps, rois, (side, side), 1.0, -1, conventions.roi_aligned)
    crops = crops if conventions.mask_targets_soft else (crops >= 0.5).to(crops.dtype)
    return crops.reshape(*matched.shape, side, side)


class MaskHead(nn.Module):
    """Positive regions to a loss in training; detections to masks of their class at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_MASK_HEAD
        self.conventions = conventions_of(cfg)
        self.pooler = Pooler(cfg, spec)
        extractor = choose(EXTRACTORS, spec.FEATURE_EXTRACTOR, "MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR")
        predictor = choose(PREDICTORS, spec.PREDICTOR, "MODEL.ROI_MASK_HEAD.PREDICTOR")
        self.feature_extractor = extractor(cfg, in_channels)
        self.predictor = predictor(cfg, self.feature_extractor.out_channels)
        side = spec.POOLER_RESOLUTION * self.predictor.scale
        if side != spec.RESOLUTION:
            raise ConfigError(f"MODEL.ROI_MASK_HEAD.RESOLUTION is {spec.RESOLUTION}; {spec.PREDICTOR} gives {side}")

    def logits(self, features: list[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """boxes [B, R, 4], labels and valid [B, R] -> logits [B, R, M, M]."""
        x = self.feature_extractor(self.pooler(features, boxes, valid))
        return self.predictor(x, labels.flatten()).unflatten(0, labels.shape)

    def losses(self, features: list[Tensor], samples: SampleBatch, targets: TargetBatch) -> dict[str, Tensor]:
        """Binary cross-entropy of the positives' masks, mean over pixels and positives -> a scalar."""
        # positives come first in the samples, so a fixed slice holds them all
        chosen = slice(samples.num_positive)
        boxes, labels, matched = samples.boxes[:, chosen], samples.labels[:, chosen], samples.matched[:, chosen]
        positive = (labels > 0) & (samples.weight[:, chosen] > 0) & targets.outlined.gather(1, matched)
        logits = self.logits(features, boxes, labels, positive)
        wanted = mask_targets(targets, boxes, matched, logits.shape[-1], self.conventions)
        error = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none").mean((2, 3))
        error = torch.where(positive, error, 0)
        return {"loss_mask": error.sum() / positive.sum().clamp(min=1)}

    def detect(self, features: list[Tensor], detections: DetectionBatch) -> Tensor:
        """-> [B, D, M, M] probabilities."""
        valid = detections.labels > 0
        return self.logits(features, detections.boxes, detections.labels, valid).sigmoid()
