"""Compile a Triton kernel for a GPU that is not there, and report the resources that it would use."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
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
        "loads": sorted(set(re.findall(r"ld\.global[.\w]*", ptx))),
        "stores": sorted(set(re.findall(r"st\.global[.\w]*", ptx))),
        "atomics": sorted(set(re.findall(r"(?:atom|red)\.global[.\w]*", ptx))),
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


def main(module: str, target: str) -> None:
    """Print the reports of all `CASES` of a module as JSON. A process of its own: the interpreter must be off."""
    cases: list[Case] = importlib.import_module(module).CASES
    print(json.dumps({case.name: case.report(target) for case in cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
