"""The README's figures are measured ones, and its commands of several processes run; tests/docs runs the rest."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks import report
from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.engine import load_predictions

TINY = [
    *(
        "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
        "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
        "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5 "
        "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 2 SOLVER.STEPS (1,)"
    ).split(),
    *("MODEL.WEIGHT", ""),  # the recipe's are in the network
    # at the recipe's rate the features of so small a model die, all scores are equal, and rounding decides their order
    *("SOLVER.BASE_LR", "0.0001", "SEED", "1"),
]


def snippets(repository, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


def run(command: list[str], folder, **environment) -> str:
    settings = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a few shapes under the names of COCO's files, with its 80 classes."""
    folder = tmp_path_factory.mktemp("readme")
    shapes, coco = folder / "shapes", folder / "datasets" / "coco"
    ensure_shapes(shapes, train=4, val=4)
    (coco / "annotations").mkdir(parents=True)
    for names, year, split in ((("train",), "train2014", "train"), (("valminusminival", "minival"), "val2014", "val")):
        (coco / year).symlink_to(shapes / split)
        full = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        full["categories"] += [{"id": k, "name": f"class {k}"} for k in range(len(full["categories"]) + 1, 81)]
        for name in names:
            (coco / f"annotations/instances_{name}2014.json").write_text(json.dumps(full))
    return folder


def test_install_and_test_commands_are_the_ones_that_ci_runs(repository):
    commands = snippets(repository, "bash")
    assert commands[0] == "pip install -e . && python tools/train.py\n"
    assert commands[1] == "pip install -e '.[dev]' && pytest\n"
    ci = (repository / ".ci" / "run").read_text()
    assert "pip install -q -e '.[dev]'\npytest\n" in ci


def test_benchmarks_are_those_of_the_committed_result(repository):
    text = (repository / "README.md").read_text()
    name = re.search(r"benchmarks/results/[\w-]+\.json", text)[0]
    rows = report.read_rows(json.loads((repository / name).read_text()))
    for kind, table in (("operator", report.operator_table), ("step", report.step_table)):
        assert table([row for row in rows if row.kind == kind]) in text


def test_figures_of_runs_are_those_of_the_committed_logs(repository):
    rows = re.findall(
        r"^\| .*\[log\]\((.*?)\)\) \| ([\d.]+) s \| (.*) \|$", (repository / "README.md").read_text(), re.M
    )
    assert len(rows) == 2
    for path, seconds, results in rows:
        log = (repository / path).read_text()
        assert f"iterations in {seconds} s" in log
        for figure in re.findall(r"AP50 ([\d.]+)", results):
            assert re.search(rf"AP50\b.*\n.*\b{figure}\b", log)


def test_training_commands(workplace, repository):
    """Two processes train; one and two of them find the same."""
    several, test = (shlex.split(line) for line in snippets(repository, "bash")[4].splitlines())
    assert several[:4] == ["torchrun", "--nproc_per_node=8", "-m", "fastrcnn"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    run([*launcher, *several[2:], *TINY, "SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "2"], workplace)

    assert test == ["fastrcnn", "test", "--weights", "output/coco"]
    found = []
    for command in ([sys.executable], launcher):
        settings = ["TEST.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]
        assert "AP50" in run([*command, "-m", *test, *settings], workplace)
        found.append(load_predictions(workplace / "output/coco/inference/coco_2014_minival/predictions.pth"))
    assert sum(len(boxlist) for boxlist in found[0].values()) > 0
    assert found[0].keys() == found[1].keys()
    for index, boxlist in found[0].items():
        torch.testing.assert_close(found[1][index].bbox, boxlist.bbox, rtol=1e-3, atol=1e-2)
