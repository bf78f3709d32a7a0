"""Detectors as programs of torch.export, and as files that need PyTorch and torchvision alone."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shapes_config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.export.module import ExportModule, outputs

METADATA = "fastrcnn.json"  # the name under which a file has its metadata
MIN_SIDE = 32  # pixels of a padded image


def size_unit(cfg: Any) -> int:
    """What height and width of padded images are multiples of."""
    return max(cfg.DATALOADER.SIZE_DIVISIBILITY, 1)


def example_inputs(cfg: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two images of noise and different sizes, as `ExportModule` takes them."""
    unit = size_unit(cfg)
    side = -(-256 // unit) * unit
    images = torch.randint(256, (2, 3, side, side + 2 * unit), dtype=torch.uint8, device=device)
    return images, torch.tensor([[side, side + unit], [side // 2, side]], device=device)


def export_program(cfg: Any, model: nn.Module, keep: Sequence[Any] = ()) -> ExportedProgram:
    """The `ExportModule` of a model as a graph of PyTorch's and torchvision's operators, for any number of images and
    any size from MIN_SIDE on in multiples of DATALOADER.SIZE_DIVISIBILITY.

    keep: operators, `torch.ops.fastrcnn.*.default`, that stay as they are. ConfigError for test-time augmentation.
    """
    if cfg.TEST.BBOX_AUG.ENABLED:
        raise ConfigError(
            "TEST.BBOX_AUG.ENABLED is True: test-time augmentation is several passes through the model, and an export "
            "holds one; set it to False"
        )
    module = ExportModule(cfg, model, keep)
    unit, batch = size_unit(cfg), Dim("batch", min=1)
    least = -(-MIN_SIDE // unit)
    shape = {0: batch, 2: unit * Dim("rows", min=least), 3: unit * Dim("columns", min=least)}
    # oblivious: else sides of 1, which coarse levels of small images have, would be excluded
    with torch.no_grad(), shapes_config.patch(backed_size_oblivious=True), _without_others_warnings():
        program = torch.export.export(
            module,
            example_inputs(cfg, module.mean.device),
            dynamic_shapes=(shape, {0: batch}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _allow_sides_of_one(program)
    return program


def _allow_sides_of_one(program: ExportedProgram) -> None:
    """Drops the checks that a side is not 1, by which tracing knows strides; those of a side of 1 do not matter."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            condition = node.args[0].meta["val"].node.expr
            if isinstance(condition, sympy.Ne) and not free_unbacked_symbols(condition):
                program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def metadata(cfg: Any, categories: Mapping[int, str]) -> dict[str, Any]:
    """What a program that runs an exported detector has to know, as values of JSON.

    outputs: names, in their order. categories: {label: name}. min_size, max_size: of the shorter and the longer side,
    pixels; antialias: how images are resized to them (INPUT.ANTIALIAS). size_divisibility, min_side: of the padded
    height and width. last_pixel: a box is scaled to another size as (x1, y1, x2 − 1, y2 − 1), and then 1 is added
    again; masks are pasted at (x1, y1, x2 − 1, y2 − 1). mask_size: M. paste_continuous, mask_threshold: as of
    `fastrcnn.ops.paste_masks`.
    """
    conventions, mask = conventions_of(cfg), cfg.MODEL.ROI_MASK_HEAD
    return {
        "fastrcnn": version("fastrcnn"),
        "outputs": outputs(cfg),
        "categories": {str(label): name for label, name in categories.items()},
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "antialias": cfg.INPUT.ANTIALIAS,
        "size_divisibility": size_unit(cfg),
        "min_side": MIN_SIDE,
        "last_pixel": conventions.last_pixel,
        "mask_size": mask.RESOLUTION if cfg.MODEL.MASK_ON else None,
        "paste_continuous": conventions.paste_continuous,
        "mask_threshold": mask.POSTPROCESS_MASKS_THRESHOLD,
    }


@contextmanager
def _without_others_warnings() -> Iterator[None]:
    """Hides two warnings of torchvision and torch about themselves, which no user can do anything about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`create_unbacked_symint` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield


def export_pt2(cfg: Any, model: nn.Module, categories: Mapping[int, str], path: str | Path) -> None:
    """Writes a file that `torch.export.load` reads; the metadata is its extra file `METADATA`.

    ValueError unless the path ends in .pt2; ConfigError as of `export_program`.
    """
    path = _checked(path)
    program = export_program(cfg, model)
    with _without_others_warnings():
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata(cfg, categories))})


def export_aoti(cfg: Any, model: nn.Module, categories: Mapping[int, str], path: str | Path) -> None:
    """Writes a package that `torch._inductor.aoti_load_package` reads, compiled for the model's device and for this
    machine's processor; `METADATA` is in its metadata.

    ValueError unless the path ends in .pt2, or without a C++ compiler; ConfigError as of `export_program`.
    """
    path = _checked(path)
    program = export_program(cfg, model)
    settings = {"aot_inductor.metadata": {METADATA: json.dumps(metadata(cfg, categories))}}
    try:
        with torch.no_grad(), _without_others_warnings():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"an AOTInductor package needs a C++ compiler: install g++, or name one in CXX ({error})"
        ) from error


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name must end in .pt2, by which PyTorch knows such files")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def load_pt2(path: str | Path) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A file of `export_pt2` as a function like `ExportModule`."""
    return torch.export.load(path).module()


def load_aoti(path: str | Path) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A package of `export_aoti` as a function like `ExportModule`."""
    return torch._inductor.aoti_load_package(str(path))
