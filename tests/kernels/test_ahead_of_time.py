"""Every kernel in every launch configuration compiles for every target: no spills, no stack, the expected vectors."""

import ast
import re
from collections import Counter

import pytest
from aot import MODULES, TARGETS, access_bytes, load_cases, reports


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module, target):
    found = reports(module, target)
    kind = "hip" if target.startswith("gfx") else "cuda"
    for case in load_cases(module):
        report = found[case.name]
        assert report["spill"] == 0, f"{case.name} on {target}: {report}"
        assert report["stack"] == 0, f"{case.name} on {target}: {report}"
        for what in ("loads", "stores", "atomics"):
            piece = getattr(case, what).get(kind)
            assert piece is None or any(piece in name for name in report[what]), f"{case.name} on {target}: {report}"


@pytest.mark.parametrize("module", MODULES)
def test_names_of_cases_are_their_own(module):
    names = Counter(case.name for case in load_cases(module))
    assert max(names.values()) == 1, names.most_common(1)


def test_every_kernel_has_a_case(repository):
    written = {
        f"triton_kernels.{path.stem}:{node.name}"
        for path in (repository / "triton_kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written
    assert written == {case.kernel for module in MODULES for case in load_cases(module)}


def test_document_lists_the_cases(repository):
    """`python tests/aot.py --document docs/kernels.md` writes it."""
    sections = re.split(r"^## (\w+)$", (repository / "docs" / "kernels.md").read_text(), flags=re.MULTILINE)[1:]
    documented = {
        f"cases_{name}": re.findall(r"^\| `(\w+_kernel)` \| `([^`]+)` \|", text, re.MULTILINE)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }
    cases = {m: [(case.kernel.split(":")[1], case.name) for case in load_cases(m)] for m in MODULES}
    assert documented == cases


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("ld.global.v4.b32", 16),
        ("ld.global.L1::evict_last.v2.b64", 16),
        ("st.global.b16", 2),
        ("st.global.v8.b32", 32),
        ("global_load_dwordx3", 12),
        ("global_load_dword", 4),
        ("buffer_store_short_d16_hi", 2),
        ("global_load_short_d16", 2),
        ("global_load_ubyte", 1),
    ],
)
def test_access_bytes(instruction, size):
    assert access_bytes(instruction) == size
