"""A miniature Cityscapes tree on disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastrcnn.data.datasets.cityscapes import LABEL_IDS

WIDTH, HEIGHT = 64, 32
OBJECTS = [  # (label, polygon in pixel indices), later ones before earlier ones
    ("road", [[0, 16], [63, 16], [63, 31], [0, 31]]),
    ("car", [[4, 10], [23, 10], [23, 19], [4, 19]]),
    ("car", [[14, 14], [33, 14], [33, 25], [14, 25]]),
    ("bicyclegroup", [[40, 2], [49, 2], [49, 11], [40, 11]]),
    ("caravan", [[50, 12], [62, 12], [62, 20], [50, 20]]),
    ("person", [[-2, 20], [5, 20], [5, 30], [-2, 30]]),
]


def write_frame(root: Path, split: str, frame: str, objects: list, width: int = WIDTH, height: int = HEIGHT) -> None:
    """leftImg8bit, gtFine polygons and the instance ids drawn from them, as the official json2instanceImg draws."""
    city = frame.split("_")[0]
    images, annotations = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 90, 90)).save(images / f"{frame}_leftImg8bit.png")
    entries = [{"label": label, "polygon": polygon} for label, polygon in objects]
    content = {"imgWidth": width, "imgHeight": height, "objects": entries}
    (annotations / f"{frame}_gtFine_polygons.json").write_text(json.dumps(content))
    ids = Image.new("I", (width, height), 0)
    counts = dict.fromkeys(LABEL_IDS, 0)
    for label, polygon in objects:
        name = label.removesuffix("group")
        number = LABEL_IDS.get(name, 7)
        if label in LABEL_IDS:
            number = 1000 * number + counts[name]
            counts[name] += 1
        ImageDraw.Draw(ids).polygon([tuple(point) for point in polygon], fill=number)
    Image.fromarray(np.array(ids).astype(np.uint16)).save(annotations / f"{frame}_gtFine_instanceIds.png")


def write_cityscapes(root: Path, split: str = "train") -> dict[str, Path]:
    """Two frames, the second without objects; the folders as CityScapesDataset takes them."""
    write_frame(root, split, "aachen_000000_000019", OBJECTS)
    write_frame(root, split, "bonn_000001_000019", OBJECTS[:1])
    return {"img_dir": root / "leftImg8bit", "ann_dir": root / "gtFine"}
