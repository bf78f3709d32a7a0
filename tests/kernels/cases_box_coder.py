"""The box coder as the library launches it."""

import triton.language as tl
from aot import Case

from triton_kernels.box_coder import BLOCK, OPTIONS

SCALARS = {"n": "i32", "wx": "fp32", "wy": "fp32", "ww": "fp32", "wh": "fp32", "max_log": "fp32"}
POINTERS = {
    "encode_boxes_forward": ("boxes_ptr", "anchors_ptr", "out_ptr"),
    "encode_boxes_backward": ("grad_ptr", "boxes_ptr", "anchors_ptr", "grad_boxes_ptr", "grad_anchors_ptr"),
    "decode_boxes_forward": ("deltas_ptr", "anchors_ptr", "sizes_ptr", "out_ptr"),
    "decode_boxes_backward": (
        "grad_ptr",
        "deltas_ptr",
        "anchors_ptr",
        "sizes_ptr",
        "grad_deltas_ptr",
        "grad_anchors_ptr",
    ),
}
WIDE = {  # 4 numbers per box: one vector each
    "fp32": {"cuda": ".v4.b32", "hip": "dwordx4"},
    "fp16": {"cuda": ".v2.b32", "hip": "dwordx2"},
    "bf16": {"cuda": ".v2.b32", "hip": "dwordx2"},
    "fp64": {"cuda": ".v2.b64", "hip": "dwordx4"},
}


def _case(operation, dtype, *, clip=False, deltas=None):
    """deltas: their dtype, and so that of their gradient, where it is not that of the anchors."""
    types = dict.fromkeys(POINTERS[operation], f"*{dtype}") | SCALARS
    constants = {"BLOCK": BLOCK, "DTYPE": tl.float64 if dtype == "fp64" else tl.float32}
    if "decode" in operation:
        types["sizes_ptr"] = "*i32" if clip else f"*{dtype}"
        constants["CLIP"] = clip
    else:
        types.pop("max_log")
    if deltas is not None:
        types |= {name: f"*{deltas}" for name in types if name in ("deltas_ptr", "grad_deltas_ptr")}
    return Case(
        name="-".join([operation, *([f"{deltas}-deltas"] if deltas else []), dtype, "clip" if clip else "plain"]),
        kernel=f"triton_kernels.box_coder:{operation}_kernel",
        types=types,
        constants=constants,
        options=OPTIONS,
        loads=WIDE[dtype],
        stores=WIDE[dtype],
    )


CASES = [_case(o, d) for o in POINTERS for d in ("fp32", "fp16", "bf16")]
CASES += [
    _case(f"decode_boxes_{direction}", "fp32", clip=True, deltas=deltas)
    for direction in ("forward", "backward")
    for deltas in (None, "fp16")
]
CASES += [_case("decode_boxes_backward", "fp64", clip=True), _case("encode_boxes_backward", "fp64")]
