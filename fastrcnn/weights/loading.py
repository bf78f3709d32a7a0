"""Read a file of weights, recognise whose it is, and copy it into a model."""

import pickle
import warnings
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


def read_state(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str | None]:
    """A path or a state dict -> (tensors under our names, the family they came from, their conventions if known).

    Files are read with `torch.load(weights_only=True)`: no code in them runs. A checkpoint's {"model": ...} is opened.
    FileNotFoundError, or WeightError for a file that is no state dict.
    """
    if isinstance(source, Mapping):
        content = source
    elif "://" in str(source):
        raise WeightError(f"{source}: addresses of weights are not available; download the file and name its path")
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
            raise WeightError(f"{path} is not a file of weights that can be read safely: {error}") from error
    conventions = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        conventions, content = content.get("conventions"), content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightError(f"{_name(source)} holds no state dict (a mapping from names to tensors)")
    # DataParallel and torch.compile put these before the names
    state = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in content.items()}
    if torchvision.matches(state):
        return torchvision.convert(state), "torchvision", "torchvision"
    if torchvision.is_body(state):
        return torchvision.convert_body(state), "torchvision ResNet", None
    return state, "fastrcnn", conventions


def load(model: nn.Module, source: str | Path | Mapping[str, Tensor], skip_mismatch: bool = False) -> Report:
    """Copy weights into a model and report what did not fit.

    Tensors of another shape (a head for another number of classes, say) are an error, with the table of all of them,
    unless skip_mismatch: then they keep their initial values. No tensor in common is an error too. Weights that were
    trained with other conventions than MODEL.CONVENTIONS give a warning.
    """
    state, family, conventions = read_state(source)
    ours = getattr(model, "conventions", conventions)
    if conventions is not None and conventions != ours:
        warnings.warn(
            f"{_name(source)} was trained with the conventions {conventions!r}, the model has {ours!r}: "
            f"set MODEL.CONVENTIONS {conventions}, or expect worse detections",
            stacklevel=2,
        )
    if family == "torchvision ResNet" and _strides_in_1x1(model):
        warnings.warn(
            "torchvision's ResNets have their strides in the 3×3 convolutions: set MODEL.RESNETS.STRIDE_IN_1X1 False",
            stacklevel=2,
        )
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
    # a count that only momentum-free batch norm uses, and that frozen batch norm does not have
    report.missing, report.unexpected = (
        [name for name in names if not name.endswith("num_batches_tracked")]
        for names in (report.missing, report.unexpected)
    )
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


def _strides_in_1x1(model: nn.Module) -> bool:
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return any(m.stride == (2, 2) and m.kernel_size == (1, 1) and m.out_channels < m.in_channels for m in layers)


def _name(source: str | Path | Mapping[str, Tensor]) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)
