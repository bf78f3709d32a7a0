"""Cell anchors: the shapes that a region proposal network places at every position of a feature map."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.config import ConfigError, Conventions


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], stride: int, conventions: Conventions) -> Tensor:
    """float32 [A, 4] around the place (0, 0); a size is the square root of an area in pixels, a ratio is height /
    width.

    "exact" is detectron2's generator: centred on 0, sizes in the outer loop. "rounded" is torchvision's: centred on 0,
    ratios in the outer loop, rounded half to even, as `torch.round` does. "quantised" is Detectron's: centred on the
    first stride × stride pixels, ratios in the outer loop, the window of a ratio in whole pixels and then scaled.
    """
    if conventions.cell_anchors == "quantised":
        return _quantised(sizes, ratios, stride)
    shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size in sizes for ratio in ratios]
    if conventions.cell_anchors == "rounded":
        shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios for size in sizes]
    boxes = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
    return boxes.round() if conventions.cell_anchors == "rounded" else boxes


def _quantised(sizes: Sequence[float], ratios: Sequence[float], stride: int) -> Tensor:
    boxes = []
    for ratio in ratios:
        width = round(stride / math.sqrt(ratio))
        height = round(width * ratio)
        for size in sizes:
            w, h = width * size / stride, height * size / stride
            boxes.append(((stride - w) / 2, (stride - h) / 2, (stride + w) / 2, (stride + h) / 2))
    return torch.tensor(boxes)


def cell_anchors_of_levels(
    sizes: Sequence[float | Sequence[float]], ratios: Sequence[float], strides: Sequence[int], conventions: Conventions
) -> list[Tensor]:
    """One [A, 4] per stride: of all the sizes if there is one stride, else of one size, or one tuple of sizes."""
    per_level = [tuple(s) if isinstance(s, Sequence) else (s,) for s in sizes]
    if len(strides) == 1:
        per_level = [tuple(size for level in per_level for size in level)]
    if len(per_level) != len(strides):
        raise ConfigError(
            f"MODEL.RPN.ANCHOR_SIZES has {len(sizes)} entries and MODEL.RPN.ANCHOR_STRIDE {len(strides)}: "
            "a feature pyramid needs one size, or one tuple of sizes, per stride"
        )
    return [cell_anchors(s, ratios, stride, conventions) for s, stride in zip(per_level, strides, strict=True)]


def level_strides(
    strides: Sequence[int], image: Sequence[int], grids: Sequence[Sequence[int]], conventions: Conventions
) -> list[tuple[int, int]]:
    """(sy, sx) of each level, for a padded image (H, W) and the (h, w) of its feature maps."""
    if conventions.strides_from_grid:
        return [(image[0] // h, image[1] // w) for h, w in grids]
    return [(s, s) for s in strides]
