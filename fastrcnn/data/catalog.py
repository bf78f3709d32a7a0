"""Datasets by name: the built-in names, yours, and how a name becomes a dataset."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastrcnn.config import conventions_of
from fastrcnn.data.datasets import CityScapesDataset, COCODataset, DataError, PascalVOCDataset
from fastrcnn.data.datasets.cityscapes import EVALUATED_CLASSES
from fastrcnn.data.datasets.shapes import ensure_shapes

_REMOVE = "remove_images_without_annotations"
_COCO_KEYS = {"img_dir", "ann_file", _REMOVE}
_VOC_KEYS = {"data_dir", "split", "classes", "use_difficult"}
_CITYSCAPES_KEYS = {"img_dir", "ann_dir", "split", "mode", "min_area", "mini", "classes", _REMOVE}
_FORMS = (
    "{img_dir, ann_file[, remove_images_without_annotations]}, {data_dir, split[, classes, use_difficult]}, "
    "{img_dir, ann_dir, split[, mode, min_area, mini, classes, remove_images_without_annotations]} "
    "or {factory: 'module:Class', args}"
)


def data_dir() -> Path:
    """The folder that relative paths of datasets start from: FASTRCNN_DATASETS, or ./datasets."""
    return Path(os.environ.get("FASTRCNN_DATASETS", "datasets"))


def _builtin() -> dict[str, dict[str, Any]]:
    coco_2014 = {"train": "train2014", "val": "val2014", "minival": "val2014", "valminusminival": "val2014"}
    entries = {}
    for split in ("train", "val"):
        entries[f"coco_2017_{split}"] = {
            "img_dir": f"coco/{split}2017",
            "ann_file": f"coco/annotations/instances_{split}2017.json",
        }
        entries[f"shapes_{split}"] = {
            "img_dir": f"shapes/{split}",
            "ann_file": f"shapes/annotations/instances_{split}.json",
        }
    for prefix, kind in (("coco", "instances"), ("keypoints_coco", "person_keypoints")):
        for split, folder in coco_2014.items():
            entries[f"{prefix}_2014_{split}"] = {
                "img_dir": f"coco/{folder}",
                "ann_file": f"coco/annotations/{kind}_{split}2014.json",
            }
    for year in ("2007", "2012"):
        for split in ("train", "val", "test"):
            entries[f"voc_{year}_{split}"] = {"data_dir": f"voc/VOC{year}", "split": split}
            if (year, split) != ("2012", "test"):  # its annotations were never published
                entries[f"voc_{year}_{split}_cocostyle"] = {
                    "img_dir": f"voc/VOC{year}/JPEGImages",
                    "ann_file": f"voc/VOC{year}/Annotations/pascal_{split}{year}.json",
                }
    for split in ("train", "val", "test"):
        entries[f"cityscapes_fine_instanceonly_seg_{split}_cocostyle"] = {
            "img_dir": "cityscapes/images",
            "ann_file": f"cityscapes/annotations/instancesonly_filtered_gtFine_{split}.json",
        }
    cityscapes = {"img_dir": "cityscapes/leftImg8bit", "ann_dir": "cityscapes/gtFine"}
    for mode in ("poly", "mask"):
        for split in ("train", "val"):
            entries[f"cityscapes_{mode}_instance_{split}"] = {**cityscapes, "split": split, "mode": mode}
        entries[f"cityscapes_{mode}_instance_minival"] = {**cityscapes, "split": "val", "mode": mode, "mini": 10}
    return entries


class DatasetCatalog:
    """The built-in names. A file named by PATHS_CATALOG may have a class of this name and form."""

    DATASETS: Mapping[str, Mapping[str, Any]] = _builtin()

    @staticmethod
    def get(name: str) -> dict[str, Any]:
        """{"factory": class name or "module:Class", "args": keyword arguments}; DataError for an unknown name."""
        if name not in DatasetCatalog.DATASETS:
            raise _unknown(name, DatasetCatalog.DATASETS)
        return _recipe(name, DatasetCatalog.DATASETS[name])


def _unknown(name: str, names: Mapping[str, Any]) -> DataError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    return DataError(
        f"there is no dataset {name!r}; the nearest names are {', '.join(near)}. "
        "Your own go into DATASETS.REGISTER or the file that PATHS_CATALOG names"
    )


def _recipe(name: str, entry: Any) -> dict[str, Any]:
    """An entry in any of its forms as {factory, args}, paths made absolute or relative to the working folder."""
    keys = set(entry) if isinstance(entry, Mapping) else set()
    if "factory" in keys and keys <= {"factory", "args"}:
        return {"factory": entry["factory"], "args": dict(entry.get("args") or {})}
    if keys >= {"img_dir", "ann_file"} and keys <= _COCO_KEYS:
        args = {"root": _path(entry["img_dir"]), "ann_file": _path(entry["ann_file"])}
        return {
            "factory": "COCODataset",
            "args": args | ({_REMOVE: _flag(name, _REMOVE, entry[_REMOVE])} if _REMOVE in keys else {}),
        }
    if keys >= {"img_dir", "ann_dir", "split"} and keys <= _CITYSCAPES_KEYS:
        args = {**entry, "img_dir": _path(entry["img_dir"]), "ann_dir": _path(entry["ann_dir"])}
        if _REMOVE in keys:
            args[_REMOVE] = _flag(name, _REMOVE, entry[_REMOVE])
        if "classes" in keys:
            args["classes"] = _names(entry["classes"])
        return {"factory": "CityScapesDataset", "args": args}
    if keys >= {"data_dir", "split"} and keys <= _VOC_KEYS:
        args = {"data_dir": _path(entry["data_dir"]), "split": entry["split"]}
        if "classes" in keys:
            args["classes"] = _names(entry["classes"])
        if "use_difficult" in keys:
            args["use_difficult"] = _flag(name, "use_difficult", entry["use_difficult"])
        return {"factory": "PascalVOCDataset", "args": args}
    raise DataError(f"dataset {name!r} has the entry {entry!r}; wanted {_FORMS}")


def _path(value: str) -> Path:
    return data_dir() / Path(os.path.expandvars(value)).expanduser()


def _names(value: Any) -> tuple[str, ...]:
    return tuple(str(each).strip() for each in (value.split(",") if isinstance(value, str) else value))


def _flag(name: str, key: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise DataError(f"dataset {name!r}: {key} is {value!r}; want true or false")
    return text == "true"


def find_recipe(cfg: Any, name: str) -> dict[str, Any]:
    """{factory, args} of a name: from DATASETS.REGISTER, then PATHS_CATALOG, then the built-in names."""
    known: dict[str, Any] = {**DatasetCatalog.DATASETS}
    if cfg.PATHS_CATALOG:
        path = Path(cfg.PATHS_CATALOG)
        if not path.is_file():
            raise DataError(f"PATHS_CATALOG: file {path} does not exist")
        if path.suffix == ".py":
            recipe = _from_python(path, name) if name not in cfg.DATASETS.REGISTER else None
            if recipe is not None:
                return recipe
        else:
            known |= _from_yaml(path)
    known |= cfg.DATASETS.REGISTER
    if name not in known:
        raise _unknown(name, known)
    return _recipe(name, known[name])


def _from_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"PATHS_CATALOG: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"PATHS_CATALOG: {path} holds no mapping of dataset names to entries {_FORMS}")
    return content


def _from_python(path: Path, name: str) -> dict[str, Any] | None:
    """What the file's DatasetCatalog.get says; None if it does not know the name (RuntimeError, as in the original)."""
    spec = importlib.util.spec_from_file_location("paths_catalog", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "DatasetCatalog"):
        raise DataError(f"PATHS_CATALOG: {path} has no class DatasetCatalog")
    try:
        recipe = module.DatasetCatalog.get(name)
    except (RuntimeError, KeyError, DataError):
        return None
    if not isinstance(recipe, Mapping) or set(recipe) != {"factory", "args"}:
        raise DataError(f"PATHS_CATALOG: {path}: DatasetCatalog.get({name!r}) gave {recipe!r}; want {{factory, args}}")
    return dict(recipe)


