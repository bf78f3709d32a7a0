"""What happens to an image and its boxes before they are batched.

Every transform is a callable (PIL RGB image, BoxList) → (image, BoxList); the last one makes a tensor. All randomness
comes from torch's generator, which the loader seeds for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import ColorJitter as TorchColorJitter
from torchvision.transforms.v2 import functional as F

from fastrcnn.structures import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, BoxList, SegmentationMask, scaled_size

Transform = Callable[[Any, BoxList], tuple[Any, BoxList]]


class Compose:
    """Transforms one after another."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any, target: BoxList) -> tuple[Any, BoxList]:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


class ColorJitter:
    """torchvision's random change of brightness, contrast, saturation and hue."""

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
    ) -> None:
        self.jitter = TorchColorJitter(brightness, contrast, saturation, hue)

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Image.Image, BoxList]:
        return self.jitter(image), target


class Resize:
    """The shorter side becomes min_size (one of several, drawn each time), unless the longer would pass max_size.

    antialias=False is torchvision's way: plain bilinear, both sides truncated. The pixels are rounded to uint8, which
    `ImageBatch.from_images` does not do there, so the two differ by up to half a grey level.
    """

    def __init__(self, min_size: int | Sequence[int], max_size: int, antialias: bool = True) -> None:
        self.min_size = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size = max_size
        self.antialias = antialias

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Image.Image, BoxList]:
        chosen = 0 if len(self.min_size) == 1 else int(torch.randint(len(self.min_size), ()))
        min_size = self.min_size[chosen]
        height, width = scaled_size(image.height, image.width, min_size, self.max_size, exact=self.antialias)
        return resized(image, width, height, self.antialias), target.resize((width, height))


def resized(image: Image.Image, width: int, height: int, antialias: bool) -> Image.Image:
    """The image at another size, bilinear; antialias as in `Resize`."""
    if antialias:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = interpolate(F.pil_to_tensor(image)[None].float(), (height, width), mode="bilinear")
    return F.to_pil_image(pixels[0].round().byte())


class LargeScaleJitter:
    """Resize to a random size and, where the image then passes size × size pixels, cut out a window of that.

    The image just fits into a square of scale · size pixels, scale drawn uniformly between the two given. detectron2's
    ResizeScale and FixedSizeCrop (Ghiasi et al. 2021, "Simple Copy-Paste"); what that one pads is left to the batch.

    The boxes that the window cuts shrink to what remains of their masks, which are cut too. Objects of which less than
    min_area square pixels remain, by their masks where there are any, are dropped.
    """

    def __init__(self, scale: tuple[float, float], size: int, min_area: float = 1.0, antialias: bool = True) -> None:
        self.scale = scale
        self.size = size
        self.min_area = min_area
        self.antialias = antialias

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Image.Image, BoxList]:
        low, high = self.scale
        side = self.size * (low + (high - low) * torch.rand(()).item())
        factor = min(side / image.width, side / image.height)
        width, height = (max(round(each * factor), 1) for each in (image.width, image.height))
        image, target = resized(image, width, height, self.antialias), target.resize((width, height))
        place = torch.rand(()).item()  # one for both directions, as there
        x, y = (round(max(each - self.size, 0) * place) for each in (width, height))
        window = (x, y, min(x + self.size, width), min(y + self.size, height))
        return image.crop(window), crop_objects(target, window, self.min_area)


def crop_objects(target: BoxList, window: tuple[int, int, int, int], min_area: float) -> BoxList:
    """The objects in a window (x1, y1, x2, y2) of the image, as `LargeScaleJitter` says."""
    whole, target = target.convert("xyxy").bbox, target.convert("xyxy").crop(window)
    area = target.area()
    if target.has_field("masks"):
        masks, extent, area_of_mask = _clipped(target.get_field("masks"))
        target.add_field("masks", masks)
        border = whole.new_tensor(window)
        cut = (whole[:, :2] < border[:2]).any(1) | (whole[:, 2:] > border[2:]).any(1)
        low, high = target.bbox[:, :2].maximum(extent[:, :2]), target.bbox[:, 2:].minimum(extent[:, 2:])
        target.bbox = torch.where(cut[:, None], torch.cat([low, high.maximum(low)], 1), target.bbox)
        area = torch.where(cut, area_of_mask.minimum(target.area()), area)
    return target[area >= min_area]


