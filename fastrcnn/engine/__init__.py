"""Training, testing, checkpoints, and the processes that share the work."""

from fastrcnn.engine.checkpoint import Checkpointer, find, read
from fastrcnn.engine.hooks import Hook
from fastrcnn.engine.inference import inference, load_predictions, test
from fastrcnn.engine.solver import WarmupMultiStepLR, lr_factor, make_optimizer
from fastrcnn.engine.trainer import Run, Trainer, train

__all__ = [
    "Checkpointer",
    "Hook",
    "Run",
    "Trainer",
    "WarmupMultiStepLR",
    "find",
    "inference",
    "load_predictions",
    "lr_factor",
    "make_optimizer",
    "read",
    "test",
    "train",
]
