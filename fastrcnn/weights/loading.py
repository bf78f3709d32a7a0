"""Read a file of weights, recognise whose it is, and copy it into a model."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn.weights import torchvision


class WeightError(ValueError):
    """A file of weights that cannot be read, or that does not fit the model."""


@dataclass
class Report:
    """What became of a state dict: names without a counterpart, and those of another shape (theirs, the model's)."""

    source: str
    family: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"{len(self.loaded)} tensors loaded from {self.source} ({self.family} names)"]
        rows += [f"  missing      {name}  (keeps its initial value)" for name in self.missing]
        rows += [f"  unexpected   {name}  (left out)" for name in self.unexpected]
        rows += [
            f"  mismatched   {n}  {list(there)} in the weights, {list(here)} in the model"
            for n, there, here in self.mismatched
        ]
        return "\n".join(rows)


def read_state(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A path or a state dict -> (tensors under our names, the family they came from).

    Files are read with `torch.load(weights_only=True)`: no code in them runs. A checkpoint's {"model": ...} is opened.
    """
    if isinstance(source, Mapping):
        content = source
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
            raise WeightError(f"{path} is not a file of weights that can be read safely: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightError(f"{_name(source)} holds no state dict (a mapping from names to tensors)")
    state = {name.removeprefix("module."): value for name, value in content.items()}
    if torchvision.matches(state):
        return torchvision.convert(state), "torchvision"
    return state, "fastrcnn"


def load(model: nn.Module, source: str | Path | Mapping[str, Tensor], skip_mismatch: bool = False) -> Report:
    """Copy weights into a model and report what did not fit.

    Tensors of another shape (a head for another number of classes, say) are an error, with the table of all of them,
    unless skip_mismatch: then they keep their initial values. No tensor in common is an error too.
    """
    state, family = read_state(source)
    own = model.state_dict()
    report = Report(_name(source), family)
    for name, value in state.items():
        if name not in own:
            report.unexpected.append(name)
        elif own[name].shape != value.shape:
            report.mismatched.append((name, tuple(value.shape), tuple(own[name].shape)))
        else:
            report.loaded.append(name)
    report.missing = [name for name in own if name not in state]
    if not report.loaded:
        raise WeightError(f"nothing in {report.source} fits the model\n{report}")
    if report.mismatched and not skip_mismatch:
        raise WeightError(
            f"{len(report.mismatched)} tensors do not fit the model; adapt the config (MODEL.ROI_BOX_HEAD.NUM_CLASSES "
            "is the number of classes + 1), or keep their initial values with MODEL.WEIGHT_SKIP_MISMATCH True\n"
            f"{report}"
        )
    model.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def _name(source: str | Path | Mapping[str, Tensor]) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)