def _clipped(masks: SegmentationMask) -> tuple[SegmentationMask, Tensor, Tensor]:
    """Masks without what lies outside their image, the boxes [N, 4] around them and their areas [N]."""
    if masks.mode == "mask":
        bitmaps = masks.get_mask_tensor()
        sides = []
        for covered in (bitmaps.amax(1) > 0, bitmaps.amax(2) > 0):  # columns [N, W], rows [N, H]
            sides.append((covered.int().argmax(1), covered.shape[1] - covered.flip(1).int().argmax(1)))
        (x1, x2), (y1, y2) = sides
        return masks, torch.stack([x1, y1, x2, y2], 1).float(), bitmaps.flatten(1).sum(1).float()
    polygons = [
        [part for each in parts if len(part := _clipped_polygon(each, masks.size)) > 2] for parts in masks.polygons
    ]
    extent, area = torch.zeros(len(polygons), 4), torch.zeros(len(polygons))
    for number, parts in enumerate(polygons):
        if parts:
            points = torch.cat(parts)
            extent[number] = torch.cat([points.amin(0), points.amax(0)])
            area[number] = sum(_polygon_area(part) for part in parts)
    return SegmentationMask(polygons, masks.size), extent, area


def _clipped_polygon(points: Tensor, size: tuple[int, int]) -> Tensor:
    """[V, 2] cut at the four sides of an image of size (width, height) in turn (Sutherland and Hodgman 1974).

    Pieces that fall apart stay joined by edges along the border, which enclose nothing.
    """
    for axis, border, sign in ((0, 0, 1), (0, size[0], -1), (1, 0, 1), (1, size[1], -1)):
        inside = (points[:, axis] - border) * sign >= 0
        if inside.all():
            continue
        step = points.roll(-1, 0) - points
        crossing = points + ((border - points[:, axis]) / step[:, axis])[:, None] * step
        crossing[:, axis] = border
        both = torch.stack([points, crossing], 1)  # [V, 2, 2]
        points = both[torch.stack([inside, inside != inside.roll(-1)], 1)]
    return _without_spurs(points)


def _without_spurs(points: Tensor) -> Tensor:
    """[V, 2] without corners from which the outline goes back the way it came: they would widen its box."""
    while len(points):
        before, after = points - points.roll(1, 0), points.roll(-1, 0) - points
        cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
        spur = (cross == 0) & ((before * after).sum(1) <= 0)
        if not spur.any():
            break
        points = torch.cat([points[: (first := int(spur.int().argmax()))], points[first + 1 :]])
    return points


def _polygon_area(points: Tensor) -> Tensor:
    x, y = (points - points[0]).unbind(1)
    return (x * y.roll(-1) - x.roll(-1) * y).sum().abs() / 2


class RandomHorizontalFlip:
    """Left and right swapped with the given probability."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Image.Image, BoxList]:
        if torch.rand(()) < self.probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            target = target.transpose(FLIP_LEFT_RIGHT)
        return image, target


class RandomVerticalFlip:
    """Top and bottom swapped with the given probability."""

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Image.Image, BoxList]:
        if torch.rand(()) < self.probability:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            target = target.transpose(FLIP_TOP_BOTTOM)
        return image, target


class ToTensor:
    """PIL RGB → uint8 [3, h, w]; the model's normalisation comes with the batch."""

    def __call__(self, image: Image.Image, target: BoxList) -> tuple[Tensor, BoxList]:
        return F.pil_to_tensor(image), target


def build_transforms(cfg: Any, is_train: bool) -> Compose:
    """The transforms that cfg.INPUT asks for; for testing only the resizing, which TEST.BBOX_AUG.ENABLED leaves to the
    engine."""
    wanted = cfg.INPUT
    if not is_train and cfg.TEST.BBOX_AUG.ENABLED:
        return Compose([ToTensor()])
    if not is_train:
        return Compose([Resize(wanted.MIN_SIZE_TEST, wanted.MAX_SIZE_TEST, wanted.ANTIALIAS), ToTensor()])
    if wanted.LSJ_SIZE:
        resize = LargeScaleJitter(wanted.LSJ_SCALE, wanted.LSJ_SIZE, wanted.LSJ_MIN_AREA, wanted.ANTIALIAS)
    else:
        resize = Resize(wanted.MIN_SIZE_TRAIN, wanted.MAX_SIZE_TRAIN, wanted.ANTIALIAS)
    return Compose(
        [
            ColorJitter(wanted.BRIGHTNESS, wanted.CONTRAST, wanted.SATURATION, wanted.HUE),
            resize,
            RandomHorizontalFlip(wanted.HORIZONTAL_FLIP_PROB_TRAIN),
            RandomVerticalFlip(wanted.VERTICAL_FLIP_PROB_TRAIN),
            ToTensor(),
        ]
    )
