"""RetinaNet: classes and boxes straight from the anchors of a pyramid (Lin et al., 2017)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.anchors import cell_anchors
from fastrcnn.models.layers import conv, conv_stack, gather_rows, smooth_l1, widen
from fastrcnn.models.roi_heads.box import iou_loss
from fastrcnn.models.rpn import OnAnchors, rows_of
from fastrcnn.structures import DetectionBatch, ImageBatch, TargetBatch


class RetinaNetHead(nn.Module):
    """Shared by all levels: two towers of 3×3 convolutions; one ends in a logit per anchor and class, without the
    background, the other in four box deltas per anchor."""

    def __init__(self, cfg: Any, in_channels: int, num_anchors: int):
        super().__init__()
        spec = cfg.MODEL.RETINANET
        channels = [in_channels] * (spec.NUM_CONVS + 1)
        self.cls_tower = nn.Sequential(*conv_stack(channels, cfg, spec.NORM))
        self.bbox_tower = nn.Sequential(*conv_stack(channels, cfg, spec.NORM))
        for layer in (*self.cls_tower, *self.bbox_tower):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
        self.cls_logits = conv(in_channels, num_anchors * (spec.NUM_CLASSES - 1), 3, init="small")
        self.bbox_pred = conv(in_channels, num_anchors * 4, 3, init="small")
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - spec.PRIOR_PROB) / spec.PRIOR_PROB))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L × [B, C, H, W] -> logits L × [B, A·classes, H, W] and deltas L × [B, 4A, H, W], those of an anchor side by
        side."""
        logits = [self.cls_logits(self.cls_tower(f)) for f in features]
        return logits, [self.bbox_pred(self.bbox_tower(f)) for f in features]


def _cells(cfg: Any) -> list[Tensor]:
    """SCALES_PER_OCTAVE sizes, by equal ratios, per level."""
    spec, conventions = cfg.MODEL.RETINANET, conventions_of(cfg)
    if len(spec.ANCHOR_SIZES) != len(spec.ANCHOR_STRIDES):
        raise ConfigError(
            f"MODEL.RETINANET.ANCHOR_SIZES has {len(spec.ANCHOR_SIZES)} entries and MODEL.RETINANET.ANCHOR_STRIDES "
            f"{len(spec.ANCHOR_STRIDES)}: there must be one size per stride"
        )
    cells = []
    for size, stride in zip(spec.ANCHOR_SIZES, spec.ANCHOR_STRIDES, strict=True):
        sizes = [size * spec.OCTAVE ** (scale / spec.SCALES_PER_OCTAVE) for scale in range(spec.SCALES_PER_OCTAVE)]
        if conventions.cell_anchors == "rounded":
            sizes = [int(s) for s in sizes]  # as torchvision has them
        cells.append(cell_anchors(sizes, spec.ASPECT_RATIOS, stride, conventions))
    return cells


