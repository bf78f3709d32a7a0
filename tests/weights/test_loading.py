"""Weights: recognised, reported, and refused when they could run code or do not fit."""

import pickle
import warnings

import pytest
import torch
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn

import fastrcnn
from fastrcnn.config.conventions import CONVENTIONS
from fastrcnn.weights import WeightError, load, read_state


@pytest.fixture(scope="module")
def torchvision_state():
    with torch.device("meta"):
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return model.state_dict()


def build(repository, *overrides):
    path = "torchvision/mask_rcnn_R_50_FPN"
    with torch.device("meta"):
        return fastrcnn.build_model(fastrcnn.load_config(path, list(overrides)))


def test_every_torchvision_tensor_finds_its_place(repository, torchvision_state):
    own = {name: tuple(value.shape) for name, value in build(repository).state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in read_state(torchvision_state).state.items()}
    theirs = {name: shape for name, shape in theirs.items() if not name.endswith("num_batches_tracked")}
    assert theirs == own


def test_report_lists_what_did_not_fit():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    state = {
        "0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(3),
        "1.weight": torch.ones(5, 3),
        "other": torch.ones(1),
    }
    before = model[1].weight.clone()
    with pytest.raises(WeightError, match=r"1\.weight +\[5, 3\] in the weights, \[4, 3\] in the model"):
        load(model, state)
    report = load(model, state, skip_mismatch=True)
    assert report.missing == ["1.bias"]
    assert report.unexpected == ["other"]
    assert report.mismatched == [("1.weight", (5, 3), (4, 3))]
    assert torch.equal(model[0].weight, torch.ones(3, 2))
    assert torch.equal(model[1].weight, before)
    assert "1.bias" in str(report)
    assert "other" in str(report)


def test_another_number_of_classes_is_refused(repository, torchvision_state):
    with pytest.raises(WeightError, match=r"NUM_CLASSES[\s\S]*roi_heads.box.predictor.cls_score.weight"):
        load(build(repository, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "4"), torchvision_state)


def test_own_checkpoint_and_parallel_prefix(tmp_path):
    model = torch.nn.Linear(2, 2)
    path = tmp_path / "model.pth"
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "iteration": 3}, path)
    copy = torch.nn.Linear(2, 2)
    report = load(copy, path)
    assert report.loaded == ["weight", "bias"]
    assert torch.equal(copy.weight, model.weight)


class Hostile:
    def __reduce__(self):
        return (open, ("owned.txt", "w"))


def test_hostile_and_broken_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Hostile()}))
    torch.save({"weight": Hostile()}, tmp_path / "evil_zip.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    (tmp_path / "empty.pkl").write_bytes(pickle.dumps({"blobs": {}}))
    for name in ("evil.pth", "evil_zip.pth", "torn.pth", "list.pth", "list.pkl", "empty.pkl"):
        with pytest.raises(WeightError, match=name):
            read_state(tmp_path / name)
    assert not (tmp_path / "owned.txt").exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        read_state(tmp_path / "absent.pth")


def test_classifiers_become_bodies(repository):
    state = resnet18(weights=None).state_dict()
    path = "quick_start"
    wide = "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 64 MODEL.RESNETS.STEM_OUT_CHANNELS 64".split()
    model = fastrcnn.build_model(fastrcnn.load_config(path, wide))
    report = load(model, state)
    assert report.family == "torchvision ResNet"
    assert not report.unexpected
    assert not [name for name in report.missing if name.startswith("backbone.body")]
    assert torch.equal(model.backbone.body.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])


def test_strides_of_classifiers_are_told(repository):
    path = "e2e_faster_rcnn_R_50_FPN_1x"
    with torch.device("meta"):
        state = resnet50(weights=None).state_dict()
        other = ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]
        models = [fastrcnn.build_model(fastrcnn.load_config(path, overrides)) for overrides in ([], other)]
    with pytest.warns(UserWarning, match="STRIDE_IN_1X1 False"):
        load(models[0], state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(models[1], state)


def test_other_conventions_are_told(repository, torchvision_state):
    model = build(repository, "MODEL.CONVENTIONS", "modern")
    with pytest.warns(UserWarning, match="trained with the conventions 'torchvision', the model has 'modern'"):
        load(model, torchvision_state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(build(repository), torchvision_state)


def test_two_names_of_the_same_conventions(monkeypatch):
    monkeypatch.setitem(CONVENTIONS, "one", CONVENTIONS["torchvision"])
    model = torch.nn.Linear(2, 2)
    model.conventions = "torchvision"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, {"model": model.state_dict(), "conventions": "one"})
    with pytest.warns(UserWarning, match="conventions 'modern'"):
        load(model, {"model": model.state_dict(), "conventions": "modern"})


def test_nothing_in_common_is_an_error():
    with pytest.raises(WeightError, match="nothing in the state dict fits"):
        load(torch.nn.Linear(2, 2), {"a": torch.ones(1)})
