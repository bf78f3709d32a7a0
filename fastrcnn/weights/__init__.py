"""Trained weights, recognised by content: fastrcnn's own checkpoints and torchvision's detectors."""

from fastrcnn.weights.loading import Report, WeightError, load, read_state

__all__ = ["Report", "WeightError", "load", "read_state"]
