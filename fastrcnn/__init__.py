"""Faster, Mask and Keypoint R-CNN and RetinaNet whose hot path is Triton kernels: nothing to compile."""

from fastrcnn import weights
from fastrcnn.coco_demo import COCODemo
from fastrcnn.config import Conventions, load_config
from fastrcnn.models import build_model
from fastrcnn.predictor import Predictor
from fastrcnn.structures import BoxList, DetectionBatch, ImageBatch, SegmentationMask, TargetBatch

__version__ = "0.1.0"

__all__ = [
    "BoxList",
    "COCODemo",
    "Conventions",
    "DetectionBatch",
    "ImageBatch",
    "Predictor",
    "SegmentationMask",
    "TargetBatch",
    "build_model",
    "load_config",
    "weights",
]
