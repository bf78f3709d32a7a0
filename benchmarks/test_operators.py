"""Each operator beside its rivals: checked, then timed. See `operators/` for the cases, `timing.py` for the method.

The providers of a case are measured together, launch by launch in turn; pytest-benchmark's own columns are a second,
separate measurement of the eager wall time, in batches of calls. Everything else stands in the JSON's extra_info.
A provider with a wrong result fails and gets no time; one that lacks memory, or does not know a dtype, is skipped.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import operators, timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, ROUND_SECONDS = 5, 0.01
SLOW = 0.05  # seconds per call from which two rounds do


@dataclass
class Outcome:
    """Of one provider of one case; error: of its result, extra: for the JSON, problem: why there is neither."""

    call: timing.Call
    error: float | None = None
    problem: Exception | None = None
    skip: str | None = None
    extra: dict[str, Any] | None = None


def unsuited(provider: str, problem: Exception) -> str | None:
    """The reason to skip a provider that raised this, or None if it is a defect."""
    first_line = str(problem).strip().split("\n")[0][:200]
    if isinstance(problem, torch.OutOfMemoryError):
        return f"out of memory: {first_line}"
    if isinstance(problem, NotImplementedError) or "not implemented for" in first_line:
        return f"unsupported: {first_line}"
    if provider == "compiled reference" and not isinstance(problem, AssertionError):
        return f"does not compile: {type(problem).__name__}: {first_line}"
    return None


def attempt(case: operators.Case, provider: str, inputs: operators.Inputs) -> Outcome:
    """Run it once and check the result."""
    outcome = Outcome(partial(case.providers[provider], inputs))
    try:
        outcome.error = case.check(provider, outcome.call(), inputs)
        timing.synchronize()
    except Exception as problem:
        outcome.problem, outcome.skip = problem.with_traceback(None), unsuited(provider, problem)
    return outcome


def measure(case: operators.Case, device: torch.device = DEVICE) -> dict[str, Outcome]:
    """Check all providers of a case and time those that are right, in turn."""
    timing.release()
    with timing.side_stream():
        inputs = case.make(device)
        outcomes = {provider: attempt(case, provider, inputs) for provider in case.providers}
        calls = {name: outcome.call for name, outcome in outcomes.items() if outcome.problem is None}
        if not calls:
            return outcomes
        timing.release()
        eager = timing.eager_us(calls)
        warm = timing.graph_us(calls)
        cold = timing.graph_us(calls, cold=True)
        work = {"bytes": case.bytes(inputs), "operations": case.operations(inputs)} | bounds(case, inputs)
        for name, call in calls.items():
            best = (cold[name] or eager[name])["median"]
            outcomes[name].extra = {
                "kind": "operator",
                "op": case.op,
                "case": case.label,
                "dtype": str(case.dtype).removeprefix("torch."),
                "direction": case.direction,
                "provider": name,
                "device": device.type,
                "eager_us": eager[name],
                "graph_cold_us": cold[name],
                "graph_warm_us": warm[name],
                **work,
                "gb_per_s": work["bytes"] / best / 1e3,
                "roofline_share": work["roofline_us"] / best if work["roofline_us"] else None,
                "peak_mib": timing.peak_mib(call),
                "error": outcomes[name].error,
            }
    return outcomes


def bounds(case: operators.Case, inputs: operators.Inputs) -> dict[str, float | None]:
    """The least times in µs that this device's ceilings allow; None without ceilings.

    roofline_us: for the bytes or the operations, whichever takes longer. l2_bound_us: for reading every tap from L2,
    which an implementation that merges taps can beat.
    """
    ceilings = timing.ceilings()
    if ceilings is None:
        return {"roofline_us": None, "l2_bound_us": None}
    memory = case.bytes(inputs) / ceilings[case.ceiling] / 1e3
    arithmetic = case.operations(inputs) / ceilings["fp32_tflops"] / 1e6
    l2 = case.l2_bytes(inputs) / ceilings["l2_read_gb_per_s"] / 1e3 if case.l2_bytes else None
    return {"roofline_us": max(memory, arithmetic), "l2_bound_us": l2}


class Current:
    """The measurements of one case at a time: the next one's inputs need the memory."""

    group: str | None = None
    outcomes: dict[str, Outcome] | None = None

    @classmethod
    def of(cls, case: operators.Case) -> dict[str, Outcome]:
        if cls.group != case.group:
            cls.group = cls.outcomes = None
            cls.outcomes = measure(case)
            cls.group = case.group
        return cls.outcomes


def parameters() -> list:
    found = [(case, ()) for case in operators.cases(DEVICE.type)]
    if DEVICE.type == "cpu":
        skip = pytest.mark.skip(reason="a size for GPUs: no CUDA device")
        found += [(case, skip) for case in operators.cases("cuda")]
    return [
        pytest.param(case, provider, id=f"{case.group}, {provider}".replace("×", "x"), marks=marks)
        for case, marks in found
        for provider in case.providers
    ]


@pytest.mark.parametrize(("case", "provider"), parameters())
def test_operator(case, provider, benchmark):
    outcome = Current.of(case)[provider]
    if outcome.skip:
        pytest.skip(outcome.skip)
    if outcome.problem is not None:
        raise outcome.problem
    benchmark.group = f"{case.group}, {DEVICE.type}"
    benchmark.extra_info.update(outcome.extra)
    seconds = outcome.extra["eager_us"]["median"] / 1e6
    batch = max(1, round(ROUND_SECONDS / seconds))
    done = 0

    def call():
        nonlocal done
        outcome.call()
        done += 1
        if done % batch == 0:
            timing.synchronize()

    with timing.side_stream():
        benchmark.pedantic(call, rounds=2 if seconds > SLOW else ROUNDS, iterations=batch)
