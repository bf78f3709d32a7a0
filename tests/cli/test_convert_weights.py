"""The converter as a user runs it."""

import pickle
from functools import partial

import pytest
import torch
from support import TINY

import fastrcnn
from fastrcnn.weights import load, read_state


def build(*overrides):
    return fastrcnn.build_model(fastrcnn.load_config("quick_start", [*TINY, *overrides]))


@pytest.fixture
def convert(tmp_path, monkeypatch, fastrcnn_command):
    monkeypatch.chdir(tmp_path)
    return partial(fastrcnn_command, "convert-weights")


def test_there_and_back(convert, tmp_path):
    model = build()
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


def test_to_detectron2_with_other_classes(convert, tmp_path):
    model = build()
    torch.save({"model": model.state_dict(), "conventions": "torchvision"}, tmp_path / "ours.pth")
    code, out, err = convert("ours.pth", "theirs.pkl", "--to", "detectron2", "--classes", "1=5", "2=1")
    assert code == 0, err
    assert "detectron2 has the geometry 'modern': expect worse detections there" in out
    content = pickle.loads((tmp_path / "theirs.pkl").read_bytes())
    assert content["matching_heuristics"]
    assert content["__author__"]
    scores = model.state_dict()["roi_heads.box.predictor.cls_score.weight"]
    assert torch.equal(torch.tensor(content["model"]["roi_heads.box_predictor.cls_score.weight"]), scores[[5, 1, 0]])
    smaller = build("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3")
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
