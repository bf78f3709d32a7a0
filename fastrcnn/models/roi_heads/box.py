"""Box heads: what is in a region, and where exactly (Fast R-CNN, Girshick 2015; Cascade R-CNN, Cai et al. 2018)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.backbones.resnet import ResNetHead
from fastrcnn.models.layers import (
    conv_norm,
    conv_stack,
    gather_rows,
    group_norm,
    linear,
    norm_name,
    of_rows,
    smooth_l1,
    weighted_mean,
    widen,
)
from fastrcnn.models.registry import ROI_BOX_FEATURE_EXTRACTORS, ROI_BOX_PREDICTOR, ROI_MASK_FEATURE_EXTRACTORS
from fastrcnn.models.roi_heads.sampling import Pooler, label_regions
from fastrcnn.structures import DetectionBatch, ImageBatch, ProposalBatch, SampleBatch, TargetBatch


def conv_relu(layers: Sequence[nn.Module] | nn.Sequential, x: Tensor) -> Tensor:
    """A convolution, or a convolution and its norm, then ReLU."""
    return F.relu_(conv_norm(*layers, x) if len(layers) == 2 else layers[0](x))


@ROI_BOX_FEATURE_EXTRACTORS.register("ResNet50Conv5ROIFeatureExtractor")
@ROI_MASK_FEATURE_EXTRACTORS.register("ResNet50Conv5ROIFeatureExtractor")
class ResNet50Conv5ROIFeatureExtractor(nn.Module):
    """[N, C, side, side] -> the last stage of the ResNet -> [N, out_channels, side / 2, side / 2]."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.head = ResNetHead(cfg, in_channels)
        self.out_channels = self.head.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@ROI_BOX_FEATURE_EXTRACTORS.register("FPN2MLPFeatureExtractor")
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
        norm = norm_name(cfg.MODEL.ROI_BOX_HEAD)
        if norm not in ("", "GN"):
            raise ConfigError(f"MODEL.ROI_BOX_HEAD.NORM is {norm!r}; FPN2MLPFeatureExtractor takes GN or none")
        layer = linear(fan_in, self.out_channels, bias=not norm)
        return nn.Sequential(layer, group_norm(self.out_channels, cfg)) if norm else layer

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.fc7(F.relu_(self.fc6(x.flatten(1)))))


