"""Launch configurations of triton_kernels/proposals.py: five levels of 800 × 1333 pixels, 1,000 proposals per level."""

import torch
import triton
from aot import Case

from triton_kernels.anchors import MAX_LEVELS
from triton_kernels.proposals import decode_launch, keys_launch, merge_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"nhwc": True, "nchw": False}


def _per_level(names: str, kind: str) -> dict[str, str]:
    return {f"{name}{level}": kind for name in names.split() for level in range(MAX_LEVELS)}


def _keys(dtype: str, layout: str) -> Case:
    chosen = keys_launch(200_400, DTYPES[dtype].itemsize)
    types = {"keys_ptr": f"*{dtype}", "levels": "i32", "length": "i32"}
    return Case(
        f"keys-{dtype}-{layout}",
        "triton_kernels.proposals:proposal_keys_kernel",
        types | _per_level("l", f"*{dtype}") | _per_level("count cells stride", "i32"),
        {"CHANNELS_LAST": LAYOUTS[layout], "BLOCK": chosen.block},
        aligned=("length",),
        options=chosen.options,
        stores={"cuda": ".v4.b32", "hip": "dwordx4"},
    )


def _decode(logits: str, deltas: str, layout: str, sizes: str) -> Case:
    chosen = decode_launch(1000)
    types = {"index_ptr": "*i64", "logits_ptr": f"*{logits}", "image_sizes_ptr": f"*{sizes}", "boxes_ptr": "*fp32"}
    types |= (
        {"valid_ptr": "*u8", "levels": "i32", "k": "i32"} | _per_level("d", f"*{deltas}") | _per_level("c", "*fp32")
    )
    types |= _per_level("width size cells stride", "i32") | _per_level("sy sx", "fp32")
    types |= dict.fromkeys("wx wy ww wh max_log min_size".split(), "fp32")
    # a thread has a row, and where a warp has 64 threads half of one
    row = {"cuda": ".v4.b32", "hip": "dwordx2"} if deltas == "fp32" else {"cuda": ".v2.b32", "hip": "load_dword"}
    return Case(
        f"decode-{logits}-{deltas}-{layout}-{sizes}",
        "triton_kernels.proposals:proposal_decode_kernel",
        types,
        {"CHANNELS_LAST": LAYOUTS[layout], "BLOCK": chosen.block},
        options=chosen.options,
        loads=row if LAYOUTS[layout] else {},
        stores={"cuda": ".v4.b32", "hip": "dwordx2"},
    )


def _merge(logits: str, per_batch: bool, levels: int) -> Case:
    chosen = merge_launch(1000 * levels, levels)
    names = "images levels k per_level total per_batch steps".split()
    types = {"logits_ptr": f"*{logits}", "boxes_ptr": "*fp32", "kept_ptr": "*i64", "counts_ptr": "*i32"}
    types |= {"out_boxes_ptr": "*fp32", "out_scores_ptr": "*fp32", "out_valid_ptr": "*u8"} | dict.fromkeys(names, "i32")
    # with five levels four threads share a box
    boxes = {"cuda": ".v4.b32", "hip": "dwordx4"} if levels == 1 else {}
    return Case(
        f"merge-{logits}-{levels}-levels{'-per-batch' if per_batch else ''}",
        "triton_kernels.proposals:proposal_merge_kernel",
        types,
        {"PER_BATCH": per_batch, "LEVELS": triton.next_power_of_2(levels), "BLOCK": chosen.block},
        options=chosen.options,
        loads=boxes,
        stores=boxes,
    )


CASES = [
    *(_keys(dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
    *(_decode(dtype, dtype, layout, "i32") for dtype in DTYPES for layout in LAYOUTS),
    _decode("bf16", "fp32", "nhwc", "i64"),
    *(_merge(dtype, per_batch, 5) for dtype in DTYPES for per_batch in (False, True)),
    _merge("fp32", False, 1),
]
