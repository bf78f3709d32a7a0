"""Large-scale jitter: sizes, the window, and what becomes of boxes, masks and keypoints in it."""

import numpy as np
import pytest
import torch
from data.makers import annotation, write_coco
from PIL import Image
from pycocotools import mask as coco_mask

from fastrcnn.config import load_config
from fastrcnn.data import make_data_loader
from fastrcnn.data.transforms import LargeScaleJitter, RandomVerticalFlip, build_transforms, crop_objects
from fastrcnn.structures import BoxList, Keypoints, PersonKeypoints, SegmentationMask


def bitmap_of(parts, size) -> np.ndarray:
    width, height = size
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width))) > 0


def blobs(size=(80, 60), count=12) -> list[list[list[float]]]:
    """Instances of one or two star-shaped parts, which are concave."""
    rng = np.random.default_rng(7)
    instances = []
    for _ in range(count):
        parts = []
        for _ in range(rng.integers(1, 3)):
            angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
            radius = rng.uniform(3, 25, 12)
            centre = rng.uniform(0, size)
            points = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
            parts.append(points.clip(0, size).flatten().tolist())
        instances.append(parts)
    return instances


def target_of(instances, size, mode) -> BoxList:
    points = [np.concatenate([np.array(part).reshape(-1, 2) for part in parts]) for parts in instances]
    target = BoxList([[*each.min(0), *each.max(0)] for each in points], size)
    if mode == "rle":
        height, width = size[::-1]
        codes = [coco_mask.merge(coco_mask.frPyObjects(parts, height, width)) for parts in instances]
        target.add_field("masks", SegmentationMask(codes, size, "mask"))
    elif mode != "boxes":
        masks = SegmentationMask(instances, size)
        target.add_field("masks", masks.convert("mask") if mode == "bitmap" else masks)
    target.add_field("labels", torch.arange(1, len(instances) + 1))
    return target


@pytest.mark.parametrize("mode", ["poly", "bitmap", "rle"])
@pytest.mark.parametrize("window", [(20, 15, 60, 45), (0, 0, 33, 60), (5, 30, 80, 60)])
def test_window_against_bitmaps(window, mode):
    """The masks are those of the pixels in the window, the cut boxes lie around them, the rest is untouched."""
    size = (80, 60)
    target = target_of(blobs(size), size, mode)
    got = crop_objects(target, window, min_area=4)
    x1, y1, x2, y2 = window
    whole = [bitmap_of(parts, size) for parts in blobs(size)]
    area = [each[y1:y2, x1:x2].sum() for each in whole]
    labels = got.get_field("labels").tolist()
    assert {label for label in labels if area[label - 1] < 2} == set()
    assert {number for number, each in enumerate(area, 1) if each > 12} <= set(labels)
    assert len(labels) >= 5
    masks = got.get_field("masks")
    assert masks.size == got.size == (x2 - x1, y2 - y1)
    tolerance = 0.3 if mode == "poly" else 0.0  # an outline's box against that of its pixels
    for box, label, mask in zip(got.bbox.tolist(), labels, masks.get_mask_tensor().numpy() > 0, strict=True):
        want = whole[label - 1][y1:y2, x1:x2]
        assert (mask ^ want).sum() <= (0.05 * want.sum() + 8 if mode == "poly" else 0)
        before = target.bbox[label - 1].tolist()
        if x1 <= before[0] and y1 <= before[1] and before[2] <= x2 and before[3] <= y2:
            assert box == pytest.approx([before[0] - x1, before[1] - y1, before[2] - x1, before[3] - y1])
            continue
        if mode == "poly":  # the box of an outline, with 1/16 pixel
            fine = [(16 * np.array(part)).tolist() for part in blobs(size)[label - 1]]
            want = bitmap_of(fine, (16 * size[0], 16 * size[1]))[16 * y1 : 16 * y2, 16 * x1 : 16 * x2]
        rows, columns = np.flatnonzero(want.any(1)), np.flatnonzero(want.any(0))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        tight = [side / (16 if mode == "poly" else 1) for side in tight]
        window_of_before = np.clip(np.array(before) - [x1, y1, x1, y1], 0, [x2 - x1, y2 - y1] * 2)
        tight = [max(tight[0], window_of_before[0]), max(tight[1], window_of_before[1]),
                 min(tight[2], window_of_before[2]), min(tight[3], window_of_before[3])]  # fmt: skip
        assert np.abs(np.array(box) - tight).max() <= tolerance


