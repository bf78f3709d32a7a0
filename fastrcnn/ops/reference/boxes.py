"""Definition of the box utilities, torchvision's, as compositions of PyTorch's operators."""

import torch
from torch import Tensor
from torchvision.ops import box_convert as torchvision_box_convert
from torchvision.ops import box_iou as torchvision_box_iou

FORMATS = ("xyxy", "xywh", "cxcywh")


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    if fmt not in FORMATS:
        raise ValueError(f"Unsupported Bounding Box area for given format {fmt}")
    boxes = _widened(boxes)
    if fmt == "xyxy":
        return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return boxes[..., 2] * boxes[..., 3]


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    if fmt not in FORMATS:  # rotated boxes
        return torchvision_box_iou(boxes1, boxes2, fmt)
    area1, area2 = box_area(boxes1, fmt), box_area(boxes2, fmt)
    (low1, high1), (low2, high2) = _corners(boxes1, fmt), _corners(boxes2, fmt)
    low = torch.maximum(low1[..., :, None, :], low2[..., None, :, :])
    high = torch.minimum(high1[..., :, None, :], high2[..., None, :, :])
    w, h = _widened(high - low).clamp(min=0).unbind(-1)
    inter = w * h
    return inter / (area1[..., :, None] + area2[..., None, :] - inter)


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    if in_fmt not in FORMATS or out_fmt not in FORMATS:  # rotated boxes
        return torchvision_box_convert(boxes, in_fmt, out_fmt)
    if in_fmt == out_fmt:
        return boxes.clone()
    a, b, c, d = boxes.unbind(-1)
    if in_fmt == "xywh":
        a, b, c, d = a, b, a + c, b + d
    elif in_fmt == "cxcywh":
        a, b, c, d = a - 0.5 * c, b - 0.5 * d, a + 0.5 * c, b + 0.5 * d
    if out_fmt == "xywh":
        c, d = c - a, d - b
    elif out_fmt == "cxcywh":
        a, b, c, d = (a + c) / 2, (b + d) / 2, c - a, d - b
    return torch.stack((a, b, c, d), -1)


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), -1).reshape(boxes.shape)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return torch.where((w >= min_size) & (h >= min_size))[0]


def _widened(x: Tensor) -> Tensor:
    """Products of half floats and small integers overflow."""
    if x.is_floating_point():
        return x if x.dtype == torch.float64 else x.float()
    return x if x.dtype == torch.int64 else x.int()


def _corners(boxes: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    first, second = boxes[..., :2], boxes[..., 2:]
    if fmt == "xywh":
        return first, first + second
    if fmt == "cxcywh":
        return first - second / 2, first + second / 2
    return first, second
