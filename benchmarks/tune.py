"""Measures launch configurations on this GPU and writes the table that the kernels' configuration functions read.

    python -m benchmarks.tune [--output FILE] [--time-limit SECONDS]

Each of our operators runs once in each case of `benchmarks.operators` while its launches are recorded. From each rule a
search goes to neighbours that halve or double block, num_warps or tile, and on from a faster one until none is faster.
What is measured is the whole operator, inside a CUDA graph where it can be captured, after its result was checked.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.operators import Case, cases
from triton_kernels import launch
from triton_kernels.launch import Launch

Spread = dict[str, float]
Measure = Callable[[Mapping[Launch, Callable[[], Any]]], Mapping[Launch, Spread | None]]
SECONDS_PER_VARIANT = 0.03
MOST_WARPS, MOST_BLOCK = 32, 65536


@dataclass(frozen=True)
class Work:
    """An operator on its inputs. check: raises AssertionError for a wrong result of `call`."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], Any]


@dataclass
class Findings:
    """Of a search: kernels as the table holds them, and what happened to the variants."""

    kernels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    measured: int = 0
    failed: int = 0  # to compile, to launch or to be captured
    wrong: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)  # works that the time did not suffice for


def neighbours(of: Launch) -> list[Launch]:
    """block, num_warps or tile halved or doubled; a tile of 0 is none and stays."""
    found = []
    for name, most in (("block", MOST_BLOCK), ("num_warps", MOST_WARPS), ("tile", MOST_BLOCK)):
        value = getattr(of, name)
        found += [replace(of, **{name: v}) for v in (value // 2, value * 2) if 0 < v <= most and v != value]
    return found


def measure_on_gpu(calls: Mapping[Launch, Callable[[], Any]]) -> Mapping[Launch, Spread | None]:
    """µs of each, taken in turn, inside CUDA graphs, or eager where the operator itself cannot be captured."""
    found = timing.graph_us(calls, budget=SECONDS_PER_VARIANT)
    return found if any(found.values()) else timing.eager_us(calls, budget=SECONDS_PER_VARIANT)


def width(spread: Spread) -> float:
    return spread["p80"] - spread["p20"]


def faster(spread: Spread, than: Spread) -> bool:
    """By more than either of them varies."""
    return than["median"] - spread["median"] > max(width(spread), width(than))


def launched(work: Work, kernel: str, variant: Launch) -> Callable[[], Any]:
    def call() -> Any:
        with launch.override(kernel, variant):
            return work.call()

    return call


def search(
    work: Work, kernel: str, rule: Launch, measure: Measure, deadline: float, findings: Findings
) -> tuple[Launch, float, float] | None:
    """The fastest launch found, its time and the rule's in µs, both of one round; None if nothing could be measured."""
    tried, best, told = {rule}, rule, None
    while time.monotonic() < deadline:
        calls = {variant: launched(work, kernel, variant) for variant in (rule, best)}
        for variant in neighbours(best):
            if variant in tried:
                continue
            tried.add(variant)
            call = launched(work, kernel, variant)
            try:
                work.check(call())
            except AssertionError as error:
                findings.wrong.append(f"{work.name}: {kernel} {variant}: {error}")
            except Exception:  # whatever a compiler or a driver raises for a configuration that it does not take
                findings.failed += 1
            else:
                calls[variant] = call
        spreads = {variant: spread for variant, spread in measure(calls).items() if spread is not None}
        findings.failed += len(calls) - len(spreads)
        findings.measured += len(spreads)
        if not {rule, best} <= spreads.keys():
            break
        before, winner = best, min(spreads, key=lambda variant: spreads[variant]["median"])
        if faster(spreads[winner], spreads[best]):
            best = winner
        chosen = best if faster(spreads[best], spreads[rule]) else rule
        told = chosen, spreads[chosen]["median"], spreads[rule]["median"]
        if best == before:
            break
    return told


def tune(works: Iterable[Work], measure: Measure, deadline: float, findings: Findings) -> None:
    """Fills `findings`. deadline: in seconds of `time.monotonic`.

    Where a work launches a kernel with several sizes, they vary together. Sizes that an earlier work had are not
    measured again. Rules that nothing beats are kept only beside other sizes of their kernel that something beat: those
    would otherwise serve as the nearest measurement.
    """
    seen: set[tuple] = set()
    beaten: set[str] = set()
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for work in works:
            if time.monotonic() >= deadline:
                findings.unfinished.append(work.name)
                continue
            work.call()  # a backward pass runs its forward at the first call only
            with launch.record() as records:
                work.check(work.call())
            groups: dict[tuple[str, Launch], list[dict[str, int]]] = {}
            for kernel, rule, sizes in records:
                key = (kernel, *sorted(sizes.items()))
                if key not in seen:
                    seen.add(key)
                    groups.setdefault((kernel, rule), []).append(sizes)
            for (kernel, rule), all_sizes in groups.items():
                told = search(work, kernel, rule, measure, deadline, findings)
                if told is None:
                    continue
                chosen, microseconds, by_rule = told
                if chosen != rule:
                    beaten.add(kernel)
                entries = [launch.entry(chosen, sizes, microseconds, by_rule) for sizes in all_sizes]
                found.setdefault(kernel, []).extend(entries)
    finally:  # what was found before a device broke is worth keeping
        findings.kernels = {kernel: entries for kernel, entries in found.items() if kernel in beaten}


def write_table(path: Path, capability: str, kernels: dict[str, list[dict[str, Any]]], device: str) -> None:
    """Put this capability's measurements into the table; those of other capabilities stay."""
    import triton

    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    table[capability] = {"device": device, "date": date.today().isoformat(), "versions": versions, "kernels": kernels}
    path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", encoding="utf-8")


def works(device: torch.device) -> Iterable[Work]:
    """Our operators in the cases of the benchmarks, each made when it is asked for."""
    for case in cases(device.type):
        inputs = case.make(device)
        yield Work(case.group, partial(case.providers["fastrcnn"], inputs), partial(_check, case, inputs))
        timing.release()


def _check(case: Case, inputs: dict[str, Any], result: Any) -> None:
    case.check("fastrcnn", result, inputs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=launch.TABLE_PATH, help="the table (default: the package's own)")
    parser.add_argument("--time-limit", type=float, default=240, metavar="SECONDS", help="default: 240")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to tune for", file=sys.stderr)
        return 1
    findings = Findings()
    started = time.monotonic()
    try:
        with timing.side_stream():
            tune(works(torch.device("cuda")), measure_on_gpu, started + args.time_limit, findings)
    finally:
        write_table(args.output, launch._capability(), findings.kernels, torch.cuda.get_device_name())
    entries = [entry for found in findings.kernels.values() for entry in found]
    print(
        f"{findings.measured} measurements in {time.monotonic() - started:.0f} s: {len(entries)} entries for "
        f"{len(findings.kernels)} kernels in {args.output}; {findings.failed} variants failed to compile or launch"
    )
    for name in findings.unfinished:
        print(f"not reached in time: {name}")
    for told in findings.wrong:
        print(f"WRONG RESULT, refused: {told}", file=sys.stderr)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
