"""Shows what the model is fed: a sheet of images after augmentation with their targets, and what the datasets hold."""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastrcnn.cli.common import QUICK_START, add_config_arguments
from fastrcnn.config import Config, load_config
from fastrcnn.data import build_dataset, make_data_loader
from fastrcnn.evaluation import target_of
from fastrcnn.structures import BoxList, ImageBatch, Keypoints, SegmentationMask, TargetBatch
from fastrcnn.visualization import contact_sheet, draw_detections, readable_scale

EXAMPLES = """  fastrcnn show-data
      the quick start's training data, in show_data.png
  fastrcnn show-data --config-file my.yaml --split test --count 40 --output pictures/test.png
      what the evaluation sees, crowds and difficult objects included
  fastrcnn show-data --config-file my.yaml INPUT.HORIZONTAL_FLIP_PROB_TRAIN 1.0
      a key changed: every image is mirrored

The images are those that go into the model: resized, augmented, their normalisation undone. Crowds and difficult
objects are dashed. Datasets lie in ./datasets, or in the folder that FASTRCNN_DATASETS names.
"""
_SIDE = 480  # pixels of the longer side of a picture of the sheet
_SMALL, _MEDIUM = 32**2, 96**2  # COCO's limits of areas
_TINY = 2  # pixels: hardly anybody means boxes that narrow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("train", "test"), default="train", help="DATASETS.TRAIN or DATASETS.TEST")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images on the sheet (default: 16)")
    parser.add_argument(
        "--output", type=Path, default=Path("show_data.png"), metavar="FILE", help="picture (default: show_data.png)"
    )
    add_config_arguments(parser, "default: the quick start")


