"""Boxes of one image with whatever belongs to each of them: labels, scores, masks, keypoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLIP_LEFT_RIGHT = 0
FLIP_TOP_BOTTOM = 1


def as_index(index: int | slice | Sequence | Tensor) -> slice | Tensor:
    """Any way of naming rows as a slice, an int64 or a bool tensor; an int names one row and keeps the dimension."""
    if isinstance(index, slice):
        return index
    index = torch.as_tensor(index)
    if index.numel() == 0 and index.dtype != torch.bool:  # [] arrives as float32
        index = index.long()
    return index.reshape(-1)


def take(values: Any, index: slice | Tensor) -> Any:
    """The rows of a field: lists are indexed as tensors are."""
    if isinstance(values, Tensor):
        return values[index if isinstance(index, slice) else index.to(values.device)]
    if isinstance(values, list):
        rows = torch.arange(len(values))[index if isinstance(index, slice) else index.cpu()]
        return [values[row] for row in rows.tolist()]
    return values[index]


def check_flip(method: int) -> None:
    if method not in (FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM):
        raise ValueError(f"transpose: method is {method!r}; want FLIP_LEFT_RIGHT (0) or FLIP_TOP_BOTTOM (1)")


def crop_window(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) in whole pixels, inside an image of size (width, height), at least one pixel each way."""
    width, height = size
    x1 = min(max(round(float(box[0])), 0), width - 1)
    y1 = min(max(round(float(box[1])), 0), height - 1)
    x2 = min(max(round(float(box[2])), x1 + 1), width)
    y2 = min(max(round(float(box[3])), y1 + 1), height)
    return x1, y1, x2, y2


class BoxList:
    """N boxes of an image, with fields of length N that follow every operation.

    bbox: float32 [N, 4], pixels; image_size: (width, height). mode "xyxy": corners, the second one exclusive
    (width = x2 − x1); "xywh": corner and size. A field is a tensor [N, ...], a list of length N, or an object with
    resize, transpose, crop, indexing and cat (SegmentationMask, Keypoints), which then moves with the boxes.
    Every method returns a new BoxList. Names follow maskrcnn-benchmark's class.
    """

    def __init__(self, bbox: Tensor | Sequence, image_size: tuple[int, int], mode: str = "xyxy") -> None:
        bbox = torch.as_tensor(bbox, dtype=torch.float32)
        if bbox.numel() == 0:
            bbox = bbox.reshape(0, 4)
        if bbox.ndim != 2 or bbox.shape[1] != 4:
            raise ValueError(f"bbox has shape {list(bbox.shape)}; want [N, 4]")
        if mode not in ("xyxy", "xywh"):
            raise ValueError(f"mode is {mode!r}; want 'xyxy' or 'xywh'")
        self.bbox = bbox
        self.size = (int(image_size[0]), int(image_size[1]))
        self.mode = mode
        self.extra_fields: dict[str, Any] = {}

    def add_field(self, name: str, values: Any) -> None:
        """Attach values of length N; ValueError if the length differs."""
        if isinstance(values, Tensor) and values.ndim == 0:
            raise ValueError(f"field {name!r} is a single number; there are {len(self)} boxes")
        if len(values) != len(self):
            raise ValueError(f"field {name!r} has length {len(values)}; there are {len(self)} boxes")
        self.extra_fields[name] = values

    def get_field(self, name: str) -> Any:
        if name not in self.extra_fields:
            raise KeyError(f"no field {name!r}; there are {self.fields()}")
        return self.extra_fields[name]

    def has_field(self, name: str) -> bool:
        return name in self.extra_fields

    def fields(self) -> list[str]:
        return list(self.extra_fields)

    def copy_with_fields(self, fields: str | Iterable[str], skip_missing: bool = False) -> BoxList:
        """The same boxes with only the named fields."""
        result = BoxList(self.bbox, self.size, self.mode)
        for name in [fields] if isinstance(fields, str) else fields:
            if self.has_field(name) or not skip_missing:
                result.add_field(name, self.get_field(name))
        return result

    def convert(self, mode: str) -> BoxList:
        """The same boxes as "xyxy" or "xywh"."""
        if mode not in ("xyxy", "xywh"):
            raise ValueError(f"mode is {mode!r}; want 'xyxy' or 'xywh'")
        if mode == self.mode:
            return self
        first, second = self.bbox[:, :2], self.bbox[:, 2:]
        second = second - first if mode == "xywh" else second + first
        result = BoxList(torch.cat((first, second), 1), self.size, mode)
        result.extra_fields = dict(self.extra_fields)
        return result

    def resize(self, size: tuple[int, int]) -> BoxList:
        """Boxes of the image scaled to size (width, height)."""
        x, y = size[0] / self.size[0], size[1] / self.size[1]
        moved = BoxList(self.bbox * self.bbox.new_tensor([x, y, x, y]), size, self.mode)
        return self._move_fields(moved, "resize", size)

    def transpose(self, method: int) -> BoxList:
        """Boxes of the image mirrored left-right (FLIP_LEFT_RIGHT) or top-bottom (FLIP_TOP_BOTTOM)."""
        check_flip(method)
        width, height = self.size
        x1, y1, x2, y2 = self.convert("xyxy").bbox.unbind(1)
        if method == FLIP_LEFT_RIGHT:
            x1, x2 = width - x2, width - x1
        else:
            y1, y2 = height - y2, height - y1
        moved = BoxList(torch.stack((x1, y1, x2, y2), 1), self.size).convert(self.mode)
        return self._move_fields(moved, "transpose", method)

    def crop(self, box: Sequence[float]) -> BoxList:
        """Boxes of the window (x1, y1, x2, y2) of the image, rounded to whole pixels; each is cut at its border.

        Boxes outside the window stay, with no area; `clip_to_image` drops them.
        """
        x1, y1, x2, y2 = crop_window(box, self.size)
        size = (x2 - x1, y2 - y1)
        corners = self.convert("xyxy").bbox - self.bbox.new_tensor([x1, y1, x1, y1])
        corners = corners.clamp(min=0).minimum(corners.new_tensor([*size, *size]))
        return self._move_fields(BoxList(corners, size).convert(self.mode), "crop", (x1, y1, x2, y2))

    def _move_fields(self, moved: BoxList, operation: str, argument: Any) -> BoxList:
        for name, values in self.extra_fields.items():
            if not isinstance(values, Tensor | list):
                values = getattr(values, operation)(argument)
            moved.extra_fields[name] = values
        return moved

    def to(self, device: torch.device | str) -> BoxList:
        result = BoxList(self.bbox.to(device), self.size, self.mode)
        for name, values in self.extra_fields.items():
            result.extra_fields[name] = values.to(device) if hasattr(values, "to") else values
        return result

    def clip_to_image(self, remove_empty: bool = True) -> BoxList:
        """Boxes cut at the image's border; with remove_empty those without area are dropped."""
        corners = self.convert("xyxy").bbox
        corners = corners.clamp(min=0).minimum(corners.new_tensor([*self.size, *self.size]))
        clipped = BoxList(corners, self.size)
        clipped.extra_fields = dict(self.extra_fields)
        clipped = clipped.convert(self.mode)
        if not remove_empty:
            return clipped
        return clipped[(corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])]

    def area(self) -> Tensor:
        """float32 [N], square pixels."""
        sides = self.convert("xywh").bbox[:, 2:]
        return sides[:, 0] * sides[:, 1]

    def __getitem__(self, index: int | slice | Sequence | Tensor) -> BoxList:
        """The named boxes with their fields: int, slice, list, index tensor or bool mask [N]."""
        rows = as_index(index)
        result = BoxList(take(self.bbox, rows), self.size, self.mode)
        result.extra_fields = {name: take(values, rows) for name, values in self.extra_fields.items()}
        return result

    def __len__(self) -> int:
        return self.bbox.shape[0]

    def __repr__(self) -> str:
        width, height = self.size
        return f"BoxList({len(self)} boxes, image {width}x{height}, {self.mode}, fields {self.fields()})"


