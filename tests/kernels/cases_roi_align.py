"""Launch configurations of triton_kernels/roi_align.py."""

from aot import Case

from triton_kernels.roi_align import MAX_LEVELS, MAX_UNROLLED_RATIO, config

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def case(name: str, dtype: str, *, channels=256, ratio=2, channels_last=True, backward=False, padded=True) -> Case:
    """backward: the maps are float32 gradients, and dtype is that of the output's gradient."""
    maps = "fp32" if backward else dtype
    chosen = config(channels, ITEMSIZE[maps])
    types = {"pooled_ptr": f"*{dtype}", "boxes_ptr": "*fp32", "valid_ptr": "*u8" if padded else "*fp32"}
    types |= {f"f{level}": f"*{maps}" for level in range(MAX_LEVELS)}
    types |= {f"{size}{level}": "i32" for size in "hw" for level in range(MAX_LEVELS)}
    types |= {f"s{level}": "fp32" for level in range(MAX_LEVELS)}
    types |= {f"t{level}": "fp32" for level in range(1, MAX_LEVELS)}
    types |= {"images": "i32", "boxes_per_image": "i32"}
    constants = {
        "C": channels,
        "PH": 7,
        "PW": 7,
        "RATIO": ratio,
        "ALIGNED": True,
        "PADDED": padded,
        "HAS_VALID": padded,
        "CHANNELS_LAST": channels_last,
        "UNROLL": 0 < ratio <= MAX_UNROLLED_RATIO,
        "BACKWARD": backward,
        "BLOCK": chosen.block,
    }
    wide = channels_last and channels % 8 == 0
    return Case(
        name,
        "triton_kernels.roi_align:roi_align_kernel",
        types,
        constants,
        options=chosen.options,
        loads={"cuda": ".v4.b32", "hip": "load_dwordx2"} if wide and not backward else {},
        atomics={"cuda": "relaxed.add"} if backward else {},
    )


CASES = [case(f"forward-{dtype}", dtype) for dtype in ITEMSIZE]
CASES += [
    case("forward-bf16-rois", "bf16", padded=False),
    case("forward-bf16-adaptive", "bf16", ratio=0),
    case("forward-bf16-many-samples", "bf16", ratio=6),
    case("forward-bf16-contiguous", "bf16", channels_last=False),
    case("forward-bf16-1024-channels", "bf16", channels=1024),
    case("forward-fp32-one-channel", "fp32", channels=1, channels_last=False),
    case("backward-fp32", "fp32", backward=True),
    case("backward-fp16", "fp16", backward=True),
    case("backward-bf16", "bf16", backward=True),
    case("backward-bf16-rois", "bf16", padded=False, backward=True),
    case("backward-bf16-adaptive", "bf16", ratio=0, backward=True),
    case("backward-fp32-contiguous", "fp32", channels_last=False, backward=True),
]
