"""Every kernel in every launch configuration compiles for every target: no spills, no stack, the expected vectors."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

MODULES = sorted(p.stem for p in Path(__file__).parent.glob("cases_*.py"))
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@cache
def reports(module: str, target: str) -> dict:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent)]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "FASTRCNN_KERNELS": "auto",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, str(here.parent / "aot.py"), module, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module, target):
    sys.path.insert(0, str(Path(__file__).parent))
    cases = importlib.import_module(module).CASES
    sys.path.pop(0)
    found = reports(module, target)
    kind = "hip" if target.startswith("gfx") else "cuda"
    for case in cases:
        report = found[case.name]
        assert report["spill"] == 0, f"{case.name} on {target}: {report}"
        assert report["stack"] == 0, f"{case.name} on {target}: {report}"
        for what in ("loads", "stores", "atomics"):
            piece = getattr(case, what).get(kind)
            assert piece is None or any(piece in name for name in report[what]), f"{case.name} on {target}: {report}"
