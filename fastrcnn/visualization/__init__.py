"""Pictures: detections drawn on images, beside the ground truth, sheets of them, and the curves of a training run."""

from fastrcnn.visualization.colours import PALETTE, class_colour, readable_on
from fastrcnn.visualization.curves import Metrics, plot_metrics, read_metrics
from fastrcnn.visualization.drawing import (
    KEYPOINT_LOGIT,
    MASK_OPACITY,
    PERSON_SKELETON,
    contact_sheet,
    draw_comparison,
    draw_detections,
    readable_scale,
)

__all__ = [
    "KEYPOINT_LOGIT",
    "MASK_OPACITY",
    "PALETTE",
    "PERSON_SKELETON",
    "Metrics",
    "class_colour",
    "contact_sheet",
    "draw_comparison",
    "draw_detections",
    "plot_metrics",
    "read_metrics",
    "readable_on",
    "readable_scale",
]
