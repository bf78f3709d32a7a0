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

from fastrcnn.structures import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, BoxList, scaled_size

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
        if self.antialias:
            return image.resize((width, height), Image.Resampling.BILINEAR), target.resize((width, height))
        pixels = interpolate(F.pil_to_tensor(image)[None].float(), (height, width), mode="bilinear")
        return F.to_pil_image(pixels[0].round().byte()), target.resize((width, height))


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
    """The transforms that cfg.INPUT asks for; for testing only the resizing."""
    wanted = cfg.INPUT
    if not is_train:
        return Compose([Resize(wanted.MIN_SIZE_TEST, wanted.MAX_SIZE_TEST, wanted.ANTIALIAS), ToTensor()])
    return Compose(
        [
            ColorJitter(wanted.BRIGHTNESS, wanted.CONTRAST, wanted.SATURATION, wanted.HUE),
            Resize(wanted.MIN_SIZE_TRAIN, wanted.MAX_SIZE_TRAIN, wanted.ANTIALIAS),
            RandomHorizontalFlip(wanted.HORIZONTAL_FLIP_PROB_TRAIN),
            RandomVerticalFlip(wanted.VERTICAL_FLIP_PROB_TRAIN),
            ToTensor(),
        ]
    )
