"""Where families of trained weights disagree on geometry, in one value."""

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Conventions:
    """Each field is a disagreement; the values are those of `modern`, which is detectron2's geometry.

    cell_anchors: "exact", centred on 0, sizes in the outer loop; or "rounded" to integers, ratios in the outer loop.
    strides_from_grid: the anchor stride of a level is image side // grid side rather than the nominal one.
    roi_aligned: ROIAlign shifts by half a pixel and allows boxes below one pixel.
    frozen_bn_eps: added to the variance of frozen batch norm.
    paste_continuous: masks are sampled at pixel centres rather than resized to integer boxes.
    mask_targets_soft: bitmap ground truth is resampled to fractions rather than thresholded at 0.5.
    min_detection_size: detections with a side below it, in pixels, are dropped.
    """

    cell_anchors: Literal["exact", "rounded"] = "exact"
    strides_from_grid: bool = False
    roi_aligned: bool = True
    frozen_bn_eps: float = 1e-5
    paste_continuous: bool = True
    mask_targets_soft: bool = False
    min_detection_size: float = 0.0


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
    ),
}


def conventions_of(cfg: Any) -> Conventions:
    """The value that MODEL.CONVENTIONS names, with MODEL.RESNETS.FROZEN_BN_EPS in force where it is not negative."""
    conventions = CONVENTIONS[cfg.MODEL.CONVENTIONS]
    eps = cfg.MODEL.RESNETS.FROZEN_BN_EPS
    return conventions if eps < 0 else replace(conventions, frozen_bn_eps=eps)
