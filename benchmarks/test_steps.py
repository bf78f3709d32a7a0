"""Whole steps, ours beside torchvision's and ours on the reference operators (see `steps`).

No time is reported of a model that finds something else, or learns from something else, than torchvision's.
"""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import steps
from benchmarks.steps import CPU_CASES, DEVICE, GPU_CASES, OURS, REFERENCE, THEIRS, Case


class Replay:
    """A clock that goes as told, by which pytest-benchmark takes over times that were measured elsewhere."""

    now = 0.0
    __name__ = "times of steps.measure"

    def __call__(self) -> float:
        return self.now

    def run(self, benchmark: Any, case: Case, info: dict[str, Any], seconds: list[float]) -> None:
        times = iter(seconds)

        def advance() -> None:
            self.now += next(times)

        benchmark.group = str(case)
        benchmark.extra_info.update(info)
        benchmark.pedantic(advance, rounds=len(seconds))


clock = Replay()


@pytest.fixture(scope="session")
def reference() -> dict[Case, tuple[dict[str, Any], list[float]]]:
    return steps.measure_reference()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("provider", [OURS, THEIRS])
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_step_on_cpu(case, provider, benchmark):
    if DEVICE.type != "cpu":
        pytest.skip("the GPU is measured instead")
    steps.check_agreement(case)
    clock.run(benchmark, case, *steps.measure(case, provider))


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("provider", [OURS, THEIRS, REFERENCE])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_step_on_gpu(case, provider, benchmark, request):
    if DEVICE.type == "cpu":
        pytest.skip("needs a CUDA device")
    steps.check_agreement(replace(case, batch=1, dtype="float32"))
    if provider == REFERENCE:
        info, seconds = request.getfixturevalue("reference")[case]
        if "error" in info:
            pytest.fail(info["error"])
    else:
        info, seconds = steps.measure(case, provider)
    clock.run(benchmark, case, info, seconds)
