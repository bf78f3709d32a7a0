"""Detection operators for any model: a drop-in for `torchvision.ops`, and padded, sync-free ones on top."""

from fastrcnn.ops.anchors import grid_anchors
from fastrcnn.ops.box_coder import BoxCoder, decode_boxes, encode_boxes
from fastrcnn.ops.boxes import box_area, box_convert, box_iou, clip_boxes_to_image, remove_small_boxes
from fastrcnn.ops.focal_loss import focal_loss, sigmoid_focal_loss
from fastrcnn.ops.keypoints import heatmaps_to_keypoints
from fastrcnn.ops.match import match_boxes
from fastrcnn.ops.nms import batched_nms, nms, nms_padded
from fastrcnn.ops.paste import paste_masks
from fastrcnn.ops.proposals import select_proposals
from fastrcnn.ops.rasterize import rasterize_polygons
from fastrcnn.ops.roi_align import MultiScaleRoIAlign, RoIAlign, multilevel_roi_align, roi_align
from fastrcnn.ops.sample import sample_balanced
from fastrcnn.ops.soft_nms import soft_nms_padded

__all__ = [
    "BoxCoder",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "decode_boxes",
    "encode_boxes",
    "focal_loss",
    "grid_anchors",
    "heatmaps_to_keypoints",
    "match_boxes",
    "multilevel_roi_align",
    "nms",
    "nms_padded",
    "paste_masks",
    "rasterize_polygons",
    "remove_small_boxes",
    "roi_align",
    "sample_balanced",
    "select_proposals",
    "sigmoid_focal_loss",
    "soft_nms_padded",
]
