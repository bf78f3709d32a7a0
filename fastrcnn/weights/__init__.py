"""Trained weights of five projects, recognised by content, fetched by name, and exported again."""

from fastrcnn.weights.classes import select_classes
from fastrcnn.weights.download import fetch
from fastrcnn.weights.errors import WeightError
from fastrcnn.weights.loading import Report, Weights, adopt_conventions, export, load, read_state

__all__ = [
    "Report",
    "WeightError",
    "Weights",
    "adopt_conventions",
    "export",
    "fetch",
    "load",
    "read_state",
    "select_classes",
]
