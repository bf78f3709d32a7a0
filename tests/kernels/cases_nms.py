"""Launch configurations of triton_kernels/nms.py."""

from typing import Any

from aot import Case

from triton_kernels.nms import (
    EARLIER_BLOCKS,
    WORDS,
    band_rows,
    finish_launch,
    mask_launch,
    pass_launch,
    segmented_launch,
)

KINDS = [  # boxes, labels
    ("fp32", None),
    ("fp32", "i32"),
    ("fp32", "i64"),
    ("fp16", None),
    ("fp16", "i32"),
    ("bf16", "i64"),
]
MASK = mask_launch(10_000)
ROWS = band_rows(1, 10_000, MASK.block)
PASS, FINISH = pass_launch(MASK.block, ROWS), finish_launch(MASK.block, ROWS)
SEGMENTED = segmented_launch(2000)
SIXTEEN_BYTES = {"cuda": ".v4.b32", "hip": "dwordx4"}

TYPES = {
    "labels_ptr": "*i64",
    "order_ptr": "*i64",
    "counts_ptr": "*i32",
    "valid_ptr": "*u8",
    "starts_ptr": "*i32",
    "kept_boxes_ptr": "*fp32",
    "kept_labels_ptr": "*i64",
    "indices_ptr": "*i64",
    "kept_counts_ptr": "*i32",
    "group_counts_ptr": "*i32",
    "mask_ptr": "*i32",
    "alive_ptr": "*i32",
    "keep_ptr": "*i32",
    "flags_ptr": "*i32",
    "n": "i32",
    "begin": "i32",
    "rows": "i32",
    "pitch": "i32",
    "max_output": "i32",
    "step": "i32",
    "passes": "i32",
    "threshold": "fp32",
}


def case(name: str, kernel: str, options: dict[str, Any], constants: dict[str, Any], loads=None, **types: str | None):
    """types: in place of those above; None: the launcher passes None."""
    absent = {key: None for key, value in types.items() if value is None}
    return Case(
        name,
        f"triton_kernels.nms:nms_{kernel}_kernel",
        TYPES | types,
        constants | absent,
        aligned=("pitch",),
        options=options,
        loads=loads or {},
    )


CASES = []
for boxes, labels in KINDS:
    given = {"boxes_ptr": f"*{boxes}", "labels_ptr": f"*{labels}" if labels else None}
    starts = {"starts_ptr": "*i32" if labels else None}
    kept = {"valid_ptr": None, "kept_labels_ptr": given["labels_ptr"]}
    name = f"{boxes}{f'-{labels}-labels' if labels else ''}"
    block = {"BLOCK": MASK.block}
    CASES += [
        case(f"segmented-{name}", "segmented", SEGMENTED.options, {"BLOCK": SEGMENTED.block}, **given, **kept),
        case(f"mask-{name}", "mask", MASK.options, block, **given, **starts),
        case(f"earlier-{name}", "earlier", MASK.options, block | {"CHUNK": EARLIER_BLOCKS}, **given, **starts),
    ]
for valid in ("u8", "i1"):
    given = {"boxes_ptr": "*fp32", "valid_ptr": f"*{valid}", "order_ptr": None, "counts_ptr": None}
    given |= {"labels_ptr": None, "kept_labels_ptr": None}
    name = f"segmented-fp32-sorted-{valid}-valid"
    CASES.append(case(name, "segmented", SEGMENTED.options, {"BLOCK": SEGMENTED.block}, **given))
for starts, counts in ((None, "*i32"), ("*i32", "*i32"), (None, None), ("*i32", None)):
    given = {"starts_ptr": starts, "counts_ptr": counts}
    name = f"{'-labels' if starts else ''}{'-counts' if counts else ''}"
    settle = {"BLOCK": MASK.block, "WORDS": WORDS}
    finish = settle | {"CHUNK": FINISH.tile}
    CASES += [
        case(f"pass{name}", "pass", PASS.options, settle, SIXTEEN_BYTES, **given),
        case(f"finish{name}", "finish", FINISH.options, finish, SIXTEEN_BYTES, boxes_ptr="*fp32", **given),
    ]
# the ragged operators: everything takes part
for labels in (None, "i64"):
    given = {"boxes_ptr": "*fp32", "counts_ptr": None, "labels_ptr": f"*{labels}" if labels else None}
    starts = {"starts_ptr": "*i32" if labels else None}
    kept = {"valid_ptr": None, "kept_labels_ptr": given["labels_ptr"]}
    name = f"fp32{f'-{labels}-labels' if labels else ''}-all"
    CASES += [
        case(f"segmented-{name}", "segmented", SEGMENTED.options, {"BLOCK": SEGMENTED.block}, **given, **kept),
        case(f"mask-{name}", "mask", MASK.options, block, **given, **starts),
        case(f"earlier-{name}", "earlier", MASK.options, block | {"CHUNK": EARLIER_BLOCKS}, **given, **starts),
    ]
