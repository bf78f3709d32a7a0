"""The converter as a user runs it."""

import pickle
import runpy
import sys

import pytest
import torch

import fastrcnn
from fastrcnn.weights import load, read_state

TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,)"
).split()


def build(repository, *overrides):
    return fastrcnn.build_model(fastrcnn.load_config(repository / "configs" / "quick_start.yaml", [*TINY, *overrides]))


@pytest.fixture
def convert(repository, tmp_path, monkeypatch, capsys):
    """convert(arguments…) -> (exit code, stdout, stderr), run in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments])
        try:
            runpy.run_path(str(repository / "tools" / "convert_weights.py"), run_name="__main__")
        except SystemExit as end:
            return (end.code or 0, *capsys.readouterr())

    return run


def test_there_and_back(convert, repository, tmp_path):
    model = build(repository)
    torch.save({"model": model.state_dict(), "conventions": "torchvision", "optimizer": {}}, tmp_path / "ours.pth")
    code, out, err = convert("ours.pth", "theirs.pth", "--to", "torchvision")
    assert code == 0, err
    assert "fastrcnn names, conventions torchvision" in out
    assert "roi_heads.box_head.fc6.weight" in torch.load(tmp_path / "theirs.pth")
    code, out, err = convert("theirs.pth", "back.pth")
    assert code == 0, err
    back = torch.load(tmp_path / "back.pth")
    assert back["conventions"] == "torchvision"
    assert back["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(back["model"][name], value) for name, value in model.state_dict().items())


def test_to_detectron2_with_other_classes(convert, repository, tmp_path):
    model = build(repository)
    torch.save({"model": model.state_dict(), "conventions": "torchvision"}, tmp_path / "ours.pth")
    code, out, err = convert("ours.pth", "theirs.pkl", "--to", "detectron2", "--classes", "1=5", "2=1")
    assert code == 0, err
    assert "detectron2 has the geometry 'modern': expect worse detections there" in out
    content = pickle.loads((tmp_path / "theirs.pkl").read_bytes())
    assert content["matching_heuristics"]
    assert content["__author__"]
    scores = model.state_dict()["roi_heads.box.predictor.cls_score.weight"]
    assert torch.equal(torch.tensor(content["model"]["roi_heads.box_predictor.cls_score.weight"]), scores[[5, 1, 0]])
    smaller = build(repository, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3")
    assert not load(smaller, read_state(tmp_path / "theirs.pkl").state).missing


def test_mistakes_are_one_line(convert, tmp_path):
    code, out, err = convert("absent.pth", "out.pth")
    assert (code, out, err) == (2, "", "error: no weights at absent.pth\n")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    code, _, err = convert("evil.pkl", "out.pth")
    assert code == 2
    assert "it asks for os.system" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out.pth").exists()