def run(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    cfg = load_config(args.config_file or QUICK_START, args.opts)
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    is_train = args.split == "train"
    for name in cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST:
        with _warnings() as told:
            dataset = build_dataset(cfg, name, is_train, transforms=lambda image, target: (image, target))
            text = describe(name, dataset)
        if is_train:
            with _warnings():
                left_out = len(build_dataset(cfg, name, False)) - len(dataset)
            text += f"\n  {left_out:,} more images are left out: they have nothing to learn from" if left_out else ""
        print("\n".join([text, *(f"  warning: {line}" for line in dict.fromkeys(told))]))
    with _warnings():  # told above
        fed = list(islice(samples(cfg, is_train), args.count))
    pictures = []
    for image, target, categories in fed:
        pictures.append(draw_detections(image, target, categories, scale=readable_scale(target.size, _SIDE)))
    contact_sheet(pictures, max(round(len(pictures) ** 0.5), 1), args.output)
    print(f"{len(pictures)} images written to {args.output}")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The package's warnings of the block, which are not printed."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("fastrcnn")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def samples(cfg: Config, is_train: bool) -> Iterator[tuple[Image.Image, BoxList, dict[int, str]]]:
    """What the loader of training or testing gives, one by one: image, target in its frame, names of the classes.

    In training the targets are those of the batch, which the losses see; the loader of testing gives none, so they are
    the dataset's.
    """
    if is_train:
        loader = make_data_loader(cfg, True)
        for images, targets, _ in loader:
            for picture, target in zip(undo_normalisation(images, cfg), to_boxlists(images, targets), strict=True):
                yield picture, target, getattr(loader.dataset, "categories", {})
        return
    for loader in make_data_loader(cfg, False):
        for images, indices in loader:
            if isinstance(images, ImageBatch):
                pictures = undo_normalisation(images, cfg)
            else:  # with test-time augmentation they come as they are
                pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
            for picture, index in zip(pictures, indices, strict=True):
                target = loader.dataset[index][1]
                yield picture, target, getattr(loader.dataset, "categories", {})


def undo_normalisation(batch: ImageBatch, cfg: Config) -> list[Image.Image]:
    """The images of a batch as RGB pictures, without padding."""
    pixels = batch.to_uint8(cfg).permute(0, 2, 3, 1).numpy()
    sizes = batch.sizes.tolist()
    return [Image.fromarray(p[:height, :width].copy()) for p, (height, width) in zip(pixels, sizes, strict=True)]


def to_boxlists(images: ImageBatch, targets: TargetBatch) -> list[BoxList]:
    """The targets of a batch, each in the frame of its image without padding: fields labels, iscrowd and, where there
    are any, masks and keypoints."""
    result = []
    for number, (height, width) in enumerate(images.sizes.tolist()):
        used = (targets.labels[number] > 0).nonzero()[:, 0]
        target = BoxList(targets.boxes[number, used], (width, height))
        target.add_field("labels", targets.labels[number, used])
        target.add_field("iscrowd", targets.crowd[number, used])
        if targets.masks is not None:
            bitmaps = targets.masks[number, used, :height, :width]
            target.add_field("masks", SegmentationMask(bitmaps, target.size, mode="mask"))
        elif targets.polygons is not None:
            outlines = []
            for edges, parts in zip(
                targets.polygons.edges[number, used], targets.polygons.parts[number, used], strict=True
            ):
                corners = [edges[parts == part, :2] for part in range(int(parts.max()) + 1)]
                outlines.append([part.flatten().tolist() for part in corners if len(part) > 2])
            target.add_field("masks", SegmentationMask(outlines, target.size))
        if targets.keypoints is not None and targets.keypoints.shape[2]:
            target.add_field("keypoints", Keypoints(targets.keypoints[number, used], target.size))
        result.append(target)
    return result


def describe(name: str, dataset: Any) -> str:
    """What a dataset holds: images, their sizes, objects by class and size, and what looks wrong."""
    sizes: Counter[tuple[int, int]] = Counter()
    labels: Counter[int] = Counter()
    seen: Counter[int] = Counter()  # images of a label
    areas, per_image, tiny, twice = [], [], [], []
    aside: Counter[str] = Counter()
    for index in range(len(dataset)):
        info = dataset.get_img_info(index)
        sizes[info["width"], info["height"]] += 1
        target = target_of(dataset, index).convert("xyxy")
        own = target.get_field("labels").tolist()
        labels.update(own)
        seen.update(set(own))
        per_image.append(len(own))
        corners = target.bbox
        areas += target.area().tolist()
        for field, what in (("iscrowd", "crowds"), ("difficult", "difficult objects")):
            if target.has_field(field):
                aside[what] += int(torch.as_tensor(target.get_field(field)).sum())
        where = info.get("file_name") or getattr(dataset, "id_to_img_map", {}).get(index, index)
        tiny += [where] * int(((corners[:, 2:] - corners[:, :2]) < _TINY).any(1).sum())
        boxes = Counter(zip(own, map(tuple, corners.tolist()), strict=True))
        twice += [where] * sum(count - 1 for count in boxes.values())
    objects = len(areas)
    limits = [0, _SMALL, _MEDIUM, np.inf]
    small, medium, large = np.histogram(areas, limits)[0].tolist() if areas else (0, 0, 0)
    lines = [f"{name}: {len(dataset):,} images, {objects:,} objects"]
    common = ", ".join(f"{width}×{height} ({count:,})" for (width, height), count in sizes.most_common(3))
    lines.append(f"  image sizes: {common}" + (f", {len(sizes) - 3:,} others" if len(sizes) > 3 else ""))
    lines.append(
        f"  objects per image: {min(per_image, default=0)} to {max(per_image, default=0)}, on average "
        f"{objects / max(len(dataset), 1):.1f}; {per_image.count(0):,} images have none"
    )
    lines.append(
        f"  areas of boxes in the files: {small:,} small (below 32² pixels), {medium:,} medium, {large:,} large (from "
        "96² on)"
    )
    lines += [f"  {what}: {count:,}" for what, count in aside.items() if count]
    categories = getattr(dataset, "categories", {})
    rows = [
        (str(label), str(categories.get(label, "")), labels[label], seen[label]) for label in {**categories, **labels}
    ]
    lines += _columns(("label", "class", "objects", "images"), rows)
    if empty := [str(class_name) for label, class_name in categories.items() if not labels[label]]:
        lines.append(f"  look: {len(empty)} classes have no object: {', '.join(empty)}")
    for places, what in ((tiny, f"narrower than {_TINY} pixels"), (twice, "there twice, with the same class")):
        if places:
            lines.append(f"  look: {len(places):,} boxes are {what}, the first in image {places[0]}")
    return "\n".join(lines)


def _columns(head: Sequence[str], rows: Sequence[tuple[str, str, int, int]]) -> list[str]:
    width = max([len(head[1]), *(len(row[1]) for row in rows)])
    form = f"  {{:>5}}  {{:<{width}}}  {{:>9}}  {{:>8}}"
    return [form.format(*head), *(form.format(label, name, f"{n:,}", f"{i:,}") for label, name, n, i in rows)]
