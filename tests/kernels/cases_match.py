"""Matching as the library launches it: the sizes of a training step, small and large."""

from aot import Case

from triton_kernels.match import config

TYPES = {
    "valid_ptr": "*i1",
    "matched_ptr": "*i64",
    "iou_ptr": "*fp32",
    "top_ptr": "*i32",
    "count": "i32",
    "rows": "i32",
    "slots": "i32",
    "high": "fp32",
    "low": "fp32",
}
VECTORS = {
    "fp32": {"cuda": ".v4.b32", "hip": "dwordx4"},
    "fp16": {"cuda": ".v2.b32", "hip": "dwordx2"},
    "bf16": {"cuda": ".v2.b32", "hip": "dwordx2"},
}
BOXES = {"proposals": 8 * 2100, "anchors": 8 * 267_000}


def _case(kernel, size, dtype, **constants):
    launch = config(BOXES[size], 64)
    atomic = constants.get("LOW_QUALITY")
    return Case(
        name="-".join([kernel, size, dtype, *(["low-quality"] if atomic else [])]),
        kernel=f"triton_kernels.match:{kernel}_kernel",
        types={"boxes_ptr": f"*{dtype}", "gt_ptr": f"*{dtype}"} | TYPES,
        constants=constants | {"BLOCK": launch.block},
        options=launch.options,
        loads=VECTORS[dtype],
        atomics={"cuda": "max.s32", "hip": "smax"} if atomic else {},
    )


CASES = [
    _case("match_boxes", size, dtype, LOW_QUALITY=low_quality)
    for size in BOXES
    for dtype in VECTORS
    for low_quality in (False, True)
]
CASES += [_case("match_ties", size, dtype) for size in BOXES for dtype in VECTORS]
