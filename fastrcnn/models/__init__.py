"""Detectors: padded batches in, losses or detections out."""

from fastrcnn.models.detector import GeneralizedRCNN, build_model, resolve_device

__all__ = ["GeneralizedRCNN", "build_model", "resolve_device"]
