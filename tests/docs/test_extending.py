"""The worked examples of docs/extending.md, and what comes out of them."""

import sys

import pytest
import torch
from data.makers import annotation, write_coco
from docs.pages import Block, blocks
from docs.test_commands import commands

import fastrcnn
from fastrcnn import cli
from fastrcnn.models.registry import BACKBONES, ROI_BOX_FEATURE_EXTRACTORS

FEW = (
    "MODEL.DEVICE cpu MODEL.MASK_ON False SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 "
    "DATASETS.TRAIN ('few',) DATASETS.TEST ('few',) INPUT.MIN_SIZE_TRAIN (64,)"
).split()


def of_page(language: str) -> list[Block]:
    return [block for block in blocks(language) if block.page == "docs/extending.md"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files of the page, whose modules can be imported; what they register is forgotten."""
    for block in [*of_page("python"), *of_page("yaml")]:
        if block.mark.startswith("file: "):
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    BACKBONES.pop("Tower-FPN", None)
    ROI_BOX_FEATURE_EXTRACTORS.pop("MeanFeatureExtractor", None)
    sys.modules.pop("my_parts", None)


def test_parts_build_and_train(workplace, capsys):
    [use] = [block for block in of_page("python") if not block.mark]
    found = {}
    exec(use.text, found)
    assert "Tower" in capsys.readouterr().out
    model = found["model"]
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert [m.shape[2] for m in model.backbone(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2, 1]
    assert model.roi_heads.box.feature_extractor.out_channels == 128

    [command] = [command for block in of_page("bash") for command in commands(block)]
    categories = [{"id": k, "name": str(k)} for k in range(1, 7)]
    few = write_coco(workplace / "few", [annotation(1), annotation(2)], categories=categories)
    register = {"few": {"img_dir": str(few["root"]), "ann_file": str(few["ann_file"])}}
    cli.main([*command[1:], *FEW, "DATASETS.REGISTER", str(register)])
    trained = torch.load(workplace / "output/quick_start/model_final.pth", weights_only=True)["model"]
    assert {"backbone.body.stem.weight", "roi_heads.box.feature_extractor.fc.weight"} <= set(trained)


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "torchvision:swin_t-FPN"), ("timm", "timm:convnext_tiny-FPN")]
)
def test_weights_of_libraries(library, name, workplace):
    pytest.importorskip(library)
    [snippet] = [block.text for block in of_page("python") if f"import {library}\n" in block.text]
    # the same without the download
    exec(snippet.replace('"DEFAULT"', "None").replace("pretrained=True", "pretrained=False"), {})
    cfg = fastrcnn.load_config("quick_start", ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.CONV_BODY", name])
    model = fastrcnn.build_model(cfg)
    [file] = workplace.glob("*.pth")
    report = fastrcnn.weights.load(model, file)
    assert not report.unexpected
    assert not [n for n in report.missing if n.startswith("backbone.body.")]
