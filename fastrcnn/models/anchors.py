"""Cell anchors: the shapes that a region proposal network places at every position of a feature map."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.config import ConfigError, Conventions


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], conventions: Conventions) -> Tensor:
    """float32 [A, 4], centred on 0; a size is the square root of an area in pixels, a ratio is height / width.

    "exact" is detectron2's generator, sizes in the outer loop; "rounded" is torchvision's, ratios in the outer loop
    and half to even, as `torch.round` does.
    """
    shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size in sizes for ratio in ratios]
    if conventions.cell_anchors == "rounded":
        shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios for size in sizes]
    boxes = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
    return boxes.round() if conventions.cell_anchors == "rounded" else boxes


def cell_anchors_of_levels(
    sizes: Sequence[float | Sequence[float]], ratios: Sequence[float], strides: Sequence[int], conventions: Conventions
) -> list[Tensor]:
    """One [A, 4] per level: one size, or one tuple of sizes, for each stride."""
    if len(sizes) != len(strides):
        raise ConfigError(
            f"MODEL.RPN.ANCHOR_SIZES has {len(sizes)} entries and MODEL.RPN.ANCHOR_STRIDE {len(strides)}: "
            "a feature pyramid needs one size, or one tuple of sizes, per stride"
        )
    per_level = [tuple(s) if isinstance(s, Sequence) else (s,) for s in sizes]
    return [cell_anchors(s, ratios, conventions) for s in per_level]


def level_strides(
    strides: Sequence[int], image: Sequence[int], grids: Sequence[Sequence[int]], conventions: Conventions
) -> list[tuple[int, int]]:
    """(sy, sx) of each level, for a padded image (H, W) and the (h, w) of its feature maps."""
    if conventions.strides_from_grid:
        return [(image[0] // h, image[1] // w) for h, w in grids]
    return [(s, s) for s in strides]
