"""Compile a Triton kernel for a GPU that is not there, and report the resources that it would use.

python tests/aot.py --document docs/kernels.md    writes the reports of all cases as a document
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FOLDER = Path(__file__).resolve().parent / "kernels"
MODULES = sorted(path.stem for path in FOLDER.glob("cases_*.py"))


def compile_report(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: str, aligned: tuple[str, ...] = (), **options
) -> dict[str, Any]:
    """Registers, stack, spills and the kinds of global loads and stores of `kernel` on `target`.

    types: argument name -> "*fp32", "*bf16", "i32", "fp32", ... of every argument that is not constexpr.
    constants: constexpr argument name -> value. aligned: integer arguments that are divisible by 16; pointers always
    count as aligned. options: num_warps, num_stages, enable_fp_fusion.

    Spills show up in `stack` on NVIDIA and in `spill` and `stack` on AMD: assert that both are 0.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = [[["tt.divisibility", 16]] if t.startswith("*") or n in aligned else None for n, t in signature.items()]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): attribute for i, attribute in enumerate(divisible) if attribute},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    return {
        "registers": int(found["vgpr_count"]),
        "spill": int(found["vgpr_spill_count"]),
        "stack": int(found["private_segment_fixed_size"]),
        "shared": compiled.metadata.shared,
        "loads": sorted(set(re.findall(r"(?:global|buffer)_load_\w+", text))),
        "stores": sorted(set(re.findall(r"(?:global|buffer)_store_\w+", text))),
        "atomics": sorted(set(re.findall(r"(?:global|buffer)_atomic_\w+", text))),
    }


def _nvidia(compiled: Any) -> dict[str, Any]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups())
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spill": local,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "loads": sorted(set(re.findall(r"ld\.global[.:\w]*", ptx))),
        "stores": sorted(set(re.findall(r"st\.global[.:\w]*", ptx))),
        "atomics": sorted(set(re.findall(r"(?:atom|red)\.global[.:\w]*", ptx))),
    }


@dataclass(frozen=True)
class Case:
    """One kernel in one launch configuration, as the library launches it.

    kernel: "triton_kernels.nms:nms_segmented_kernel". loads, stores, atomics: a piece that must appear in the
    name of at least one such instruction, by kind of target ("cuda" or "hip"), for example {"cuda": ".v4.b32"}.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, str] = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)
    atomics: dict[str, str] = field(default_factory=dict)

    def report(self, target: str) -> dict[str, Any]:
        module, name = self.kernel.split(":")
        kernel = getattr(importlib.import_module(module), name)
        return compile_report(kernel, self.types, self.constants, target, self.aligned, **self.options)


def load_cases(module: str) -> list[Case]:
    """`CASES` of a module of tests/kernels."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(module).CASES
    finally:
        sys.path.pop(0)


@cache
def reports(module: str, target: str) -> dict[str, dict[str, Any]]:
    """Case -> report, compiled in a process of its own: the interpreter must be off."""
    paths = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent.parent)]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "FASTRCNN_KERNELS": "auto",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, __file__, module, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} on {target}: {done.stderr[-4000:]}")
    return json.loads(done.stdout)


def access_bytes(instruction: str) -> int:
    """Bytes that one thread moves by a global load or store: of "ld.global.v4.b32" or "global_load_dwordx4" 16."""
    if found := re.search(r"(?:\.v(\d+))?\.[bsuf](\d+)$", instruction):
        return int(found[1] or 1) * int(found[2]) // 8
    if found := re.search(r"_(dword|ushort|sshort|short|ubyte|sbyte|byte)(?:x(\d+))?(?:_d16)?(?:_hi)?$", instruction):
        size = 4 if found[1] == "dword" else 2 if "short" in found[1] else 1
        return size * int(found[2] or 1)
    raise ValueError(f"unknown access {instruction}")


INTRODUCTION = """
# Kernels, compiled with Triton {version}

What every kernel of `triton_kernels` uses in the launch configurations of `tests/kernels/cases_*.py`, compiled ahead of
time: nothing here was run. `python tests/aot.py --document docs/kernels.md` writes this file; the tests compile the
same cases and allow no spills and no stack.

- sm_80 is the A100, sm_90 the H100 and H200, sm_100 the B200, gfx942 the MI300: registers of a thread (gfx942: vector
  registers) / shared memory of a program, in bytes.
- Load, store: the widest access of one thread to global memory, in bytes; where the targets differ, in their order.
- Spills: bytes or registers of a thread that went to memory, and its stack, the largest of all targets.
"""


def document() -> str:
    """Markdown tables of the reports of all cases, by kernel file."""
    jobs = [(module, target) for module in MODULES for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        compiled = dict(zip(jobs, pool.map(lambda job: reports(*job), jobs), strict=True))
    lines = [INTRODUCTION.strip().format(version=triton.__version__)]
    for module in MODULES:
        cases = load_cases(module)
        found = {case.name: [compiled[module, target][case.name] for target in TARGETS] for case in cases}
        lines += ["", f"## {module.removeprefix('cases_')}", ""]
        lines += _table(
            ("kernel", "case", "launch", *TARGETS, "load", "store", "spills"), (_row(c, found[c.name]) for c in cases)
        )
        atomics = [
            (f"`{name}`", *map(_atomics, rows)) for name, rows in found.items() if any(r["atomics"] for r in rows)
        ]
        if atomics:
            lines += ["", "Atomics:", "", *_table(("case", *TARGETS), atomics)]
    return "\n".join(lines) + "\n"


def _row(case: Case, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    sizes = [f"{name} {value}" for name, value in case.constants.items() if re.search("BLOCK|TILE", name)]
    return (
        f"`{case.kernel.split(':')[1]}`",
        f"`{case.name}`",
        ", ".join([f"num_warps {case.options.get('num_warps', 4)}", *sizes]),
        *(f"{row['registers']} / {row['shared']}" for row in rows),
        _widest(row["loads"] for row in rows),
        _widest(row["stores"] for row in rows),
        str(max(row["spill"] + row["stack"] for row in rows)),
    )


def _widest(accesses: Iterable[list[str]]) -> str:
    widths = [str(max(map(access_bytes, names), default="–")) for names in accesses]
    return widths[0] if len(set(widths)) == 1 else ", ".join(widths)


def _atomics(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row["atomics"]) or "–"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]


def main(module: str, target: str) -> None:
    """Print the reports of all `CASES` of a module as JSON; or with --document and a path, write the document."""
    if module == "--document":
        Path(target).write_text(document())
    else:
        print(json.dumps({case.name: case.report(target) for case in load_cases(module)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
