"""Greedy non-maximum suppression: many sets at once, or few large ones, without a host sync.

Greedy NMS is the only solution of "a box is kept if it is a candidate and no kept box of higher score overlaps it".
Both algorithms solve that equation by iterating it, inside a block of boxes or over a whole set; the sort by score is
the caller's, and so is the choice between the two (`SEGMENTED_LIMIT`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Beyond it one program walks a set too slowly and the bitmask, which spreads a set over many, is faster (an estimate).
SEGMENTED_LIMIT = 4096
BLOCK = 64  # boxes per tile: 32 leaves half of each load unused, 128 spills registers
WORDS = 32  # of a row of the bitmask, read in one step: 1,024 boxes
PASSES = 16  # enough for every realistic set up to 16,000 boxes (3 to 15 seen); the sweep finishes the others
MASK_BYTES = 1 << 30  # sets are taken in groups whose bitmasks fit; one set may exceed it

# No fusion: a contracted multiply-add decides differently at the threshold.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
SEGMENTED_OPTIONS = OPTIONS | {"num_warps": 8}  # with 4 the two tiles of the kernel spill registers on sm_90


@triton.jit
def _load_boxes(boxes_ptr, index, inside):
    """index [N] -> x1, y1, x2, y2, each [N] float32; outside: a box without area, which overlaps nothing."""
    p = boxes_ptr + index.to(tl.int64) * 4
    x1 = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    y1 = tl.load(p + 1, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(p + 2, mask=inside, other=0.0).to(tl.float32)
    y2 = tl.load(p + 3, mask=inside, other=0.0).to(tl.float32)
    return x1, y1, x2, y2


@triton.jit
def _overlaps(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold):
    """IoU of a [A] and b [B] above the threshold -> bool [A, B]; the definition of the reference, step by step."""
    width = tl.maximum(tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :]), 0.0)
    height = tl.maximum(tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :]), 0.0)
    inter = width * height  # [A, B]
    union = ((ax2 - ax1) * (ay2 - ay1))[:, None] + ((bx2 - bx1) * (by2 - by1))[None, :] - inter
    return (inter > threshold * union) & (inter > 0.0)


@triton.jit(do_not_specialize=["n", "max_output"])
def nms_segmented_kernel(
    boxes_ptr,
    labels_ptr,
    order_ptr,
    counts_ptr,
    kept_boxes_ptr,
    kept_labels_ptr,
    indices_ptr,
    kept_counts_ptr,
    n,
    max_output,
    threshold,
    LABELLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first max_output boxes of greedy NMS of each set. Grid: one program per set.

    Reads boxes [S, n, 4] and labels [S, n] through order [S, n], of which the first counts [S] take part; writes
    indices [S, max_output] and kept_counts [S]. kept_boxes [S, max_output, 4] and kept_labels [S, max_output] are
    scratch: each block of boxes is compared with those kept before it, 16 B (24 B with labels) per pair of block and
    kept box from L2, so n * kept / BLOCK * 16 B per set. Stops as soon as max_output boxes are kept.
    """
    segment = tl.program_id(0).to(tl.int64)
    boxes_ptr += segment * n * 4
    labels_ptr += segment * n
    order_ptr += segment * n
    kept_boxes_ptr += segment * max_output * 4
    kept_labels_ptr += segment * max_output
    indices_ptr += segment * max_output
    count = tl.load(counts_ptr + segment)
    lane = tl.arange(0, BLOCK)

    kept = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while (first < count) & (kept < max_output):
        inside = first + lane < count
        source = tl.load(order_ptr + first + lane, mask=inside, other=0)
        x1, y1, x2, y2 = _load_boxes(boxes_ptr, source, inside)
        if LABELLED:
            label = tl.load(labels_ptr + source, mask=inside, other=0)

        hit = tl.zeros([BLOCK], tl.int32)
        for start in range(0, kept, BLOCK):
            taken = start + lane < kept
            u1, v1, u2, v2 = _load_boxes(kept_boxes_ptr, start + lane, taken)
            tile = _overlaps(u1, v1, u2, v2, x1, y1, x2, y2, threshold)  # [kept, block]
            if LABELLED:
                kept_label = tl.load(kept_labels_ptr + start + lane, mask=taken, other=0)
                tile = tile & (kept_label[:, None] == label[None, :])
            hit |= tl.max(tile.to(tl.int32), axis=0)
        candidate = inside & (hit == 0)

        tile = _overlaps(x1, y1, x2, y2, x1, y1, x2, y2, threshold) & (lane[:, None] < lane[None, :])
        if LABELLED:
            tile = tile & (label[:, None] == label[None, :])
        alive = candidate
        changed = tl.full([], 1, tl.int32)
        while changed != 0:  # one or two rounds in a real block of 64
            suppressed = tl.max((tile & alive[:, None]).to(tl.int32), axis=0)
            updated = candidate & (suppressed == 0)
            changed = tl.max((updated != alive).to(tl.int32), axis=0)
            alive = updated

        slot = kept + tl.cumsum(alive.to(tl.int32), axis=0) - 1
        fits = alive & (slot < max_output)
        tl.store(indices_ptr + slot, source, mask=fits)
        p = kept_boxes_ptr + slot * 4
        tl.store(p, x1, mask=fits)
        tl.store(p + 1, y1, mask=fits)
        tl.store(p + 2, x2, mask=fits)
        tl.store(p + 3, y2, mask=fits)
        if LABELLED:
            tl.store(kept_labels_ptr + slot, label, mask=fits)
        kept = tl.minimum(kept + tl.sum(alive.to(tl.int32), axis=0), max_output)
        first += BLOCK
        tl.debug_barrier()  # the next block loads the kept boxes that this one stored

    tl.store(kept_counts_ptr + segment, kept)
    for start in range(kept, max_output, BLOCK):
        tl.store(indices_ptr + start + lane, tl.full([BLOCK], -1, tl.int64), mask=start + lane < max_output)