def test_polygons_are_clipped_with_their_exact_area():
    """A ring open to the left falls into two pieces; the edges that join them along the border enclose nothing, and the
    corner of a piece that turns outside the window around its corner does not widen the box."""
    ring = [10, 10, 50, 10, 50, 50, 10, 50, 10, 40, 40, 40, 40, 20, 10, 20]
    target = target_of([[ring]], (60, 60), "poly")
    got = crop_objects(target, (0, 0, 30, 60), 1)
    assert got.bbox.tolist() == [[10, 10, 30, 50]]
    mask = got.get_field("masks").get_mask_tensor()[0]
    assert mask.sum() == 2 * 20 * 10
    around = [-20.0, 30, -20, -20, 30, -20, 30, 5, 40, 5, 40, -30, -30, -30, -30, 40, 5, 40, 5, 30]
    target = BoxList([[0, 0, 40, 40]], (60, 60))
    target.add_field("masks", SegmentationMask([[around]], (60, 60)))
    got = crop_objects(target, (0, 0, 35, 50), 1)
    assert got.bbox.tolist() == [[0, 0, 35, 40]]  # the pieces at (30..35, 0..5) and (0..5, 30..40)
    target = BoxList([[0, 30, 5, 40]], (60, 60))
    target.add_field("masks", SegmentationMask([[[-5, 30, 5, 30, 5, 40, -5, 40, -9, 70, -9, -20]]], (60, 60)))
    assert crop_objects(target, (0, 0, 3, 60), 1).bbox.tolist() == [[0, 30, 3, 40]]


@pytest.mark.parametrize("mode", ["boxes", "poly", "bitmap"])
def test_objects_of_which_too_little_remains_are_dropped(mode):
    instances = [[[0, 0, 20, 0, 20, 20, 0, 20]], [[30, 0, 60, 0, 60, 20, 30, 20]], [[70, 0, 78, 0, 78, 20, 70, 20]]]
    target = target_of(instances, (80, 60), mode)
    for least, labels in ((1, [1, 2]), (100, [1, 2]), (200, [1, 2]), (201, [1]), (401, [])):
        assert crop_objects(target, (0, 0, 40, 60), least).get_field("labels").tolist() == labels


def test_an_object_whose_mask_is_outside_the_window_is_dropped():
    """The box of an L reaches into the window, nothing of the object does."""
    corner = [[10, 40, 50, 40, 50, 10, 60, 10, 60, 50, 10, 50]]
    for mode, left in (("poly", 0), ("bitmap", 0), ("boxes", 1)):
        assert len(crop_objects(target_of([corner], (80, 60), mode), (0, 0, 45, 38), 1)) == left


