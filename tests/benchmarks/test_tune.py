"""The tuner: which launch it keeps, what it refuses, what it writes. Times are told, not measured."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import Findings, Work
from triton_kernels import launch
from triton_kernels.launch import Launch

RULE = Launch(64, 4)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "launch_table.json"
    monkeypatch.setattr(launch, "TABLE_PATH", path)
    monkeypatch.setattr(launch, "_capability", lambda: "sm_90")
    path.write_text("{}")
    caches = launch.load_table.cache_clear, launch._nearest.cache_clear
    for clear in caches:
        clear()
    yield path
    for clear in caches:
        clear()


def work(name="pool", launches=(("pool", {"rows": 1000}),), rule=RULE, broken=(), wrong=()):
    """An operator that launches these kernels and returns what it launched; some launches raise or are wrong."""

    def call():
        chosen = [launch.choose(kernel, rule, **sizes) for kernel, sizes in launches]
        if any(c in broken for c in chosen):
            raise RuntimeError("out of registers")
        return chosen

    def check(chosen):
        assert not any(c in wrong for c in chosen), "another result"

    return Work(name, call, check)


def costs(best: Launch, noise: float = 0.01):
    """A fake clock: every doubling away from the best launch costs half the time again."""

    def measure(calls):
        found = {}
        for variant, call in calls.items():
            assert call()[0] == variant
            distance = abs(math.log2(variant.block / best.block)) + abs(math.log2(variant.num_warps / best.num_warps))
            distance += abs(math.log2(variant.tile / best.tile)) if best.tile else 0
            median = 10 * 1.5**distance
            found[variant] = {"median": median, "p20": median * (1 - noise), "p80": median * (1 + noise)}
        return found

    return measure


def run(works, measure, seconds=60.0):
    findings = Findings()
    tune.tune(works, measure, time.monotonic() + seconds, findings)
    return findings


def test_walks_to_the_fastest(table):
    best = Launch(256, 2, tile=16)
    findings = run([work(rule=replace(RULE, tile=4))], costs(best))
    (entry,) = findings.kernels["pool"]
    assert Launch(**entry["launch"]) == best
    assert entry["sizes"] == {"rows": 1000}
    assert (entry["microseconds"], entry["rule_microseconds"]) == (10.0, 75.94)  # 10 · 1.5⁵
    assert not findings.wrong
    assert not findings.failed


def test_rule_stays_where_nothing_beats_it_by_more_than_the_spread(table):
    assert run([work()], costs(RULE)).kernels == {}
    assert run([work()], costs(Launch(128, 4), noise=0.5)).kernels == {}


def test_failures_are_skipped_and_wrong_results_refused(table):
    broken, wrong = Launch(128, 4), Launch(64, 8)
    findings = run([work(broken=[broken], wrong=[wrong])], costs(broken))
    assert findings.failed == 1
    assert len(findings.wrong) == 1
    assert "num_warps=8" in findings.wrong[0]
    assert findings.kernels == {}


def test_what_cannot_be_measured_leaves_the_rule(table):
    findings = run([work()], lambda calls: dict.fromkeys(calls))
    assert findings.kernels == {}
    assert findings.failed == 5  # the rule and four neighbours


def test_sizes_vary_together_and_once(table):
    both = (("pool", {"rows": 1000}), ("pool", {"rows": 10}))
    later = work("later", (*both, ("pool", {"rows": 1})))
    findings = run([work(launches=both), later], costs(Launch(128, 4)))
    assert [entry["sizes"]["rows"] for entry in findings.kernels["pool"]] == [1000, 10, 1]
    assert all(entry["launch"]["block"] == 128 for entry in findings.kernels["pool"])


def test_rule_is_kept_beside_sizes_that_something_beat(table):
    def measure(calls):
        small = launch_sizes[-1] == 500
        return costs(RULE if small else Launch(128, 4))(calls)

    launch_sizes = []

    def with_sizes(rows):
        inner = work(launches=(("pool", {"rows": rows}),))
        return Work(str(rows), lambda: launch_sizes.append(rows) or inner.call(), inner.check)

    findings = run([with_sizes(400), with_sizes(500)], measure)
    assert [entry["launch"]["block"] for entry in findings.kernels["pool"]] == [128, 64]


def test_time_limit_names_what_was_not_reached(table):
    findings = run([work("first"), work("second")], costs(Launch(128, 4)), seconds=-1)
    assert findings.unfinished == ["first", "second"]
    assert findings.kernels == {}


def test_what_was_found_survives_a_failure_of_the_device(table):
    def broken():
        raise RuntimeError("illegal memory access")

    findings = Findings()
    works = [work(), Work("broken", broken, print)]
    with pytest.raises(RuntimeError, match="illegal"):
        tune.tune(works, costs(Launch(128, 4)), time.monotonic() + 60, findings)
    assert findings.kernels["pool"]


def test_table_keeps_other_capabilities_and_is_read_by_choose(table):
    other = {"device": "A", "date": "2026-01-01", "versions": {}, "kernels": {"pool": []}}
    table.write_text(json.dumps({"sm_80": other, "sm_90": other}))
    found = run([work()], costs(Launch(256, 2)))
    tune.write_table(table, "sm_90", found.kernels, "NVIDIA H200")
    written = json.loads(table.read_text())
    assert written["sm_80"] == other
    assert written["sm_90"]["device"] == "NVIDIA H200"
    assert written["sm_90"]["versions"]["torch"] == torch.__version__
    launch.load_table.cache_clear()
    launch._nearest.cache_clear()
    assert launch.choose("pool", RULE, rows=1200) == Launch(256, 2)
    assert launch.choose("pool", RULE, rows=3000) == RULE


def test_new_table_file(tmp_path):
    tune.write_table(tmp_path / "new.json", "sm_100", {}, "B")
    assert set(json.loads((tmp_path / "new.json").read_text())) == {"sm_100"}


def test_neighbours_stay_within_what_can_be_launched():
    found = tune.neighbours(Launch(1, 32, tile=2))
    assert found == [Launch(2, 32, 2), Launch(1, 16, 2), Launch(1, 32, 1), Launch(1, 32, 4)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
