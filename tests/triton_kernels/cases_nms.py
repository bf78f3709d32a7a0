"""Launch configurations of triton_kernels/nms.py."""

from itertools import product

from aot import Case

from triton_kernels.nms import OPTIONS, SEGMENTED_OPTIONS

NAMES = {"*fp32": "float32", "*bf16": "bfloat16"}

CASES = [
    Case(
        f"segmented-{NAMES[boxes]}{'-labels' if labelled else ''}",
        "triton_kernels.nms:nms_segmented_kernel",
        {
            "boxes_ptr": boxes,
            "labels_ptr": "*i64",
            "order_ptr": "*i64",
            "counts_ptr": "*i32",
            "kept_boxes_ptr": "*fp32",
            "kept_labels_ptr": "*i64",
            "indices_ptr": "*i64",
            "kept_counts_ptr": "*i32",
            "n": "i32",
            "max_output": "i32",
            "threshold": "fp32",
        },
        {"LABELLED": labelled, "BLOCK": 64},
        options=SEGMENTED_OPTIONS,
    )
    for boxes, labelled in product(NAMES, (False, True))
]
CASES += [
    Case(
        f"mask-{NAMES[boxes]}{'-labels' if labelled else ''}",
        "triton_kernels.nms:nms_mask_kernel",
        {
            "boxes_ptr": boxes,
            "labels_ptr": "*i64",
            "counts_ptr": "*i32",
            "mask_ptr": "*i32",
            "n": "i32",
            "pitch": "i32",
            "threshold": "fp32",
        },
        {"LABELLED": labelled, "BLOCK": 64},
        aligned=("pitch",),
        options=OPTIONS,
    )
    for boxes, labelled in product(NAMES, (False, True))
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
        {"BLOCK": 64, "WORDS": 32},
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
        {"WORDS": 32},
        aligned=("pitch",),
        options=OPTIONS,
        loads={"cuda": ".v4.b32", "hip": "dwordx4"},
    ),
]
