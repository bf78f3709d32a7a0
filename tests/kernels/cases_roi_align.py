"""Launch configurations of triton_kernels/roi_align.py."""

from typing import Any

from aot import Case

from triton_kernels.launch import Launch
from triton_kernels.roi_align import (
    MAX_LEVELS,
    MAX_UNROLLED_RATIO,
    forward_config,
    gather_config,
    scatter_config,
    tiles_config,
)

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
SIZES = {f"{size}{level}": "i32" for size in "hw" for level in range(MAX_LEVELS)}
LEVELS = {f"s{level}": "fp32" for level in range(MAX_LEVELS)} | {f"t{level}": "fp32" for level in range(1, MAX_LEVELS)}
COUNTS = {"inset": "fp32", "images": "i32", "boxes_per_image": "i32"}


def _boxes(padded: bool) -> dict[str, str]:
    """Without `valid` the launchers hand over the boxes in its place."""
    return {"boxes_ptr": "*fp32", "valid_ptr": "*u8" if padded else "*fp32"}


def _maps(dtype: str) -> dict[str, str]:
    return {f"f{level}": f"*{dtype}" for level in range(MAX_LEVELS)}


def _constants(ratio: int, padded: bool) -> dict[str, Any]:
    return {"PH": 7, "PW": 7, "RATIO": ratio, "PADDED": padded}


def _channels(channels: int, ratio: int, channels_last: bool, chosen: Launch) -> dict[str, Any]:
    unroll = 0 < ratio <= MAX_UNROLLED_RATIO
    return {"C": channels, "CHANNELS_LAST": channels_last, "UNROLL": unroll, "BLOCK": chosen.block}


def forward(name: str, dtype: str, *, channels=256, ratio=2, channels_last=True, padded=True) -> Case:
    chosen = forward_config(channels, ITEMSIZE[dtype])
    wide = {"cuda": ".v4.b32", "hip": "load_dwordx2"} if channels_last else {}
    return Case(
        f"forward-{name}",
        "triton_kernels.roi_align:roi_align_forward_kernel",
        {"out_ptr": f"*{dtype}"} | _boxes(padded) | _maps(dtype) | SIZES | LEVELS | COUNTS,
        _constants(ratio, padded)
        | _channels(channels, ratio, channels_last, chosen)
        | {"ALIGNED": True, "HAS_VALID": padded},
        options=chosen.options,
        loads=wide,
        stores={"cuda": ".v4.b32"} if channels_last else {},
    )


def scatter(name: str, dtype: str, *, channels=256, ratio=2, channels_last=True, padded=True) -> Case:
    """dtype: of the output's gradient; those of the maps are float32."""
    chosen = scatter_config(channels)
    return Case(
        f"scatter-{name}",
        "triton_kernels.roi_align:roi_align_scatter_kernel",
        {"grad_ptr": f"*{dtype}"} | _boxes(padded) | _maps("fp32") | SIZES | LEVELS | COUNTS,
        _constants(ratio, padded)
        | _channels(channels, ratio, channels_last, chosen)
        | {"ALIGNED": True, "HAS_VALID": padded},
        options=chosen.options,
        loads={"cuda": ".v4.b32" if dtype == "fp32" else ".v2.b32"},
        atomics={"cuda": "relaxed.add", "hip": "atomic_add_f32"},
    )


def tiles(name: str, *, ratio=2, padded=True) -> Case:
    chosen = tiles_config(5600)
    return Case(
        f"tiles-{name}",
        "triton_kernels.roi_align:roi_align_tiles_kernel",
        {"bitmap_ptr": "*i32", "table_ptr": "*fp32"}
        | _boxes(padded)
        | SIZES
        | LEVELS
        | COUNTS
        | {"count": "i32", "tiles": "i32", "words": "i32"},
        _constants(ratio, padded)
        | {"ALIGNED": True, "HAS_VALID": padded, "TILE": gather_config(256, 2).tile, "BLOCK": chosen.block},
        options=chosen.options,
    )


def gather(name: str, dtype: str, *, channels=256, ratio=2, channels_last=True, padded=True) -> Case:
    chosen = gather_config(channels, ITEMSIZE[dtype])
    return Case(
        f"gather-{name}",
        "triton_kernels.roi_align:roi_align_gather_kernel",
        {"grad_ptr": f"*{dtype}", "bitmap_ptr": "*i32", "table_ptr": "*fp32"}
        | _maps(dtype)
        | SIZES
        | COUNTS
        | {"tiles": "i32", "words": "i32"},
        _constants(ratio, padded) | _channels(channels, ratio, channels_last, chosen) | {"TILE": chosen.tile},
        options=chosen.options,
        loads={"cuda": ".v4.b32" if dtype == "fp32" else ".v2.b32"},
        stores={"cuda": ".v4.b32"} if channels_last else {},
    )


CASES = [make(dtype, dtype) for make in (forward, scatter, gather) for dtype in ITEMSIZE]
CASES += [
    case
    for make in (forward, scatter, gather)
    for case in (
        make("bf16-rois", "bf16", padded=False),
        make("bf16-adaptive", "bf16", ratio=0),
        make("bf16-many-samples", "bf16", ratio=6),
        make("bf16-contiguous", "bf16", channels_last=False),
        make("bf16-1024-channels", "bf16", channels=1024),
    )
]
CASES += [
    forward("fp32-one-channel", "fp32", channels=1, channels_last=False),
    tiles("padded"),
    tiles("rois", padded=False),
    tiles("adaptive", ratio=0),
]
