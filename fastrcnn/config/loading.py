"""Configuration from YAML files and from `KEY VALUE` pairs, and back to YAML."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fastrcnn.config.schema import Config, Section, coerce, key_types, leaves, nearest

RECIPES = Path(__file__).resolve().parent.parent / "configs"
_warned: set[str] = set()  # dead keys that this process was warned of


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the file or the command line, the key, and what is wanted."""


def load_config(path: str | Path | None = None, overrides: Sequence[Any] | None = ()) -> Config:
    """The defaults, then the YAML file `path`, then `overrides`, a flat list KEY VALUE KEY VALUE … .

    `path` may be the name of one of the recipes that come with the package: see `find_config`.
    A file may name others with `_BASE_: other.yaml` or `_BASE_: [one.yaml, two.yaml]`, relative to itself, or recipes;
    they are read before it, in this order. Values may be Python literals as text, such as "(480000, 640000)". A dead
    key that is set to something else than its default gives a warning, once in a process. Raises ConfigError.
    """
    cfg = Config()
    if path is not None:
        merge_file(cfg, path)
    merge_overrides(cfg, list(overrides or ()))
    check_config(cfg)
    defaults = {leaf.path: leaf.default for leaf in leaves(Config()) if leaf.dead}
    dead = [leaf.path for leaf in leaves(cfg) if leaf.dead and leaf.default != defaults[leaf.path]]
    new = [path for path in dead if path not in _warned]
    if new:
        _warned.update(new)
        warnings.warn(f"these keys do nothing, as in maskrcnn-benchmark: {', '.join(new)}", stacklevel=2)
    return cfg