def _factory(name: str, factory: Any) -> Callable[..., Any]:
    own = {each.__name__: each for each in (COCODataset, PascalVOCDataset, CityScapesDataset)}
    if callable(factory):
        return factory
    if factory in own:
        return own[factory]
    module_name, _, class_name = str(factory).partition(":")
    if not class_name:
        raise DataError(f"dataset {name!r}: factory is {factory!r}; want {', '.join(own)} or 'module:Class'")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"dataset {name!r}: factory {factory!r} cannot be imported: {error}") from error


def _num_classes(cfg: Any) -> int:
    return cfg.MODEL.RETINANET.NUM_CLASSES if cfg.MODEL.RETINANET_ON else cfg.MODEL.ROI_BOX_HEAD.NUM_CLASSES


def build_dataset(cfg: Any, name: str, is_train: bool, transforms: Any = None) -> Any:
    """The dataset of a name, checked to hold images.

    For training, COCO files and Cityscapes lose images without usable annotations (unless the entry says otherwise),
    COCO files crowds, VOC its difficult objects; for testing everything stays. Cityscapes has its ten classes, or the
    eight that are evaluated where the model has nine with the background: the original's recipes ask for both. Your own
    factory gets its args and `transforms`.
    """
    recipe = find_recipe(cfg, name)
    factory, args = _factory(name, recipe["factory"]), dict(recipe["args"])
    if factory in (COCODataset, CityScapesDataset):
        args[_REMOVE] = is_train and args.get(_REMOVE, True)
    if factory is COCODataset:
        args.setdefault("keep_crowd", not is_train)
        args.setdefault("json_category_ids", cfg.DATASETS.JSON_CATEGORY_IDS)
        args.setdefault("keypoint_shift", conventions_of(cfg).keypoint_shift)
    elif factory is PascalVOCDataset:
        args.setdefault("use_difficult", not is_train)
    elif factory is CityScapesDataset and _num_classes(cfg) == len(EVALUATED_CLASSES) + 1:
        args.setdefault("classes", EVALUATED_CLASSES)
    if name in ("shapes_train", "shapes_val") and recipe == DatasetCatalog.get(name):
        try:
            ensure_shapes(data_dir() / "shapes")
        except OSError as error:
            raise DataError(f"dataset {name!r} cannot be made: {error}") from None
    dataset = factory(transforms=transforms, **args)
    if len(dataset) == 0:
        shown = ", ".join(f"{key}={value}" for key, value in args.items())
        raise DataError(f"dataset {name!r} is empty: no image to use ({shown})")
    return dataset
