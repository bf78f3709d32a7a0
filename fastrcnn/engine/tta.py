"""Test-time augmentation: an image at several sizes and mirrored, and one answer from all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrcnn.config import Config, ConfigError, Conventions, conventions_of
from fastrcnn.structures import DetectionBatch, ImageBatch, PersonKeypoints


@dataclass(frozen=True)
class View:
    """One of the ways in which the images are looked at: resized to min_size and max_size, and mirrored if flip."""

    min_size: int
    max_size: int
    flip: bool

    def batch(self, images: Sequence[Tensor], cfg: Config) -> ImageBatch:
        """uint8 RGB images [3, h, w] of any size -> the model's input."""
        cfg = cfg.clone()
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = self.min_size, self.max_size
        return ImageBatch.from_images([image.flip(2) for image in images] if self.flip else images, cfg)


def views(cfg: Config) -> list[View]:
    """The plain view, mirrored with H_FLIP; each of SCALES, mirrored too with SCALE_H_FLIP."""
    aug = cfg.TEST.BBOX_AUG
    plain = [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, flip) for flip in (False, True)[: 1 + aug.H_FLIP]]
    scaled = [(scale, aug.MAX_SIZE, flip) for scale in aug.SCALES for flip in (False, True)[: 1 + aug.SCALE_H_FLIP]]
    return [View(*each) for each in plain + scaled]


@torch.no_grad()
def detect_augmented(model: nn.Module, images: Sequence[Tensor], cfg: Config) -> DetectionBatch:
    """Detections by all `views` of uint8 RGB images [3, h, w] at their own size, in the frame of the plain view.

    Boxes: the candidates of all views together, then one NMS per class and the best D (maskrcnn-benchmark). Masks:
    those of all views in the merged boxes, probabilities averaged (detectron2). Keypoints: the same with the logits of
    the heat maps (Detectron's HM_AVG). The features of a view are computed twice where there are masks or keypoints,
    so that those of one view are in memory at a time. ConfigError for a model without heads on regions, and for
    mirrored keypoints other than COCO's 17, of which nobody knows the mirror images.
    """
    if model.roi_heads is None:
        raise ConfigError("TEST.BBOX_AUG.ENABLED needs a model with heads on regions: no RETINANET_ON, no RPN_ONLY")
    device = next(model.parameters()).device
    images = [image.to(device, non_blocking=True) for image in images]
    heads, conventions = model.roi_heads, conventions_of(cfg)
    base: ImageBatch | None = None
    found = []
    for view, batch, features in _looks(model, images, cfg):
        base = batch if base is None else base
        proposals, _ = model.rpn(batch, features)
        boxes, *rest = heads.box.candidates(features, batch, proposals)
        boxes = _mirrored(boxes, batch) if view.flip else boxes
        found.append((_carried(boxes, batch, base, conventions), *rest))
    candidates = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
    detections = heads.box.keep(*_best(*candidates, limit=heads.spec.PRE_NMS_TOP_N), base)
    if heads.mask is not None or heads.keypoint is not None:
        _add_masks_and_keypoints(model, images, detections, base, cfg)
    detections.boxes = conventions.for_scaling(detections.boxes, base.sizes, base.original_sizes)
    return detections


def _looks(model: nn.Module, images: list[Tensor], cfg: Config) -> Iterator[tuple[View, ImageBatch, list[Tensor]]]:
    for view in views(cfg):
        batch = view.batch(images, cfg)
        yield view, batch, model.backbone(batch.pixels)


def _mirrored(boxes: Tensor, batch: ImageBatch) -> Tensor:
    """Boxes [B, N, 4] of mirrored images in the images, and the other way round."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = batch.sizes[:, 1:]
    return torch.stack([width - x2, y1, width - x1, y2], -1)


def _carried(boxes: Tensor, source: ImageBatch, target: ImageBatch, conventions: Conventions) -> Tensor:
    """Boxes [B, N, 4] of the frame of one batch in that of another with the same images."""
    scale = (target.sizes / source.sizes).flip(1).repeat(1, 2)[:, None]  # [B, 1, 4]
    boxes = conventions.for_scaling(boxes, source.sizes, target.sizes) * scale
    return boxes.clamp(min=0).minimum(target.sizes.flip(1).repeat(1, 2)[:, None])


def _best(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, limit: int) -> tuple[Tensor, ...]:
    """The `limit` candidates [B, N] of the highest scores, valid ones first, in order."""
    order = torch.where(valid, scores, -1).sort(dim=1, descending=True, stable=True).indices[:, :limit]
    return (
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        *(values.gather(1, order) for values in (scores, labels, valid)),
    )


def _add_masks_and_keypoints(
    model: nn.Module, images: list[Tensor], detections: DetectionBatch, base: ImageBatch, cfg: Config
) -> None:
    heads, conventions = model.roi_heads, conventions_of(cfg)
    masks, heatmaps = [], []
    for view, batch, features in _looks(model, images, cfg):
        boxes = _carried(detections.boxes, base, batch, conventions)
        seen: Any = replace(detections, boxes=_mirrored(boxes, batch) if view.flip else boxes, sizes=batch.sizes)
        if heads.mask is not None:
            heads.mask.detect(features, seen)
            masks.append(seen.masks.flip(3) if view.flip else seen.masks)
            detections.paste = seen.paste
        if heads.keypoint is not None:
            logits = heads.keypoint.heatmaps(features, seen)
            heatmaps.append(logits[:, _flip_map(logits.shape[1])].flip(3) if view.flip else logits)
    if masks:
        detections.masks = sum(masks) / len(masks)
    if heatmaps:
        heads.keypoint.place(sum(heatmaps) / len(heatmaps), base, detections)


def _flip_map(count: int) -> list[int]:
    if count != len(PersonKeypoints.NAMES):
        raise ConfigError(
            f"TEST.BBOX_AUG mirrors images, and of {count} keypoints it is not known which are mirror images of each "
            "other, as it is of COCO's 17: set H_FLIP and SCALE_H_FLIP False"
        )
    return list(PersonKeypoints.FLIP_MAP)
