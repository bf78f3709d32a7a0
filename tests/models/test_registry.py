"""Parts by name, and the examples of docs/extending.md."""

import os
import re
import subprocess
import sys

import pytest
import torch
from data.makers import annotation, write_coco

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.registry import BACKBONES, ROI_BOX_FEATURE_EXTRACTORS, Registry, import_parts

FEW = (
    "MODEL.DEVICE cpu MODEL.MASK_ON False SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 "
    "DATASETS.TRAIN ('few',) DATASETS.TEST ('few',) INPUT.MIN_SIZE_TRAIN (64,)"
).split()


def test_registry():
    parts = Registry()

    @parts.register("b")
    class Part:
        pass

    parts.register("a")(len)
    assert parts == {"b": Part, "a": len}
    assert parts.find("b", "MODEL.PART") is Part
    with pytest.raises(ConfigError, match=r"MODEL.PART is 'c'; it must be one of b, a$"):
        parts.find("c", "MODEL.PART")
    with pytest.raises(ValueError, match="'a' is registered already, as <built-in function len>"):
        parts.register("a")(max)


def test_names_are_maskrcnn_benchmarks():
    """With R-152 and the small ones throughout."""
    resnets = {f"R-{depth}-{top}" for depth in (50, 101) for top in ("C4", "C5", "FPN", "FPN-RETINANET")}
    assert resnets | {"R-152-FPN", "FBNet"} <= set(BACKBONES)
    assert {
        "ResNet50Conv5ROIFeatureExtractor",
        "FPN2MLPFeatureExtractor",
        "FPNXconv1fcFeatureExtractor",
    } <= set(ROI_BOX_FEATURE_EXTRACTORS)


def test_modules_that_cannot_be_imported():
    cfg = fastrcnn.load_config(None, ["MODEL.IMPORT", "('no_such_parts',)"])
    with pytest.raises(ConfigError, match=r"MODEL.IMPORT names 'no_such_parts', which cannot be imported: No module"):
        import_parts(cfg)


def blocks(repository, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repository / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, repository):
    (tmp_path / "tools").symlink_to(repository / "tools")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_worked_examples(workplace, monkeypatch, repository, capsys):
    parts, use, *_ = blocks(repository, "python")
    [recipe] = blocks(repository, "yaml")
    [command] = blocks(repository, "bash")
    (workplace / "my_parts.py").write_text(parts)
    (workplace / "my.yaml").write_text(recipe)
    monkeypatch.syspath_prepend(workplace)
    found = {}
    try:
        exec(use, found)
    finally:
        BACKBONES.pop("Tower-FPN", None)
        ROI_BOX_FEATURE_EXTRACTORS.pop("MeanFeatureExtractor", None)
        sys.modules.pop("my_parts", None)
    assert "Tower" in capsys.readouterr().out
    model = found["model"]
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert [m.shape[2] for m in model.backbone(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2, 1]
    assert model.roi_heads.box.feature_extractor.out_channels == 128

    assert command.startswith("PYTHONPATH=. python ")
    categories = [{"id": k, "name": str(k)} for k in range(1, 7)]
    few = write_coco(workplace / "few", [annotation(1), annotation(2)], categories=categories)
    register = {"few": {"img_dir": str(few["root"]), "ann_file": str(few["ann_file"])}}
    done = subprocess.run(
        [sys.executable, *command.split()[2:], *FEW, "DATASETS.REGISTER", str(register)],
        env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    trained = torch.load(workplace / "output/quick_start/model_final.pth", weights_only=True)["model"]
    assert {"backbone.body.stem.weight", "roi_heads.box.feature_extractor.fc.weight"} <= set(trained)


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "torchvision:swin_t-FPN"), ("timm", "timm:convnext_tiny-FPN")]
)
def test_weights_of_libraries(library, name, workplace, repository):
    pytest.importorskip(library)
    [snippet] = [block for block in blocks(repository, "python") if f"import {library}\n" in block]
    # the same without the download
    exec(snippet.replace('"DEFAULT"', "None").replace("pretrained=True", "pretrained=False"), {})
    cfg = fastrcnn.load_config("configs/quick_start.yaml", ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.CONV_BODY", name])
    model = fastrcnn.build_model(cfg)
    [file] = workplace.glob("*.pth")
    report = fastrcnn.weights.load(model, file)
    assert not report.unexpected
    assert not [n for n in report.missing if n.startswith("backbone.body.")]
