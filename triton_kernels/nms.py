"""Greedy non-maximum suppression: many sets at once, or few large ones, without a host sync.

Greedy NMS is the only solution of "a box is kept if it is a candidate and no kept box of higher score overlaps it".
Both algorithms solve that equation by iterating it, inside a block of boxes or over a whole band of them; the sort by
score is the caller's, and so is the choice between the two (`prefer_segmented`).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, choose

SEGMENTED_LIMIT = 4096  # boxes of a set that one program may walk (an estimate, as prefer_segmented)
BAND = 16384  # boxes: their bitmask of 34 MB stays in the L2 of an H200 while the passes read it
MASK_BYTES = 1 << 28  # of all sets together: with many sets the bands are shorter
WORDS = 32  # of a row of the bitmask, read in one step: 1,024 boxes
# The most that a simulated set needed, of uniform, clustered and anchor-like boxes (1,000 to 16,384, thresholds 0.3 to
# 0.7), the pass that only confirms included; 8 is usual, and 2 to 5 with 80 labels. The sweep finishes all others: an
# idle pass costs its launch, a block that is left to the sweep more.
PASSES = 12
EARLIER_BLOCKS = 64  # of kept boxes per program
NONE = tl.constexpr(2**31 - 1)  # no block changed


def prefer_segmented(n: int, max_output: int) -> bool:
    """Whether one program per set is the better choice.

    It compares n * kept / 2 pairs, some 0.3 us per 64 x 64 of them, while the bitmask costs the launch of its passes
    at least. Estimates, not measured.
    """
    return n <= SEGMENTED_LIMIT and n * min(n, max_output) <= SEGMENTED_LIMIT**2 // 4


def segmented_launch(n: int) -> Launch:
    """64 boxes: 32 leave half of each load unused, 128 spill; with 4 warps the kernel's two tiles spill on sm_90."""
    return choose("nms_segmented", Launch(64, 8), n=n)


def mask_launch(n: int) -> Launch:
    """Of the kernels that compare boxes; with 8 warps the variants with labels spill on sm_80.

    Its block is that of all kernels of the bitmask.
    """
    return choose("nms_mask", Launch(64, 4), n=n)


def pass_launch(block: int, rows: int) -> Launch:
    """The number of warps."""
    return choose("nms_pass", Launch(block, 4), rows=rows)


def finish_launch(block: int, rows: int) -> Launch:
    """The number of warps, and tile: boxes appended in one step, 4 per thread; 8 per thread spill in some variants."""
    return choose("nms_finish", Launch(block, 4, 512), rows=rows)


