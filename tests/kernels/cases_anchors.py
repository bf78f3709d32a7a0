"""Launch configurations of triton_kernels/anchors.py."""

from aot import Case

from triton_kernels.anchors import BLOCK, OPTIONS

CASES = [
    Case(
        f"grid-{name}",
        "triton_kernels.anchors:grid_anchors_kernel",
        {
            "cells_ptr": pointer,
            "anchors_ptr": pointer,
            "count": "i32",
            "width": "i32",
            "cells": "i32",
            "stride_y": "fp32",
            "stride_x": "fp32",
        },
        {"BLOCK": BLOCK},
        options=OPTIONS,
        stores=stores,
    )
    for name, pointer, stores in (
        ("float32", "*fp32", {"cuda": ".v4.b32", "hip": "dwordx4"}),
        ("float16", "*fp16", {"cuda": ".v2.b32", "hip": "dwordx2"}),
        ("bfloat16", "*bf16", {"cuda": ".v2.b32", "hip": "dwordx2"}),
    )
]
