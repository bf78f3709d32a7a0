"""What flows through a detector: ragged at the two ends (`BoxList`), padded in between (`*Batch`)."""

from fastrcnn.structures.batches import (
    DetectionBatch,
    ImageBatch,
    PolygonBatch,
    ProposalBatch,
    SampleBatch,
    TargetBatch,
    scaled_size,
)
from fastrcnn.structures.boxlist import (
    FLIP_LEFT_RIGHT,
    FLIP_TOP_BOTTOM,
    BoxList,
    boxlist_iou,
    cat_boxlist,
    remove_small_boxes,
)
from fastrcnn.structures.image_list import ImageList, to_image_list
from fastrcnn.structures.keypoint import Keypoints, PersonKeypoints
from fastrcnn.structures.segmentation_mask import SegmentationMask

__all__ = [
    "FLIP_LEFT_RIGHT",
    "FLIP_TOP_BOTTOM",
    "BoxList",
    "DetectionBatch",
    "ImageBatch",
    "ImageList",
    "Keypoints",
    "PersonKeypoints",
    "PolygonBatch",
    "ProposalBatch",
    "SampleBatch",
    "SegmentationMask",
    "TargetBatch",
    "boxlist_iou",
    "cat_boxlist",
    "remove_small_boxes",
    "scaled_size",
    "to_image_list",
]
