import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fastrcnn.structures import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, SegmentationMask

SIZE = (64, 48)  # (width, height)


def star(cx: float, cy: float, radius: float, points: int = 5) -> list[float]:
    angle = np.arange(2 * points) * np.pi / points
    r = np.where(np.arange(2 * points) % 2, 0.5, 1) * radius
    return np.stack((cx + r * np.cos(angle), cy + r * np.sin(angle)), 1).ravel().tolist()


POLYGONS = [
    [star(20.3, 18.6, 14)],
    [star(45, 30, 12), star(12, 40, 7.5)],
    [[5, 5, 60, 8, 58, 44, 9, 40]],
    [star(60, 5, 15)],  # reaches outside
]


def frame(masks: SegmentationMask) -> torch.Tensor:
    return masks.get_mask_tensor().bool()


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)


def test_polygons_become_masks_as_pycocotools_draws_them():
    single = [[np.float32(part).astype(np.float64).tolist() for part in parts] for parts in POLYGONS]
    want = np.stack([coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, 48, 64))) for parts in single])
    got = SegmentationMask(POLYGONS, SIZE).get_mask_tensor()
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("compressed", [True, False])
def test_rle(compressed):
    bitmap = np.zeros((48, 64), dtype=np.uint8)
    bitmap[3:20, 7:9] = bitmap[30:, 50:] = 1
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(bitmap))
    else:
        flat = bitmap.ravel(order="F")
        runs = np.diff(np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1, [flat.size])))
        rle = {"size": [48, 64], "counts": ([0] if flat[0] else []) + runs.tolist()}
    masks = SegmentationMask([rle, POLYGONS[0]], SIZE, "mask")
    assert np.array_equal(masks.get_mask_tensor()[0].numpy(), bitmap)
    assert torch.equal(masks.get_mask_tensor()[1], SegmentationMask(POLYGONS[:1], SIZE).get_mask_tensor()[0])