def boxlist_iou(first: BoxList, second: BoxList) -> Tensor:
    """Intersection over union of every pair: float32 [N, M]; 0 where the union has no area."""
    if first.size != second.size:
        raise ValueError(f"boxes of images of different size: {first.size} and {second.size}")
    a, b = first.convert("xyxy").bbox[:, None], second.convert("xyxy").bbox[None]  # [N, 1, 4], [1, M, 4]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = first.area()[:, None] + second.area()[None] - intersection
    return torch.where(union > 0, intersection / union, 0)


def cat_boxlist(boxlists: Sequence[BoxList]) -> BoxList:
    """All boxes of BoxLists of one image, which must agree in size, mode and names of fields."""
    if not boxlists:
        raise ValueError("cat_boxlist needs at least one BoxList")
    head = boxlists[0]
    for other in boxlists[1:]:
        if (other.size, other.mode, set(other.fields())) != (head.size, head.mode, set(head.fields())):
            raise ValueError(f"cannot join {other} to {head}: size, mode and fields must agree")
    result = BoxList(torch.cat([boxes.bbox for boxes in boxlists]), head.size, head.mode)
    for name, first in head.extra_fields.items():
        values = [boxes.get_field(name) for boxes in boxlists]
        if isinstance(first, Tensor):
            joined: Any = torch.cat(values)
        elif isinstance(first, list):
            joined = [value for part in values for value in part]
        else:
            joined = first.cat(values)
        result.add_field(name, joined)
    return result


def remove_small_boxes(boxlist: BoxList, min_size: float) -> BoxList:
    """The boxes whose two sides are at least min_size pixels."""
    sides = boxlist.convert("xywh").bbox[:, 2:]
    return boxlist[(sides >= min_size).all(1)]
