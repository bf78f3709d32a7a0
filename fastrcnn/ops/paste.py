"""Masks of boxes as masks of the image."""

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import paste as reference


def _fake(masks, boxes, height, width, threshold, continuous):
    dtype = torch.float32 if threshold is None else torch.bool
    return masks.new_empty((masks.shape[0], height, width), dtype=dtype)


PASTE = _library.register(
    "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float? threshold, bool continuous) -> Tensor",
    reference=reference.paste_masks,
    fake=_fake,
)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float | None = 0.5,
    continuous: bool = False,
) -> Tensor:
    """Resize masks [D, M, M] to their boxes [D, 4] xyxy and paste each into an image of its own, [D, H, W].

    image_size: (height, width). Returns bool, or with threshold None the float32 probabilities. continuous False is
    torchvision's rule (`paste_masks_in_image`: padding 1, boxes cut to whole pixels, then > threshold), True is
    detectron2's (sampled at pixel centres as `grid_sample` does, then ≥ threshold; nothing for a box without area). A
    box that is not finite gives an empty mask. No gradient. ValueError if masks or boxes have other shapes, are not of
    floating point or lie on different devices.
    """
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks must have the shape [D, M, M], got {list(masks.shape)}")
    if boxes.shape != (masks.shape[0], 4):
        raise ValueError(f"boxes must have the shape [{masks.shape[0]}, 4] for these masks, got {list(boxes.shape)}")
    _library.check_floating(masks=masks, boxes=boxes)
    _library.check_one_device(masks=masks, boxes=boxes)
    return PASTE(masks.detach(), boxes.detach(), *image_size, threshold, continuous)
