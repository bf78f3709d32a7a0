"""Definition of pasting masks into an image, as two small matrix products per mask.

Bilinear interpolation is separable: pixel column x mixes two columns of the mask, with the weights max(0, 1 − |s − i|)
for the source position s of x. So a pasted mask is rows [H, M] @ mask [M, M] @ columns [M, W], whatever the size of the
box.
"""

import torch
from torch import Tensor

BLOCK = 1 << 24  # pixels per intermediate
FAR = 1e9  # pixels; int64 coordinates must not overflow


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None, continuous: bool
) -> Tensor:
    """masks [D, M, M], boxes [D, 4] -> bool [D, H, W], or float32 without a threshold."""
    masks, boxes = masks.float(), boxes.float()
    if masks.shape[0] * masks.shape[1] * height * width == 0:
        dtype = torch.float32 if threshold is None else torch.bool
        return masks.new_zeros((masks.shape[0], height, width), dtype=dtype)
    sources = _continuous_sources if continuous else _integer_sources
    if not continuous:
        masks = torch.nn.functional.pad(masks, (1, 1, 1, 1))
    x1, y1, x2, y2 = boxes.unbind(1)
    columns = _weights(*sources(x1, x2, width, masks.shape[2]), masks.shape[2])  # [D, W, M]
    rows = _weights(*sources(y1, y2, height, masks.shape[1]), masks.shape[1])  # [D, H, M]
    chunk = max(1, BLOCK // (height * width))
    pasted = []
    with torch.autocast(masks.device.type, enabled=False):  # which would multiply in half precision
        for mask, row, column in zip(masks.split(chunk), rows.split(chunk), columns.split(chunk), strict=True):
            image = row @ mask @ column.mT  # [D, H, W]
            if threshold is not None:
                image = image >= threshold if continuous else image > threshold
            pasted.append(image)
    return torch.cat(pasted)


def _weights(source: Tensor, inside: Tensor, taps: int) -> Tensor:
    """Source positions [D, L] -> weights [D, L, taps] of the taps, zero where not inside."""
    tap = torch.arange(taps, dtype=source.dtype, device=source.device)
    weights = (1 - (source[:, :, None] - tap).abs()).clamp(min=0)
    return torch.where(inside[:, :, None], weights, 0)


def _integer_sources(low: Tensor, high: Tensor, length: int, taps: int) -> tuple[Tensor, Tensor]:
    """torchvision: a box widened for the padding, cut to whole pixels, and the mask resized to those.

    low, high [D] of the boxes in one direction -> the source [D, length] of each pixel, and whether the box covers it.
    """
    centre, half = (high + low) * 0.5, (high - low) * 0.5 * (taps / (taps - 2))
    finite = (centre - half).isfinite() & (centre + half).isfinite()
    first, last = (torch.where(finite, x, 0).clamp(-FAR, FAR).long() for x in (centre - half, centre + half))
    pixels = (last - first + 1).clamp(min=1)
    offset = torch.arange(length, device=low.device) - first[:, None]  # [D, length]
    # the float32 arithmetic of F.interpolate(mode="bilinear"), which holds the ends instead of fading to zero (a tensor
    # is divided, since Python's number / tensor multiplies with the rounded reciprocal)
    source = (torch.full_like(pixels, taps) / pixels)[:, None] * (offset + 0.5) - 0.5
    covered = (offset >= 0) & (offset <= (last - first)[:, None]) & finite[:, None]
    return source.clamp(0, taps - 1), covered


def _continuous_sources(low: Tensor, high: Tensor, length: int, taps: int) -> tuple[Tensor, Tensor]:
    """detectron2: the mask sampled at pixel centres, fading to zero over half a tap outside."""
    pixel = torch.arange(length, dtype=low.dtype, device=low.device) + 0.5
    source = (pixel - low[:, None]) / (high - low)[:, None] * taps - 0.5
    return source, (high > low)[:, None] & source.isfinite() & high.isfinite()[:, None]
