"""Masks from the head's M × M probabilities to run-length codes of the whole image."""

import pycocotools.mask
import torch

from fastrcnn.config import Conventions
from fastrcnn.ops import paste_masks
from fastrcnn.structures import BoxList

_CHUNK_PIXELS = 1 << 24  # 64 MiB of float32 probabilities at a time, however many masks and however large the image


def encode_masks(boxlist: BoxList, conventions: Conventions) -> BoxList:
    """A copy of `boxlist` in which field `mask` became field `rle`, a list of N compressed codes of pycocotools
    ({"size": [h, w], "counts": str}) of the image of the box list.

    mask: probabilities [N,M,M] or [N,1,M,M], pasted at the boxes (xyxy pixels of the image) as the conventions have it,
    or bool [N,H,W], which are pasted already.
    """
    width, height = boxlist.size
    masks = boxlist.get_field("mask")
    step = max(1, _CHUNK_PIXELS // (height * width))
    codes: list[dict] = []
    for start in range(0, len(boxlist), step):
        part = masks[start : start + step]
        if part.dtype != torch.bool:
            boxes = conventions.corners(boxlist.bbox[start : start + step])
            part = part.reshape(len(boxes), *part.shape[-2:])
            part = paste_masks(part, boxes, (height, width), continuous=conventions.paste_continuous)
        codes += encode_bitmaps(part)
    result = boxlist.copy_with_fields([name for name in boxlist.fields() if name != "mask"])
    result.add_field("rle", codes)
    return result


def encode_bitmaps(masks: torch.Tensor) -> list[dict]:
    """[N,H,W] bool or 0/1 → N compressed codes whose `counts` is text, fit for JSON."""
    # pycocotools wants [H,W,N] in Fortran order, which is the memory of a contiguous [N,W,H]
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    codes = pycocotools.mask.encode(columns.T)
    return [{"size": list(map(int, code["size"])), "counts": code["counts"].decode("ascii")} for code in codes]
