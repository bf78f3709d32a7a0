"""Writes Cityscapes' objects as COCO files, which the names cityscapes_fine_instanceonly_seg_*_cocostyle expect."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastrcnn.data import DataError
from fastrcnn.data.datasets.cityscapes import EVALUATED_CLASSES, FIRST_INSTANCE, LABEL_IDS, instances, read_instance_ids
from fastrcnn.structures import SegmentationMask

EXAMPLES = """  fastrcnn convert-cityscapes --datadir datasets/cityscapes \\
      --outdir datasets/cityscapes/annotations
      from gtFine/<split>/*/*_gtFine_instanceIds.png to instancesonly_filtered_gtFine_<split>.json, for each split

The files name the images alone, without folders: put them, or links to them, into one (docs/cityscapes.md).
"""
CATEGORIES = {LABEL_IDS[name]: {"id": number, "name": name} for number, name in enumerate(EVALUATED_CLASSES, 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=["cityscapes_instance_only"], default="cityscapes_instance_only")
    parser.add_argument("--datadir", type=Path, required=True, help="folder that holds gtFine")
    parser.add_argument("--outdir", type=Path, required=True, help="folder for the COCO files")


def run(args: argparse.Namespace) -> None:
    root = args.datadir / "gtFine_trainvaltest"  # as the archive's name is, where it is unpacked into a folder
    root = (root if root.is_dir() else args.datadir) / "gtFine"
    splits = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if not splits:
        raise DataError(f"{root} has none of the folders train, val, test")
    args.outdir.mkdir(parents=True, exist_ok=True)
    for split in splits:
        content = convert(root / split)
        path = args.outdir / f"instancesonly_filtered_gtFine_{split}.json"
        path.write_text(json.dumps(content))
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} objects")


def convert(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """<folder>/<city>/*_instanceIds.png as the content of a COCO file: the eight classes that are evaluated."""
    images, annotations = [], []
    for number, path in enumerate(tqdm(sorted(folder.glob("*/*_gtFine_instanceIds.png")), unit="image"), 1):
        ids = read_instance_ids(path)
        name = path.name.replace("gtFine_instanceIds", "leftImg8bit")
        image = {"id": number, "file_name": name, "seg_file_name": path.name}
        images.append(image | {"width": ids.shape[1], "height": ids.shape[0]})
        for entry in objects(ids):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
    return {"images": images, "annotations": annotations, "categories": list(CATEGORIES.values())}


def objects(ids: Any) -> Iterator[dict[str, Any]]:
    """Instance ids [h, w] → annotations, with the outlines of the pixels as polygons."""
    for number, (x1, y1, x2, y2), bitmap in instances(ids):
        if number // FIRST_INSTANCE in CATEGORIES:
            inside = SegmentationMask(torch.from_numpy(bitmap)[None], (x2 - x1, y2 - y1), "mask")
            (parts,) = inside.convert("poly").polygons
            corner = torch.tensor([x1, y1])
            yield {
                "category_id": CATEGORIES[number // FIRST_INSTANCE]["id"],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(bitmap.sum()),
                "iscrowd": 0,
                "segmentation": [(part.long() + corner).flatten().tolist() for part in parts],
            }
