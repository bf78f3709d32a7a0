"""Masks from the head's M × M probabilities to run-length codes of the whole image."""

import pycocotools.mask
import torch

from fastrcnn.ops import paste_masks
from fastrcnn.structures import BoxList

_CHUNK_PIXELS = 1 << 24  # 64 MiB of float32 probabilities at a time, however many masks and however large the image


def encode_masks(boxlist: BoxList, continuous: bool) -> BoxList:
    """A copy of `boxlist` in which field `mask` (probabilities [N,M,M] or [N,1,M,M]) became field `rle`.

    `rle` is a list of N compressed codes of pycocotools ({"size": [h, w], "counts": str}) of the image of the box list,
    whose boxes must be xyxy pixels of it. `continuous` is `fastrcnn.ops.paste_masks`'s rule of pasting.
    """
    width, height = boxlist.size
    masks = boxlist.get_field("mask")
    masks = masks.reshape(len(boxlist), *masks.shape[-2:])
    step = max(1, _CHUNK_PIXELS // (height * width))
    codes: list[dict] = []
    for start in range(0, len(boxlist), step):
        chunk = slice(start, start + step)
        pasted = paste_masks(masks[chunk], boxlist.bbox[chunk], (height, width), continuous=continuous)
        codes += encode_bitmaps(pasted)
    result = boxlist.copy_with_fields([name for name in boxlist.fields() if name != "mask"])
    result.add_field("rle", codes)
    return result


def encode_bitmaps(masks: torch.Tensor) -> list[dict]:
    """[N,H,W] bool or 0/1 → N compressed codes whose `counts` is text, fit for JSON."""
    # pycocotools wants [H,W,N] in Fortran order, which is the memory of a contiguous [N,W,H]
    columns = masks.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    codes = pycocotools.mask.encode(columns.T)
    return [{"size": list(map(int, code["size"])), "counts": code["counts"].decode("ascii")} for code in codes]
