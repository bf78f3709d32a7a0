"""Read weights, recognise whose they are, and copy them into a model; and the way back, to other projects' names."""

import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastrcnn.config.conventions import CONVENTIONS
from fastrcnn.weights import detectron, detectron2, torchvision
from fastrcnn.weights.classes import select_classes
from fastrcnn.weights.download import fetch
from fastrcnn.weights.errors import WeightError
from fastrcnn.weights.pickles import read_pickle

logger = logging.getLogger("fastrcnn")

# what torch.save wrote before it wrote archives
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_BODY = "backbone.body."


class Weights(NamedTuple):
    """state: tensors under our names. family: whose they are. conventions: the name of their geometry, if known."""

    state: dict[str, Tensor]
    family: str
    conventions: str | None


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


def read_state(source: str | Path | Mapping[str, Any]) -> Weights:
    """Weights of any known family, recognised by what is in them.

    source: a path, an address or a name (see `download.fetch`), or the contents of a file: a mapping from names to
    tensors or arrays, or one with such a mapping as "model", "blobs" or "state_dict". Files of torch.save are read with
    weights_only=True and pickles by `pickles.read_pickle`: no code in them runs. FileNotFoundError, or WeightError for
    what cannot be fetched, cannot be read safely, or is no state dict.
    """
    content = source if isinstance(source, Mapping) else _read_file(fetch(source))
    conventions = None
    for key in ("model", "blobs", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            conventions, content = content.get("conventions"), content[key]
            break
    if not isinstance(content, Mapping):
        content = {}
    values = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    if not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise WeightError(f"{_name(source)} holds no state dict (a mapping from names to tensors)")
    # DataParallel and torch.compile put these before the names
    state = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in values.items()}
    if detectron.matches(state):
        body = detectron.is_body(state)
        return Weights(
            detectron.convert(state), "Detectron body" if body else "Detectron", None if body else "detectron"
        )
    if torchvision.matches(state):
        return Weights(torchvision.convert(state), "torchvision", "torchvision")
    if detectron2.matches(state):
        body = detectron2.is_body(state)
        return Weights(
            detectron2.convert(state), "detectron2 body" if body else "detectron2", None if body else "modern"
        )
    if torchvision.body(state):
        return Weights(torchvision.convert_body(state), torchvision.body(state), None)
    # maskrcnn-benchmark keeps its anchors among its parameters, and here they follow from the config
    kept = {name: value for name, value in state.items() if not name.startswith("rpn.anchor_generator.")}
    if len(kept) < len(state):
        return Weights(kept, "maskrcnn-benchmark", conventions or "maskrcnn-benchmark")
    return Weights(state, "fastrcnn", conventions)


def adopt_conventions(cfg: Any, source: str | Path | Mapping[str, Any]) -> None:
    """Set MODEL.CONVENTIONS to those that the weights were trained with, before the model is built; bodies of backbones
    have none, and leave it. source: what `read_state` takes."""
    found = read_state(source).conventions
    if found is None:
        return
    if CONVENTIONS.get(found) != CONVENTIONS[cfg.MODEL.CONVENTIONS]:
        logger.info("MODEL.CONVENTIONS %s, as %s has it, not %s", found, _name(source), cfg.MODEL.CONVENTIONS)
    cfg.MODEL.CONVENTIONS = found


def _read_file(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(len(_TORCH_MAGIC))
    if not (zipfile.is_zipfile(path) or start.startswith(b"PK") or start == _TORCH_MAGIC):
        return read_pickle(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise WeightError(f"{path} is not a file of weights that can be read safely: {error}") from error


def load(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    skip_mismatch: bool = False,
    classes: Mapping[int, int] | None = None,
) -> Report:
    """Copy weights into a model and report what did not fit.

    source: what `read_state` takes. A parameter that the weights do not have by its whole name takes the one whose name
    is the longest ending of it, as in maskrcnn-benchmark; so a body's last stage finds the head of a C4 model.
    classes: {our label: their label}; the last layers of the heads take the rows of those classes, and keep their
    initial values for our other labels.

    Tensors of another shape (a head for another number of classes, say) are an error, with the table of all of them,
    unless skip_mismatch: then they keep their initial values. No tensor in common is an error too. Weights that were
    trained with other conventions than MODEL.CONVENTIONS give a warning.
    """
    state, family, conventions = read_state(source)
    ours = getattr(model, "conventions", conventions)
    if conventions is not None and conventions != ours and CONVENTIONS.get(conventions) != CONVENTIONS.get(ours):
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
    own = model.state_dict(keep_vars=True)
    if classes is not None:
        state = select_classes(state, classes, own)
    report = Report(_name(source), family)
    chosen: dict[str, Tensor] = {}
    used = set()
    for name, parameter in own.items():
        source_name = _find(name, state, own)
        if source_name is None:
            report.missing.append(name)
            continue
        used.add(source_name)
        value = state[source_name]
        if parameter.shape == value.shape:
            chosen[name] = value
        else:
            report.mismatched.append((name, tuple(value.shape), tuple(parameter.shape)))
    report.loaded = list(chosen)
    # a head that shares a part with another lists it under both names; a count that only batch norm without momentum
    # uses, frozen batch norm does not have
    filled = {id(own[name]) for name in chosen}
    report.missing = [n for n in report.missing if id(own[n]) not in filled and not n.endswith("num_batches_tracked")]
    report.unexpected = [n for n in state if n not in used and not n.endswith("num_batches_tracked")]
    if not report.loaded:
        raise WeightError(f"nothing in {report.source} fits the model\n{report}")
    if report.mismatched and not skip_mismatch:
        raise WeightError(
            f"{len(report.mismatched)} tensors do not fit the model; adapt the config (MODEL.ROI_BOX_HEAD.NUM_CLASSES "
            "is the number of classes + 1), or keep their initial values with MODEL.WEIGHT_SKIP_MISMATCH True\n"
            f"{report}"
        )
    model.load_state_dict(chosen, strict=False)
    return report


def _find(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The name in the weights that fills a parameter of the model: its own, or the longest ending of it that no other
    parameter has for its own; a body's names may end there too."""
    if name in state:
        return name
    ending = name
    while ending:
        for candidate in (ending, _BODY + ending):
            if candidate in state and candidate not in own:
                return candidate
        ending = ending.partition(".")[2]
    # a deformable convolution starts from the plain one
    return _find(name.replace(".conv2.conv.", ".conv2."), state, own) if ".conv2.conv." in name else None


def export(source: nn.Module | Mapping[str, Tensor], project: str) -> dict[str, Tensor]:
    """The parameters of a model, or a state dict under our names, as "torchvision" or "detectron2" has them.

    `read_state` reads the result back, bit for bit but for what the other project does not have: detectron2 no boxes
    and masks of the background (nothing reads them; they come back as zeros), torchvision's RetinaNet a label 0 of its
    own, which never fires. Geometry does not travel: use the result with the conventions "torchvision" or "modern".
    WeightError, with the names, for parameters without a counterpart.
    """
    families = {"torchvision": torchvision.export, "detectron2": detectron2.export}
    if project not in families:
        raise WeightError(f"{project!r}: weights can be exported to {' and '.join(families)}")
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return families[project](state)


def _strides_in_1x1(model: nn.Module) -> bool:
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return any(m.stride == (2, 2) and m.kernel_size == (1, 1) and m.out_channels < m.in_channels for m in layers)


def _name(source: str | Path | Mapping[str, Any]) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)
