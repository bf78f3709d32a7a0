"""Which launch configuration is chosen: from the table of measurements, or by the rule."""

import json

import pytest

from triton_kernels import launch
from triton_kernels.launch import Launch

RULE = Launch(64, 1)


@pytest.fixture
def table(monkeypatch):
    def use(capability, kernels):
        monkeypatch.setattr(launch, "load_table", lambda: {"sm_90": {"kernels": kernels}})
        monkeypatch.setattr(launch, "_capability", lambda: capability)
        launch._nearest.cache_clear()

    yield use
    launch._nearest.cache_clear()


ENTRIES = [
    {"sizes": {"channels": 64, "itemsize": 2}, "launch": {"block": 64, "num_warps": 2, "tile": 0}},
    {"sizes": {"channels": 256, "itemsize": 2}, "launch": {"block": 256, "num_warps": 8, "tile": 4}},
]


@pytest.mark.parametrize(
    ("channels", "itemsize", "warps"),
    [(64, 2, 2), (100, 2, 2), (200, 2, 8), (500, 2, 8), (512, 2, 1), (256, 4, 1), (32, 2, 1), (33, 2, 2)],
)
def test_nearest_measurement_within_a_factor_of_two_else_the_rule(table, channels, itemsize, warps):
    table("sm_90", {"pool": ENTRIES})
    assert launch.choose("pool", RULE, channels=channels, itemsize=itemsize).num_warps == warps


def test_other_devices_and_kernels_take_the_rule(table):
    table("sm_80", {"pool": ENTRIES})
    assert launch.choose("pool", RULE, channels=64, itemsize=2) is RULE
    table("sm_90", {"pool": ENTRIES})
    assert launch.choose("other", RULE, channels=64, itemsize=2) is RULE


def test_sizes_of_another_name_are_an_error(table):
    table("sm_90", {"pool": ENTRIES})
    with pytest.raises(ValueError, match=r"launch_table.json: pool has .*itemsize.* asked for .*rows"):
        launch.choose("pool", RULE, rows=64)


def test_override_and_record():
    other = Launch(32, 4)
    with launch.record() as seen, launch.override("pool", other):
        assert launch.choose("pool", RULE, rows=7) is other
        assert launch.choose("other", RULE, rows=7) is RULE
    assert launch.choose("pool", RULE, rows=7) is RULE
    assert seen == [("pool", RULE, {"rows": 7}), ("other", RULE, {"rows": 7})]


def test_committed_table_can_be_read():
    """Every entry is a launch of the sizes that it says, as `choose` will read it."""
    for capability, found in json.loads(launch.TABLE_PATH.read_text()).items():
        assert {"device", "date", "versions", "kernels"} <= found.keys(), capability
        for kernel, entries in found["kernels"].items():
            for entry in entries:
                assert Launch(**entry["launch"]).num_warps in (1, 2, 4, 8, 16, 32), kernel
                assert entry["microseconds"] <= entry["rule_microseconds"], kernel
                assert min(entry["sizes"].values()) > 0, kernel
