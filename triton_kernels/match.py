"""Matching boxes with ground truth without the matrix of their IoUs.

A program holds its boxes and their best IoUs in registers and walks over the ground truths of its image. IoUs are
computed as in the reference, operation by operation and without fusion, so that both passes and the reference agree to
the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.box_coder import load_boxes
from triton_kernels.launch import Launch, choose

BELOW, BETWEEN = tl.constexpr(-1), tl.constexpr(-2)
COUNTS = ["count", "rows", "slots"]


@triton.jit
def _used_slots(valid_ptr, slots, BLOCK: tl.constexpr):
    """One more than the last valid slot: those behind it cost nothing."""
    lane = tl.arange(0, BLOCK)
    used = tl.zeros([], tl.int32)
    for start in range(0, slots, BLOCK):
        valid = tl.load(valid_ptr + start + lane, mask=start + lane < slots, other=0) != 0
        used = tl.maximum(used, tl.max(tl.where(valid, start + lane + 1, 0), axis=0))
    return used


@triton.jit
def _iou(x1, y1, x2, y2, area, gt_ptr, valid_ptr):
    """Of all boxes with one ground truth, −1 where it is NaN or negative and for an empty slot.

    A NaN coordinate makes the union NaN, whatever minimum and maximum do with it.
    """
    gx1 = tl.load(gt_ptr).to(tl.float32)
    gy1 = tl.load(gt_ptr + 1).to(tl.float32)
    gx2 = tl.load(gt_ptr + 2).to(tl.float32)
    gy2 = tl.load(gt_ptr + 3).to(tl.float32)
    valid = tl.load(valid_ptr) != 0
    width = tl.maximum(tl.minimum(x2, gx2) - tl.maximum(x1, gx1), 0.0)
    height = tl.maximum(tl.minimum(y2, gy2) - tl.maximum(y1, gy1), 0.0)
    inter = width * height
    iou = tl.div_rn(inter, (gx2 - gx1) * (gy2 - gy1) + area - inter)
    return tl.where((iou >= 0.0) & valid, tl.abs(iou), -1.0)  # abs: −0 has the bits of the lowest integer


@triton.jit
def _label(best, index, tied, high, low):
    unmatched = tl.where((best < low) | (best < 0.0), BELOW, BETWEEN)
    return tl.where((best >= high) | tied, index, unmatched).to(tl.int64)


@triton.jit
def _my_boxes(boxes_ptr, count, rows, BLOCK: tl.constexpr):
    """Image, number and coordinates of this program's boxes; NaN past the end, which has no IoU with anything."""
    blocks = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x1, y1, x2, y2 = load_boxes(boxes_ptr, image * rows + index, inside, float("nan"), BLOCK)
    return image, image * count + index, inside, x1, y1, x2, y2


