import json
import threading

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from pycocotools.coco import COCO

from fastrcnn.data.datasets import shapes
from fastrcnn.data.datasets.shapes import CATEGORIES, draw_scene, ensure_shapes, mask_to_polygons

SMALL = {"train": 24, "val": 8, "size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "shapes"
    ensure_shapes(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng([7, number]), 128) for number in range(80)]


def decode(annotation, size=128):
    codes = pycocotools.mask.frPyObjects(annotation["segmentation"], size, size)
    return pycocotools.mask.decode(pycocotools.mask.merge(codes)).astype(bool)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout_is_cocos(folder):
    for split, count in (("train", 24), ("val", 8)):
        coco = COCO(str(folder / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
        for info in coco.imgs.values():
            with Image.open(folder / split / info["file_name"]) as image:
                assert (image.mode, image.size) == ("RGB", (info["width"], info["height"])) == ("RGB", (128, 128))
        assert all(annotation["image_id"] in coco.imgs for annotation in coco.anns.values())
    assert {path.name for path in folder.iterdir()} == {"train", "val", "annotations", "shapes.json"}


def test_same_parameters_give_the_same_bytes(folder, tmp_path):
    ensure_shapes(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(folder)
    ensure_shapes(tmp_path / "other", **SMALL, seed=1)
    first = "train/000000.png"
    assert (tmp_path / "other" / first).read_bytes() != (folder / first).read_bytes()


def test_train_and_val_differ(folder):
    assert (folder / "train/000000.png").read_bytes() != (folder / "val/000000.png").read_bytes()


def test_made_once(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ensure_shapes(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_at_once(folder, tmp_path, monkeypatch):
    root, both_built, errors = tmp_path / "shapes", threading.Barrier(2), []
    rename = shapes.os.rename
    monkeypatch.setattr(shapes.os, "rename", lambda *names: (both_built.wait(60), rename(*names)))

    def make():
        try:
            ensure_shapes(root, **SMALL)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # no temporary folder is left
    assert contents(root) == contents(folder)


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(root, split, *rest):
        (root / split).mkdir()
        if split == "val":
            raise OSError("no space left on device")

    monkeypatch.setattr(shapes, "_write_split", full_disk)
    with pytest.raises(OSError, match="no space"):
        ensure_shapes(tmp_path / "shapes", **SMALL)
    assert not list(tmp_path.iterdir())


def test_foreign_folders_are_not_touched(folder, tmp_path):
    with pytest.raises(FileExistsError, match=r"'train': 24.*'train': 25"):
        ensure_shapes(folder, **{**SMALL, "train": 25})
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(FileExistsError, match="another content"):
        ensure_shapes(tmp_path, **SMALL)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_annotations_agree_with_each_other(scenes):
    shifts = []
    for _, annotations in scenes:
        covered = np.zeros((128, 128), int)
        for annotation in annotations:
            mask = decode(annotation)
            covered += mask
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = annotation["bbox"]
            corners = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            shifts.append(abs(corners - [x, y, x + w, y + h]).max())  # the thin tip of a star may be cut off
            assert abs(mask.sum() - annotation["area"]) <= 0.1 * annotation["area"]
        assert (covered > 1).sum() <= 0.02 * (covered > 0).sum()  # visible parts only: later shapes cover earlier ones
    assert max(shifts) <= 3
    assert np.mean(shifts) <= 0.5


def test_polygons_give_the_visible_pixels(monkeypatch):
    seen, annotate = [], shapes._annotation
    monkeypatch.setattr(shapes, "_annotation", lambda shape: (seen.append(shape), annotate(shape))[1])
    ious = []
    for number in range(60):
        seen.clear()
        _, annotations = draw_scene(np.random.default_rng([8, number]), 128)
        for shape, annotation in zip(seen, annotations, strict=True):
            mask = decode(annotation)
            ious.append((mask & shape.mask).sum() / (mask | shape.mask).sum())
            assert annotation["area"] == shape.mask.sum() >= 0.3 * shape.full_area
    assert min(ious) >= 0.9
    assert np.median(ious) >= 0.97


def test_scenes_are_varied(scenes):
    annotations = [annotation for _, scene in scenes for annotation in scene]
    counts = np.bincount([annotation["category_id"] for annotation in annotations], minlength=7)
    assert counts[0] == 0
    assert (counts[1:] >= 0.1 * len(annotations)).all()
    whole = [a for a in annotations if CATEGORIES[a["category_id"] - 1] in ("circle", "square", "star")]
    assert np.mean([len(annotation["segmentation"]) > 1 for annotation in annotations]) > 0.2
    assert any(len(annotation["segmentation"]) > 1 for annotation in whole)  # cut apart by an occluder, not by design
    assert {len(scene) for _, scene in scenes} == {2, 3, 4, 5, 6}


def test_objects_stand_out(scenes):
    distances = []
    for pixels, annotations in scenes:
        background = np.ones((128, 128), bool)
        for annotation in annotations:
            background &= ~decode(annotation)
        level = np.median(pixels[background], 0)
        distances += [np.linalg.norm(np.median(pixels[decode(a)], 0) - level) for a in annotations]
        assert pixels[background].std(0).min() > 6  # a texture, not a flat colour
    assert np.mean(np.array(distances) > 60) > 0.9


def test_keypoints_of_figures(scenes, folder):
    figures = [(pixels, a) for pixels, scene in scenes for a in scene if "keypoints" in a]
    category = json.loads((folder / "annotations/instances_val.json").read_text())["categories"][-1]
    assert len(figures) == sum(a["category_id"] == category["id"] for _, scene in scenes for a in scene) > 20
    hidden = 0
    for _, annotation in figures:
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        named = dict(zip(category["keypoints"], points, strict=True))
        assert annotation["num_keypoints"] == len(points) >= 6
        mask = np.pad(decode(annotation), 2)  # the polygon is simplified: look one pixel around
        for x, y, visibility in points:
            near = mask[round(y) + 1 : round(y) + 4, round(x) + 1 : round(x) + 4]
            assert visibility in (1, 2)
            assert near.any() if visibility == 2 else not near.all()
            hidden += visibility == 1
        assert named["head"][1] < named["neck"][1] < named["hip"][1] < named["left_foot"][1]
        assert named["left_hand"][0] > named["right_hand"][0]
    assert hidden > 0
    assert {number for pair in category["skeleton"] for number in pair} == set(range(1, len(category["keypoints"]) + 1))


BITMAPS = {
    "hole": ["######", "#....#", "#.##.#", "#.##.#", "#....#", "######"],
    "corners that touch": ["##..", "##..", "..##", "..##"],
    "hole at a corner": ["####", "#.##", "##.#", "####"],
    "pixel": ["...", ".#.", "..."],
    "comb": ["#.#.#.#.", "########"],
}


@pytest.mark.parametrize("name", BITMAPS)
def test_small_bitmaps_are_traced_exactly(name):
    mask = np.array([[cell == "#" for cell in row] for row in BITMAPS[name]])
    polygons = [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]
    codes = pycocotools.mask.frPyObjects(polygons, *mask.shape)
    overlaps = pycocotools.mask.decode(codes).sum(2)
    if name != "comb":  # its outline is long enough to be straightened
        np.testing.assert_array_equal(overlaps, mask)
    assert overlaps.max() == 1


def test_large_bitmaps_are_traced_closely():
    y, x = np.mgrid[:90, :120]
    ring = (np.hypot(x - 50, y - 45) < 40) & (np.hypot(x - 50, y - 45) > 18)
    everything = np.ones((90, 120), bool)
    for mask in (ring, everything, ring | (x > 100), ring & (abs(y - 30) > 1)):
        codes = pycocotools.mask.frPyObjects([p.ravel().tolist() for p in mask_to_polygons(mask)], 90, 120)
        got = pycocotools.mask.decode(pycocotools.mask.merge(codes)).astype(bool)
        assert (got & mask).sum() >= 0.97 * (got | mask).sum()
    assert len(mask_to_polygons(ring & (abs(y - 45) > 1))) == 2  # cut in two by a strip
    assert mask_to_polygons(np.zeros((5, 5), bool)) == []