@ROI_BOX_FEATURE_EXTRACTORS.register("FPNXconv1fcFeatureExtractor")
class FPNXconv1fcFeatureExtractor(nn.Module):
    """[N, C, side, side] -> NUM_STACKED_CONVS 3×3 convolutions, one fully connected layer -> [N, out_channels]."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        spec = cfg.MODEL.ROI_BOX_HEAD
        self.out_channels = spec.MLP_HEAD_DIM
        channels = [in_channels, *[spec.CONV_HEAD_DIM] * spec.NUM_STACKED_CONVS]
        self.normed = bool(norm_name(spec))
        self.xconvs = nn.Sequential(*conv_stack(channels, cfg, norm_name(spec), spec.DILATION))
        self.fc6 = linear(channels[-1] * spec.POOLER_RESOLUTION**2, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        layers = 1 + self.normed  # and a ReLU
        for first in range(0, len(self.xconvs), layers + 1):
            x = conv_relu(self.xconvs[first : first + layers], x)
        return F.relu_(self.fc6(x.flatten(1)))


@ROI_BOX_PREDICTOR.register("FPNPredictor")
class FPNPredictor(nn.Module):
    """[N, in_channels] -> class logits [N, classes], background first, and deltas [N, 4·classes] (or 4·2)."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        classes = cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES
        self.cls_score = linear(in_channels, classes, std=0.01)
        self.bbox_pred = linear(in_channels, 4 * (2 if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else classes), std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


@ROI_BOX_PREDICTOR.register("FastRCNNPredictor")
class FastRCNNPredictor(FPNPredictor):
    """The same of the mean over a map [N, in_channels, h, w]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.mean((2, 3)))


def _area(sides: Tensor) -> Tensor:
    """[..., 2] -> [...]; the backward of prod would wait for the device."""
    return sides[..., 0] * sides[..., 1]


def iou_loss(kind: str, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Both [..., 4] -> [...]: 1 − GIoU (Rezatofighi et al. 2019), 1 − DIoU or 1 − CIoU (Zheng et al. 2020).

    As torchvision.ops has them, which index by masks and so wait for the device.
    """
    eps = 1e-7
    low, high, gt_low, gt_high = boxes[..., :2], boxes[..., 2:], gt_boxes[..., :2], gt_boxes[..., 2:]
    side, gt_side = high - low, gt_high - gt_low
    inter = _area((torch.minimum(high, gt_high) - torch.maximum(low, gt_low)).clamp(min=0))
    union = _area(side) + _area(gt_side) - inter
    hull = torch.maximum(high, gt_high) - torch.minimum(low, gt_low)  # sides of the box around both
    iou = inter / (union + eps)
    if kind == "giou":
        area = _area(hull)
        return 1 - iou + (area - union) / (area + eps)
    centres = ((low + high - gt_low - gt_high) / 2).square().sum(-1)
    loss = 1 - iou + centres / (hull.square().sum(-1) + eps)
    if kind == "ciou":
        angles = torch.atan(gt_side[..., 0] / gt_side[..., 1]) - torch.atan(side[..., 0] / side[..., 1])
        shape = 4 / math.pi**2 * angles.square()
        loss = loss + (shape / (1 - iou + shape + eps)).detach() * shape
    return loss


def box_error(
    deltas: Tensor, samples: SampleBatch, gt_boxes: Tensor, positive: Tensor, weights: Sequence[float], spec: Any
) -> Tensor:
    """The loss that MODEL.ROI_BOX_HEAD.BOX_REG_LOSS names, of deltas [B, R, 4] against the boxes gt_boxes [B, R, 4] ->
    [B, R], 0 where not positive (bool [B, R])."""
    if spec.BOX_REG_LOSS == "smooth_l1":
        wanted = ops.encode_boxes(gt_boxes, samples.boxes, weights)
        return smooth_l1(deltas - wanted, positive, spec.SMOOTH_L1_BETA).sum(2)
    # what is not positive becomes a box that is right: empty slots would put 0 · ∞ into the gradient
    unit = F.pad(torch.ones_like(samples.boxes[..., 2:]), (2, 0))
    chosen = positive[..., None]
    anchors, gt_boxes = torch.where(chosen, samples.boxes, unit), torch.where(chosen, gt_boxes, unit)
    boxes = ops.decode_boxes(torch.where(chosen, deltas, 0), anchors, weights)
    return torch.where(positive, iou_loss(spec.BOX_REG_LOSS, boxes, gt_boxes), 0)


class BoxHead(nn.Module):
    """Regions to losses in training, to detections at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.spec = cfg.MODEL.ROI_HEADS
        self.head = cfg.MODEL.ROI_BOX_HEAD
        self.agnostic = cfg.MODEL.CLS_AGNOSTIC_BBOX_REG
        self.min_size = conventions_of(cfg).min_detection_size
        self.pooler = Pooler(cfg, self.head)
        self.feature_extractor, self.predictor = self._stage(cfg, in_channels)

    def _stage(self, cfg: Any, in_channels: int) -> tuple[nn.Module, nn.Module]:
        names = self.head.FEATURE_EXTRACTOR, self.head.PREDICTOR
        extractor = ROI_BOX_FEATURE_EXTRACTORS.find(names[0], "MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR")(cfg, in_channels)
        predictor = ROI_BOX_PREDICTOR.find(names[1], "MODEL.ROI_BOX_HEAD.PREDICTOR")
        return extractor, predictor(cfg, extractor.out_channels)

    def extract(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """boxes [B, R, 4], valid bool [B, R] -> what the predictor takes, [B·R, ...]."""
        return of_rows(self.feature_extractor, self.pooler(features, boxes, valid), valid)

    def predict(self, predictor: nn.Module, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """x [B·R, ...], shape (B, R) -> logits [B, R, classes], deltas [B, R, classes or 2, 4]."""
        logits, deltas = predictor(x)
        return widen(logits).unflatten(0, shape), widen(deltas).unflatten(0, shape).unflatten(2, (-1, 4))

    def losses(
        self, features: list[Tensor], images: ImageBatch, samples: SampleBatch, targets: TargetBatch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """-> scalars, means over the regions sampled in the batch; and what was extracted from the samples."""
        x = self.extract(features, samples.boxes, samples.weight > 0)
        predicted = self.predict(self.predictor, x, samples.labels.shape)
        return self.losses_of(*predicted, samples, targets, self.spec.BBOX_REG_WEIGHTS), x

    def losses_of(
        self, logits: Tensor, deltas: Tensor, samples: SampleBatch, targets: TargetBatch, weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """logits [B, R, classes], deltas [B, R, classes or 2, 4], weights of the deltas -> two scalars."""
        classification = F.cross_entropy(logits.flatten(0, 1), samples.labels.flatten(), reduction="none")
        column = samples.labels.clamp(max=1) if self.agnostic else samples.labels
        chosen = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]  # [B, R, 4]
        positive = (samples.labels > 0) & (samples.weight > 0)
        error = box_error(chosen, samples, gather_rows(targets.boxes, samples.matched), positive, weights, self.head)
        return {
            "loss_classifier": weighted_mean(classification, samples.weight.flatten()),
            "loss_box_reg": self.head.BOX_REG_LOSS_WEIGHT * error.sum() / samples.weight.sum().clamp(min=1),
        }

    def detect(self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch) -> DetectionBatch:
        """The `candidates` that `keep` leaves."""
        return self.keep(*self.candidates(features, images, proposals), images)

    def candidates(
        self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Softmax, then `rank`."""
        x = self.extract(features, proposals.boxes, proposals.valid)
        logits, deltas = self.predict(self.predictor, x, proposals.valid.shape)
        return self.rank(logits.softmax(2), deltas, proposals, images, self.spec.BBOX_REG_WEIGHTS)

    def rank(
        self, scores: Tensor, deltas: Tensor, proposals: ProposalBatch, images: ImageBatch, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The PRE_NMS_TOP_N best (region, class) pairs of an image, best first: boxes [B, K, 4], scores, labels and
        whether they are good enough, valid, [B, K].

        scores [B, P, classes], background first; deltas [B, P, classes or 2, 4] from the proposals.
        """
        classes = scores.shape[2] - 1
        scores = torch.where(proposals.valid[..., None], scores[..., 1:], 0).flatten(1)
        scores, pair = scores.topk(min(self.spec.PRE_NMS_TOP_N, scores.shape[1]), dim=1)  # [B, K]
        region, label = pair // classes, pair % classes + 1
        column = torch.ones_like(label) if self.agnostic else label
        chosen = gather_rows(deltas.flatten(1, 2), region * deltas.shape[2] + column)
        anchors = gather_rows(proposals.boxes, region)
        boxes = ops.decode_boxes(chosen, anchors, weights, clip_to=images.sizes[:, None])
        sides = boxes[..., 2:] - boxes[..., :2]
        return boxes, scores, label, (scores > self.spec.SCORE_THRESH) & (sides >= self.min_size).all(2)

    def keep(self, boxes: Tensor, scores: Tensor, label: Tensor, valid: Tensor, images: ImageBatch) -> DetectionBatch:
        """boxes [B, K, 4], scores, labels and valid [B, K] -> NMS per class, the best D."""
        kept, scores, count = self._suppress(boxes, scores, label, valid)
        slot = kept.clamp(min=0)
        filled = kept >= 0
        return DetectionBatch(
            boxes=torch.where(filled[..., None], gather_rows(boxes, slot), 0),
            scores=scores,
            labels=torch.where(filled, label.gather(1, slot), 0),
            count=count,
            sizes=images.sizes,
            original_sizes=images.original_sizes,
        )

    def _suppress(self, boxes: Tensor, scores: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> indices [B, D], −1 where empty; their scores [B, D], 0 where empty; counts [B]."""
        spec = self.spec
        slots = spec.DETECTIONS_PER_IMG
        if spec.SOFT_NMS:
            settings = spec.SOFT_NMS, spec.NMS, spec.SOFT_NMS_SIGMA, spec.SOFT_NMS_MIN_SCORE
            return ops.soft_nms_padded(boxes, scores, slots, *settings, label, valid)
        kept, count = ops.nms_padded(boxes, scores, spec.NMS, slots, label, valid)
        return kept, torch.where(kept >= 0, scores.gather(1, kept.clamp(min=0)), 0), count


class CascadeBoxHead(BoxHead):
    """Box heads one after another: each refines the boxes of the one before and learns with a stricter IoU.

    As in detectron2: the boxes of a stage carry no gradient, the regions sampled for the first stage are labelled anew
    for each later one, each stage's gradient reaches the features with the weight 1 / stages, and at test time the
    scores are the mean of all stages and the boxes those of the last.
    """

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__(cfg, in_channels)
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        if not self.agnostic:
            raise ConfigError("MODEL.CASCADE_ON is True; it needs MODEL.CLS_AGNOSTIC_BBOX_REG True")
        if not len(cascade.IOUS) == len(cascade.BBOX_REG_WEIGHTS) >= 1:
            raise ConfigError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS has {len(cascade.IOUS)} stages, BBOX_REG_WEIGHTS "
                f"{len(cascade.BBOX_REG_WEIGHTS)}; both need as many, at least one"
            )
        self.ious, self.weights = cascade.IOUS, cascade.BBOX_REG_WEIGHTS
        stages = [(self.feature_extractor, self.predictor)]
        stages += [self._stage(cfg, in_channels) for _ in self.ious[1:]]
        self.feature_extractor, self.predictor = (nn.ModuleList(parts) for parts in zip(*stages, strict=True))

    def losses(
        self, features: list[Tensor], images: ImageBatch, samples: SampleBatch, targets: TargetBatch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """-> scalars loss_classifier_stage0, loss_box_reg_stage0, …; and what the first stage extracted."""
        losses, extracted, boxes = {}, [], samples.boxes
        for stage, weights in enumerate(self.weights):
            if stage > 0:
                samples = self._relabel(samples, boxes, targets, self.ious[stage])
            pooled = self.pooler(features, samples.boxes, samples.weight > 0)
            pooled = torch.lerp(pooled.detach(), pooled, 1 / len(self.weights))  # the same, with less gradient
            extracted.append(of_rows(self.feature_extractor[stage], pooled, samples.weight > 0))
            logits, deltas = self.predict(self.predictor[stage], extracted[-1], samples.labels.shape)
            found = self.losses_of(logits, deltas, samples, targets, weights)
            losses |= {f"{name}_stage{stage}": loss for name, loss in found.items()}
            boxes = self._refine(deltas.detach(), samples.boxes, images, stage)
        return losses, extracted[0]

    @torch.no_grad()
    def _relabel(self, samples: SampleBatch, boxes: Tensor, targets: TargetBatch, iou: float) -> SampleBatch:
        """The samples at the boxes [B, R, 4] of the stage before; one without area is not learnt from any more."""
        weight = samples.weight * (boxes[..., 2:] > boxes[..., :2]).all(2)
        labels, matched = label_regions(boxes, weight > 0, targets, iou, iou)
        return replace(samples, boxes=boxes, labels=labels.clamp(min=0), matched=matched, weight=weight)

    def _refine(self, deltas: Tensor, boxes: Tensor, images: ImageBatch, stage: int) -> Tensor:
        """deltas [B, R, 2, 4] of a stage, boxes [B, R, 4] -> [B, R, 4] within the images."""
        return ops.decode_boxes(deltas[:, :, 1], boxes, self.weights[stage], clip_to=images.sizes[:, None])

    def candidates(
        self, features: list[Tensor], images: ImageBatch, proposals: ProposalBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean of the stages' softmax, then `rank` with the boxes of the last."""
        scores, refined = [], proposals.boxes
        for stage in range(len(self.weights)):
            proposals = replace(proposals, boxes=refined)
            x = self.feature_extractor[stage](self.pooler(features, proposals.boxes, proposals.valid))
            logits, deltas = self.predict(self.predictor[stage], x, proposals.valid.shape)
            scores.append(logits.softmax(2))
            refined = self._refine(deltas, refined, images, stage)
        return self.rank(sum(scores) / len(scores), deltas, proposals, images, self.weights[-1])
