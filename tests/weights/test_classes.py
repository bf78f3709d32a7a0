"""Heads for a subset of classes: row by row."""

import pytest
import torch

import fastrcnn
from fastrcnn.weights import WeightError, load, select_classes

TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,)"
).split()
ROWS = {
    "roi_heads.box.predictor.cls_score": 1,
    "roi_heads.box.predictor.bbox_pred": 4,
    "roi_heads.mask.predictor.mask_fcn_logits": 1,
}
CLASSES = {1: 3, 2: 1, 4: 9}  # our class 3 has no counterpart


def build(repository, classes, *overrides):
    path = "quick_start"
    cfg = fastrcnn.load_config(path, [*TINY, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(classes), *overrides])
    model = fastrcnn.build_model(cfg)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def test_rows_of_classes(repository):
    theirs, model = build(repository, 11).state_dict(), build(repository, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load(model, theirs, classes=CLASSES)
    assert not report.missing + report.unexpected + report.mismatched
    after = model.state_dict()
    for layer, rows in ROWS.items():
        for end in ("weight", "bias"):
            got, old, source = (s[f"{layer}.{end}"].split(rows) for s in (after, before, theirs))
            assert len(got) == 5
            for label in range(5):
                want = old[label] if label == 3 else source[{0: 0, **CLASSES}[label]]
                assert torch.equal(got[label], want), (layer, end, label)
    others = [name for name in after if name.rsplit(".", 1)[0] not in ROWS]
    assert all(torch.equal(after[name], theirs[name]) for name in others)


def test_one_box_for_all_classes(repository):
    agnostic = ("MODEL.CLS_AGNOSTIC_BBOX_REG", "True")
    theirs, model = build(repository, 11, *agnostic).state_dict(), build(repository, 5, *agnostic)
    load(model, theirs, classes=CLASSES)
    name = "roi_heads.box.predictor.bbox_pred.weight"
    assert torch.equal(model.state_dict()[name], theirs[name])


def test_without_a_model(repository):
    theirs = build(repository, 11).state_dict()
    state = select_classes(theirs, {1: 3, 2: 10})
    assert state["roi_heads.box.predictor.bbox_pred.weight"].shape == (12, 16)
    load(build(repository, 3), state)
    with pytest.raises(WeightError, match=r"our labels \[4\] do not exist; they end at 3"):
        select_classes(theirs, CLASSES)


def test_retinanet():
    """9 anchors × 3 classes without background -> 9 × 2."""
    state = {
        "rpn.head.cls_tower.0.weight": torch.randn(4, 4, 3, 3),
        "rpn.head.cls_logits.weight": torch.randn(27, 4, 3, 3),
        "rpn.head.cls_logits.bias": torch.randn(27),
        "rpn.head.bbox_pred.bias": torch.randn(36),
    }
    got = select_classes(state, {1: 3, 2: 1})
    for end in ("weight", "bias"):
        old, new = state[f"rpn.head.cls_logits.{end}"], got[f"rpn.head.cls_logits.{end}"]
        assert len(new) == 18
        for anchor in range(9):
            assert torch.equal(new[anchor * 2], old[anchor * 3 + 2])
            assert torch.equal(new[anchor * 2 + 1], old[anchor * 3])


def test_stages_of_a_cascade():
    state = {
        f"roi_heads.box.predictor.{stage}.{layer}.{end}": torch.randn(rows, *more)
        for stage in range(3)
        for layer, rows in (("cls_score", 4), ("bbox_pred", 8))
        for end, more in (("weight", (5,)), ("bias", ()))
    }
    state["roi_heads.mask.predictor.mask_fcn_logits.bias"] = torch.randn(4)
    got = select_classes(state, {1: 2})
    for name, value in got.items():
        assert torch.equal(value, state[name] if "bbox_pred" in name else state[name][[0, 2]])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({1: 11}, r"their labels \[11\] do not exist; they end at 10"),
        ({5: 1}, r"our labels \[5\] do not exist"),
        ({0: 2, 1: 1}, "first label is 1"),
    ],
)
def test_labels_that_do_not_exist(repository, classes, message):
    with pytest.raises(WeightError, match=message):
        load(build(repository, 5), build(repository, 11).state_dict(), classes=classes)