def test_keypoints_outside_the_window_lose_their_label():
    target = BoxList([[5, 5, 35, 25]], (40, 30))
    target.add_field("keypoints", Keypoints([[[10, 10, 2], [30, 20, 1], [0, 0, 0]]], (40, 30)))
    got = crop_objects(target, (6, 4, 26, 24), 1).get_field("keypoints")
    assert got.size == (20, 20)
    assert got.keypoints.tolist() == [[[4, 6, 2], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(("width", "height"), [(64, 48), (40, 90)])
def test_sizes_and_places(width, height):
    """Every size from the least to the largest, cut to the window; the pixels and the boxes move together."""
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    pixels[10:30, 12:32] = 255
    target = BoxList([[12, 10, 32, 30]], (width, height))
    jitter = LargeScaleJitter((0.5, 2.0), 100, min_area=0)
    sides, places = [], set()
    for _ in range(60):
        image, moved = jitter(Image.fromarray(pixels), target)
        assert image.size == moved.size
        assert max(image.size) <= 100
        sides.append(max(image.size))
        white = np.argwhere(np.array(image)[:, :, 0] > 147)
        if len(moved) and moved.area()[0] > 25:
            got = [*white.min(0)[::-1], *(white.max(0)[::-1] + 1)]
            assert np.abs(np.array(got) - moved.bbox[0].numpy()).max() <= 1
            places.add(round(moved.bbox[0, 0].item()))
    assert min(sides) < 65
    assert sides.count(100) > 20
    assert len(places) > 10


def test_scale_is_detectron2s():
    """The image fits into a square of scale · size, both sides rounded."""
    image, target = Image.new("RGB", (333, 500)), BoxList([], (333, 500))
    for scale, want in ((0.5, (341, 512)), (0.1, (68, 102))):
        assert LargeScaleJitter((scale, scale), 1024)(image, target)[0].size == want
    assert LargeScaleJitter((2.0, 2.0), 1024)(image, target)[0].size == (1024, 1024)


@pytest.mark.parametrize("mode", ["poly", "rle"])
def test_batches_of_one_shape(tmp_path, monkeypatch, mode):
    """INPUT.LSJ_* from the configuration to the batch; with SIZE_DIVISIBILITY every batch is the square."""
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    outline = [[5.0, 6, 15, 6, 15, 18, 5, 18]]
    if mode == "rle":
        outline = coco_mask.merge(coco_mask.frPyObjects(outline, 30, 40))
        outline = {"size": [30, 40], "counts": outline["counts"].decode()}
    entry = annotation(1, segmentation=outline, keypoints=[8, 9, 2] * 17, num_keypoints=17)
    write_coco(tmp_path, [entry, {**entry, "image_id": 2, "segmentation": [[5.0, 6, 15, 6, 15, 18]]}])
    options = {
        "INPUT.LSJ_SIZE": "64", "INPUT.LSJ_SCALE": "(0.2, 2.0)", "INPUT.LSJ_MIN_AREA": "2.0",
        "DATALOADER.SIZE_DIVISIBILITY": "64", "DATALOADER.NUM_WORKERS": "0", "MODEL.MASK_ON": "True",
        "MODEL.KEYPOINT_ON": "True", "MODEL.ROI_BOX_HEAD.NUM_CLASSES": "3", "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.MAX_ITER": "6", "DATASETS.TRAIN": "('mine',)", "DATALOADER.ASPECT_RATIO_GROUPING": "False",
        "DATASETS.REGISTER": "{'mine': {'img_dir': 'images', 'ann_file': 'annotations.json'}}",
    }  # fmt: skip
    cfg = load_config(None, [part for pair in options.items() for part in pair])
    largest = []
    for images, targets, _ in make_data_loader(cfg, is_train=True):
        assert images.pixels.shape == (2, 3, 64, 64)
        sides = targets.boxes[targets.valid][:, 2:] - targets.boxes[targets.valid][:, :2]
        assert (sides.prod(1) >= 2).all()
        largest += images.sizes.max(1).values.tolist()
    assert len(set(largest)) > 3
    cfg.INPUT.LSJ_SIZE = 0
    image, _ = build_transforms(cfg, is_train=True)(Image.new("RGB", (40, 30)), BoxList([], (40, 30)))
    assert image.shape == (3, 800, 1066)


def test_vertical_flip_moves_keypoints():
    points = torch.zeros(1, 17, 3)
    points[0, 1] = torch.tensor([4.0, 5, 2])  # the left eye
    target = BoxList([[2, 3, 10, 12]], (40, 30))
    target.add_field("keypoints", PersonKeypoints(points, (40, 30)))
    _, flipped = RandomVerticalFlip(1.0)(Image.new("RGB", (40, 30)), target)
    assert flipped.bbox.tolist() == [[2, 18, 10, 27]]
    got = flipped.get_field("keypoints").keypoints[0]
    assert got[2].tolist() == [4, 25, 2]  # a mirror image's is the right one
    assert got.count_nonzero() == 3
