"""Masks of the instances of one image, as polygons or as bitmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from fastrcnn.structures.boxlist import FLIP_LEFT_RIGHT, as_index, check_flip, crop_window, take


class SegmentationMask:
    """N instances of an image of size (width, height).

    mode "poly": instances is a list of N lists of parts, each part flat [x0, y0, x1, y1, …] or a tensor [V, 2], in
    continuous pixels; kept in `.polygons` as float32 tensors [V, 2]. A part of fewer than 3 points is dropped; an
    instance without parts stays, empty, so that instances keep the order of the boxes.
    mode "mask": a tensor [N, H, W] (above 0 = inside), or a list whose N elements are RLE dicts (compressed or not),
    bitmaps [H, W] or lists of parts; kept as uint8 [N, H, W].
    """

    def __init__(
        self, instances: SegmentationMask | Tensor | Sequence, size: tuple[int, int], mode: str = "poly"
    ) -> None:
        self.size = (int(size[0]), int(size[1]))
        self.mode = mode
        if mode not in ("poly", "mask"):
            raise ValueError(f"mode is {mode!r}; want 'poly' or 'mask'")
        if isinstance(instances, SegmentationMask):
            if instances.size != self.size:
                raise ValueError(f"masks have size {instances.size}; want {self.size}")
            instances = instances._content(mode)
        if mode == "poly":
            self.polygons = [_parts(instance) for instance in instances]
        else:
            self._bitmaps = _bitmaps(instances, self.size)

    def _content(self, mode: str) -> Any:
        if mode == "mask":
            return self.get_mask_tensor()
        return self.polygons if self.mode == "poly" else [_outline(bitmap.cpu().numpy()) for bitmap in self._bitmaps]

    def convert(self, mode: str) -> SegmentationMask:
        """The same masks in the other mode. Polygons become bitmaps by pycocotools' rule; bitmaps become the outlines
        of their pixels, which give the same bitmap back."""
        return self if mode == self.mode else SegmentationMask(self._content(mode), self.size, mode)

    def get_mask_tensor(self) -> Tensor:
        """uint8 [N, H, W], 1 = inside."""
        return self._bitmaps if self.mode == "mask" else _bitmaps(self.polygons, self.size)

    def resize(self, size: tuple[int, int]) -> SegmentationMask:
        """Masks of the image scaled to size (width, height); bitmaps bilinear, inside where at least half is."""
        width, height = int(size[0]), int(size[1])
        if self.mode == "poly":
            return self._move(scale=(width / self.size[0], height / self.size[1]), size=(width, height))
        masks = self._bitmaps[:, None].float()
        if len(self):
            masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False, antialias=True)
        else:
            masks = masks.new_zeros(0, 1, height, width)
        return SegmentationMask((masks[:, 0] >= 0.5).byte(), (width, height), "mask")

    def transpose(self, method: int) -> SegmentationMask:
        """Masks of the image mirrored left-right or top-bottom."""
        check_flip(method)
        if self.mode == "mask":
            return SegmentationMask(self._bitmaps.flip(2 if method == FLIP_LEFT_RIGHT else 1), self.size, "mask")
        if method == FLIP_LEFT_RIGHT:
            return self._move(scale=(-1, 1), shift=(self.size[0], 0), size=self.size)
        return self._move(scale=(1, -1), shift=(0, self.size[1]), size=self.size)

    def crop(self, box: Sequence[float]) -> SegmentationMask:
        """Masks of the window (x1, y1, x2, y2), rounded to whole pixels. Polygons may reach beyond their window."""
        x1, y1, x2, y2 = crop_window(box, self.size)
        size = (x2 - x1, y2 - y1)
        if self.mode == "mask":
            return SegmentationMask(self._bitmaps[:, y1:y2, x1:x2], size, "mask")
        return self._move(shift=(-x1, -y1), size=size)

    def _move(
        self, *, size: tuple[int, int], scale: tuple[float, float] = (1, 1), shift: tuple[float, float] = (0, 0)
    ) -> SegmentationMask:
        return SegmentationMask(
            [[part * part.new_tensor(scale) + part.new_tensor(shift) for part in parts] for parts in self.polygons],
            size,
        )

    def to(self, device: torch.device | str) -> SegmentationMask:
        if self.mode == "mask":
            return SegmentationMask(self._bitmaps.to(device), self.size, "mask")
        return SegmentationMask([[part.to(device) for part in parts] for parts in self.polygons], self.size)

    @classmethod
    def cat(cls, parts: Sequence[SegmentationMask]) -> SegmentationMask:
        """All instances of several SegmentationMasks of one image; bitmaps if any of them is."""
        size = parts[0].size
        if any(part.size != size for part in parts):
            raise ValueError(f"cannot join masks of images of different sizes: {[part.size for part in parts]}")
        if all(part.mode == "poly" for part in parts):
            return cls([instance for part in parts for instance in part.polygons], size)
        return cls(torch.cat([part.get_mask_tensor() for part in parts]), size, "mask")

    def __getitem__(self, index: int | slice | Sequence | Tensor) -> SegmentationMask:
        """The named instances: int, slice, list, index tensor or bool mask [N]."""
        content = self.polygons if self.mode == "poly" else self._bitmaps
        return SegmentationMask(take(content, as_index(index)), self.size, self.mode)

    def __len__(self) -> int:
        return len(self.polygons if self.mode == "poly" else self._bitmaps)

    def __repr__(self) -> str:
        return f"SegmentationMask({len(self)} instances, image {self.size[0]}x{self.size[1]}, {self.mode})"


def _parts(instance: Any) -> list[Tensor]:
    if isinstance(instance, dict):
        raise ValueError('an RLE is no polygon: give mode="mask"')
    parts = [torch.as_tensor(part, dtype=torch.float32) for part in instance]
    if any(part.numel() % 2 or part.ndim == 0 for part in parts):
        raise ValueError("a polygon part has an odd number of coordinates; want [x0, y0, x1, y1, …]")
    return [part.reshape(-1, 2) for part in parts if part.numel() >= 6]


def _bitmaps(instances: Tensor | Sequence, size: tuple[int, int]) -> Tensor:
    width, height = size
    if isinstance(instances, Tensor) and instances.ndim == 3:
        masks = (instances > 0).byte()
    elif len(instances) == 0:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    else:
        masks = torch.stack([_bitmap(instance, width, height) for instance in instances])
    if masks.shape[1:] != (height, width):
        raise ValueError(f"masks are {masks.shape[2]}x{masks.shape[1]}; the image is {width}x{height}")
    return masks


def _bitmap(instance: Any, width: int, height: int) -> Tensor:
    if isinstance(instance, Tensor | np.ndarray):
        return (torch.as_tensor(instance) > 0).byte()
    if isinstance(instance, dict):
        rle = instance
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
    else:
        parts = [part.flatten().double().tolist() for part in _parts(instance)]
        if not parts:
            return torch.zeros(height, width, dtype=torch.uint8)
        rle = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    return torch.from_numpy(coco_mask.decode(rle))


def _outline(bitmap: np.ndarray) -> list[Tensor]:
    """The borders of a bitmap [H, W] along its pixels, as polygons [V, 2]: one for each 4-connected region.

    A hole is joined to the border around it by a cut of no width, so that the polygon has it too.
    """
    loops, holes = [], []
    for loop in _border_loops(bitmap):
        x, y = loop[:, 0], loop[:, 1]
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
        (loops if area > 0 else holes).append([tuple(point) for point in loop.tolist()])
    # from left to right: what the cut meets on its way left is then already part of a region's border
    for hole in sorted(holes, key=min):
        start = hole.index(min(hole))
        x, y = hole[start]
        left = x - 1
        while bitmap[y, left - 1] and left > 0:
            left -= 1
        target = next(loop for loop in loops if _has_edge(loop, (left, y), (left, y + 1)))
        at = target.index((left, y))
        target[at:at] = [(left, y), *hole[start:], *hole[: start + 1]]
    return [_without_straight_points(torch.tensor(loop, dtype=torch.float32)) for loop in loops]


def _border_loops(bitmap: np.ndarray) -> list[np.ndarray]:
    """Closed walks [V, 2] along pixel edges with the inside on the right of the direction (y down: area > 0)."""
    inside = np.pad(bitmap.astype(bool), 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shifted, start, step in (  # the outside neighbour of a pixel, the corner to start from, and the way to go
        (np.roll(inside, 1, 0), (0, 0), (1, 0)),  # top edge, to the right
        (np.roll(inside, -1, 1), (1, 0), (0, 1)),  # right edge, down
        (np.roll(inside, -1, 0), (1, 1), (-1, 0)),  # bottom edge, to the left
        (np.roll(inside, 1, 1), (0, 1), (0, -1)),  # left edge, up
    ):
        for y, x in np.argwhere(inside & ~shifted).tolist():
            steps.setdefault((x - 1 + start[0], y - 1 + start[1]), []).append(step)
    loops = []
    while steps:
        first = point = next(iter(steps))
        step = steps[first][0]
        loop = []
        while True:
            ways = steps[point]
            # where two regions touch at a corner, turn right: each keeps its own border
            right = (-step[1], step[0])
            step = right if loop and right in ways else ways[0]
            ways.remove(step)
            if not ways:
                del steps[point]
            loop.append(point)
            point = (point[0] + step[0], point[1] + step[1])
            if point == first:
                break
        loops.append(np.array(loop))
    return loops


def _has_edge(loop: list[tuple[int, int]], a: tuple[int, int], b: tuple[int, int]) -> bool:
    return any({a, b} == {loop[i - 1], loop[i]} for i, point in enumerate(loop) if point in (a, b))


def _without_straight_points(points: Tensor) -> Tensor:
    before, after = points - points.roll(1, 0), points.roll(-1, 0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
