"""Mask head: a small bitmap of the object in each detected box (Mask R-CNN, He et al. 2017)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import Conventions
from fastrcnn.models.layers import conv, conv_stack, norm_name, widen
from fastrcnn.models.registry import ROI_MASK_FEATURE_EXTRACTORS, ROI_MASK_PREDICTOR
from fastrcnn.models.roi_heads.box import BoxHead, conv_relu
from fastrcnn.models.roi_heads.second import SecondHead
from fastrcnn.structures import DetectionBatch, SampleBatch, TargetBatch


@ROI_MASK_FEATURE_EXTRACTORS.register("MaskRCNNFPNFeatureExtractor")
class MaskRCNNFPNFeatureExtractor(nn.Module):
    """[N, C, side, side] -> 3×3 convolutions of CONV_LAYERS channels, named mask_fcn1, mask_fcn2, …"""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_MASK_HEAD
        self.depth = len(spec.CONV_LAYERS)
        self.out_channels = spec.CONV_LAYERS[-1]
        channels = [in_channels, *spec.CONV_LAYERS]
        norm = norm_name(spec)
        for index in range(self.depth):
            stack = conv_stack(channels[index : index + 2], cfg, norm, spec.DILATION)[:-1]
            self.add_module(f"mask_fcn{index + 1}", nn.Sequential(*stack) if norm else stack[0])

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            layer = getattr(self, f"mask_fcn{index + 1}")
            x = conv_relu(layer if isinstance(layer, nn.Sequential) else [layer], x)
        return x


class _MaskPredictor(nn.Module):
    """The 1×1 convolution to one logit per class; only the channel of the class asked for is ever computed."""

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


@ROI_MASK_PREDICTOR.register("MaskRCNNConv1x1Predictor")
class MaskRCNNConv1x1Predictor(_MaskPredictor):
    """At the resolution of the features."""


@ROI_MASK_PREDICTOR.register("MaskRCNNC4Predictor")
class MaskRCNNC4Predictor(_MaskPredictor):
    """After a 2×2 transposed convolution that doubles the resolution."""

    def __init__(self, cfg: Any, in_channels: int):
        channels = cfg.MODEL.ROI_MASK_HEAD.CONV_LAYERS[-1]
        super().__init__(cfg, channels)
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        nn.init.kaiming_normal_(self.conv5_mask.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv5_mask.bias)

    def upsample(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv5_mask(x))


def mask_targets(targets: TargetBatch, boxes: Tensor, matched: Tensor, side: int, conventions: Conventions) -> Tensor:
    """The outline of the matched object inside each box, boxes [B, R, 4], matched int64 [B, R] -> [B, R, M, M].

    Polygons are rasterised by pycocotools' rule; bitmaps are resampled by ROIAlign, and thresholded at 0.5 as in
    detectron2 unless the conventions keep the fractions.
    """
    boxes = conventions.corners(boxes)
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


class MaskHead(SecondHead):
    """Positive regions to a loss in training; detections to masks of their class at test time."""

    def __init__(self, cfg: Any, in_channels: int, box: BoxHead):
        super().__init__(cfg, "ROI_MASK_HEAD", ROI_MASK_FEATURE_EXTRACTORS, ROI_MASK_PREDICTOR, in_channels, box)

    def logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """x [B·R, C, s, s], labels int64 [B, R] -> logits [B, R, M, M]."""
        return self.checked(self.predictor(x, labels.flatten()).unflatten(0, labels.shape))

    def losses(
        self, features: list[Tensor], samples: SampleBatch, targets: TargetBatch, extracted: Tensor
    ) -> dict[str, Tensor]:
        """Binary cross-entropy of the positives' masks, mean over pixels and positives -> a scalar.

        extracted [B·R, ...]: what the box head extracted from the samples, used where the two heads share it.
        """
        # positives come first in the samples, so a fixed slice holds them all
        chosen = slice(samples.num_positive)
        boxes, labels, matched = samples.boxes[:, chosen], samples.labels[:, chosen], samples.matched[:, chosen]
        positive = (labels > 0) & (samples.weight[:, chosen] > 0) & targets.outlined.gather(1, matched)
        logits = self.logits(self.of_positives(features, samples, extracted, positive), labels)
        wanted = mask_targets(targets, boxes, matched, logits.shape[-1], self.conventions)
        error = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none").mean((2, 3))
        error = torch.where(positive, error, 0)
        return {"loss_mask": error.sum() / positive.sum().clamp(min=1)}

    def detect(self, features: list[Tensor], detections: DetectionBatch) -> None:
        """Give the detections masks [B, D, M, M], probabilities."""
        x = self.extract(features, detections.boxes, detections.labels > 0)
        detections.masks = self.logits(x, detections.labels).sigmoid()
        if self.spec.POSTPROCESS_MASKS:
            detections.paste = self.paste

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """masks [N, M, M] and boxes [N, 4] of an image of this size (h, w) -> bool [N, h, w]."""
        threshold, continuous = self.spec.POSTPROCESS_MASKS_THRESHOLD, self.conventions.paste_continuous
        return ops.paste_masks(masks, self.conventions.corners(boxes), size, threshold, continuous)
