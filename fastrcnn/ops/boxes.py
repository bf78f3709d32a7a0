"""torchvision's box utilities: same arguments, results and errors. Boxes are [..., 4], xyxy unless fmt says so."""

from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import boxes as reference

AREA = _library.register_composite('box_area(Tensor boxes, str fmt="xyxy") -> Tensor', reference.box_area)
IOU = _library.register_composite('box_iou(Tensor boxes1, Tensor boxes2, str fmt="xyxy") -> Tensor', reference.box_iou)
CONVERT = _library.register_composite(
    "box_convert(Tensor boxes, str in_fmt, str out_fmt) -> Tensor", reference.box_convert
)
CLIP = _library.register_composite(
    "clip_boxes_to_image(Tensor boxes, SymInt[] size) -> Tensor", reference.clip_boxes_to_image
)
REMOVE_SMALL = _library.register_composite(
    "remove_small_boxes(Tensor boxes, float min_size) -> Tensor", reference.remove_small_boxes
)


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """Areas [...] of boxes [..., 4]; negative for a box with one side inverted.

    fmt: "xyxy", "xywh" or "cxcywh"; ValueError for any other.
    """
    return AREA(boxes, fmt)


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union [..., N, M] of boxes1 [..., N, 4] with boxes2 [..., M, 4]; NaN for two empty boxes.

    fmt of both: as in `box_area`, or one of torchvision's rotated formats; ValueError for any other. RuntimeError for
    boxes on different devices.
    """
    _library.check_one_device(RuntimeError, boxes1=boxes1, boxes2=boxes2)
    return IOU(boxes1, boxes2, fmt)


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Boxes [..., 4] in another format: "xyxy", "xywh" (corner and size), "cxcywh" (centre and size).

    Returns a new tensor [..., 4]. Rotated formats go to torchvision; ValueError for a format that neither knows.
    """
    return CONVERT(boxes, in_fmt, out_fmt)


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] with their corners clamped into an image of size (height, width); ValueError for another size."""
    return CLIP(boxes, size)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Indices int64 [K] of the boxes [N, 4] whose sides are both ≥ min_size.

    K depends on the data: on a GPU this waits for the device, and torch.compile(fullgraph=True) needs
    torch._dynamo.config.capture_dynamic_output_shape_ops. Inside a model a mask serves better.
    """
    return REMOVE_SMALL(boxes, min_size)
