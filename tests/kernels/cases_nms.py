"""Launch configurations of triton_kernels/nms.py."""

from aot import Case

from triton_kernels.nms import BLOCK, OPTIONS, SEGMENTED_OPTIONS, WORDS

KINDS = [  # boxes, labels
    ("fp32", None),
    ("fp32", "i32"),
    ("fp32", "i64"),
    ("fp16", None),
    ("fp16", "i32"),
    ("bf16", "i64"),
]


def _name(kernel: str, boxes: str, labels: str | None) -> str:
    return f"{kernel}-{boxes}{f'-{labels}-labels' if labels else ''}"


# without labels the launchers hand over some other pointer
CASES = [
    Case(
        _name("segmented", boxes, labels),
        "triton_kernels.nms:nms_segmented_kernel",
        {
            "boxes_ptr": f"*{boxes}",
            "labels_ptr": f"*{labels or 'i64'}",
            "order_ptr": "*i64",
            "counts_ptr": "*i32",
            "kept_boxes_ptr": "*fp32",
            "kept_labels_ptr": f"*{labels or 'i64'}",
            "indices_ptr": "*i64",
            "kept_counts_ptr": "*i32",
            "n": "i32",
            "max_output": "i32",
            "threshold": "fp32",
        },
        {"LABELLED": labels is not None, "BLOCK": BLOCK},
        options=SEGMENTED_OPTIONS,
    )
    for boxes, labels in KINDS
]
CASES += [
    Case(
        _name("mask", boxes, labels),
        "triton_kernels.nms:nms_mask_kernel",
        {
            "boxes_ptr": f"*{boxes}",
            "labels_ptr": f"*{labels or 'i32'}",
            "counts_ptr": "*i32",
            "mask_ptr": "*i32",
            "n": "i32",
            "pitch": "i32",
            "threshold": "fp32",
        },
        {"LABELLED": labels is not None, "BLOCK": BLOCK},
        aligned=("pitch",),
        options=OPTIONS,
    )
    for boxes, labels in KINDS
]
CASES += [
    Case(
        "pass",
        "triton_kernels.nms:nms_pass_kernel",
        {
            "mask_ptr": "*i32",
            "counts_ptr": "*i32",
            "keep_in_ptr": "*i32",
            "keep_out_ptr": "*i32",
            "flags_ptr": "*i32",
            "pitch": "i32",
            "step": "i32",
            "steps": "i32",
        },
        {"BLOCK": BLOCK, "WORDS": WORDS},
        aligned=("pitch",),
        options=OPTIONS,
        loads={"cuda": ".v4.b32", "hip": "dwordx4"},
    ),
    Case(
        "sweep",
        "triton_kernels.nms:nms_sweep_kernel",
        {
            "mask_ptr": "*i32",
            "counts_ptr": "*i32",
            "keep_ptr": "*i32",
            "flags_ptr": "*i32",
            "rows": "i32",
            "pitch": "i32",
            "steps": "i32",
        },
        {"WORDS": WORDS},
        aligned=("pitch",),
        options=OPTIONS,
        loads={"cuda": ".v4.b32", "hip": "dwordx4"},
    ),
]
