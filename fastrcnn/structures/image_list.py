"""Images of different sizes in one zero-padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ImageList:
    """tensors: [B, C, H, W], padded at the bottom and right; image_sizes: B × (height, width) before padding."""

    tensors: Tensor
    image_sizes: list[tuple[int, int]]

    def to(self, device: torch.device | str) -> ImageList:
        return ImageList(self.tensors.to(device), self.image_sizes)

    def __len__(self) -> int:
        return len(self.image_sizes)


def to_image_list(tensors: ImageList | Tensor | Sequence[Tensor], size_divisible: int = 0) -> ImageList:
    """An ImageList of an image [C, h, w], a batch [B, C, H, W] or a list of images of any sizes.

    H and W are the largest h and w, rounded up to multiples of size_divisible if that is above 0.
    """
    if isinstance(tensors, ImageList):
        return tensors
    if isinstance(tensors, Tensor):
        if tensors.ndim not in (3, 4):
            raise ValueError(f"an image is [C, h, w] and a batch [B, C, H, W]; got {list(tensors.shape)}")
        tensors = [tensors] if tensors.ndim == 3 else list(tensors)
    if not tensors:
        raise ValueError("to_image_list needs at least one image")
    sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if size_divisible > 0:
        height = -(-height // size_divisible) * size_divisible
        width = -(-width // size_divisible) * size_divisible
    batch = tensors[0].new_zeros(len(tensors), tensors[0].shape[0], height, width)
    for image, slot, (h, w) in zip(tensors, batch, sizes, strict=True):
        slot[:, :h, :w] = image
    return ImageList(batch, sizes)
