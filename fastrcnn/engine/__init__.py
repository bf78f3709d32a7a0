"""Training, testing, checkpoints, and the processes that share the work."""

from fastrcnn.engine.checkpoint import Checkpointer, category_names, config_of, find, find_model, read
from fastrcnn.engine.ema import WeightAverage
from fastrcnn.engine.hooks import Hook
from fastrcnn.engine.inference import load_predictions, test, test_all
from fastrcnn.engine.solver import LRSchedule, lr_factor, make_optimizer
from fastrcnn.engine.trainer import Run, Trainer, output_folder, train

__all__ = [
    "Checkpointer",
    "Hook",
    "LRSchedule",
    "Run",
    "Trainer",
    "WeightAverage",
    "category_names",
    "config_of",
    "find",
    "find_model",
    "load_predictions",
    "lr_factor",
    "make_optimizer",
    "output_folder",
    "read",
    "test",
    "test_all",
    "train",
]
