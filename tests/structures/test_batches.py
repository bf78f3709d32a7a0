"""The padded batches against what went into them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

import fastrcnn
from fastrcnn.structures import (
    BoxList,
    DetectionBatch,
    ImageBatch,
    Keypoints,
    PersonKeypoints,
    PolygonBatch,
    SegmentationMask,
    TargetBatch,
    scaled_size,
)


def config(*overrides):
    return fastrcnn.load_config(None, ["DATALOADER.SIZE_DIVISIBILITY", "32", *overrides])


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [
        (480, 640, (800, 1066)),
        (640, 480, (1066, 800)),
        (500, 1000, (666, 1332)),
        (427, 640, (800, 1199)),
        (1, 900, (1, 900)),
    ],
)
def test_scaled_size_is_the_originals(height, width, want):
    """Computed by hand from `Resize.get_size` of maskrcnn-benchmark, for 800 and 1333."""
    assert scaled_size(height, width, 800, 1333) == want


def test_images_are_normalised_and_padded():
    cfg = config("INPUT.PIXEL_STD", "(1.0, 2.0, 4.0)")
    images = [noise(40, 50), noise(64, 33)]
    batch = ImageBatch.from_tensors(images, [(80, 100), (64, 33)], cfg)
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes.tolist() == [[40, 50], [64, 33]]
    assert batch.original_sizes.tolist() == [[80, 100], [64, 33]]
    for slot, image in zip(batch.pixels, images, strict=True):
        for channel, (mean, std) in enumerate(zip(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD, strict=True)):
            want = (image[2 - channel].numpy().astype(np.float64) - mean) / std  # BGR
            got = slot[channel, : image.shape[1], : image.shape[2]]
            np.testing.assert_allclose(got, want, atol=1e-4)
        assert (slot[:, image.shape[1] :] == 0).all()
        assert (slot[:, :, image.shape[2] :] == 0).all()


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_resizing_is_pillows(scale):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    low = int(60 * scale)
    cfg = config("INPUT.MIN_SIZE_TEST", str(low), "INPUT.PIXEL_MEAN", "(0.0, 0.0, 0.0)")
    batch = ImageBatch.from_images([pil_to_tensor(image)], cfg)
    height, width = batch.sizes[0].tolist()
    want = pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)).float()
    assert (batch.pixels[0, [2, 1, 0], :height, :width] - want).abs().max() <= 1


def test_resizing_without_antialiasing_is_torchvisions():
    cfg = config("INPUT.MIN_SIZE_TEST", "30", "INPUT.ANTIALIAS", "False", "INPUT.TO_BGR255", "False")
    image = noise(61, 83)
    batch = ImageBatch.from_images([image], cfg)
    assert batch.sizes.tolist() == [[30, 40]]
    normalised = image.float() / 255 - torch.tensor(cfg.INPUT.PIXEL_MEAN)[:, None, None]
    want = F.interpolate(normalised[None], scale_factor=30 / 61, recompute_scale_factor=True, mode="bilinear")
    torch.testing.assert_close(batch.pixels[:, :, :30, :40], want)


@pytest.mark.parametrize(
    "image", [torch.rand(3, 8, 8), noise(8, 8)[0], noise(8, 8)[:1], noise(8, 0)], ids=["float", "2d", "grey", "empty"]
)
def test_bad_images_are_named(image):
    with pytest.raises(ValueError, match=r"image 1 is .*wanted a uint8 RGB tensor"):
        ImageBatch.from_images([noise(8, 8), image], config())
    with pytest.raises(ValueError, match="at least one image"):
        ImageBatch.from_images([], config())


def target(boxes, size, polygons=None):
    boxlist = BoxList(torch.tensor(boxes), size)
    boxlist.add_field("labels", torch.arange(1, len(boxes) + 1))
    if polygons is not None:
        boxlist.add_field("masks", SegmentationMask(polygons, size, "poly"))
    return boxlist


def batch_of(*sizes):
    sizes = torch.tensor(sizes, dtype=torch.int32)
    height, width = sizes.amax(0).tolist()
    return ImageBatch(torch.zeros(len(sizes), 3, height, width), sizes, sizes)


def test_targets_are_padded_in_the_frame_of_the_batch():
    batch = batch_of((40, 60), (20, 30), (10, 10))
    boxlists = [
        target([[0.0, 0, 15, 10], [3, 4, 9, 10], [5, 5, 30, 20]], (30, 20)),  # half the size: doubled
        target([[1.0, 2, 3, 4]], (30, 20)),
        target([[1.0, 2, 3, 4]], (10, 10))[:0],
    ]
    boxlists[0].add_field("iscrowd", torch.tensor([False, True, False]))
    targets = TargetBatch.from_boxlists(boxlists, batch)
    assert targets.boxes.shape == (3, 4, 4)  # a power of two of slots
    assert targets.boxes[0].tolist() == [[0, 0, 30, 20], [6, 8, 18, 20], [10, 10, 60, 40], [0, 0, 0, 0]]
    assert targets.labels.tolist() == [[1, 2, 3, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert targets.valid.tolist() == [[True, False, True, False], [True, False, False, False], [False] * 4]
    assert targets.polygons is None
    assert targets.masks is None


def test_polygons_become_edges():
    triangle, square = [0.0, 0, 4, 0, 0, 4], [6.0, 6, 8, 6, 8, 8, 6, 8]
    boxlist = target([[0.0, 0, 8, 8], [0, 0, 4, 4], [1, 1, 2, 2]], (10, 10), [[triangle, square], [triangle], []])
    targets = TargetBatch.from_boxlists([boxlist], batch_of((10, 10)))
    p = targets.polygons
    assert isinstance(p, PolygonBatch)
    assert p.edges.shape == (1, 4, 8, 4)
    assert p.num_parts == 2
    assert p.parts[0].tolist() == [[0] * 3 + [1] * 4 + [-1], [0] * 3 + [-1] * 5, [-1] * 8, [-1] * 8]
    assert p.edges[0, 0, 2].tolist() == [0, 4, 0, 0]  # closed
    assert p.edges[0, 0, 6].tolist() == [6, 8, 6, 6]
    assert targets.outlined.tolist() == [[True, True, False, False]]


def test_one_bitmap_makes_all_masks_bitmaps():
    square = [2.0, 2, 6, 2, 6, 6, 2, 6]
    bitmap = torch.zeros(1, 8, 12, dtype=torch.uint8)
    bitmap[0, 3:, 5:] = 1
    second = target([[5.0, 3, 12, 8]], (12, 8))
    second.add_field("masks", SegmentationMask(bitmap, (12, 8), "mask"))
    first = target([[2.0, 2, 6, 6]], (10, 10), [[square]])
    targets = TargetBatch.from_boxlists([first, second], batch_of((10, 10), (8, 12)))
    assert targets.polygons is None
    assert targets.masks.shape == (2, 1, 10, 12)
    assert targets.masks[0, 0, 2:6, 2:6].sum() == targets.masks[0].sum() == 16
    assert torch.equal(targets.masks[1, 0, :8], bitmap[0])
    # the border once more, then nothing
    assert torch.equal(targets.masks[1, 0, 8], bitmap[0, 7])
    assert targets.masks[1, 0, 9].sum() == 0


def test_targets_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        TargetBatch.from_boxlists([target([[0.0, 0, 1, 1]], (5, 5))], batch_of((5, 5), (5, 5)))
    mixed = [target([[0.0, 0, 1, 1]], (5, 5)), target([[0.0, 0, 1, 1]], (5, 5), [[[0.0, 0, 1, 0, 0, 1]]])]
    with pytest.raises(ValueError, match="objects without masks"):
        TargetBatch.from_boxlists(mixed, batch_of((5, 5), (5, 5)))


def test_detections_return_to_the_original_images():
    detections = DetectionBatch(
        boxes=torch.tensor([[[10.0, 20, 30, 40], [1, 2, 3, 4]], [[0, 0, 0, 0], [0, 0, 0, 0]]]),
        scores=torch.tensor([[0.9, 0.2], [0, 0]]),
        labels=torch.tensor([[3, 1], [0, 0]]),
        count=torch.tensor([2, 0], dtype=torch.int32),
        sizes=torch.tensor([[100, 50], [64, 64]], dtype=torch.int32),
        original_sizes=torch.tensor([[200, 25], [64, 64]], dtype=torch.int32),
        masks=torch.rand(2, 2, 4, 4),
    )
    first, second = detections.to_boxlists()
    assert first.size == (25, 200)
    assert first.bbox.tolist() == [[5, 40, 15, 80], [0.5, 4, 1.5, 8]]
    assert first.get_field("labels").tolist() == [3, 1]
    assert torch.equal(first.get_field("mask"), detections.masks[0])
    assert len(second) == 0
    assert second.get_field("mask").shape == (0, 4, 4)


def with_keypoints(boxlist, points):
    boxlist.add_field("keypoints", Keypoints(points, boxlist.size))
    return boxlist


def test_keypoints_are_padded_in_the_frame_of_the_batch():
    first = with_keypoints(target([[0.0, 0, 15, 10], [3, 4, 9, 10]], (30, 20)), torch.full((2, 5, 3), 2.0))
    targets = TargetBatch.from_boxlists([first, target([[0.0, 0, 5, 5]], (30, 20))[:0]], batch_of((40, 60), (20, 30)))
    assert targets.keypoints.shape == (2, 2, 5, 3)
    assert (targets.keypoints[0] == torch.tensor([4.0, 4, 2])).all()
    assert not targets.keypoints[1].any()
    nothing = TargetBatch.from_boxlists([target([[0.0, 0, 5, 5]], (30, 20))[:0]], batch_of((20, 30)))
    assert nothing.keypoints.shape == (1, 1, 0, 3)
    assert TargetBatch.from_boxlists([target([[0.0, 0, 5, 5]], (30, 20))], batch_of((20, 30))).keypoints is None


@pytest.mark.parametrize(
    ("points", "message"),
    [(None, "objects without keypoints"), (torch.ones(1, 3, 3), r"objects of \[3, 5\] keypoints")],
)
def test_keypoints_that_do_not_fit_each_other_are_errors(points, message):
    first = with_keypoints(target([[0.0, 0, 5, 5]], (9, 9)), torch.ones(1, 5, 3))
    second = target([[0.0, 0, 5, 5]], (9, 9))
    second = second if points is None else with_keypoints(second, points)
    with pytest.raises(ValueError, match=message):
        TargetBatch.from_boxlists([first, second], batch_of((9, 9), (9, 9)))


@pytest.mark.parametrize(("count", "kind"), [(17, PersonKeypoints), (5, Keypoints)])
def test_keypoints_return_to_the_original_images(count, kind):
    detections = DetectionBatch(
        boxes=torch.ones(2, 3, 4),
        scores=torch.ones(2, 3),
        labels=torch.ones(2, 3).long(),
        count=torch.tensor([2, 0], dtype=torch.int32),
        sizes=torch.tensor([[100, 50], [64, 64]], dtype=torch.int32),
        original_sizes=torch.tensor([[200, 25], [64, 64]], dtype=torch.int32),
        keypoints=torch.tensor([10.0, 20, 1]).expand(2, 3, count, 3),
        keypoint_scores=torch.rand(2, 3, count),
    )
    first, second = detections.to_boxlists()
    points = first.get_field("keypoints")
    assert type(points) is kind
    assert points.size == (25, 200)
    assert points.keypoints.shape == (2, count, 3)
    assert (points.keypoints == torch.tensor([5.0, 40, 1])).all()
    assert torch.equal(first.get_field("keypoint_scores"), detections.keypoint_scores[0, :2])
    assert second.get_field("keypoints").keypoints.shape == (0, count, 3)


@pytest.mark.parametrize("bgr", [False, True])
def test_normalisation_is_undone(bgr):
    cfg = fastrcnn.load_config("quick_start", ["INPUT.TO_BGR255", bgr, "INPUT.PIXEL_STD", "(1.0, 2.0, 3.0)"])
    images = [torch.randint(256, size, dtype=torch.uint8) for size in ((3, 40, 50), (3, 33, 64))]
    batch = ImageBatch.from_tensors(images, [tuple(image.shape[1:]) for image in images], cfg)
    for got, image in zip(batch.to_uint8(cfg), images, strict=True):
        assert torch.equal(got[:, : image.shape[1], : image.shape[2]], image)
