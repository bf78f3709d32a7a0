"""Region proposal network (Ren et al., 2015), and what other detectors on anchors share with it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn import ops
from fastrcnn.config import ConfigError, Conventions, conventions_of
from fastrcnn.models.anchors import cell_anchors_of_levels, level_strides
from fastrcnn.models.layers import conv, gather_rows, smooth_l1, weighted_mean, widen
from fastrcnn.models.registry import RPN_HEADS
from fastrcnn.structures import DetectionBatch, ImageBatch, ProposalBatch, TargetBatch


@RPN_HEADS.register("SingleConvRPNHead")
class SingleConvRPNHead(nn.Module):
    """Shared by all levels: MODEL.RPN.NUM_CONVS 3×3 convolutions with ReLU, then per anchor an objectness logit and
    four box deltas."""

    def __init__(self, cfg: Any, in_channels: int, num_anchors: int):
        super().__init__()
        spec = cfg.MODEL.RPN
        if spec.NUM_CONVS < 1:
            raise ConfigError(f"MODEL.RPN.NUM_CONVS is {spec.NUM_CONVS}; SingleConvRPNHead needs at least 1")
        channels = spec.HEAD_CHANNELS or in_channels
        first, *more = (
            conv(channels if index else in_channels, channels, 3, init="small") for index in range(spec.NUM_CONVS)
        )
        self.conv = nn.ModuleList([first, *more]) if more else first  # "conv.weight", or "conv.0.weight" and so on
        self.cls_logits = conv(channels, num_anchors, 1, init="small")
        self.bbox_pred = conv(channels, num_anchors * 4, 1, init="small")

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps [B, C, H, W] -> logits L × [B, A, H, W], deltas L × [B, 4A, H, W], the four of an anchor adjacent."""
        for layer in self.conv if isinstance(self.conv, nn.ModuleList) else [self.conv]:
            features = [F.relu_(layer(f)) for f in features]
        return [self.cls_logits(x) for x in features], [self.bbox_pred(x) for x in features]


def rows_of(level: Tensor, values: int) -> Tensor:
    """[B, A·values, H, W] -> [B, H·W·A, values]: y, x, anchor of the cell. A view if channels_last."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, values)


class OnAnchors(nn.Module):
    """A head on anchors at every place of every level.

    spec: the section of the config, named `section` in errors, with STRADDLE_THRESH and the IoU thresholds. strides:
    pixels, per level; cells: the anchors of a place, [A, 4] per level.
    """

    def __init__(
        self, spec: Any, section: str, strides: tuple[int, ...], cells: list[Tensor], conventions: Conventions
    ):
        super().__init__()
        self.spec = spec
        self.conventions = conventions
        self._section, self._strides = section, strides
        if len({len(cell) for cell in cells}) != 1:
            raise ConfigError(f"{section}.ANCHOR_SIZES {spec.ANCHOR_SIZES}: every level needs as many sizes")
        self.num_anchors = len(cells[0])
        for level, cell in enumerate(cells):
            self.register_buffer(f"cell_anchors_{level}", cell, persistent=False)

    @property
    def cells(self) -> list[Tensor]:
        return [getattr(self, f"cell_anchors_{level}") for level in range(len(self._strides))]

    def strides(self, images: ImageBatch, features: list[Tensor]) -> list[tuple[int, int]]:
        """(sy, sx) per level; ConfigError if the backbone has other levels."""
        if len(features) != len(self._strides):
            raise ConfigError(
                f"{self._section} has anchors for {len(self._strides)} levels, the backbone gives {len(features)}"
            )
        grids = [f.shape[-2:] for f in features]
        return level_strides(self._strides, images.pixels.shape[-2:], grids, self.conventions)

    def anchors(self, images: ImageBatch, features: list[Tensor]) -> Tensor:
        """[all anchors, 4]: level, y, x, anchor of the cell."""
        grids = [tuple(f.shape[-2:]) for f in features]
        return ops.grid_anchors(grids, self.strides(images, features), self.cells)

    def match(self, anchors: Tensor, images: ImageBatch, targets: TargetBatch) -> Tensor:
        """int64 [B, A]: the slot of an anchor's ground truth, −1 for background, −2 for anchors that do not train."""
        matched, _ = ops.match_boxes(
            anchors,
            targets.boxes,
            targets.valid,
            self.spec.FG_IOU_THRESHOLD,
            self.spec.BG_IOU_THRESHOLD,
            allow_low_quality=True,
        )
        border = self.spec.STRADDLE_THRESH
        if border < 0:
            return matched
        height, width = images.sizes[:, :1], images.sizes[:, 1:]
        x1, y1, x2, y2 = self.conventions.corners(anchors).unbind(1)
        inside = (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)  # [B, A]
        return torch.where(inside, matched, -2)