@triton.jit(do_not_specialize=COUNTS)
def match_boxes_kernel(
    boxes_ptr,
    gt_ptr,
    valid_ptr,
    matched_ptr,
    iou_ptr,
    top_ptr,
    count,
    rows,
    slots,
    high,
    low,
    LOW_QUALITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """matched and iou [B, count] of boxes [B, count, 4] (rows = count) or [count, 4] (rows = 0) with gt [B, slots, 4].

    LOW_QUALITY: matched and iou are the best ground truth and IoU instead (0 and −1 where there is none), and top
    [B, slots], of the bits of −1, receives the best IoU of each ground truth as its bits: for `match_ties_kernel`.

    Grid: B × blocks of boxes. Moves 28 B per box in fp32, and the ground truths, 17 B each, once per program from L2;
    about 25 operations per pair, a division among them. Of a program's maxima only those above what is already there
    go through an atomic: few, since most boxes do not touch most ground truths; a value read too early costs one more.
    A maximum does not depend on order.
    """
    image, out, inside, x1, y1, x2, y2 = _my_boxes(boxes_ptr, count, rows, BLOCK)
    gt_ptr += image * slots * 4
    valid_ptr += image * slots
    top_ptr += image * slots
    area = (x2 - x1) * (y2 - y1)
    best = tl.full([BLOCK], -1.0, tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for g in range(_used_slots(valid_ptr, slots, BLOCK)):
        iou = _iou(x1, y1, x2, y2, area, gt_ptr + g * 4, valid_ptr + g)
        index = tl.where(iou > best, g, index)  # the first of equals
        best = tl.maximum(best, iou)
        if LOW_QUALITY:
            top = tl.max(iou, axis=0).to(tl.int32, bitcast=True)  # of numbers ≥ 0, and −1, integer order is theirs
            tl.atomic_max(top_ptr + g, top, mask=top > tl.load(top_ptr + g), sem="relaxed")
    if LOW_QUALITY:
        tl.store(matched_ptr + out, index.to(tl.int64), mask=inside)
        tl.store(iou_ptr + out, best, mask=inside)
    else:
        tl.store(matched_ptr + out, _label(best, index, False, high, low), mask=inside)
        tl.store(iou_ptr + out, tl.maximum(best, 0.0), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def match_ties_kernel(
    boxes_ptr,
    gt_ptr,
    valid_ptr,
    matched_ptr,
    iou_ptr,
    top_ptr,
    count,
    rows,
    slots,
    high,
    low,
    BLOCK: tl.constexpr,
):
    """Final matched and iou from those of `match_boxes_kernel`: boxes that tie the top of a ground truth are matched.

    Grid: B × blocks of boxes. Moves 40 B per box in fp32. A ground truth whose top is above the best IoU of all boxes
    of the program costs one load; the others are computed again, 25 operations per pair.
    """
    image, out, inside, x1, y1, x2, y2 = _my_boxes(boxes_ptr, count, rows, BLOCK)
    gt_ptr += image * slots * 4
    valid_ptr += image * slots
    top_ptr += image * slots
    area = (x2 - x1) * (y2 - y1)
    best = tl.load(iou_ptr + out, mask=inside, other=-1.0)
    index = tl.load(matched_ptr + out, mask=inside, other=0)
    reach = tl.max(best, axis=0)
    tied = tl.zeros([BLOCK], tl.int1)
    for g in range(_used_slots(valid_ptr, slots, BLOCK)):
        top = tl.load(top_ptr + g).to(tl.float32, bitcast=True)
        if (top >= 0.0) & (top <= reach):
            tied |= _iou(x1, y1, x2, y2, area, gt_ptr + g * 4, valid_ptr + g) == top
    tl.store(matched_ptr + out, _label(best, index, tied, high, low), mask=inside)
    tl.store(iou_ptr + out, tl.maximum(best, 0.0), mask=inside)


def config(boxes: int, slots: int) -> Launch:
    """block: boxes, of all images together `boxes`. slots: of ground truth per image.

    One warp, whose maximum over the boxes needs no shared memory and no barrier. Four boxes per thread hide the loads
    of a ground truth and the division of the IoU behind each other; fewer where that would leave under 2048 programs,
    16 for each processor of a large GPU.
    """
    block = min(128, max(32, triton.next_power_of_2(boxes // 2048)))
    return choose("match", Launch(block, 1), boxes=boxes, slots=slots)


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, high: float, low: float, allow_low_quality: bool
) -> tuple[Tensor, Tensor]:
    (batch, slots), count = gt_valid.shape, boxes.shape[-2]
    matched = boxes.new_empty((batch, count), dtype=torch.int64)
    iou = boxes.new_empty((batch, count), dtype=torch.float32)
    if not matched.numel():
        return matched, iou
    launch = config(batch * count, max(slots, 1))
    grid = (batch * triton.cdiv(count, launch.block),)
    # the bits of −1, which no valid box raises
    top = boxes.new_full((batch, slots), -1.0, dtype=torch.float32).view(torch.int32) if allow_low_quality else matched
    arguments = (
        boxes.contiguous(),
        gt_boxes.contiguous(),
        gt_valid.contiguous(),
        matched,
        iou,
        top,
        count,
        count if boxes.dim() == 3 else 0,
        slots,
        high,
        low,
    )
    match_boxes_kernel[grid](*arguments, LOW_QUALITY=allow_low_quality, BLOCK=launch.block, **launch.options)
    if allow_low_quality:
        match_ties_kernel[grid](*arguments, BLOCK=launch.block, **launch.options)
    return matched, iou