def find_config(name: str | Path) -> Path:
    """The YAML file that a name means: a path, the config.yml of a run's folder, or a recipe in fastrcnn/configs,
    whatever the current folder.

    Of a recipe the suffix and what leads to configs/ may be left out: "quick_start", "configs/quick_start.yaml" and
    "../configs/quick_start.yaml" are one. ConfigError, with the nearest recipe, where there is neither.
    """
    path = Path(name).expanduser()
    for file in (path, path / "config.yml"):
        if file.is_file():
            return file
    parts = path.parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    recipe = RECIPES.joinpath(*parts)
    for file in (recipe, recipe.with_name(recipe.name + ".yaml")):
        if not path.is_absolute() and file.is_file():
            return file
    known = [file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml")]
    near = nearest("/".join(parts).removesuffix(".yaml"), known)
    raise ConfigError(f"{name}: cannot read this configuration file: no such file, nor a recipe; the nearest is {near}")


def dump_config(cfg: Config) -> str:
    """The whole tree as YAML, from which `load_config` makes an equal one."""
    return yaml.dump(_plain(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def check_config(cfg: Config) -> None:
    """Raises ConfigError for values that no model can use, whatever the model."""

    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"{key} is {value!r}; it must be {wanted}")

    for name, node in (("SOLVER", cfg.SOLVER), ("TEST", cfg.TEST)):
        need(node.IMS_PER_BATCH >= 1, f"{name}.IMS_PER_BATCH", node.IMS_PER_BATCH, "at least 1")
    for name, node in (("ROI_BOX_HEAD", cfg.MODEL.ROI_BOX_HEAD), ("RETINANET", cfg.MODEL.RETINANET)):
        need(node.NUM_CLASSES >= 2, f"MODEL.{name}.NUM_CLASSES", node.NUM_CLASSES, "at least 2: the background counts")
    need(len(cfg.INPUT.MIN_SIZE_TRAIN) > 0, "INPUT.MIN_SIZE_TRAIN", cfg.INPUT.MIN_SIZE_TRAIN, "one size or more")
    need(cfg.DATALOADER.NUM_WORKERS >= 0, "DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, "at least 0")
    need(cfg.SOLVER.MAX_ITER >= 0, "SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER, "at least 0")
    need(cfg.SOLVER.ACCUMULATE_STEPS >= 1, "SOLVER.ACCUMULATE_STEPS", cfg.SOLVER.ACCUMULATE_STEPS, "at least 1")
    need(0 <= cfg.SOLVER.EMA_DECAY < 1, "SOLVER.EMA_DECAY", cfg.SOLVER.EMA_DECAY, "at least 0 and below 1")
    steps = cfg.SOLVER.STEPS
    need(all(a < b for a, b in pairwise(steps)), "SOLVER.STEPS", steps, "in rising order")


def merge_file(cfg: Config, path: str | Path) -> None:
    """Reads a YAML file or recipe, with the files that it names, over what `cfg` has. Raises ConfigError."""
    _merge_file(cfg, find_config(path), ())


def _merge_file(cfg: Config, path: Path, readers: tuple[Path, ...]) -> None:
    if path.resolve() in readers:
        raise ConfigError(f"{path}: _BASE_ leads back to this file: {' → '.join(map(str, (*readers, path.resolve())))}")
    tree = _read(path)
    bases = tree.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: _BASE_: wanted the name of a file, got {type(base).__name__} {base!r}")
        beside = path.parent / Path(base).expanduser()
        _merge_file(cfg, beside if beside.is_file() else find_config(base), (*readers, path.resolve()))
    _merge_tree(cfg, cfg, tree, "", str(path))


def _read(path: Path) -> dict[Any, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}, line {mark.line + 1}: broken YAML: {error.problem or error.context}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: broken YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: wanted keys with values, got {type(tree).__name__} {tree!r}")
    return tree


def _merge_tree(cfg: Config, node: Section, tree: Mapping[Any, Any], prefix: str, source: str) -> None:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in key_types(type(node)):
            raise _unknown(cfg, path, source)
        child = getattr(node, name)
        if not isinstance(child, Section):
            _assign(node, name, value, path, source)
        elif isinstance(value, Mapping):
            _merge_tree(cfg, child, value, f"{path}.", source)
        elif value is not None:  # a section with nothing under it changes nothing
            raise ConfigError(
                f"{source}: {path} is a section, wanted keys below it, got {type(value).__name__} {value!r}"
            )


def merge_overrides(cfg: Config, overrides: Sequence[Any]) -> None:
    """Sets the keys of a flat list KEY VALUE KEY VALUE … in `cfg`. Raises ConfigError."""
    source = "command line"
    if len(overrides) % 2:
        raise ConfigError(f"{source}: wanted pairs KEY VALUE, but the last key has no value: {overrides[-1]!r}")
    for path, value in zip(overrides[::2], overrides[1::2], strict=True):
        node: Any = cfg
        *sections, name = str(path).split(".")
        for part in sections:
            node = getattr(node, part) if isinstance(node, Section) and part in key_types(type(node)) else None
        if not isinstance(node, Section) or name not in key_types(type(node)):
            raise _unknown(cfg, str(path), source)
        if isinstance(child := getattr(node, name), Section):
            raise ConfigError(
                f"{source}: {path} is a section; name a key of it, such as {path}.{fields(child)[0].name}"
            )
        _assign(node, name, value, str(path), source)


def _assign(node: Section, name: str, value: Any, path: str, source: str) -> None:
    try:
        value = coerce(value, key_types(type(node))[name])
    except TypeError as error:
        raise ConfigError(f"{source}: {path}: {error}") from None
    if isinstance(value, dict):
        value = {**getattr(node, name), **value}
    setattr(node, name, value)


def _unknown(cfg: Config, path: str, source: str) -> ConfigError:
    keys = [leaf.path for leaf in leaves(cfg)]
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    return ConfigError(f"{source}: unknown key {path}; the nearest is {nearest(path, [*keys, *sections])}")


def _plain(node: Section) -> dict[str, Any]:
    values = {f.name: getattr(node, f.name) for f in fields(node)}
    return {name: _plain(value) if isinstance(value, Section) else value for name, value in values.items()}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
