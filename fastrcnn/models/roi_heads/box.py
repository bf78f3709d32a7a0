"""Box head: what is in a region, and where exactly (Fast R-CNN, Girshick 2015)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.layers import conv_stack, gather_rows, group_norm, linear, smooth_l1, weighted_mean, widen
from fastrcnn.models.roi_heads.sampling import Pooler
from fastrcnn.structures import DetectionBatch, ImageBatch, ProposalBatch, SampleBatch


class FPN2MLPFeatureExtractor(nn.Module):
    """[N, C, side, side] -> two fully connected layers -> [N, out_channels]."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_BOX_HEAD
        self.out_channels = spec.MLP_HEAD_DIM
        fan_in = in_channels * spec.POOLER_RESOLUTION**2
        self.fc6 = self._layer(cfg, fan_in)
        self.fc7 = self._layer(cfg, self.out_channels)

    def _layer(self, cfg: Any, fan_in: int) -> nn.Module:
        use_gn = cfg.MODEL.ROI_BOX_HEAD.USE_GN
        layer = linear(fan_in, self.out_channels, bias=not use_gn)
        return nn.Sequential(layer, group_norm(self.out_channels, cfg)) if use_gn else layer

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.fc7(F.relu_(self.fc6(x.flatten(1)))))


class FPNXconv1fcFeatureExtractor(nn.Module):
    """[N, C, side, side] -> NUM_STACKED_CONVS 3×3 convolutions, one fully connected layer -> [N, out_channels]."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_BOX_HEAD
        self.out_channels = spec.MLP_HEAD_DIM
        channels = [in_channels, *[spec.CONV_HEAD_DIM] * spec.NUM_STACKED_CONVS]
        self.xconvs = nn.Sequential(*conv_stack(channels, cfg, spec.USE_GN, spec.DILATION))
        self.fc6 = linear(channels[-1] * spec.POOLER_RESOLUTION**2, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.fc6(self.xconvs(x).flatten(1)))


class FPNPredictor(nn.Module):
    """[N, in_channels] -> class logits [N, classes], background first, and deltas [N, 4·classes] (or 4·2)."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        classes = cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
        self.cls_score = linear(in_channels, classes, std=0.01)
        self.bbox_pred = linear(in_channels, 4 * (2 if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else classes), std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


EXTRACTORS = {c.__name__: c for c in (FPN2MLPFeatureExtractor, FPNXconv1fcFeatureExtractor)}
PREDICTORS = {c.__name__: c for c in (FPNPredictor,)}


def choose(table: dict[str, type], name: str, key: str) -> type:
    """The class that a config key names, or an error that lists what there is."""
    if name not in table:
        raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join(table)}")
    return table[name]


class BoxHead(nn.Module):
    """Regions to losses in training, to detections at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.spec = cfg.MODEL.ROI_HEADS
        self.head = cfg.MODEL.ROI_BOX_HEAD
        self.agnostic = cfg.MODEL.CLS_AGNOSTIC_BBOX_REG
        self.min_size = conventions_of(cfg).min_detection_size
        self.pooler = Pooler(cfg, self.head)
        extractor = choose(EXTRACTORS, self.head.FEATURE_EXTRACTOR, "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR")
        predictor = choose(PREDICTORS, self.head.PREDICTOR, "MODEL.ROI_BOX_HEAD.PREDICTOR")
        self.feature_extractor = extractor(cfg, in_channels)
        self.predictor = predictor(cfg, self.feature_extractor.out_channels)

    def predict(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """boxes [B, R, 4], valid bool [B, R] -> logits [B, R, classes], deltas [B, R, classes or 2, 4]."""
        logits, deltas = self.predictor(self.feature_extractor(self.pooler(features, boxes, valid)))
        shape = boxes.shape[:2]
        return widen(logits).unflatten(0, shape), widen(deltas).unflatten(0, shape).unflatten(2, (-1, 4))

    def losses(self, features: list[Tensor], samples: SampleBatch, gt_boxes: Tensor) -> dict[str, Tensor]:
        """gt_boxes [B, G, 4] -> two scalars, means over the regions sampled in the batch."""
        logits, deltas = self.predict(features, samples.boxes, samples.weight > 0)
        classification = F.cross_entropy(logits.flatten(0, 1), samples.labels.flatten(), reduction="none")
        column = samples.labels.clamp(max=1) if self.agnostic else samples.labels
        chosen = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]  # [B, R, 4]
        wanted = ops.encode_boxes(gather_rows(gt_boxes, samples.matched), samples.boxes, self.spec.BBOX_REG_WEIGHTS)
        positive = (samples.labels > 0) & (samples.weight > 0)
        error = smooth_l1(chosen - wanted, positive, self.head.SMOOTH_L1_BETA)
        return {
            "loss_classifier": weighted_mean(classification, samples.weight.flatten()),
            "loss_box_reg": error.sum() / samples.weight.sum().clamp(min=1),
        }

    def detect(self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch) -> DetectionBatch:
        """Softmax, the PRE_NMS_TOP_N best (region, class) pairs of an image, their boxes, NMS per class, the best D."""
        logits, deltas = self.predict(features, proposals.boxes, proposals.valid)
        classes = logits.shape[2] - 1
        scores = logits.softmax(2)[..., 1:]  # [B, P, classes without background]
        scores = torch.where(proposals.valid[..., None], scores, 0).flatten(1)
        scores, pair = scores.topk(min(self.spec.PRE_NMS_TOP_N, scores.shape[1]), dim=1)  # [B, K]
        region, label = pair // classes, pair % classes + 1
        column = torch.ones_like(label) if self.agnostic else label
        chosen = gather_rows(deltas.flatten(1, 2), region * deltas.shape[2] + column)
        boxes = ops.decode_boxes(
            chosen, gather_rows(proposals.boxes, region), self.spec.BBOX_REG_WEIGHTS, clip_to=images.sizes[:, None]
        )
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = (scores > self.spec.SCORE_THRESH) & (sides >= self.min_size).all(2)
        kept, count = ops.nms_padded(boxes, scores, self.spec.NMS, self.spec.DETECTIONS_PER_IMG, label, valid)
        slot = kept.clamp(min=0)
        filled = kept >= 0
        return DetectionBatch(
            boxes=torch.where(filled[..., None], gather_rows(boxes, slot), 0),
            scores=torch.where(filled, scores.gather(1, slot), 0),
            labels=torch.where(filled, label.gather(1, slot), 0),
            count=count,
            sizes=images.sizes,
            original_sizes=images.original_sizes,
        )
