"""Two processes over gloo, started by torchrun as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrcnn.config import ConfigError
from fastrcnn.data import DataError, SampleError
from fastrcnn.engine import checkpoint, distributed, load_predictions
from fastrcnn.engine.logging import exit_on_user_error

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from engine import standins
from fastrcnn.engine import distributed, train

standins.use_standins(noise=0.0)
folder = Path(sys.argv[1])
run = train(standins.tiny_config(folder / "run", ACCUMULATE_STEPS=2, EMA_DECAY=0.5, TEST_PERIOD=4))

if distributed.world_size() > 1:
    with distributed.session("cpu"):
        rank = distributed.rank()
        report = {"gathered": distributed.gather_objects({"rank": rank, "data": [rank] * (rank + 1)})}
        values = torch.tensor([rank, float("nan") if rank else 0.0])
        report["mean"] = distributed.mean_over_ranks(values).tolist()
        report["from_main"] = distributed.from_main(lambda: f"made by {os.getpid()}" if rank == 0 else 1 / 0)
        try:
            distributed.from_main(lambda: int("x"))
        except ValueError as error:
            report["error"] = str(error)
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(7 + rank)
        distributed.broadcast_buffers(norm)
        report["statistics"] = norm.running_mean.tolist()
        with distributed.main_first():
            report["first"] = (folder / "made").exists()
            (folder / "made").touch()
        report |= {"pid": os.getpid(), "results": run.results}
        (folder / f"report{rank}.json").write_text(json.dumps(report))
"""


def start(tmp_path, *launcher):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), str(tmp_path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    runs = start(one), start(two, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    return one, two


def test_two_processes_train_as_one_with_the_same_batch(both):
    one, two = (checkpoint.read(folder / "run" / "model_final.pth") for folder in both)
    for weights in ("model", "trained"):
        for name, value in one[weights].items():
            torch.testing.assert_close(two[weights][name], value, rtol=1e-5, atol=1e-6, msg=name)
    losses = [[json.loads(line) for line in (f / "run" / "metrics.jsonl").read_text().splitlines()] for f in both]
    assert len(losses[0]) == len(losses[1]) == 6
    for single, shared in zip(*losses, strict=True):
        assert shared["iteration"] == single["iteration"]
        if "loss" in single:
            assert shared["loss"] == pytest.approx(single["loss"], rel=1e-4)
        else:
            assert shared["validation"] == pytest.approx(single["validation"], rel=1e-4)


def test_detections_of_all_processes_are_evaluated(both):
    one, two = (load_predictions(folder / "run/inference/tiny/predictions.pth") for folder in both)
    assert list(two) == list(one) == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(two[i].bbox, one[i].bbox) for i in one)
    results = [json.loads((both[1] / f"report{rank}.json").read_text())["results"] for rank in (0, 1)]
    assert set(results[0]["tiny"]) == {"bbox"}
    assert results[1] == {}


def test_objects_travel_in_the_order_of_the_ranks(both):
    first, second = (json.loads((both[1] / f"report{rank}.json").read_text()) for rank in (0, 1))
    assert first["gathered"] == [{"rank": 0, "data": [0]}, {"rank": 1, "data": [1, 1]}]
    assert second["gathered"] is None
    assert first["from_main"] == second["from_main"] == f"made by {first['pid']}"
    assert first["error"] == second["error"] == "invalid literal for int() with base 10: 'x'"
    assert (first["first"], second["first"]) == (False, True)
    for report in (first, second):
        assert report["statistics"] == [7, 7]  # of rank 0, which writes the checkpoints
        assert report["mean"][0] == 0.5
        assert report["mean"][1] != report["mean"][1]


def test_more_processes_than_gpus_is_told_in_every_one(monkeypatch):
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for rank in "01":
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"2 processes run here and there are 1 GPUs: .*--nproc_per_node=1"):
            distributed.local_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "told"),
    [
        (0, 0, DataError("bad key"), "error: bad key\n"),
        (1, 1, DataError("bad key"), ""),  # rank 0 meets it as well
        (1, 1, SampleError("bad image"), "error in process 1: bad image\n"),
        (2, 0, DataError("no file here"), "error in process 2: no file here\n"),  # another machine
    ],
)
def test_a_mistake_is_told_once(monkeypatch, capsys, rank, local_rank, error, told):
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        raise error
    assert end.value.code == 2
    assert capsys.readouterr().err == told


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's variable that is not torchrun's
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
        assert distributed.gather_objects(3) == [3]
        module = torch.nn.Linear(1, 1)
        assert distributed.wrap(module) is module