@triton.jit(do_not_specialize=["n"])
def nms_mask_kernel(
    boxes_ptr, labels_ptr, counts_ptr, mask_ptr, n, pitch, threshold, LABELLED: tl.constexpr, BLOCK: tl.constexpr
):
    """mask [S, rows, pitch] int32: bit i % 32 of word i / 32 of row j says that box i < j suppresses box j.

    boxes [S, n, 4] and labels [S, n] in score order. Grid: (blocks of rows, blocks of columns, S); tiles above the
    diagonal or beyond counts [S] are neither computed nor written. Writes count^2 / 16 B, evaluates count^2 / 2 IoUs.
    """
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    count = tl.load(counts_ptr + segment)
    if (column_block > row_block) | (row_block * BLOCK >= count):
        return
    boxes_ptr += segment * n * 4
    labels_ptr += segment * n
    mask_ptr += segment * tl.num_programs(0) * BLOCK * pitch

    j = row_block * BLOCK + tl.arange(0, BLOCK)
    i = column_block * BLOCK + tl.arange(0, BLOCK)
    jx1, jy1, jx2, jy2 = _load_boxes(boxes_ptr, j, j < count)
    ix1, iy1, ix2, iy2 = _load_boxes(boxes_ptr, i, i < count)
    hit = _overlaps(jx1, jy1, jx2, jy2, ix1, iy1, ix2, iy2, threshold) & (i[None, :] < j[:, None])
    if LABELLED:
        label_j = tl.load(labels_ptr + j, mask=j < count, other=0)
        label_i = tl.load(labels_ptr + i, mask=i < count, other=0)
        hit = hit & (label_j[:, None] == label_i[None, :])

    bits = hit.to(tl.int32) << (tl.arange(0, BLOCK) % 32)[None, :]
    # the 32 bits of a word are distinct, so their sum is their OR
    words = tl.sum(tl.reshape(bits, [BLOCK, BLOCK // 32, 32]), axis=2)  # [rows, words]
    word = column_block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(mask_ptr + j[:, None].to(tl.int64) * pitch + word[None, :], words)


@triton.jit(do_not_specialize=["step", "steps"])
def nms_pass_kernel(
    mask_ptr,
    counts_ptr,
    keep_in_ptr,
    keep_out_ptr,
    flags_ptr,
    pitch,
    step,
    steps,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One pass over all boxes: keep_out[j] = no i with mask[j, i] and keep_in[i]; keep is packed, [S, pitch] int32.

    flags [S, steps]: the pass raises its own if it changed anything, and returns at once if the one before did not.
    Grid: (blocks of boxes, S). Reads half of the mask, count^2 / 16 B. BLOCK is the tile of nms_mask_kernel.
    """
    block = tl.program_id(0)
    segment = tl.program_id(1).to(tl.int64)
    flags_ptr += segment * steps
    if (step > 0) & (tl.load(flags_ptr + tl.maximum(step - 1, 0)) == 0):
        return  # both keep buffers already hold the answer
    count = tl.load(counts_ptr + segment)
    mask_ptr += segment * tl.num_programs(0) * BLOCK * pitch
    keep_in_ptr += segment * pitch
    keep_out_ptr += segment * pitch

    j = block * BLOCK + tl.arange(0, BLOCK)
    hit = tl.zeros([BLOCK], tl.int32)
    if block * BLOCK < count:
        end = (block + 1) * (BLOCK // 32)  # suppressors come before their box
        for first in range(0, end, WORDS):
            word = first + tl.arange(0, WORDS)
            # words of the mask from `end` on were never written: the zeros of `kept` hide them, and without a mask the
            # load is 16 bytes wide
            kept = tl.load(keep_in_ptr + word, mask=word < end, other=0)
            suppressors = tl.load(mask_ptr + j[:, None].to(tl.int64) * pitch + word[None, :])
            hit |= tl.max(((suppressors & kept[None, :]) != 0).to(tl.int32), axis=1)

    alive = ((hit == 0) & (j < count)).to(tl.int32) << (tl.arange(0, BLOCK) % 32)
    packed = tl.sum(tl.reshape(alive, [BLOCK // 32, 32]), axis=1)
    word = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    before = tl.load(keep_in_ptr + word)
    tl.store(keep_out_ptr + word, packed)
    if tl.max((packed != before).to(tl.int32), axis=0) > 0:
        tl.atomic_or(flags_ptr + step, 1, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "steps"])
def nms_sweep_kernel(mask_ptr, counts_ptr, keep_ptr, flags_ptr, rows, pitch, steps, WORDS: tl.constexpr):
    """Greedy NMS in score order, 32 boxes at a time, for sets whose last pass still changed something.

    Grid: S. Whatever keep [S, pitch] holds is recomputed, each word from the words before it: exact for every input.
    """
    segment = tl.program_id(0).to(tl.int64)
    if tl.load(flags_ptr + segment * steps + steps - 1) == 0:
        return
    count = tl.load(counts_ptr + segment)
    mask_ptr += segment * rows * pitch
    keep_ptr += segment * pitch
    lane = tl.arange(0, 32)
    for own in range(tl.cdiv(count, 32)):
        j = own * 32 + lane
        row = mask_ptr + j.to(tl.int64) * pitch
        hit = tl.zeros([32], tl.int32)
        for first in range(0, own, WORDS):
            word = first + tl.arange(0, WORDS)
            kept = tl.load(keep_ptr + word, mask=word < own, other=0)
            suppressors = tl.load(row[:, None] + word[None, :])
            hit |= tl.max(((suppressors & kept[None, :]) != 0).to(tl.int32), axis=1)
        free = tl.sum(((hit == 0) & (j < count)).to(tl.int32) << lane, axis=0)
        among = tl.load(row + own)  # suppressors among the 32 themselves
        kept_word = free
        changed = tl.full([], 1, tl.int32)
        while changed != 0:
            updated = free & tl.sum(((among & kept_word) == 0).to(tl.int32) << lane, axis=0)
            changed = updated ^ kept_word
            kept_word = updated
        tl.store(keep_ptr + own, kept_word)
        tl.debug_barrier()  # the next 32 boxes load this word


def nms_segmented(
    boxes: Tensor, labels: Tensor | None, order: Tensor, counts: Tensor, threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS of S sets, one program each.

    boxes [S, N, 4] (computed in float32), labels [S, N] or None, order int64 [S, N]: indices by falling score,
    counts int32 [S]: so many of them take part. Returns indices int64 [S, max_output], −1 where empty, and int32 [S].
    """
    sets, n, _ = boxes.shape
    indices = order.new_empty(sets, max_output)
    kept_counts = torch.empty_like(counts)
    kept_boxes = torch.empty(sets, max_output, 4, dtype=torch.float32, device=boxes.device)
    kept_labels = None if labels is None else labels.new_empty(sets, max_output)
    nms_segmented_kernel[(sets,)](
        boxes.contiguous(),
        order if labels is None else labels.contiguous(),
        order,
        counts,
        kept_boxes,
        indices if kept_labels is None else kept_labels,
        indices,
        kept_counts,
        n,
        max_output,
        threshold,
        LABELLED=labels is not None,
        BLOCK=BLOCK,
        **SEGMENTED_OPTIONS,
    )
    return indices, kept_counts


def nms_bitmask(boxes: Tensor, labels: Tensor | None, counts: Tensor, threshold: float, passes: int = PASSES) -> Tensor:
    """Greedy NMS of S sets, each spread over many programs.

    boxes [S, N, 4] (computed in float32) and labels [S, N] or None, by falling score; counts int32 [S]: so many of
    them take part. Returns kept bool [S, N]. Scratch: N^2 / 8 B per set.
    """
    sets, n, _ = boxes.shape
    blocks = triton.cdiv(n, BLOCK)
    words = blocks * BLOCK // 32
    pitch = triton.cdiv(words, WORDS) * WORDS  # whole steps of every loop over words
    boxes = boxes.contiguous()
    labels = None if labels is None else labels.contiguous()
    group = min(sets, max(1, MASK_BYTES // (blocks * BLOCK * pitch * 4)))
    mask = torch.empty(group, blocks * BLOCK, pitch, dtype=torch.int32, device=boxes.device)
    # only the first buffer is read before it is written: from the start every box counts as kept
    keep = torch.full((2, sets, pitch), -1, dtype=torch.int32, device=boxes.device)
    flags = torch.zeros(sets, passes, dtype=torch.int32, device=boxes.device)

    for first in range(0, sets, group):
        part = slice(first, min(first + group, sets))
        size = part.stop - first
        nms_mask_kernel[(blocks, blocks, size)](
            boxes[part],
            counts[part] if labels is None else labels[part],
            counts[part],
            mask,
            n,
            pitch,
            threshold,
            LABELLED=labels is not None,
            BLOCK=BLOCK,
            **OPTIONS,
        )
        for step in range(passes):
            nms_pass_kernel[(blocks, size)](
                mask,
                counts[part],
                keep[step % 2, part],
                keep[1 - step % 2, part],
                flags[part],
                pitch,
                step,
                passes,
                BLOCK=BLOCK,
                WORDS=WORDS,
                **OPTIONS,
            )
        nms_sweep_kernel[(size,)](
            mask,
            counts[part],
            keep[passes % 2, part],
            flags[part],
            blocks * BLOCK,
            pitch,
            passes,
            WORDS=WORDS,
            **OPTIONS,
        )
    bits = torch.arange(32, dtype=torch.int32, device=boxes.device)
    return ((keep[passes % 2, :, :words, None] >> bits) & 1).bool().flatten(1)[:, :n]