class RetinaNet(OnAnchors):
    """Features to two losses in training, to detections at test time."""

    def __init__(self, cfg: Any, in_channels: int):
        spec = cfg.MODEL.RETINANET
        super().__init__(spec, "MODEL.RETINANET", spec.ANCHOR_STRIDES, _cells(cfg), conventions_of(cfg))
        self.classes = spec.NUM_CLASSES - 1
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMG
        self.head = RetinaNetHead(cfg, in_channels, self.num_anchors)

    def losses(self, images: ImageBatch, features: list[Tensor], targets: TargetBatch) -> dict[str, Tensor]:
        """features L × [B, C, h, w] -> two scalars; see MODEL.RETINANET.LOSS_PER_IMAGE for what they are divided by."""
        logits, deltas = self.head(features)
        anchors = self.anchors(images, features)
        matched = self.match(anchors, images, targets)
        positive, slot = matched >= 0, matched.clamp(min=0)
        labels = torch.where(positive, targets.labels.gather(1, slot), 0)
        labels = torch.where(matched == -2, -1, labels)
        rows = [rows_of(level, self.classes) for level in logits]
        parts = labels.split([r.shape[1] for r in rows], 1)
        # level by level, as joined logits would be a copy of the largest tensor of the model
        cost = sum(
            ops.focal_loss(row, part, self.spec.LOSS_ALPHA, self.spec.LOSS_GAMMA)
            for row, part in zip(rows, parts, strict=True)
        )  # [B]
        codes = widen(torch.cat([rows_of(level, 4) for level in deltas], 1))
        error = self._box_loss(codes, anchors, gather_rows(targets.boxes, slot), positive)  # [B]
        count, weight = positive.sum(1), self.spec.BBOX_REG_WEIGHT
        if self.spec.LOSS_PER_IMAGE:
            cost, error = (cost / count.clamp(min=1)).mean(), (error / (count * weight).clamp(min=1)).mean()
        else:
            cost = cost.sum() / (count.sum() + len(images))
            error = error.sum() / (count.sum() * weight).clamp(min=1)
        return {"loss_retina_cls": cost, "loss_retina_reg": error}

    def _box_loss(self, codes: Tensor, anchors: Tensor, gt: Tensor, positive: Tensor) -> Tensor:
        """codes and gt [B, A, 4], positive bool [B, A] -> sums [B] over the positive anchors."""
        weights = self.spec.BBOX_REG_WEIGHTS
        if self.spec.BOX_REG_LOSS == "smooth_l1":
            wanted = ops.encode_boxes(gt, anchors, weights)
            return smooth_l1(codes - wanted, positive, self.spec.BBOX_REG_BETA).sum((1, 2))
        boxes = ops.decode_boxes(codes, anchors, weights)
        # equal boxes where there is nothing to learn: no gradient, and none that is not finite
        boxes = torch.where(positive[..., None], boxes, gt)
        return torch.where(positive, iou_loss(self.spec.BOX_REG_LOSS, boxes, gt), 0).sum(1)

    def detect(self, images: ImageBatch, features: list[Tensor]) -> DetectionBatch:
        """Per level the PRE_NMS_TOP_N best (anchor, class) pairs above INFERENCE_TH, their boxes; over all levels NMS
        per class and the best TEST.DETECTIONS_PER_IMG."""
        logits, deltas = self.head(features)
        rows = [rows_of(level, 4) for level in deltas]
        anchors = self.anchors(images, features).split([r.shape[1] for r in rows])
        found = []
        for level, codes, places in zip(logits, rows, anchors, strict=True):
            flat = rows_of(level, self.classes).flatten(1)
            best, pair = flat.topk(torch.sym_min(self.spec.PRE_NMS_TOP_N, flat.shape[1]), dim=1)  # [B, K]
            anchor = pair // self.classes
            boxes = ops.decode_boxes(
                widen(gather_rows(codes, anchor)),
                places[anchor],
                self.spec.BBOX_REG_WEIGHTS,
                clip_to=images.sizes[:, None],
            )
            found.append((boxes, widen(best).sigmoid(), pair % self.classes + 1))
        boxes, scores, labels = (torch.cat(part, 1) for part in zip(*found, strict=True))
        valid = scores > self.spec.INFERENCE_TH
        kept, count = ops.nms_padded(boxes, scores, self.spec.NMS_TH, self.max_detections, labels, valid)
        slot, filled = kept.clamp(min=0), kept >= 0
        boxes = self.conventions.for_scaling(gather_rows(boxes, slot), images.sizes, images.original_sizes)
        return DetectionBatch(
            boxes=torch.where(filled[..., None], boxes, 0),
            scores=torch.where(filled, scores.gather(1, slot), 0),
            labels=torch.where(filled, labels.gather(1, slot), 0),
            count=count,
            sizes=images.sizes,
            original_sizes=images.original_sizes,
        )
