"""Launch configurations of triton_kernels/anchors.py."""

from aot import Case

from triton_kernels.anchors import MAX_LEVELS, grid_anchors_launch


def _per_level(names: str, kind: str) -> dict[str, str]:
    return {f"{name}{level}": kind for name in names.split() for level in range(MAX_LEVELS)}


def _case(name: str, pointer: str, itemsize: int, cells: int, first: str, stores: dict[str, str]) -> Case:
    chosen = grid_anchors_launch(cells, itemsize)
    types = {"anchors_ptr": pointer} | _per_level("c", pointer) | _per_level("start width", "i32")
    return Case(
        f"grid-{name}",
        "triton_kernels.anchors:grid_anchors_kernel",
        types | _per_level("first", first) | _per_level("sy sx", "fp32"),
        {"CELLS": cells, "BLOCK": chosen.block},
        options=chosen.options,
        stores=stores,
    )


WIDE = {"cuda": ".v4.b32", "hip": "dwordx4"}
HALF = {"cuda": ".v2.b32", "hip": "dwordx2"}  # a row need not begin at a multiple of 16 bytes
CASES = [
    _case("float32", "*fp32", 4, 3, "i32", WIDE),
    _case("float32-15-cells", "*fp32", 4, 15, "i32", WIDE),
    _case("float32-past-2^31", "*fp32", 4, 3, "i64", WIDE),
    _case("float16", "*fp16", 2, 3, "i32", HALF),
    _case("bfloat16", "*bf16", 2, 3, "i32", HALF),
]
