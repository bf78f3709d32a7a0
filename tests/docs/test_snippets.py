"""The Python in the documentation runs, page by page, and the commands of the first page."""

import json
import os

import pytest
import torch
from docs.pages import Block, blocks, page_names
from docs.test_commands import commands
from PIL import Image

from fastrcnn import cli
from fastrcnn.config import load_config
from fastrcnn.data import build_dataset, make_data_loader
from fastrcnn.data.datasets.shapes import ensure_shapes

ELSEWHERE = {"docs/extending.md"}  # tests/docs/test_extending.py
# a quick start of seconds
FEW = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5 MODEL.ROI_HEADS.SCORE_THRESH 0.01 "
    "SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 TEST.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1"
).split()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with photos, a small dataset of shapes at datasets/cells and a run on it at output/quick_start."""
    folder = tmp_path_factory.mktemp("docs")
    ensure_shapes(folder / "datasets" / "cells", train=8, val=4)
    (folder / "photos").mkdir()
    for number, path in enumerate(sorted((folder / "datasets/cells/val").glob("*.png"))[:2], 1):
        image = Image.open(path)
        image.save(folder / "shapes.png")
        image.resize((256, 192)).save(folder / "photos" / f"{number}.jpg")
        image.resize((192, 256)).save(folder / "photo.jpg")
    for block in blocks("yaml", "python"):
        if block.mark.startswith("file: ") and block.page not in ELSEWHERE:
            (folder / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    """Runs the test in that folder, whose modules can be imported."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    return workplace


@pytest.fixture(scope="session")
def trained(workplace):
    """output/quick_start, trained by the command of the first page."""
    before = os.getcwd()
    os.chdir(workplace)
    try:
        cli.main(["train", "--config-file", "cells.yaml", *FEW, "OUTPUT_DIR", "output/quick_start"])
    finally:
        os.chdir(before)
    return workplace / "output" / "quick_start"


def runnable(block: Block) -> bool:
    compile(block.text, str(block), "exec")
    return not block.mark.startswith("not run: ")


@pytest.mark.parametrize("page", [name for name in page_names() if name not in ELSEWHERE])
def test_python_of_a_page_runs(page, here, trained):
    """In the order of the page, in one namespace."""
    namespace = {"__name__": "snippet"}
    for block in blocks("python"):
        if block.page == page and runnable(block):
            exec(compile(block.text, str(block), "exec"), namespace)


def test_json_is_valid():
    assert [json.loads(block.text) for block in blocks("json")]


def test_marks_are_understood():
    marks = [block.mark for block in blocks("python", "yaml", "bash", "json", "text") if block.mark]
    assert all(mark.startswith(("file: ", "not run: ")) for mark in marks), marks


def test_commands_of_getting_started_run(here, trained):
    """All of them but the quick start itself, which takes minutes, and what downloads weights."""
    ran = []
    for block in blocks("bash"):
        for command in commands(block) if block.page == "docs/getting_started.md" else ():
            if command[1:] != ["train"] and "torchvision/mask_rcnn_R_50_FPN" not in command:
                cli.main([*command[1:], *(FEW if command[1] in ("train", "test", "show-data") else [])])
                ran.append(command[1])
    assert set(ran) == {"report", "test", "demo", "show-data", "train"}
    assert (here / "output/cells/model_final.pth").is_file()
    assert Image.open(here / "found_shapes.png").size == (128, 128)
    assert {path.name for path in (here / "found_cells").rglob("*.*")} >= {"1.jpg", "2.jpg", "detections.json"}


def test_class_of_your_own(here):
    cfg = load_config("dots.yaml", ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1"])
    assert [len(build_dataset(cfg, name, is_train=True)) for name in ("dots_train", "dots_val")] == [32, 8]
    ((images, targets, _),) = make_data_loader(cfg, is_train=True)
    assert len(images) == len(targets) == 2
    assert torch.equal(targets.labels[:, 0], torch.tensor([1, 1]))
    assert targets.polygons is not None
