"""The focal loss as RetinaNet launches it: the finest and the coarsest level at 800×1344, 8 images, COCO's classes."""

from aot import Case

from triton_kernels.focal_loss import config

TYPES = {
    "labels_ptr": "*i64",
    "sums_ptr": "*fp32",
    "grad_ptr": "*fp32",
    "rows": "i32",
    "total": "i32",
    "blocks": "i32",
    "alpha": "fp32",
    "gamma": "fp32",
}
VECTOR = {"cuda": ".v4.b32", "hip": "dwordx4"}
LEVELS = {"finest": 100 * 168 * 9, "coarsest": 7 * 11 * 9}


def _case(kernel, level, dtype, square):
    launch = config(LEVELS[level] * 80, 8)
    return Case(
        name="-".join([kernel, level, dtype, "square" if square else "any gamma"]),
        kernel=f"triton_kernels.focal_loss:{kernel}_kernel",
        types={"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | TYPES,
        constants={"CLASSES": 80, "SQUARE": square, "BLOCK": launch.block},
        aligned=("total",),
        options=launch.options,
        loads=VECTOR,
        stores=VECTOR if "backward" in kernel else {},
    )


CASES = [
    _case(kernel, level, dtype, square)
    for kernel in ("focal_loss", "focal_loss_backward")
    for level in LEVELS
    for dtype in ("fp32", "fp16", "bf16")
    for square in (True, False)
]
