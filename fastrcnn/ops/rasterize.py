"""Ground-truth polygons as the masks that a mask head learns."""

import torch
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import rasterize as reference


def _fake(edges, parts, num_parts, boxes, matched, side):
    return boxes.new_empty((*boxes.shape[:2], side, side), dtype=torch.float32)


RASTERIZE = _library.register(
    "rasterize_polygons(Tensor edges, Tensor parts, int num_parts, Tensor boxes, Tensor matched, int side) -> Tensor",
    reference=reference.rasterize_polygons,
    fake=_fake,
)


def rasterize_polygons(
    edges: Tensor, parts: Tensor, num_parts: int, boxes: Tensor, matched: Tensor, side: int
) -> Tensor:
    """Crop the polygons of each box's ground truth to the box and rasterise them on side × side pixels.

    edges: [B, G, E, 4], (xs, ys, xe, ye) in pixels, closed outlines; parts: int64 [B, G, E], the part (0 …
    num_parts − 1) that an edge belongs to, −1 for an empty slot; boxes: [B, R, 4] xyxy; matched: int64 [B, R], the
    ground truth of each box, negative for none. Returns float32 [B, R, side, side] of zeros and ones. The box is scaled
    to the mask (a side counts as 0.1 px at least), each part follows pycocotools' rule exactly, and the parts are
    united. No gradient. ValueError on shapes that do not fit together, other dtypes or different devices.
    """
    if edges.dim() != 4 or edges.shape[-1] != 4 or parts.shape != edges.shape[:3]:
        raise ValueError(
            f"edges and parts must have the shapes [B, G, E, 4] and [B, G, E], got {list(edges.shape)} "
            f"and {list(parts.shape)}"
        )
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or matched.shape != boxes.shape[:2]:
        raise ValueError(
            f"boxes and matched must have the shapes [B, R, 4] and [B, R], got {list(boxes.shape)} "
            f"and {list(matched.shape)}"
        )
    if boxes.shape[0] != edges.shape[0]:
        raise ValueError(f"boxes are of {boxes.shape[0]} images and edges of {edges.shape[0]}")
    _library.check_floating(edges=edges, boxes=boxes)
    for name, index in (("parts", parts), ("matched", matched)):
        if index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {index.dtype}")
    _library.check_one_device(edges=edges, parts=parts, boxes=boxes, matched=matched)
    return RASTERIZE(edges, parts, num_parts, boxes.detach(), matched, side)
