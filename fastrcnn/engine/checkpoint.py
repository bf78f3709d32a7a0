"""Checkpoints that survive: written atomically, read without running code, found again after a crash.

A file holds {"model", "optimizer", "scheduler", "scaler", "iteration", "config" (YAML), "conventions" (name),
"categories" (contiguous id → name)}. With SOLVER.EMA_DECAY "model" is the average of the weights, and "trained" the
weights themselves. The folder's `last_checkpoint` is a text file with the name of the newest one.
"""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import nn

from fastrcnn import weights
from fastrcnn.config import Config, load_config
from fastrcnn.data.datasets import COCO_CATEGORIES, VOC_CLASSES
from fastrcnn.engine import distributed

logger = logging.getLogger("fastrcnn")
LAST = "last_checkpoint"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a binary file that takes the name `path` only when it is complete and on disk.

    Whatever happens before that moment leaves an older file of that name as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk only when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, tensors on the CPU. No code of the file is run.

    Raises FileNotFoundError, or ValueError naming the file when it is damaged or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each kind of damage
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of this program: it has no 'model'")
    return contents


def exists_in(folder: str | Path) -> bool:
    """Whether a run has left checkpoints in the folder."""
    return any(True for _ in candidates(folder))


def candidates(folder: str | Path) -> Iterator[Path]:
    """The checkpoint files of a folder, the one to resume from first: last_checkpoint's, then by falling iteration,
    then model_final."""
    folder = Path(folder)
    pointer = folder / LAST
    last = folder / Path(pointer.read_text(encoding="utf-8").strip()).name if pointer.is_file() else None
    if last is not None and last.is_file():
        yield last
    numbered = (p for p in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+\.pth", p.name))
    for path in [*sorted(numbered, key=lambda p: int(p.stem[6:]), reverse=True), folder / "model_final.pth"]:
        if path != last and path.is_file():
            yield path


def read_last(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of the folder that can be read, and its contents; None where there is none.

    A damaged file is passed over with a warning; ValueError when all are damaged.
    """
    damage = []
    for path in candidates(folder):
        try:
            return path, read(path)
        except ValueError as error:
            logger.warning("%s; trying the one before it", error)
            damage.append(path.name)
    if damage:
        raise ValueError(f"no checkpoint in {folder} can be read: {', '.join(damage)}")
    return None


def find(path: str | Path) -> Path:
    """The checkpoint file that a path means: itself, for a folder its newest one, for an address or a name of the
    catalogue (see `fastrcnn.weights.fetch`) the fetched one. FileNotFoundError where there is none."""
    if isinstance(path, str) and "://" in path:
        return weights.fetch(path)
    path = Path(path)
    if path.is_file():
        return path
    newest = next(candidates(path), None) if path.is_dir() else None
    if newest is None:
        raise FileNotFoundError(f"no checkpoint at {path}: wanted a .pth file, or a folder that fastrcnn train wrote")
    return newest


def config_of(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a checkpoint was trained with, OUTPUT_DIR being the folder where it lies now, then KEY VALUE
    overrides."""
    path = Path(path)
    text = read(path).get("config")
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no config: name one with --config-file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"config of {path.name}"
        file.write_text(text, encoding="utf-8")
        return load_config(file, ["OUTPUT_DIR", str(path.parent), *overrides])


def find_model(
    config: Config | str | Path | None = None, weights: Any = None, overrides: Sequence[str] = ()
) -> tuple[Config, Any]:
    """The configuration and the weights that a user means.

    config: a Config, the name of a recipe or YAML file, or a checkpoint or a run's folder, which carry theirs; None is
    that of the weights. weights: as `fastrcnn.weights.load` takes them, or a folder of checkpoints; None is the newest
    checkpoint of the run or of OUTPUT_DIR, else MODEL.WEIGHT. overrides: KEY VALUE KEY VALUE … . FileNotFoundError
    where there are no weights, ConfigError or ValueError for a config that cannot be used.
    """
    if config is None and weights is None:
        raise ValueError("name a configuration or weights: a recipe, a file, or the folder of a run")
    if config is None or (not isinstance(config, Config) and _is_run(config)):
        source = find(weights if config is None else config)
        cfg = config_of(source, overrides)
        if weights is None:
            return cfg, source
    elif isinstance(config, Config):
        cfg = config.clone()
        cfg.merge_from_list(overrides)
    else:
        cfg = load_config(config, overrides)
    if weights is None:
        newest = next(candidates(cfg.OUTPUT_DIR), None)
        if newest is None and not cfg.MODEL.WEIGHT:
            raise FileNotFoundError(f"no weights: no checkpoint in {cfg.OUTPUT_DIR}, and MODEL.WEIGHT is empty")
        return cfg, newest or cfg.MODEL.WEIGHT
    if isinstance(weights, (str, Path)) and Path(weights).is_dir():
        weights = find(weights)
    return cfg, weights


def _is_run(path: str | Path) -> bool:
    return Path(path).is_dir() or Path(path).suffix in (".pth", ".pkl", ".pt")


def category_names(weights: Any, cfg: Config) -> dict[int, str]:
    """Label (1..K) → name: those that a checkpoint carries, else those of COCO or PASCAL VOC where their number fits.

    weights: as of `find_model`. {} where nothing is known.
    """
    if isinstance(weights, (str, Path)) and "://" not in str(weights) and Path(weights).suffix == ".pth":
        with contextlib.suppress(OSError, ValueError):  # other families' files
            names = read(weights).get("categories")
            if names:
                return {int(label): str(name) for label, name in names.items()}
    head = cfg.MODEL.RETINANET if cfg.MODEL.RETINANET_ON else cfg.MODEL.ROI_BOX_HEAD
    published = {
        2: {1: "person"} if cfg.MODEL.KEYPOINT_ON else {},
        21: dict(enumerate(VOC_CLASSES, 1)),
        81: dict(enumerate(COCO_CATEGORIES.values(), 1)),
        91: COCO_CATEGORIES,
    }
    return {} if cfg.MODEL.RPN_ONLY and not cfg.MODEL.RETINANET_ON else published.get(head.NUM_CLASSES, {})


class Checkpointer:
    """Saves and restores what a training run needs to go on: model, optimizer, scheduler and gradient scaler.

    extra: further entries of the file, of plain types. average: the average of the model's weights, where there is one.
    Only rank 0 writes.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful,
        scaler: Stateful,
        extra: dict[str, Any] | None = None,
        average: nn.Module | None = None,
    ):
        self.folder = Path(folder)
        self.parts = {
            "model": distributed.unwrap(model),
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": scaler,
        }
        self.extra = extra or {}
        self.average = average

    def save(self, iteration: int, name: str | None = None) -> Path:
        """Writes model_{iteration:07d}.pth, or `name`, and points last_checkpoint at it."""
        path = self.folder / (name or f"model_{iteration:07d}.pth")
        if distributed.is_main():
            contents = {key: part.state_dict() for key, part in self.parts.items()}
            contents |= {"iteration": iteration, **self.extra}
            if self.average is not None:
                contents |= {"trained": contents["model"], "model": self.average.state_dict()}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(contents, file))
            write_atomically(self.folder / LAST, lambda file: file.write(f"{path.name}\n".encode()))
            logger.info("wrote %s", path)
        return path

    def restore(self, contents: dict[str, Any]) -> int:
        """Puts the contents of a file back and returns its iteration.

        Learning rate, momentum and decay stay as they are configured now; the file gives the state that training made.
        An average begins at the file's weights where the file has none. ValueError when the file does not fit.
        """
        missing = [key for key in (*self.parts, "iteration") if key not in contents]
        if missing:
            raise ValueError(f"the checkpoint cannot be resumed from: it has no {', '.join(missing)}")
        parts: list[tuple[str, Any]] = list(self.parts.items())
        if "trained" in contents:
            parts[0] = ("trained", parts[0][1])
        if self.average is not None:
            parts.append(("model", self.average))
        for key, part in parts:
            if key == "scaler" and not contents[key]:
                continue  # the file is of a run without float16
            settings = [{k: v for k, v in g.items() if k != "params"} for g in getattr(part, "param_groups", ())]
            try:
                if settings and ("betas" in settings[0]) != ("betas" in contents[key]["param_groups"][0]):
                    raise ValueError("it is of another SOLVER.OPTIMIZER")
                part.load_state_dict(contents[key])
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"the checkpoint's {key} does not fit this configuration: {error}") from error
            for group, kept in zip(getattr(part, "param_groups", ()), settings, strict=True):
                group.update(kept)
        return contents["iteration"]
