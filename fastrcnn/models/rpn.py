"""Region proposal network (Ren et al., 2015)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.anchors import cell_anchors_of_levels, level_strides
from fastrcnn.models.layers import conv, gather_rows, smooth_l1, weighted_mean, widen
from fastrcnn.structures import ImageBatch, ProposalBatch, TargetBatch


class RPNHead(nn.Module):
    """Shared by all levels: 3×3 convolution and ReLU, then per anchor an objectness logit and four box deltas."""

    def __init__(self, in_channels: int, channels: int, num_anchors: int):
        super().__init__()
        self.conv = conv(in_channels, channels, 3, init="small")
        self.cls_logits = conv(channels, num_anchors, 1, init="small")
        self.bbox_pred = conv(channels, num_anchors * 4, 1, init="small")

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps [B, C, H, W] -> logits L × [B, A, H, W], deltas L × [B, 4A, H, W], the four of an anchor adjacent."""
        hidden = [F.relu_(self.conv(f)) for f in features]
        return [self.cls_logits(x) for x in hidden], [self.bbox_pred(x) for x in hidden]


def _flatten(maps: list[Tensor], values: int) -> Tensor:
    """L × [B, A·values, H, W] -> [B, all anchors, values]: level, y, x, anchor of the cell. A view if channels_last."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, values) for m in maps], 1)


class RPN(nn.Module):
    """Features to proposals, and to the two losses when there are targets."""

    def __init__(self, cfg: Any, in_channels: int):
        super().__init__()
        self.spec = cfg.MODEL.RPN
        self.conventions = conventions_of(cfg)
        if self.spec.RPN_HEAD != "SingleConvRPNHead":
            raise ConfigError(f"MODEL.RPN.RPN_HEAD is {self.spec.RPN_HEAD!r}; it must be SingleConvRPNHead")
        cells = cell_anchors_of_levels(
            self.spec.ANCHOR_SIZES, self.spec.ASPECT_RATIOS, self.spec.ANCHOR_STRIDE, self.conventions
        )
        if len({len(cell) for cell in cells}) != 1:
            raise ConfigError(f"MODEL.RPN.ANCHOR_SIZES {self.spec.ANCHOR_SIZES}: every level needs as many sizes")
        for level, cell in enumerate(cells):
            self.register_buffer(f"cell_anchors_{level}", cell, persistent=False)
        self.head = RPNHead(in_channels, self.spec.HEAD_CHANNELS or in_channels, len(cells[0]))

    @property
    def cells(self) -> list[Tensor]:
        return [getattr(self, f"cell_anchors_{level}") for level in range(len(self.spec.ANCHOR_STRIDE))]

    def forward(
        self, images: ImageBatch, features: list[Tensor], targets: TargetBatch | None = None
    ) -> tuple[ProposalBatch, dict[str, Tensor]]:
        """features L × [B, C, h, w] -> proposals without gradient, and losses (none without targets)."""
        if len(features) != len(self.cells):
            raise ConfigError(f"MODEL.RPN.ANCHOR_STRIDE has {len(self.cells)} levels, the backbone {len(features)}")
        logits, deltas = self.head(features)
        grids = [tuple(f.shape[-2:]) for f in features]
        strides = level_strides(self.spec.ANCHOR_STRIDE, images.pixels.shape[-2:], grids, self.conventions)
        mode = "TRAIN" if self.training else "TEST"
        boxes, scores, valid = ops.select_proposals(
            [x.detach() for x in logits],
            [x.detach() for x in deltas],
            self.cells,
            strides,
            images.sizes,
            pre_nms_top_n=getattr(self.spec, f"PRE_NMS_TOP_N_{mode}"),
            post_nms_top_n=getattr(self.spec, f"POST_NMS_TOP_N_{mode}"),
            max_proposals=getattr(self.spec, f"FPN_POST_NMS_TOP_N_{mode}"),
            nms_threshold=self.spec.NMS_THRESH,
            min_size=self.spec.MIN_SIZE,
            per_batch=self.training and self.spec.FPN_POST_NMS_PER_BATCH,
        )
        losses = {}
        if targets is not None:
            anchors = ops.grid_anchors(grids, strides, self.cells)
            losses = self.losses(_flatten(logits, 1)[..., 0], _flatten(deltas, 4), anchors, images, targets)
        return ProposalBatch(boxes, scores, valid), losses

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, images: ImageBatch, targets: TargetBatch
    ) -> dict[str, Tensor]:
        """logits [B, A], deltas [B, A, 4], anchors [A, 4] -> two scalars, means over the sampled anchors."""
        matched, _ = ops.match_boxes(
            anchors,
            targets.boxes,
            targets.valid,
            self.spec.FG_IOU_THRESHOLD,
            self.spec.BG_IOU_THRESHOLD,
            allow_low_quality=True,
        )
        # 1 object, 0 background, −1 ignored
        labels = (matched >= 0).long() - (matched == -2).long()
        border = self.spec.STRADDLE_THRESH
        if border >= 0:
            height, width = images.sizes[:, :1], images.sizes[:, 1:]
            x1, y1, x2, y2 = anchors.unbind(1)
            inside = (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)  # [B, A]
            labels = torch.where(inside, labels, -1)
        index, weight = ops.sample_balanced(labels, self.spec.BATCH_SIZE_PER_IMAGE, self.spec.POSITIVE_FRACTION)
        positive = weight * (labels.gather(1, index) > 0)
        objectness_logits = widen(logits.gather(1, index))
        objectness = F.binary_cross_entropy_with_logits(
            objectness_logits, (positive > 0).to(objectness_logits.dtype), reduction="none"
        )
        gt = gather_rows(targets.boxes, matched.gather(1, index).clamp(min=0))
        wanted = ops.encode_boxes(gt, anchors[index])
        error = smooth_l1(widen(gather_rows(deltas, index)) - wanted, positive > 0, self.spec.SMOOTH_L1_BETA)
        return {
            "loss_objectness": weighted_mean(objectness, weight),
            "loss_rpn_box_reg": error.sum() / weight.sum().clamp(min=1),
        }