def band_rows(sets: int, n: int, block: int) -> int:
    """Boxes of a band, a multiple of the block: few equal bands that keep to BAND and MASK_BYTES."""
    limit = min(BAND, max(1024, math.isqrt(8 * MASK_BYTES // sets) // 1024 * 1024))
    return triton.cdiv(triton.cdiv(n, triton.cdiv(n, limit)), block) * block


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
    valid_ptr,
    kept_boxes_ptr,
    kept_labels_ptr,
    indices_ptr,
    kept_counts_ptr,
    n,
    max_output,
    threshold,
    BLOCK: tl.constexpr,
):
    """The first max_output boxes of greedy NMS of each set. Grid: one program per set.

    Reads boxes [S, n, 4], labels and valid [S, n] through order [S, n], of which the first counts [S] take part; writes
    indices [S, max_output] and kept_counts [S]. labels, order, counts and valid may be None. kept_boxes
    [S, max_output, 4] and kept_labels [S, max_output] are scratch: each block of boxes is compared with those kept
    before it, 16 B (24 B with labels) per pair of block and kept box from L2, so n * kept / BLOCK * 16 B per set and
    n * kept / 2 IoUs. Stops as soon as max_output boxes are kept.
    """
    segment = tl.program_id(0).to(tl.int64)
    boxes_ptr += segment * n * 4
    kept_boxes_ptr += segment * max_output * 4
    indices_ptr += segment * max_output
    if labels_ptr is not None:
        labels_ptr += segment * n
        kept_labels_ptr += segment * max_output
    if order_ptr is not None:
        order_ptr += segment * n
    if valid_ptr is not None:
        valid_ptr += segment * n
    count = n if counts_ptr is None else tl.load(counts_ptr + segment)
    lane = tl.arange(0, BLOCK)

    kept = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while (first < count) & (kept < max_output):
        inside = first + lane < count
        if order_ptr is None:
            source = (first + lane).to(tl.int64)
        else:
            source = tl.load(order_ptr + first + lane, mask=inside, other=0)
        x1, y1, x2, y2 = _load_boxes(boxes_ptr, source, inside)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + source, mask=inside, other=0)
        if valid_ptr is not None:
            inside = inside & (tl.load(valid_ptr + source, mask=inside, other=0) != 0)

        hit = tl.zeros([BLOCK], tl.int32)
        for start in range(0, kept, BLOCK):
            taken = start + lane < kept
            u1, v1, u2, v2 = _load_boxes(kept_boxes_ptr, start + lane, taken)
            tile = _overlaps(u1, v1, u2, v2, x1, y1, x2, y2, threshold)  # [kept, block]
            if labels_ptr is not None:
                kept_label = tl.load(kept_labels_ptr + start + lane, mask=taken, other=0)
                tile = tile & (kept_label[:, None] == label[None, :])
            hit |= tl.max(tile.to(tl.int32), axis=0)
        candidate = inside & (hit == 0)

        tile = _overlaps(x1, y1, x2, y2, x1, y1, x2, y2, threshold) & (lane[:, None] < lane[None, :])
        if labels_ptr is not None:
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
        p = kept_boxes_ptr + slot.to(tl.int64) * 4
        tl.store(p, x1, mask=fits)
        tl.store(p + 1, y1, mask=fits)
        tl.store(p + 2, x2, mask=fits)
        tl.store(p + 3, y2, mask=fits)
        if labels_ptr is not None:
            tl.store(kept_labels_ptr + slot, label, mask=fits)
        kept = tl.minimum(kept + tl.sum(alive.to(tl.int32), axis=0), max_output)
        first += BLOCK
        tl.debug_barrier()  # the next block loads the kept boxes that this one stored

    tl.store(kept_counts_ptr + segment, kept)
    for start in range(kept, max_output, BLOCK):
        tl.store(indices_ptr + start + lane, tl.full([BLOCK], -1, tl.int64), mask=start + lane < max_output)


@triton.jit
def _pack(bits):
    """bits [N] of 0 and 1 -> words [N / 32]: the bits of a word are distinct, so their sum is their OR."""
    count: tl.constexpr = bits.shape[0]
    return tl.sum(tl.reshape(bits.to(tl.int32) << (tl.arange(0, count) % 32), [count // 32, 32]), axis=1)


@triton.jit
def _first_block(starts_ptr, block, BLOCK: tl.constexpr):
    """The first block with boxes that can suppress one of this block; NaN labels have their start at n."""
    return 0 if starts_ptr is None else tl.minimum(tl.load(starts_ptr + block) // BLOCK, block)


@triton.jit(do_not_specialize=["n", "begin", "rows", "max_output", "passes"])
def nms_mask_kernel(
    boxes_ptr,
    labels_ptr,
    starts_ptr,
    counts_ptr,
    kept_counts_ptr,
    mask_ptr,
    alive_ptr,
    keep_ptr,
    flags_ptr,
    n,
    begin,
    rows,
    pitch,
    max_output,
    passes,
    threshold,
    BLOCK: tl.constexpr,
):
    """mask [S, rows, pitch] int32: bit i % 32 of word i / 32 of row j says that box i < j of the band suppresses box j.

    A band is `rows` boxes from block `begin` on. boxes [S, n, 4] and labels [S, n] by falling score, with labels by
    label first; starts [S, blocks of n]: where the group of a block's first label starts. labels and counts may be
    None. Grid: (S, blocks of rows, blocks of columns); tiles above the diagonal, beyond counts [S] or of other labels
    only are neither computed nor written. Writes count^2 / 16 B, evaluates count^2 / 2 IoUs, for `count` of the band.
    Also the start of a band: all its boxes are alive [S, pitch] and kept, and flags [S, passes] are down.
    """
    segment = tl.program_id(0).to(tl.int64)
    row_block = tl.program_id(1)
    column_block = tl.program_id(2)
    first_row = (begin + row_block) * BLOCK
    count = n if counts_ptr is None else tl.load(counts_ptr + segment)
    if (column_block > row_block) | (first_row >= count) | (tl.load(kept_counts_ptr + segment) >= max_output):
        return
    lane = tl.arange(0, BLOCK)
    j = first_row + lane
    if column_block == row_block:
        word = segment * pitch + row_block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        alive = _pack(j < count)
        tl.store(alive_ptr + word, alive)
        tl.store(keep_ptr + word, alive)
        if row_block == 0:
            for step in range(passes):
                tl.store(flags_ptr + segment * passes + step, NONE)
    if starts_ptr is not None:
        starts_ptr += segment * tl.cdiv(n, BLOCK)
    if begin + column_block < _first_block(starts_ptr, begin + row_block, BLOCK):
        return

    boxes_ptr += segment * n * 4
    i = (begin + column_block) * BLOCK + lane
    jx1, jy1, jx2, jy2 = _load_boxes(boxes_ptr, j, j < count)
    ix1, iy1, ix2, iy2 = _load_boxes(boxes_ptr, i, i < count)
    hit = _overlaps(jx1, jy1, jx2, jy2, ix1, iy1, ix2, iy2, threshold) & (i[None, :] < j[:, None])
    if labels_ptr is not None:
        labels_ptr += segment * n
        label_j = tl.load(labels_ptr + j, mask=j < count, other=0)
        label_i = tl.load(labels_ptr + i, mask=i < count, other=0)
        hit = hit & (label_j[:, None] == label_i[None, :])

    bits = hit.to(tl.int32) << (lane % 32)[None, :]
    words = tl.sum(tl.reshape(bits, [BLOCK, BLOCK // 32, 32]), axis=2)  # [rows, words]
    row = mask_ptr + (segment * rows + row_block * BLOCK + lane) * pitch
    word = column_block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(row[:, None] + word[None, :], words)


@triton.jit(do_not_specialize=["n", "begin", "max_output"])
def nms_earlier_kernel(
    boxes_ptr,
    labels_ptr,
    starts_ptr,
    counts_ptr,
    kept_counts_ptr,
    group_counts_ptr,
    kept_boxes_ptr,
    alive_ptr,
    n,
    begin,
    pitch,
    max_output,
    threshold,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Clears from alive [S, pitch] the boxes of a band that a kept box of the bands before it suppresses.

    kept_boxes [S, max_output, 4], the first kept_counts [S] of which are filled; those that may share a label with the
    band start at group_counts [S]. Grid: (S, blocks of the band, chunks of CHUNK blocks of kept boxes). Reads
    rows * kept / BLOCK * 16 B from L2, evaluates rows * kept IoUs.
    """
    segment = tl.program_id(0).to(tl.int64)
    block = begin + tl.program_id(1)
    count = n if counts_ptr is None else tl.load(counts_ptr + segment)
    kept = tl.load(kept_counts_ptr + segment)
    first = tl.load(group_counts_ptr + segment) + tl.program_id(2) * (CHUNK * BLOCK)
    if (block * BLOCK >= count) | (first >= kept) | (kept >= max_output):
        return
    if starts_ptr is not None and tl.load(starts_ptr + segment * tl.cdiv(n, BLOCK) + block) >= begin * BLOCK:
        return  # its labels start within the band
    boxes_ptr += segment * n * 4
    kept_boxes_ptr += segment * max_output * 4
    lane = tl.arange(0, BLOCK)
    j = block * BLOCK + lane
    rows = j < count
    if labels_ptr is not None:  # only the label that the bands before end with is in both
        labels_ptr += segment * n
        rows = rows & (tl.load(labels_ptr + j, mask=rows, other=0) == tl.load(labels_ptr + begin * BLOCK))
    x1, y1, x2, y2 = _load_boxes(boxes_ptr, j, rows)
    hit = tl.zeros([BLOCK], tl.int32)
    for start in range(first, tl.minimum(first + CHUNK * BLOCK, kept), BLOCK):
        u1, v1, u2, v2 = _load_boxes(kept_boxes_ptr, start + lane, start + lane < kept)
        tile = _overlaps(u1, v1, u2, v2, x1, y1, x2, y2, threshold)  # [kept, block]
        hit |= tl.max(tile.to(tl.int32), axis=0)
    word = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.atomic_and(alive_ptr + segment * pitch + word, ~_pack(hit), sem="relaxed")


@triton.jit
def _settle(row, keep_ptr, alive_ptr, block, first_word, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """Kept boxes of a block of the band -> packed [BLOCK / 32]; exact if the words before it in keep are.

    row [BLOCK]: pointers to its rows of the mask, whose words from first_word on are written.
    """
    end = block * (BLOCK // 32)
    hit = tl.zeros([BLOCK], tl.int32)
    for first in range(first_word // WORDS * WORDS, end, WORDS):
        word = first + tl.arange(0, WORDS)
        # some of these words of the mask were never written: the zeros of `kept` hide them, and without a mask the
        # load is 16 bytes wide
        kept = tl.load(keep_ptr + word, mask=(word >= first_word) & (word < end), other=0)
        suppressors = tl.load(row[:, None] + word[None, :])
        hit |= tl.max(((suppressors & kept[None, :]) != 0).to(tl.int32), axis=1)
    own = end + tl.arange(0, BLOCK // 32)
    free = tl.load(alive_ptr + own) & _pack(hit == 0)
    among = tl.load(row[:, None] + own[None, :])  # suppressors in the block itself
    settled = free
    changed = tl.full([], 1, tl.int32)
    while changed != 0:  # one or two rounds in a real block of 64
        hit = tl.max(((among & settled[None, :]) != 0).to(tl.int32), axis=1)
        updated = free & _pack(hit == 0)
        changed = tl.max((updated != settled).to(tl.int32), axis=0)
        settled = updated
    return settled


@triton.jit(do_not_specialize=["n", "begin", "rows", "max_output", "step", "passes"])
def nms_pass_kernel(
    mask_ptr,
    starts_ptr,
    counts_ptr,
    kept_counts_ptr,
    alive_ptr,
    keep_ptr,
    flags_ptr,
    n,
    begin,
    rows,
    pitch,
    max_output,
    step,
    passes,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One pass over a band: each block settles itself, with the blocks before it as keep [S, pitch] now has them.

    keep is read and written by all programs of a pass at once: whether a program sees the old or the new word of
    another does not matter, because only a pass in which a block and all before it stay as they were settles the
    next. flags [S, passes] gets the first block that the pass changed: up to it everything is final, and the next pass
    leaves it alone. Grid: (S, blocks of the band). Reads half of the mask, count^2 / 16 B. BLOCK as in nms_mask_kernel.
    """
    segment = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    count = n if counts_ptr is None else tl.load(counts_ptr + segment)
    if ((begin + block) * BLOCK >= count) | (tl.load(kept_counts_ptr + segment) >= max_output):
        return
    flags_ptr += segment * passes + step
    if (step > 0) & (block <= tl.load(flags_ptr - tl.minimum(step, 1))):
        return
    if starts_ptr is not None:
        starts_ptr += segment * tl.cdiv(n, BLOCK)
    first_word = tl.maximum(_first_block(starts_ptr, begin + block, BLOCK) - begin, 0) * (BLOCK // 32)
    row = mask_ptr + (segment * rows + block * BLOCK + tl.arange(0, BLOCK)) * pitch
    keep_ptr += segment * pitch
    settled = _settle(row, keep_ptr, alive_ptr + segment * pitch, block, first_word, BLOCK, WORDS)
    word = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    before = tl.load(keep_ptr + word)
    if tl.max((settled != before).to(tl.int32), axis=0) > 0:
        tl.store(keep_ptr + word, settled)
        tl.atomic_min(flags_ptr, block, sem="relaxed")


@triton.jit(do_not_specialize=["n", "begin", "rows", "max_output", "passes"])
def nms_finish_kernel(
    boxes_ptr,
    order_ptr,
    mask_ptr,
    starts_ptr,
    counts_ptr,
    kept_counts_ptr,
    group_counts_ptr,
    kept_boxes_ptr,
    alive_ptr,
    keep_ptr,
    flags_ptr,
    indices_ptr,
    n,
    begin,
    rows,
    pitch,
    max_output,
    passes,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Settles what the passes of a band left open, block after block, and appends the kept boxes. Grid: S.

    The sweep makes the result exact for every input. Appends order [S, n] of the kept boxes to indices
    [S, max_output], their coordinates to kept_boxes, and counts them in kept_counts; group_counts: how many come before
    the label that the next band starts with. Moves 16 B per box, 24 B per kept one, and the rows of the mask it sweeps.
    """
    segment = tl.program_id(0).to(tl.int64)
    count = n if counts_ptr is None else tl.load(counts_ptr + segment)
    kept = tl.load(kept_counts_ptr + segment)
    base = begin * BLOCK
    if (base >= count) | (kept >= max_output):
        return
    boxes_ptr += segment * n * 4
    order_ptr += segment * n
    kept_boxes_ptr += segment * max_output * 4
    indices_ptr += segment * max_output
    alive_ptr += segment * pitch
    keep_ptr += segment * pitch
    if starts_ptr is not None:
        starts_ptr += segment * tl.cdiv(n, BLOCK)
    size = tl.minimum(count - base, rows)
    blocks = tl.cdiv(size, BLOCK)
    changed = tl.load(flags_ptr + segment * passes + passes - 1)  # NONE where the last pass changed nothing
    for block in range(tl.minimum(changed, blocks) + 1, blocks):
        first_word = tl.maximum(_first_block(starts_ptr, begin + block, BLOCK) - begin, 0) * (BLOCK // 32)
        row = mask_ptr + (segment * rows + block * BLOCK + tl.arange(0, BLOCK)) * pitch
        settled = _settle(row, keep_ptr, alive_ptr, block, first_word, BLOCK, WORDS)
        tl.store(keep_ptr + block * (BLOCK // 32) + tl.arange(0, BLOCK // 32), settled)
        tl.debug_barrier()  # the next block loads these words

    next_start = tl.zeros([], tl.int32)  # of the label that the next band starts with
    if starts_ptr is not None and base + rows < n:
        next_start = tl.load(starts_ptr + begin + rows // BLOCK)
    group = tl.load(group_counts_ptr + segment)
    if next_start >= base:
        group = kept
    for start in range(0, size, CHUNK):
        local = start + tl.arange(0, CHUNK)
        words = tl.load(keep_ptr + local // 32, mask=local < size, other=0)
        bits = (words >> (local % 32)) & 1
        slot = kept + tl.cumsum(bits, axis=0) - 1
        fits = (bits != 0) & (slot < max_output)
        position = base + local
        tl.store(indices_ptr + slot, tl.load(order_ptr + position, mask=fits, other=0), mask=fits)
        x1, y1, x2, y2 = _load_boxes(boxes_ptr, position, fits)
        p = kept_boxes_ptr + slot.to(tl.int64) * 4
        tl.store(p, x1, mask=fits)
        tl.store(p + 1, y1, mask=fits)
        tl.store(p + 2, x2, mask=fits)
        tl.store(p + 3, y2, mask=fits)
        kept += tl.sum(bits, axis=0)
        if next_start >= base:
            group += tl.sum(tl.where(position < next_start, bits, 0), axis=0)
    tl.store(kept_counts_ptr + segment, tl.minimum(kept, max_output))
    tl.store(group_counts_ptr + segment, group)


def nms_segmented(
    boxes: Tensor,
    labels: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    threshold: float,
    max_output: int,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy NMS of S sets, one program each.

    boxes [S, N, 4] (computed in float32), labels [S, N] or None. order int64 [S, N]: indices by falling score, None if
    the boxes already are in that order. counts int32 [S]: so many of them take part, None for all; valid bool or uint8
    [S, N], by box: the others take no part. Returns indices int64 [S, max_output], −1 where empty, and int32 [S].
    """
    sets, n, _ = boxes.shape
    config = segmented_launch(n)
    indices = torch.empty(sets, max_output, dtype=torch.int64, device=boxes.device)
    kept_counts = torch.empty(sets, dtype=torch.int32, device=boxes.device)
    nms_segmented_kernel[(sets,)](
        boxes.contiguous(),
        None if labels is None else labels.contiguous(),
        None if order is None else order.contiguous(),
        counts,
        None if valid is None else valid.contiguous(),
        torch.empty(sets, max_output, 4, dtype=torch.float32, device=boxes.device),
        None if labels is None else labels.new_empty(sets, max_output),
        indices,
        kept_counts,
        n,
        max_output,
        threshold,
        BLOCK=config.block,
        **config.options,
    )
    return indices, kept_counts


def nms_bitmask(
    boxes: Tensor,
    labels: Tensor | None,
    order: Tensor,
    counts: Tensor | None,
    threshold: float,
    max_output: int,
    padding: int = -1,
    passes: int = PASSES,
) -> tuple[Tensor, Tensor]:
    """Greedy NMS of S sets, each spread over many programs and taken in bands of boxes.

    boxes [S, N, 4] (computed in float32) by falling score; with labels [S, N] by rising label first. counts int32 [S]:
    so many of them take part, None for all. order int64 [S, N]: what stands for each box in the result.
    Returns int64 [S, max_output], of the kept boxes in their order here, then padding, and counts int32 [S].
    A set takes no band after it has max_output boxes, so with labels max_output should be N.

    Scratch beside 16 B per box of the result: at most MASK_BYTES, or 132 kB per set where that is more.
    """
    sets, n, _ = boxes.shape
    mask_config = mask_launch(n)
    block = mask_config.block
    rows = band_rows(sets, n, block)
    pass_config = pass_launch(block, rows)
    finish_config = finish_launch(block, rows)
    device = boxes.device
    pitch = triton.cdiv(rows, 32 * WORDS) * WORDS  # whole steps of every loop over words
    boxes = boxes.contiguous()
    starts = None
    if labels is not None:
        labels = labels.contiguous()
        starts = torch.searchsorted(labels, labels[:, ::block].contiguous(), out_int32=True)
    mask = torch.empty(sets, rows, pitch, dtype=torch.int32, device=device)
    alive, keep = torch.empty(2, sets, pitch, dtype=torch.int32, device=device)
    flags = torch.empty(sets, passes, dtype=torch.int32, device=device)
    kept_boxes = torch.empty(sets, max_output, 4, dtype=torch.float32, device=device)
    kept_counts, group_counts = torch.zeros(2, sets, dtype=torch.int32, device=device)
    indices = torch.full((sets, max_output), padding, dtype=torch.int64, device=device)

    for first in range(0, n, rows):
        begin = first // block
        blocks = triton.cdiv(min(rows, n - first), block)
        nms_mask_kernel[(sets, blocks, blocks)](
            boxes,
            labels,
            starts,
            counts,
            kept_counts,
            mask,
            alive,
            keep,
            flags,
            n,
            begin,
            rows,
            pitch,
            max_output,
            passes,
            threshold,
            BLOCK=block,
            **mask_config.options,
        )
        if first:
            nms_earlier_kernel[(sets, blocks, triton.cdiv(min(first, max_output), EARLIER_BLOCKS * block))](
                boxes,
                labels,
                starts,
                counts,
                kept_counts,
                group_counts,
                kept_boxes,
                alive,
                n,
                begin,
                pitch,
                max_output,
                threshold,
                BLOCK=block,
                CHUNK=EARLIER_BLOCKS,
                **mask_config.options,
            )
        for step in range(passes):
            nms_pass_kernel[(sets, blocks)](
                mask,
                starts,
                counts,
                kept_counts,
                alive,
                keep,
                flags,
                n,
                begin,
                rows,
                pitch,
                max_output,
                step,
                passes,
                BLOCK=block,
                WORDS=WORDS,
                **pass_config.options,
            )
        nms_finish_kernel[(sets,)](
            boxes,
            order,
            mask,
            starts,
            counts,
            kept_counts,
            group_counts,
            kept_boxes,
            alive,
            keep,
            flags,
            indices,
            n,
            begin,
            rows,
            pitch,
            max_output,
            passes,
            BLOCK=block,
            WORDS=WORDS,
            CHUNK=finish_config.tile,
            **finish_config.options,
        )
    return indices, kept_counts