class RPN(OnAnchors):
    """Features to proposals, and to two losses."""

    def __init__(self, cfg: Any, in_channels: int):
        spec, conventions = cfg.MODEL.RPN, conventions_of(cfg)
        if len(spec.ANCHOR_STRIDE) > 1 and not spec.USE_FPN:
            raise ConfigError(
                f"MODEL.RPN.ANCHOR_STRIDE {spec.ANCHOR_STRIDE}: several levels need a pyramid, MODEL.RPN.USE_FPN True"
            )
        cells = cell_anchors_of_levels(spec.ANCHOR_SIZES, spec.ASPECT_RATIOS, spec.ANCHOR_STRIDE, conventions)
        super().__init__(spec, "MODEL.RPN", spec.ANCHOR_STRIDE, cells, conventions)
        self.head = RPN_HEADS.find(spec.RPN_HEAD, "MODEL.RPN.RPN_HEAD")(cfg, in_channels, self.num_anchors)

    def forward(
        self, images: ImageBatch, features: list[Tensor], targets: TargetBatch | None = None
    ) -> tuple[ProposalBatch, dict[str, Tensor]]:
        """features L × [B, C, h, w] -> proposals without gradient, and losses (none without targets)."""
        outputs = self.head(features)
        proposals = self._select(images, features, *outputs)
        return proposals, {} if targets is None else self._losses(images, features, targets, *outputs)

    def losses(self, images: ImageBatch, features: list[Tensor], targets: TargetBatch) -> dict[str, Tensor]:
        """The two losses alone, for a model without heads on regions."""
        return self._losses(images, features, targets, *self.head(features))

    def detect(self, images: ImageBatch, features: list[Tensor]) -> DetectionBatch:
        """The proposals as detections without labels, scores the objectness."""
        proposals, _ = self(images, features)
        return DetectionBatch(
            boxes=self.conventions.for_scaling(proposals.boxes, images.sizes, images.original_sizes),
            scores=proposals.scores,
            labels=None,
            count=proposals.valid.sum(1, dtype=torch.int32),
            sizes=images.sizes,
            original_sizes=images.original_sizes,
        )

    def _select(
        self, images: ImageBatch, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor]
    ) -> ProposalBatch:
        mode = "TRAIN" if self.training else "TEST"
        per_level = getattr(self.spec, f"POST_NMS_TOP_N_{mode}")
        pyramid = len(features) > 1
        boxes, scores, valid = ops.select_proposals(
            logits,
            deltas,
            self.cells,
            self.strides(images, features),
            images.sizes,
            pre_nms_top_n=getattr(self.spec, f"PRE_NMS_TOP_N_{mode}"),
            post_nms_top_n=per_level,
            max_proposals=getattr(self.spec, f"FPN_POST_NMS_TOP_N_{mode}") if pyramid else per_level,
            nms_threshold=self.spec.NMS_THRESH,
            min_size=self.spec.MIN_SIZE,
            per_batch=pyramid and self.training and self.spec.FPN_POST_NMS_PER_BATCH,
        )
        # here and not before NMS: none of these has suppressed, or taken the place of, one that stays
        valid = valid & (scores >= self.spec.SCORE_THRESH)
        return ProposalBatch(boxes, scores, valid)

    def _losses(
        self,
        images: ImageBatch,
        features: list[Tensor],
        targets: TargetBatch,
        logits: list[Tensor],
        deltas: list[Tensor],
    ) -> dict[str, Tensor]:
        """Two scalars, means over the sampled anchors."""
        anchors = self.anchors(images, features)
        matched = self.match(anchors, images, targets)
        labels = (matched >= 0).long() - (matched == -2).long()  # 1 object, 0 background, −1 ignored
        index, weight = ops.sample_balanced(labels, self.spec.BATCH_SIZE_PER_IMAGE, self.spec.POSITIVE_FRACTION)
        positive = (weight > 0) & (labels.gather(1, index) > 0)
        objectness_logits = widen(torch.cat([rows_of(x, 1) for x in logits], 1)[..., 0].gather(1, index))
        objectness = F.binary_cross_entropy_with_logits(
            objectness_logits, positive.to(objectness_logits.dtype), reduction="none"
        )
        gt = gather_rows(targets.boxes, matched.gather(1, index).clamp(min=0))
        wanted = ops.encode_boxes(gt, anchors[index])
        codes = widen(gather_rows(torch.cat([rows_of(x, 4) for x in deltas], 1), index))
        error = smooth_l1(codes - wanted, positive, self.spec.SMOOTH_L1_BETA)
        return {
            "loss_objectness": weighted_mean(objectness, weight),
            "loss_rpn_box_reg": error.sum() / weight.sum().clamp(min=1),
        }
