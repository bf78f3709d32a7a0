"""The box coder as the library launches it."""

import triton.language as tl
from aot import Case

from triton_kernels.box_coder import config, index_type

FLOATS = dict.fromkeys(("height", "width", "wx", "wy", "ww", "wh", "max_log"), "fp32")
COUNTS = ("n", "anchor_repeat", "anchor_rows", "size_repeat", "size_rows")
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
}


def _case(operation, dtype="fp32", *, clip=None, deltas=None, shared=False, classes=False, inclusive=False, **rest):
    """clip: to "size" or "sizes". deltas: their dtype where it is not that of the anchors.

    classes: several boxes follow each other per anchor. rest: n, of boxes; of_anchors.
    """
    n, of_anchors = rest.get("n", 1 << 20), rest.get("of_anchors", False)
    backward = "backward" in operation
    launch = config(4 if dtype == "fp32" else 2, 5 if of_anchors else 4 if backward else 3)
    types = dict.fromkeys(POINTERS[operation], f"*{dtype}") | FLOATS | dict.fromkeys(COUNTS, "i32")
    if n >= 1 << 31:
        types["n"] = "i64"
    if clip == "sizes":
        types["sizes_ptr"] = "*i32"
    if deltas is not None:
        types |= {name: f"*{deltas}" for name in types if name in ("deltas_ptr", "grad_deltas_ptr")}
    constants = {"SHARED": shared, "INCLUSIVE": inclusive, "INDEX": index_type(n), "BLOCK": launch.block}
    if "decode" in operation:
        constants |= {"CLIP": clip is not None, "SIZES": clip == "sizes"}
    if backward:
        constants["OF_ANCHORS"] = of_anchors
    if not classes:
        constants["anchor_repeat"] = 1
    named = {
        dtype: True,
        f"{deltas}-deltas": deltas is not None,
        f"clip-to-{clip}": clip is not None,
        "shared": shared,
        "classes": classes,
        "inclusive": inclusive,
        "int64": constants["INDEX"] == tl.int64,
        "of-anchors": of_anchors,
    }
    return Case(
        name="-".join([operation, *(word for word, given in named.items() if given)]),
        kernel=f"triton_kernels.box_coder:{operation}_kernel",
        types=types,
        constants=constants,
        options=launch.options,
        loads=WIDE[dtype],
        stores=WIDE[deltas if deltas and backward else dtype],
    )


DECODES = ("decode_boxes_forward", "decode_boxes_backward")
BACKWARDS = ("encode_boxes_backward", "decode_boxes_backward")
CASES = [_case(operation, dtype) for operation in POINTERS for dtype in WIDE]
CASES += [_case(operation, dtype, of_anchors=True) for operation in BACKWARDS for dtype in WIDE]
CASES += [_case(operation, shared=True, classes=True, inclusive=True) for operation in POINTERS]
CASES += [_case(operation, clip="size", deltas="fp16", shared=True) for operation in DECODES]
CASES += [_case(operation, clip="sizes", shared=True, inclusive=True) for operation in DECODES]
CASES += [_case(operation, clip="sizes", shared=True, n=1 << 31) for operation in DECODES]
CASES += [_case(operation, n=1 << 31) for operation in POINTERS]