@pytest.mark.parametrize(("method", "axis"), [(FLIP_LEFT_RIGHT, 2), (FLIP_TOP_BOTTOM, 1)])
def test_flip(method, axis):
    masks = SegmentationMask(POLYGONS, SIZE)
    want = frame(masks).flip(axis)
    assert torch.equal(frame(masks.convert("mask").transpose(method)), want)
    assert iou(frame(masks.transpose(method)), want).min() > 0.95
    twice = masks.transpose(method).transpose(method)
    for a, b in zip(masks.polygons, twice.polygons, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_crop_cuts_the_same_pixels(mode):
    masks = SegmentationMask(POLYGONS, SIZE).convert(mode)
    cropped = masks.crop((10, 6, 50, 40))
    assert cropped.size == (40, 34)
    want = frame(masks)[:, 6:40, 10:50]
    assert iou(frame(cropped), want).min() > (0.97 if mode == "poly" else 0.999)


@pytest.mark.parametrize("size", [(128, 96), (32, 24), (70, 31)])
def test_resize_of_polygons_and_bitmaps_agree(size):
    masks = SegmentationMask(POLYGONS, SIZE)
    polygons, bitmaps = masks.resize(size), masks.convert("mask").resize(size)
    assert polygons.size == bitmaps.size == size
    assert frame(polygons).shape == frame(bitmaps).shape == (4, size[1], size[0])
    assert iou(frame(polygons), frame(bitmaps)).min() > 0.85


def test_resize_of_bitmaps_is_not_truncated():
    bitmap = torch.zeros(1, 4, 4, dtype=torch.uint8)
    bitmap[:, 1:3, 1:3] = 1
    assert SegmentationMask(bitmap, (4, 4), "mask").resize((8, 8)).get_mask_tensor().sum() == 16


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_outlines_of_any_bitmap_give_it_back(density):
    # noise has all there is: single pixels, touching corners, holes, islands in holes
    for _ in range(20):
        height, width = torch.randint(1, 24, (2,)).tolist()
        bitmap = (torch.rand(2, height, width) < density).byte()
        polygons = SegmentationMask(bitmap, (width, height), "mask").convert("poly")
        assert torch.equal(polygons.get_mask_tensor(), bitmap)


def test_outline_of_a_rectangle_has_four_corners():
    bitmap = torch.zeros(1, 9, 9)
    bitmap[0, 2:5, 3:8] = 1
    ((outline,),) = SegmentationMask(bitmap, (9, 9), "mask").convert("poly").polygons
    assert sorted(outline.tolist()) == [[3, 2], [3, 5], [8, 2], [8, 5]]


def test_instances_stay_aligned_when_their_parts_are_unusable():
    masks = SegmentationMask([POLYGONS[0], [[1, 1, 2, 2]], [], [[0, 0, 1, 1], *POLYGONS[2]]], SIZE)
    assert len(masks) == 4
    assert [len(parts) for parts in masks.polygons] == [1, 0, 0, 1]
    assert frame(masks).flatten(1).any(1).tolist() == [True, False, False, True]
    assert len(masks.convert("mask").convert("poly")) == 4


@pytest.mark.parametrize("mode", ["poly", "mask"])
@pytest.mark.parametrize("index", [slice(1, 3), [3, 0], 2, torch.tensor([True, False, False, True]), []])
def test_indexing(mode, index):
    masks = SegmentationMask(POLYGONS, SIZE).convert(mode)
    rows = torch.arange(4)[torch.tensor(index, dtype=torch.int64) if index == [] else index].reshape(-1)
    got = masks[index]
    assert got.mode == mode
    assert torch.equal(frame(got), frame(masks)[rows])


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_one_and_no_instance_keep_three_dimensions(mode):
    masks = SegmentationMask(POLYGONS, SIZE).convert(mode)
    assert masks[:1].get_mask_tensor().shape == (1, 48, 64)
    none = masks[:0]
    for moved in (none, none.resize((10, 20)).resize(SIZE), none.transpose(0), none.crop((0, 0, 64, 48))):
        assert moved.get_mask_tensor().shape == (0, 48, 64)


def test_cat_of_polygons_and_bitmaps():
    masks = SegmentationMask(POLYGONS, SIZE)
    assert SegmentationMask.cat([masks[:2], masks[2:]]).mode == "poly"
    mixed = SegmentationMask.cat([masks[:2], masks[2:].convert("mask")])
    assert torch.equal(frame(mixed), frame(masks))


def test_bad_arguments():
    with pytest.raises(ValueError, match="5x4; the image is 64x48"):
        SegmentationMask(torch.zeros(1, 4, 5), SIZE, "mask")
    with pytest.raises(ValueError, match="odd number"):
        SegmentationMask([[[0, 0, 1, 1, 2, 2, 3]]], SIZE)
    with pytest.raises(ValueError, match='mode="mask"'):
        SegmentationMask([{"size": [48, 64], "counts": [48 * 64]}], SIZE)
    with pytest.raises(ValueError, match="bitmap"):
        SegmentationMask([], SIZE, "bitmap")


def test_real_annotations_against_pycocotools(test_data):
    coco = COCO(test_data / "coco_open" / "annotations" / "instances_val2017.json")
    for image_id in sorted(coco.imgs)[:15]:
        info = coco.imgs[image_id]
        annotations = coco.imgToAnns[image_id]
        mode = "mask" if any(isinstance(ann["segmentation"], dict) for ann in annotations) else "poly"
        masks = SegmentationMask([ann["segmentation"] for ann in annotations], (info["width"], info["height"]), mode)
        for got, annotation in zip(frame(masks), annotations, strict=True):
            if isinstance(annotation["segmentation"], list):  # vertices are kept as float32
                annotation["segmentation"] = [np.float32(part).tolist() for part in annotation["segmentation"]]
            want = torch.from_numpy(coco.annToMask(annotation)).bool()
            assert torch.equal(got, want)
