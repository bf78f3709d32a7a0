"""What every result says of where it was measured. Run with `pytest benchmarks/ --benchmark-json=FILE`."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks import timing

PACKAGES = ("torch", "torchvision", "triton", "numpy")
# of nvidia-smi, which only reads; the clocks are those of the moment after the run
QUERIES = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""  # the name of a machine is nobody's business
    machine_info.pop("release", None)
    machine_info.get("cpu", {}).pop("flags", None)
    machine_info["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    machine_info["commit"] = output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    cuda = torch.cuda.is_available()
    machine_info["gpu"] = torch.cuda.get_device_name() if cuda else None
    if cuda:
        machine_info["versions"]["cuda"] = torch.version.cuda
        machine_info["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        machine_info["ceilings"] = timing.ceilings()
        machine_info |= driver_and_clocks()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """The only line that a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def driver_and_clocks() -> dict[str, object]:
    """{"driver", "clocks"}, None where nvidia-smi does not tell."""
    line = output("nvidia-smi", "--id=0", "--query-gpu=" + ",".join(QUERIES), "--format=csv,noheader")
    driver, *rest = line.split(", ") if line else [None]
    return {"driver": driver, "clocks": dict(zip(QUERIES[1:], rest, strict=False)) or None}
