"""Where families of trained weights disagree on geometry, in one value."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conventions:
    """Each field is a disagreement; the values are those of `modern`, which is detectron2's geometry.

    cell_anchors: "exact", centred on 0, sizes in the outer loop; or "rounded" to integers, ratios in the outer loop; or
    "quantised", integer multiples of the window (0, 0, stride − 1, stride − 1), ratios in the outer loop.
    strides_from_grid: the anchor stride of a level is image side // grid side rather than the nominal one.
    roi_aligned: ROIAlign shifts by half a pixel and allows boxes below one pixel.
    last_pixel: a corner (x2, y2) is the last pixel of the box, one less than ours, wherever its place counts and not
    the width alone: in ROIAlign, mask targets, pasting and the scaling to the original image.
    frozen_bn_eps: added to the variance of frozen batch norm.
    paste_continuous: masks are sampled at pixel centres rather than resized to integer boxes.
    mask_targets_soft: bitmap ground truth is resampled to fractions rather than thresholded at 0.5.
    min_detection_size: detections with a side below it, in pixels, are dropped.
    keypoint_shift: added to COCO's keypoints, which are indices of pixels, when they are read, and taken off when they
    are written: 0.5 puts them into the frame of the boxes.
    """

    cell_anchors: Literal["exact", "rounded", "quantised"] = "exact"
    strides_from_grid: bool = False
    roi_aligned: bool = True
    last_pixel: bool = False
    frozen_bn_eps: float = 1e-5
    paste_continuous: bool = True
    mask_targets_soft: bool = False
    min_detection_size: float = 0.0
    keypoint_shift: float = 0.5

    def corners(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] of this package as ROIAlign, mask targets and pasting take them."""
        return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], -1) if self.last_pixel else boxes

    def for_scaling(self, boxes: Tensor, sizes: Tensor, original_sizes: Tensor) -> Tensor:
        """Detected boxes [B, D, 4] that come out right when `DetectionBatch.to_boxlists` scales them from sizes to
        original_sizes, each [B, 2] (h, w)."""
        if not self.last_pixel:
            return boxes
        pixel = (sizes / original_sizes).flip(1)[:, None]  # [B, 1, 2], one original pixel in this frame
        return torch.cat([boxes[..., :2], boxes[..., 2:] - 1 + pixel], -1)


# Detectron's own models and those of its successor in PyTorch, which reads Detectron's weights
_LEGACY = Conventions(
    cell_anchors="quantised",
    roi_aligned=False,
    last_pixel=True,
    frozen_bn_eps=0.0,
    paste_continuous=False,
    keypoint_shift=0.0,
)
CONVENTIONS = {
    "modern": Conventions(),
    # eps: torchvision's published COCO V1 weights are used with 0; its newly built models have 1e-5
    "torchvision": Conventions(
        cell_anchors="rounded",
        strides_from_grid=True,
        roi_aligned=False,
        frozen_bn_eps=0.0,
        paste_continuous=False,
        mask_targets_soft=True,
        min_detection_size=1e-2,
        keypoint_shift=0.0,
    ),
    "maskrcnn-benchmark": _LEGACY,
    "detectron": _LEGACY,
}


def conventions_of(cfg: Any) -> Conventions:
    """The value that MODEL.CONVENTIONS names, with MODEL.RESNETS.FROZEN_BN_EPS in force where it is not negative."""
    conventions = CONVENTIONS[cfg.MODEL.CONVENTIONS]
    eps = cfg.MODEL.RESNETS.FROZEN_BN_EPS
    return conventions if eps < 0 else replace(conventions, frozen_bn_eps=eps)
