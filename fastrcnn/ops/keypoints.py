"""Heat maps of boxes as keypoints of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops import _library
from fastrcnn.ops.reference import keypoints as reference


def _fake(heatmaps, boxes, height, width):
    shape = heatmaps.shape[:2]
    return heatmaps.new_empty((*shape, 3)), heatmaps.new_empty(shape)


def _cpu(heatmaps, boxes, height, width):
    """Here sizes can be read: each map is resized to the positions that its box has, by PyTorch's operator."""
    corner, sides, counts = reference.grid(boxes, height, width)
    place = torch.empty(heatmaps.shape[:2], dtype=torch.int64)
    scores = heatmaps.new_empty(heatmaps.shape[:2])
    columns = counts[:, 0].long()
    for index, (count_x, count_y) in enumerate(counts.long().tolist()):
        resized = F.interpolate(heatmaps[index, :, None], (count_y, count_x), mode="bicubic")
        scores[index], place[index] = resized.flatten(1).max(1)
    column, row = place % columns[:, None], place // columns[:, None]
    return reference.to_points(column, row, corner, sides, counts), scores


def _triton(heatmaps, *rest):
    if heatmaps.dtype == torch.float64:  # the kernel computes in float32
        return reference.heatmaps_to_keypoints(heatmaps, *rest)
    from triton_kernels import keypoints as kernels

    return kernels.heatmaps_to_keypoints(heatmaps, *rest)


KEYPOINTS = _library.register(
    "heatmaps_to_keypoints(Tensor heatmaps, Tensor boxes, SymInt height, SymInt width) -> (Tensor, Tensor)",
    reference=reference.heatmaps_to_keypoints,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
)


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, max_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each heat map has its maximum: torchvision's `heatmaps_to_keypoints` without waiting for the device.

    heatmaps: logits [N, K, S, S] over the boxes [N, 4] xyxy. Each map is resized bicubically to the whole pixels of its
    box, rounded up, at least one and at most max_size (height, width), which is to be the image's; the centre of the
    (first) largest is the keypoint. Returns keypoints [N, K, 3], (x, y, 1), and their logits [N, K], of the heat maps'
    dtype, float32 for half precision. No gradient. ValueError on shapes that do not fit together, integers, different
    devices or a max_size below 1.
    """
    if heatmaps.dim() != 4 or heatmaps.shape[2] != heatmaps.shape[3] or heatmaps.shape[2] == 0:
        raise ValueError(f"heatmaps must have the shape [N, K, S, S], got {list(heatmaps.shape)}")
    if boxes.shape != (heatmaps.shape[0], 4):
        raise ValueError(
            f"boxes must have the shape [{heatmaps.shape[0]}, 4] for these heatmaps, got {list(boxes.shape)}"
        )
    if min(max_size) < 1:
        raise ValueError(f"max_size must be positive, got {tuple(max_size)}")
    _library.check_floating(heatmaps=heatmaps, boxes=boxes)
    _library.check_one_device(heatmaps=heatmaps, boxes=boxes)
    dtype = torch.promote_types(heatmaps.dtype, torch.float32)
    return KEYPOINTS(heatmaps.detach().to(dtype), boxes.detach().to(dtype), *max_size)
