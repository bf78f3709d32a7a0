"""Heat maps as the keypoint heads give them."""

from aot import Case

from triton_kernels.keypoints import config

LAUNCH = config(100 * 17)
TYPES = dict.fromkeys(("maps_ptr", "boxes_ptr", "points_ptr", "scores_ptr"), "*fp32")
TYPES |= dict.fromkeys(("keypoints", "height", "width"), "i32")
CASES = [
    Case(
        f"heatmaps_to_keypoints-{side}",
        "triton_kernels.keypoints:heatmaps_to_keypoints_kernel",
        TYPES,
        {"SIDE": side, "BLOCK": LAUNCH.block, "TILE": LAUNCH.tile},
        options=LAUNCH.options,
    )
    for side in (28, 56)
]
