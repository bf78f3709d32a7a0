"""Small datasets on disk for the tests of the data package."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def write_image(path: Path, width: int = 40, height: int = 30, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)


def annotation(image_id=1, bbox=(5, 6, 10, 12), category_id=3, **more) -> dict:
    return {"image_id": image_id, "bbox": list(bbox), "category_id": category_id, "iscrowd": 0, **more}


def write_coco(folder: Path, annotations: list[dict], images=((1, 40, 30), (2, 30, 40)), categories=None) -> dict:
    """Images (id, width, height) and a COCO file of these annotations; the arguments of COCODataset."""
    entries = []
    for image_id, width, height in images:
        write_image(folder / "images" / f"{image_id}.png", width, height, 20 * image_id)
        entries.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
    annotations = [{"id": number, **entry} for number, entry in enumerate(annotations, 1)]
    content = {"images": entries, "annotations": annotations, "categories": categories or CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content))
    return {"ann_file": folder / "annotations.json", "root": folder / "images"}


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_voc(folder: Path, objects: dict[str, list[str]], split: str = "train") -> Path:
    """objects: image id → its <object> elements; images are 40x30."""
    for image_id, entries in objects.items():
        write_image(folder / "JPEGImages" / f"{image_id}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        text = f"<annotation>{size}{''.join(entries)}</annotation>"
        (folder / "Annotations" / f"{image_id}.xml").write_text(text)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(objects) + "\n")
    return folder


def voc_object(box=(6, 7, 15, 18), name="cat", difficult=0) -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
