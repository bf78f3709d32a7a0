"""What happens around the iterations of a training run: checkpoints, tests, metrics, the progress bar."""

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastrcnn.engine.checkpoint import Checkpointer, write_atomically

if TYPE_CHECKING:
    from fastrcnn.engine.trainer import Trainer

logger = logging.getLogger("fastrcnn")


class Hook:
    """Called by the trainer, in the order of its list."""

    def after_iteration(self, trainer: "Trainer") -> None:
        """`trainer.iteration` iterations are finished; `trainer.metrics` is a dict when they were just read."""

    def after_training(self, trainer: "Trainer", error: BaseException | None) -> None:
        """The loop has ended, or `error` is about to end it."""


class Checkpoints(Hook):
    """A checkpoint every `period` iterations, model_final.pth at the end, and one when the run is stopped.

    That one is of the last finished iteration. Weights that are not finite are never written.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, saved: int = 0):
        self.checkpointer = checkpointer
        self.period = period
        self.saved = saved  # the iteration of the newest checkpoint

    def after_iteration(self, trainer: "Trainer") -> None:
        if self.period > 0 and trainer.iteration % self.period == 0:
            trainer.check()
            self.checkpointer.save(trainer.iteration)
            self.saved = trainer.iteration

    def after_training(self, trainer: "Trainer", error: BaseException | None) -> None:
        if error is None:
            trainer.check()
            self.checkpointer.save(trainer.iteration, "model_final.pth")
        elif trainer.iteration > self.saved:
            if trainer.updating:
                logger.warning(
                    "stopped in the middle of an update: the newest checkpoint is of iteration %d", self.saved
                )
                return
            try:
                trainer.check()
                self.checkpointer.save(trainer.iteration)
            except Exception as failure:  # the error that stopped the run is the one to tell
                logger.warning("no checkpoint of iteration %d: %s", trainer.iteration, failure)


class PeriodicTest(Hook):
    """Writes what `test()` gives, such as {"eval": {dataset: results}}, every `period` iterations, not at the last one,
    after which train() tests anyway."""

    def __init__(self, test: Callable[[], dict[str, Any]], period: int, metrics: "MetricsFile | None"):
        self.test = test
        self.period = period
        self.metrics = metrics

    def after_iteration(self, trainer: "Trainer") -> None:
        if trainer.iteration % self.period == 0 and trainer.iteration < trainer.max_iter:
            entry = self.test()
            trainer.model.train()
            if self.metrics is not None:
                self.metrics.write({"iteration": trainer.iteration, **entry})


class MetricsFile(Hook):
    """metrics.jsonl, one JSON object per line. A resumed run drops the lines after the iteration it starts from."""

    def __init__(self, path: Path, start_iteration: int = 0):
        self.path = path
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _iteration_of(line) <= start_iteration]
            write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))

    def write(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def after_iteration(self, trainer: "Trainer") -> None:
        if trainer.metrics is not None:
            self.write(trainer.metrics)


def _iteration_of(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except ValueError:  # a line that a crash cut off
        return float("inf")


class Progress(Hook):
    """A bar where stderr is a terminal, and lines in maskrcnn-benchmark's form: on a terminal to log.txt alone."""

    def __init__(self, max_iter: int, start_iteration: int, bar: bool):
        self.bar = tqdm(total=max_iter, initial=start_iteration, unit="it", dynamic_ncols=True) if bar else None

    def after_iteration(self, trainer: "Trainer") -> None:
        metrics = trainer.metrics
        if self.bar is not None:
            self.bar.update()
            if metrics is not None:
                rate = metrics["images_per_second"]
                self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.2g}, {rate:.1f} images/s")
        if metrics is not None:
            logger.log(logging.INFO if self.bar is None else logging.DEBUG, describe(metrics))

    def after_training(self, trainer: "Trainer", error: BaseException | None) -> None:
        if self.bar is not None:
            self.bar.close()


def describe(metrics: dict[str, Any]) -> str:
    """The line of the log for a dict of metrics."""
    losses = "  ".join(f"{key}: {value:.4f}" for key, value in metrics.items() if key.startswith("loss"))
    memory = f"  max mem: {metrics['max_mem_mb']:.0f}" if "max_mem_mb" in metrics else ""
    return (
        f"eta: {timedelta(seconds=round(metrics['eta_seconds']))}  iter: {metrics['iteration']}  {losses}  "
        f"time: {metrics['time']:.4f}  data: {metrics['data_time']:.4f}  images/s: {metrics['images_per_second']:.1f}  "
        f"lr: {metrics['lr']:.6f}{memory}"
    )
