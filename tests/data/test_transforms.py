import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastrcnn.config import load_config
from fastrcnn.data.transforms import (
    ColorJitter,
    Compose,
    RandomHorizontalFlip,
    RandomVerticalFlip,
    Resize,
    ToTensor,
    build_transforms,
)
from fastrcnn.structures import BoxList, SegmentationMask

BOX = (12, 8, 30, 20)


def photo(width: int = 64, height: int = 48) -> tuple[Image.Image, BoxList]:
    """A grey picture with a white rectangle, its box and its mask."""
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    x1, y1, x2, y2 = BOX
    pixels[y1:y2, x1:x2] = 255
    target = BoxList([BOX], (width, height))
    target.add_field("masks", SegmentationMask([[[x1, y1, x2, y1, x2, y2, x1, y2]]], (width, height)))
    return Image.fromarray(pixels), target


def white_box(image: torch.Tensor) -> list[int]:
    y, x = (image[0] > 147).nonzero().unbind(1)
    return [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]


@pytest.mark.parametrize("flip", [RandomHorizontalFlip, RandomVerticalFlip])
def test_flips_move_image_box_and_mask_together(flip):
    image, target = Compose([flip(1.0), ToTensor()])(*photo())
    assert image.dtype == torch.uint8
    assert image.shape == (3, 48, 64)
    assert white_box(image) == target.bbox[0].tolist() != list(BOX)
    assert torch.equal(target.get_field("masks").get_mask_tensor()[0] > 0, image[0] > 147)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(96, 2), (24, 0.5)])
def test_resize_moves_image_box_and_mask_together(size, scale, antialias):
    image, target = Compose([Resize(size, 1000, antialias), ToTensor()])(*photo())
    assert image.shape == (3, size, int(64 * scale))
    assert target.size == (int(64 * scale), size)
    assert target.bbox[0].tolist() == [side * scale for side in BOX] == white_box(image)


@pytest.mark.parametrize(
    ("width", "height", "want"),
    [
        (640, 480, (1066, 800)),
        (480, 640, (800, 1066)),
        (1000, 500, (1332, 666)),  # round(1333 · 500 / 1000) = 666, halves go to even
        (500, 500, (800, 800)),
        (3000, 10, (1200, 4)),  # round(1333 · 10 / 3000) = 4
    ],
)
def test_sizes_of_maskrcnn_benchmark(width, height, want):
    image, _ = Resize(800, 1333)(Image.new("RGB", (width, height)), BoxList([], (width, height)))
    assert image.size == want


def test_resize_without_antialias_is_torchvisions():
    image = Image.fromarray(torch.randint(256, (48, 71, 3), dtype=torch.uint8).numpy())
    peer = GeneralizedRCNNTransform(33, 60, [0.0] * 3, [1.0] * 3, size_divisible=1)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    want = peer([tensor])[0].tensors[0]
    got, _ = Compose([Resize(33, 60, antialias=False), ToTensor()])(image, BoxList([], image.size))
    assert got.shape == want.shape
    torch.testing.assert_close(got / 255, want, atol=0.501 / 255, rtol=0)  # rounded to whole grey levels


def test_sizes_are_drawn_from_all_given():
    resize = Resize((20, 30, 40), 1000)
    seen = {resize(*photo())[0].height for _ in range(50)}
    assert seen == {20, 30, 40}


def test_flip_probability():
    flips = sum(RandomHorizontalFlip(0.25)(*photo())[1].bbox[0, 0].item() != BOX[0] for _ in range(400))
    assert 60 < flips < 140
    assert RandomHorizontalFlip(0.0)(*photo())[1].bbox[0].tolist() == list(BOX)


def test_colour_changes_only_the_image_and_follows_torchs_seed():
    image, target = photo()
    jitter = ColorJitter(brightness=0.5)
    torch.manual_seed(3)
    first, unchanged = jitter(image, target)
    torch.manual_seed(3)
    second, _ = jitter(image, target)
    assert unchanged is target
    assert np.array_equal(first, second)
    assert not np.array_equal(first, image)


def test_built_from_the_configuration():
    cfg = load_config(
        None,
        ["INPUT.MIN_SIZE_TRAIN", "(24,)", "INPUT.MIN_SIZE_TEST", "96", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "1.0"],
    )
    image, target = build_transforms(cfg, is_train=True)(*photo())
    assert image.shape == (3, 24, 32)
    assert target.bbox[0].tolist() == [(64 - 30) / 2, 4, (64 - 12) / 2, 10] == white_box(image)
    image, target = build_transforms(cfg, is_train=False)(*photo())
    assert image.shape == (3, 96, 128)
    assert target.bbox[0].tolist() == [2 * side for side in BOX]
