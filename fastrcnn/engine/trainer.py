"""The training loop, and `train`, which builds everything from a config and runs it."""

import json
import logging
import os
import platform
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrcnn import weights
from fastrcnn.config import Config, ConfigError, dump_config
from fastrcnn.data import DataError, make_data_loader
from fastrcnn.engine import checkpoint, distributed
from fastrcnn.engine.ema import WeightAverage
from fastrcnn.engine.hooks import Checkpoints, Hook, MetricsFile, PeriodicTest, Progress
from fastrcnn.engine.inference import autocast, test_all
from fastrcnn.engine.logging import has_terminal, log_to
from fastrcnn.engine.solver import LRSchedule, make_optimizer
from fastrcnn.models import build_model
from fastrcnn.structures import ImageBatch, TargetBatch

logger = logging.getLogger("fastrcnn")


def seed_all(seed: int, rank: int, iteration: int) -> None:
    """Seeds torch, random and numpy from the three numbers.

    Done before every iteration, so a resumed run draws what the uninterrupted one would have drawn, and no state of a
    generator has to be saved for any rank.
    """
    words = np.random.SeedSequence((seed, rank, iteration)).generate_state(4)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    random.seed(int(words[2]))
    np.random.seed(words[3])


class Trainer:
    """Runs iterations: batch to the device, losses, backward, clipping, update, next learning rate.

    model: `model(images, targets)` gives a dict of scalar losses, on one device; it may be DistributedDataParallel.
    loader: gives (ImageBatch, TargetBatch, ids) for every iteration from `iteration` to SOLVER.MAX_ITER. With
    SOLVER.ACCUMULATE_STEPS a batch goes through the model in so many parts, whose gradients are averaged as those of
    so many processes would be. average: follows the weights after every update.
    Within an iteration nothing is read back from the device: the losses stay there and are read every
    SOLVER.LOG_PERIOD iterations, averaged over these iterations and over the ranks.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        loader: Iterable,
        optimizer: torch.optim.Optimizer,
        scheduler: LRSchedule,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        hooks: Sequence[Hook] = (),
        iteration: int = 0,
        average: WeightAverage | None = None,
    ):
        self.cfg = cfg
        self.model = model
        self.loader = loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.device = device
        self.average = average
        self.hooks = hooks
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.iteration = iteration  # finished iterations
        self.updating = False  # whether the weights are between two iterations
        self.metrics: dict[str, Any] | None = None
        self._losses: list[Tensor] = []  # of the iterations since they were last read, each [number of losses]
        self._names: list[str] = []

    def run(self) -> None:
        """Trains to SOLVER.MAX_ITER.

        Ctrl-C and SIGTERM end the loop after the iteration that is running, with KeyboardInterrupt or SystemExit, after
        the hooks have saved what there is. A loss that is not finite raises FloatingPointError.
        """
        self.model.train()
        self._restart_clock()
        with _stop_requests() as requested:
            try:
                # made here, so that Ctrl-C finds the handler installed before worker processes start
                batches = iter(self.loader) if self.iteration < self.max_iter else iter(())
                while self.iteration < self.max_iter:
                    self._iterate(batches)
                    self.metrics = None
                    if self.iteration % self.cfg.SOLVER.LOG_PERIOD == 0 or self.iteration == self.max_iter:
                        self._read_losses()
                    before = time.perf_counter()
                    for hook in self.hooks:
                        hook.after_iteration(self)
                    self._elsewhere += time.perf_counter() - before
                    # other ranks go on: rank 0 alone decides which iteration is the last, and torchrun ends them
                    if requested and distributed.is_main():
                        raise _stop_exception(requested[0])
            except BaseException as error:
                self._finish(error)
                if requested and not distributed.is_main():
                    raise SystemExit(128 + requested[0]) from None  # it failed because rank 0 has left
                raise
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        for hook in self.hooks:
            hook.after_training(self, error)

    def _iterate(self, batches: Iterator) -> None:
        seed_all(self.cfg.SEED, distributed.rank(), self.iteration)
        before = time.perf_counter()
        try:
            images, targets, _ = next(batches)
        except StopIteration:
            raise RuntimeError(f"the loader ended at iteration {self.iteration} of {self.max_iter}") from None
        self._data_time += time.perf_counter() - before
        self.optimizer.zero_grad(set_to_none=True)
        values = self._backward(images, targets)
        if self.cfg.SOLVER.CLIP_GRADIENTS > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.SOLVER.CLIP_GRADIENTS)
        self._losses.append(values)
        self._lr = self.scheduler.lr
        self.updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        self.scheduler.step()
        self.iteration += 1
        self.updating = False

    def _backward(self, images: ImageBatch, targets: TargetBatch) -> Tensor:
        """Adds the gradient of the batch to that of the parameters, and gives its losses, [number of losses]."""
        steps = self.cfg.SOLVER.ACCUMULATE_STEPS
        size = len(images) // steps
        if size * steps != len(images):
            raise ConfigError(
                f"SOLVER.ACCUMULATE_STEPS is {steps}; it must divide the images of a process, {len(images)}"
            )
        total = torch.zeros((), device=self.device)
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            some = [b._map(lambda t, part=part: t[part]).to(self.device, non_blocking=True) for b in (images, targets)]
            last = step == steps - 1
            with nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():
                with autocast(self.cfg, self.device):
                    losses = self.model(*some)
                values = torch.stack([loss.float() for loss in losses.values()]) / steps
                self.scaler.scale(values.sum()).backward()
            total = total + values.detach()
        self._names = list(losses)
        return total

    def _restart_clock(self) -> None:
        self._since = time.perf_counter()
        self._data_time = self._elsewhere = 0.0

    def _read_losses(self) -> None:
        """Sets `metrics` from the iterations since the last reading. The one host sync of training."""
        values = distributed.mean_over_ranks(torch.stack(self._losses)).cpu()  # [iterations, losses]
        count = len(values)
        self._check_losses(values)
        self._losses = []
        means = values.double().mean(0).tolist()
        seconds = (time.perf_counter() - self._since - self._elsewhere) / count
        self.metrics = {
            "iteration": self.iteration,
            "lr": self._lr,
            "loss": sum(means),
            **dict(zip(self._names, means, strict=True)),
            "time": seconds,
            "data_time": self._data_time / count,
            "images_per_second": self.cfg.SOLVER.IMS_PER_BATCH / seconds,
            "eta_seconds": seconds * (self.max_iter - self.iteration),
        }
        if self.device.type == "cuda":
            self.metrics["max_mem_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self._restart_clock()

    def _check_losses(self, values: Tensor) -> None:
        bad = ~values.isfinite().all(1)
        if bad.any():
            first = int(bad.float().argmax())
            told = ", ".join(f"{k} {v:.4g}" for k, v in zip(self._names, values[first].tolist(), strict=True))
            raise FloatingPointError(
                f"loss is not finite at iteration {self.iteration - len(values) + 1 + first}: {told}. The last good "
                "checkpoint is kept. Usual cures: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, or "
                "SOLVER.CLIP_GRADIENTS"
            )

    def check(self) -> None:
        """Raises FloatingPointError unless the losses and all weights are finite. Called before weights are written."""
        if self._losses:
            self._check_losses(torch.stack(self._losses).cpu())
        state = {k: v for k, v in distributed.unwrap(self.model).state_dict().items() if v.is_floating_point()}
        finite = torch.stack([v.isfinite().all() for v in state.values()]).tolist()
        if not all(finite):
            name = list(state)[finite.index(False)]
            raise FloatingPointError(f"weights are not finite after iteration {self.iteration}, first of all {name}")


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM of the block; a second SIGINT raises KeyboardInterrupt at
    once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals cannot be caught there
        yield received
        return
    owner = os.getpid()

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            return  # a worker process of the loader, which has inherited the handler and is ended by its parent
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if distributed.is_main():  # written past the buffers, which the signal may have interrupted
            os.write(2, b"\nstopping after this iteration; Ctrl-C again: at once\n")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_exception(number: int) -> BaseException:
    if number == signal.SIGINT:
        return KeyboardInterrupt("stopped; the checkpoint is saved: go on with --resume")
    return SystemExit(128 + number)


@dataclass(frozen=True)
class Run:
    """What `train` leaves: the folder, the iterations that are finished, and {dataset: results} (on rank 0, else
    empty)."""

    output: Path
    iteration: int
    results: dict[str, Any]


def train(cfg: Config, resume: bool = False, skip_test: bool = False, numbered: bool = False) -> Run:
    """Trains as the config says, in OUTPUT_DIR, and evaluates on DATASETS.TEST. Under torchrun, on all processes.

    resume: go on from the newest checkpoint of OUTPUT_DIR; without one, start. Without `resume` a folder that holds
    checkpoints is refused (FileExistsError). numbered: use OUTPUT_DIR, OUTPUT_DIR-2, OUTPUT_DIR-3, …: the first that is
    free, or with `resume` the last that holds checkpoints.

    Writes config.yml, labels.json, log.txt, metrics.jsonl, model_*.pth, last_checkpoint and inference/<dataset>/.
    """
    with distributed.session(cfg.MODEL.DEVICE) as device:
        cfg = cfg.clone()
        cfg.OUTPUT_DIR = distributed.from_main(lambda: str(output_folder(cfg.OUTPUT_DIR, resume, numbered)))
        with log_to(cfg.OUTPUT_DIR):
            return _train(cfg, device, resume, skip_test)


def output_folder(path: str | Path, resume: bool, numbered: bool) -> Path:
    """The folder that a run is to use: see `train`."""
    path = Path(path)
    if numbered:
        folders = [path]
        while folders[-1].exists():
            folders.append(path.with_name(f"{path.name}-{len(folders) + 1}"))
        used = [folder for folder in folders if checkpoint.exists_in(folder)]
        return used[-1] if resume and used else folders[-1]
    if not resume and checkpoint.exists_in(path):
        raise FileExistsError(
            f"{path} holds the checkpoints of another run: add --resume to go on with it, or choose another OUTPUT_DIR"
        )
    return path


def _train(cfg: Config, device: torch.device, resume: bool, skip_test: bool) -> Run:
    output, solver = Path(cfg.OUTPUT_DIR), cfg.SOLVER
    world_size, rank = distributed.world_size(), distributed.rank()
    if solver.LOG_PERIOD < 1:
        raise ConfigError(f"SOLVER.LOG_PERIOD is {solver.LOG_PERIOD}; it must be at least 1")
    newest = checkpoint.read_last(output) if resume else None
    if cfg.SEED < 0:
        cfg.SEED = newest[1].get("seed", 0) if newest else distributed.from_main(lambda: time.time_ns() % 2**31)
    seed_all(cfg.SEED, rank, 0)
    logger.info(
        "python %s, torch %s, %d process(es) on %s, seed %d",
        platform.python_version(),
        torch.__version__,
        world_size,
        device,
        cfg.SEED,
    )

    if newest is not None:
        cfg.MODEL.CONVENTIONS = newest[1].get("conventions", cfg.MODEL.CONVENTIONS)
    elif cfg.MODEL.WEIGHT:
        weights.adopt_conventions(cfg, cfg.MODEL.WEIGHT)
    model = build_model(cfg).to(device)
    if newest is None and cfg.MODEL.WEIGHT:
        report = weights.load(model, cfg.MODEL.WEIGHT, skip_mismatch=cfg.MODEL.WEIGHT_SKIP_MISMATCH)
        logger.info("weights of %s\n%s", cfg.MODEL.WEIGHT, report)
    elif newest is None and cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT > 0:
        logger.warning(
            "MODEL.WEIGHT is empty, so the first %d parts of the body stay frozen at random values; "
            "name weights, or set MODEL.BACKBONE.FREEZE_CONV_BODY_AT 0",
            cfg.MODEL.BACKBONE.FREEZE_CONV_BODY_AT,
        )
    optimizer = make_optimizer(cfg, model)
    scheduler = LRSchedule(cfg, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.DTYPE == "float16")
    extra = {"config": dump_config(cfg), "conventions": cfg.MODEL.CONVENTIONS, "seed": cfg.SEED}
    wrapped = distributed.wrap(model)  # gives every rank the weights of rank 0, where the average begins
    average = WeightAverage(model, solver.EMA_DECAY) if solver.EMA_DECAY > 0 else None
    judged = model if average is None else average.model
    checkpointer = checkpoint.Checkpointer(
        output, model, optimizer, scheduler, scaler, extra, None if average is None else average.model
    )
    iteration = 0
    if newest is not None:
        iteration = checkpointer.restore(newest[1])
        logger.info("resumed %s at iteration %d", newest[0], iteration)
    elif resume:
        logger.warning("no checkpoint in %s to resume: starting at iteration 0", output)

    with distributed.main_first():
        loader = make_data_loader(cfg, is_train=True, start_iter=iteration, rank=rank, world_size=world_size)
        # made before training, so that a missing file is found now and not after hours
        test_loaders = (
            []
            if skip_test and not solver.TEST_PERIOD
            else make_data_loader(cfg, is_train=False, rank=rank, world_size=world_size)
        )
    categories = {int(k): str(v) for k, v in getattr(loader.dataset, "categories", {}).items()}
    checkpointer.extra["categories"] = categories

    metrics = None
    hooks: list[Hook] = [Checkpoints(checkpointer, solver.CHECKPOINT_PERIOD, saved=iteration)]
    if distributed.is_main():
        (output / "config.yml").write_text(extra["config"], encoding="utf-8")
        (output / "labels.json").write_text(json.dumps(categories, indent=2) + "\n", encoding="utf-8")
        metrics = MetricsFile(output / "metrics.jsonl", iteration)
        hooks = [metrics, Progress(solver.MAX_ITER, iteration, has_terminal()), *hooks]

    def evaluation() -> dict[str, Any]:
        entry: dict[str, Any] = {"eval": test_all(judged, test_loaders, cfg)}
        if solver.TEST_PERIOD > 0:
            entry["validation"] = validation_losses(cfg, judged, sum(len(each.dataset) for each in test_loaders))
        return entry

    if solver.TEST_PERIOD > 0:
        hooks.append(PeriodicTest(evaluation, solver.TEST_PERIOD, metrics))

    started = time.perf_counter()
    trainer = Trainer(
        cfg, wrapped, loader, optimizer, scheduler, scaler, device, hooks=hooks, iteration=iteration, average=average
    )
    trainer.run()
    logger.info("trained %d iterations in %.1f s", trainer.iteration - iteration, time.perf_counter() - started)

    entry = {"eval": {}} if skip_test else evaluation()
    if metrics is not None and entry["eval"]:
        metrics.write({"iteration": trainer.iteration, **entry})
    return Run(output, trainer.iteration, entry["eval"])


@torch.no_grad()
def validation_losses(cfg: Config, model: nn.Module, count: int) -> dict[str, float]:
    """The means of the training losses, and of their sum "loss", over `count` images of DATASETS.TEST, on every rank.

    The images have the sizes and batches of testing and no augmentation; the random numbers are the same each time.
    Statistics of batch norm are used, not changed. {} with a warning where a dataset has no ground truth to learn from.
    """
    own = cfg.clone()
    own.DATASETS.TRAIN = cfg.DATASETS.TEST
    own.INPUT.MIN_SIZE_TRAIN, own.INPUT.MAX_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    own.INPUT.LSJ_SIZE = 0
    for name in "BRIGHTNESS CONTRAST SATURATION HUE HORIZONTAL_FLIP_PROB_TRAIN VERTICAL_FLIP_PROB_TRAIN".split():
        setattr(own.INPUT, name, 0.0)
    own.SOLVER.IMS_PER_BATCH = cfg.TEST.IMS_PER_BATCH
    own.SOLVER.MAX_ITER = -(-count // cfg.TEST.IMS_PER_BATCH)
    rank, device = distributed.rank(), next(model.parameters()).device
    seed_all(cfg.SEED, rank, 0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    means: dict[str, Tensor] = {}
    failure = None
    try:
        for images, targets, _ in make_data_loader(own, True, rank=rank, world_size=distributed.world_size()):
            with autocast(cfg, device):
                losses = model(images.to(device, non_blocking=True), targets.to(device, non_blocking=True))
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.float() / own.SOLVER.MAX_ITER
    except DataError as error:
        failure = error
    model.eval()
    if distributed.mean_over_ranks(torch.tensor(float(failure is not None))) > 0:  # on any rank
        logger.warning("no validation losses: %s", failure or "another process could not read its images")
        return {}
    values = distributed.mean_over_ranks(torch.stack(list(means.values()))).tolist()
    logger.info("validation losses: %s", "  ".join(f"{k}: {v:.4f}" for k, v in zip(means, values, strict=True)))
    return {"loss": sum(values), **dict(zip(means, values, strict=True))}
