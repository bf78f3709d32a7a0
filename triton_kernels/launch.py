"""Launch configurations: what was measured for this kind of GPU, and a rule where nothing was.

`launch_table.json` holds the measurements, by compute capability and kernel; `python -m benchmarks.tune` writes it.
Nothing is tuned while a program runs: the choice is a pure function of sizes and device.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE_PATH = Path(__file__).with_name("launch_table.json")
FAR = 1.0  # doublings of a size: a measurement this far away says nothing


@dataclass(frozen=True)
class Launch:
    """block: what a program works on (see each kernel). tile: a second such size, for the kernels that have one."""

    block: int
    num_warps: int
    tile: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """For the launch. Without fusion: a contracted multiply-add decides differently at thresholds and borders."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


_overrides: dict[str, Launch] = {}
_records: list[tuple[str, Launch, dict[str, int]]] | None = None


@contextmanager
def override(kernel: str, launch: Launch):
    """Within it, this kernel is launched so: for measuring."""
    _overrides[kernel] = launch
    try:
        yield
    finally:
        del _overrides[kernel]


@contextmanager
def record():
    """Yields a list that fills with (kernel, rule, sizes) of the launches within: what a tuner can vary."""
    global _records
    _records = []
    try:
        yield _records
    finally:
        _records = None


def choose(kernel: str, rule: Launch, **sizes: int) -> Launch:
    """The measured configuration of the nearest sizes on this kind of GPU, or else `rule`.

    sizes: positive; nearest in the sum of the absolute logarithms of their ratios, and each less than twice or half.
    """
    if _records is not None:
        _records.append((kernel, rule, sizes))
    return _overrides.get(kernel) or _nearest(kernel, rule, _capability(), tuple(sorted(sizes.items())))


@cache
def load_table() -> dict[str, Any]:
    """Compute capability ("sm_90") -> what was measured where and kernel -> entries {"sizes", "launch", …}."""
    return json.loads(TABLE_PATH.read_text())


@cache
def _nearest(kernel: str, rule: Launch, capability: str, sizes: tuple[tuple[str, int], ...]) -> Launch:
    best, chosen = math.inf, rule
    for entry in load_table().get(capability, {}).get("kernels", {}).get(kernel, []):
        if entry["sizes"].keys() != dict(sizes).keys():
            raise ValueError(f"{TABLE_PATH.name}: {kernel} has {entry['sizes']}, and is asked for {dict(sizes)}")
        distances = [abs(math.log2(value / entry["sizes"][name])) for name, value in sizes]
        if max(distances) < FAR and sum(distances) < best:
            best, chosen = sum(distances), Launch(**entry["launch"])
    return chosen


def _capability() -> str:
    """ "sm_90", "gfx942", or "none" without a GPU."""
    return _device_capability(torch.cuda.current_device()) if torch.cuda.is_available() else "none"


@cache
def _device_capability(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "gcnArchName", "").split(":")[0] or f"sm_{properties.major}{properties.minor}"


def entry(launch: Launch, sizes: dict[str, int], microseconds: float, rule_microseconds: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "sizes": sizes,
        "launch": asdict(launch),
        "microseconds": round(microseconds, 2),
        "rule_microseconds": round(rule_microseconds, 2),
    }
