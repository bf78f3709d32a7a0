"""Every snippet of the README runs."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
import yaml
from PIL import Image

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
]


def snippets(repository, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


def run(command: list[str], folder, **environment) -> str:
    settings = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, repository):
    """A folder with configs, tools, shapes under COCO's names, and a trained quick start of a few iterations."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tools").symlink_to(repository / "tools")
    shapes, coco = folder / "datasets" / "shapes", folder / "datasets" / "coco"
    ensure_shapes(shapes)
    (coco / "annotations").mkdir(parents=True)
    for names, year, split in ((("train",), "train2014", "train"), (("valminusminival", "minival"), "val2014", "val")):
        (coco / year).symlink_to(shapes / split)
        full = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        full["images"] = full["images"][:4]
        kept = {image["id"] for image in full["images"]}
        full["annotations"] = [a for a in full["annotations"] if a["image_id"] in kept]
        # 80 classes, as the recipe has
        full["categories"] += [{"id": k, "name": f"class {k}"} for k in range(len(full["categories"]) + 1, 81)]
        for name in names:
            (coco / f"annotations/instances_{name}2014.json").write_text(json.dumps(full))
    Image.open(next((shapes / "val").glob("*.png"))).save(folder / "photo.png")
    few = "SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu".split()
    run([sys.executable, "tools/train.py", *few], folder)
    return folder


def test_install_and_test_commands_are_the_ones_that_ci_runs(repository):
    commands = snippets(repository, "bash")
    assert commands[0] == "pip install -e . && python tools/train.py\n"
    assert commands[1] == "pip install -e '.[dev]' && pytest\n"
    ci = (repository / ".ci" / "run").read_text()
    assert "pip install -q -e '.[dev]'\npytest\n" in ci


def test_quick_start_leaves_what_the_readme_says(workplace):
    output = workplace / "output" / "quick_start"
    names = {p.name for p in output.iterdir()}
    assert {"model_final.pth", "config.yml", "metrics.jsonl", "loss_curves.png", "val_detections.png"} <= names


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


@pytest.mark.parametrize("index", [0, 1, 3], ids=["predictor", "torchvision", "operators"])
def test_python_snippets(index, workplace, repository):
    run([sys.executable, "-c", snippets(repository, "python")[index]], workplace)
    if index == 0:
        assert Image.open(workplace / "detections.png").size == (128, 128)


def test_training_commands(workplace, repository):
    one, several, test = (shlex.split(s.replace("\\\n", " ")) for s in snippets(repository, "bash")[2:5])
    assert one[:2] == ["python", "tools/train.py"]
    run([sys.executable, *one[1:], *TINY, "OUTPUT_DIR", "output/one"], workplace)
    assert (workplace / "output/one/model_final.pth").exists()

    assert several[:2] == ["torchrun", "--nproc_per_node=8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    run([*launcher, *several[2:], *TINY, "SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "2"], workplace)

    assert test == ["python", "tools/test.py", "--weights", "output/coco"]
    found = []
    for command in ([sys.executable], launcher):  # one process and two find the same
        settings = ["TEST.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.SCORE_THRESH", "0.0"]
        assert "AP50" in run([*command, *test[1:], *settings], workplace)
        found.append(load_predictions(workplace / "output/coco/inference/coco_2014_minival/predictions.pth"))
    assert sum(len(boxlist) for boxlist in found[0].values()) > 0
    assert found[0].keys() == found[1].keys()
    for index, boxlist in found[0].items():
        torch.testing.assert_close(found[1][index].bbox, boxlist.bbox, rtol=1e-3, atol=1e-2)


def test_own_dataset(workplace, repository, monkeypatch):
    from fastrcnn.config import load_config
    from fastrcnn.data import build_dataset, make_data_loader

    entries = yaml.safe_load(snippets(repository, "yaml")[0])
    path = workplace / "registered.yaml"
    path.write_text(yaml.safe_dump(entries))
    cfg = load_config(path)
    assert set(cfg.DATASETS.REGISTER) == {"cells_train", "cells_val", "parts_test"}

    module = types.ModuleType("readme_dots")
    exec(snippets(repository, "python")[2], module.__dict__)
    monkeypatch.setitem(sys.modules, "readme_dots", module)
    assert importlib.import_module("readme_dots").Dots
    register = "{dots: {factory: 'readme_dots:Dots', args: {}}}"
    path.write_text(f"DATASETS: {{REGISTER: {register}, TRAIN: [dots]}}\nMODEL: {{ROI_BOX_HEAD: {{NUM_CLASSES: 2}}}}")
    cfg = load_config(path, ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0"])
    assert len(build_dataset(cfg, "dots", is_train=True, transforms=None)) == 8
    ((images, targets, _),) = list(make_data_loader(cfg, is_train=True))
    assert len(images) == len(targets) == 2
    assert torch.equal(targets.labels[:, 0], torch.tensor([1, 1]))
