import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.makers import annotation, write_coco
from engine import standins
from engine.standins import TestLoader, TinyDetector, tiny_config

from fastrcnn.config import load_config
from fastrcnn.data import make_data_loader
from fastrcnn.engine import checkpoint, inference
from fastrcnn.evaluation import evaluate
from fastrcnn.models import build_model
from fastrcnn.structures import PersonKeypoints


@pytest.fixture(autouse=True)
def _standins(monkeypatch):
    monkeypatch.setattr(inference, "build_model", lambda cfg: TinyDetector())
    monkeypatch.setattr(inference, "make_data_loader", standins.make_data_loader)


def test_detections_reach_the_evaluation_and_the_file(tmp_path):
    cfg = tiny_config(tmp_path)
    loader = TestLoader(0, 1)
    results = inference.inference(TinyDetector(), loader, cfg, tmp_path / "out")
    assert set(results) == {"bbox"}
    predictions = inference.load_predictions(tmp_path / "out" / "predictions.pth")
    assert list(predictions) == [0, 1, 2, 3, 4, 5]
    for index, boxlist in predictions.items():
        corner = loader.dataset.pixels[index].mean().abs().item() * 4
        assert boxlist.size == (16, 16)
        torch.testing.assert_close(boxlist.bbox, torch.tensor([[corner, corner, corner + 8, corner + 8]]))
        assert boxlist.get_field("scores").tolist() == pytest.approx([0.9])
        assert boxlist.get_field("labels").tolist() == [1]


def test_proposals_are_measured_by_their_recall(tmp_path):
    class Proposals(TinyDetector):
        def forward(self, images, targets=None):
            return replace(super().forward(images), labels=None)

    cfg = tiny_config(tmp_path)
    cfg.MODEL.RPN_ONLY = True
    results = inference.inference(Proposals().eval(), TestLoader(0, 1), cfg, tmp_path)
    assert set(results) == {"box_proposal"}
    assert 0 < results["box_proposal"]["AR@100"] < 1
    predictions = inference.load_predictions(tmp_path / "predictions.pth")
    assert all(boxlist.fields() == ["objectness"] for boxlist in predictions.values())
    cfg.MODEL.RETINANET_ON = True  # its recipes set both
    assert set(inference.inference(TinyDetector().eval(), TestLoader(0, 1), cfg, tmp_path)) == {"bbox"}


def test_the_metric_of_voc_2007_is_passed_on(tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr(inference, "evaluate", lambda *_, use_07_metric, **__: passed.append(use_07_metric))
    cfg = tiny_config(tmp_path)
    for wanted in (False, True):
        cfg.TEST.USE_07_METRIC = wanted
        inference.inference(TinyDetector(), TestLoader(0, 1), cfg, tmp_path)
    assert passed == [False, True]


def test_image_without_detections_answer_is_an_error(tmp_path, monkeypatch):
    loader = TestLoader(0, 1)
    loader.ids = [0, 1, 2]
    with pytest.raises(RuntimeError, match="tiny: detections of 3 images, but the dataset has 6"):
        inference.inference(TinyDetector(), loader, tiny_config(tmp_path), tmp_path)


def test_weights_are_used_and_the_expected_results_are_checked(tmp_path, caplog):
    cfg = tiny_config(tmp_path / "out")
    model = TinyDetector()
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    results = inference.test(cfg, tmp_path)
    assert set(results) == {"tiny"}
    assert (tmp_path / "out" / "inference" / "tiny" / "predictions.pth").is_file()
    cfg.TEST.EXPECTED_RESULTS = (("bbox", "AP", (results["tiny"]["bbox"]["AP"] + 0.5, 0.01)),)
    with caplog.at_level(logging.INFO, "fastrcnn"):
        inference.test_all(model, [TestLoader(0, 1)], cfg)
    assert "FAIL: bbox AP" in caplog.text


def test_weights_that_leave_holes_are_refused(tmp_path):
    state = TinyDetector().state_dict()
    del state["head.weight"]
    torch.save({"model": state}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"half.pth does not fill the whole model:[\s\S]*head.weight"):
        inference.test(tiny_config(tmp_path / "out"), tmp_path / "half.pth")


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        inference.test(tiny_config(tmp_path), tmp_path / "absent.pth")
    assert not list(checkpoint.candidates(tmp_path))


def test_keypoints_reach_the_evaluation_and_the_files(tmp_path, repository):
    """From a model with a keypoint head to the measures, and again from the file of its predictions."""
    points = [value for k in range(17) for value in (8 + 4 * (k % 5), 10 + 6 * (k // 5), 2)]
    person = {"id": 1, "name": "person", "keypoints": PersonKeypoints.NAMES}
    annotations = [annotation(i, (4, 6, 24, 22), 1, keypoints=points, num_keypoints=17) for i in (1, 2)]
    write_coco(tmp_path, annotations, categories=[person])
    overrides = (
        "MODEL.DEVICE cpu MODEL.MASK_ON False MODEL.KEYPOINT_ON True MODEL.ROI_BOX_HEAD.NUM_CLASSES 2 "
        "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56 "
        "MODEL.ROI_KEYPOINT_HEAD.CONV_LAYERS (8,) MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) "
        "MODEL.ROI_HEADS.SCORE_THRESH 0.0 MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5 TEST.IMS_PER_BATCH 2"
    )
    cfg = load_config("quick_start", [*overrides.split(), "DATASETS.TEST", "('mine',)"])
    entry = {"img_dir": str(tmp_path / "images"), "ann_file": str(tmp_path / "annotations.json")}
    cfg.DATASETS.REGISTER = {"mine": entry}
    (loader,) = make_data_loader(cfg, is_train=False)
    results = inference.inference(build_model(cfg), loader, cfg, tmp_path)
    assert set(results) == {"bbox", "keypoints"}
    assert 0 <= results["keypoints"]["AP"] <= 1
    written = json.loads((tmp_path / "keypoints.json").read_text())
    assert len(written) == 10
    predictions = inference.load_predictions(tmp_path / "predictions.pth")
    first = predictions[0].get_field("keypoints")
    assert first.shape == (5, 17, 3)
    assert predictions[0].get_field("keypoint_scores").shape == (5, 17)
    ours = np.reshape(written[0]["keypoints"], (17, 3)) + np.array([0.5, 0.5, 0])
    np.testing.assert_allclose(ours, first[0], atol=1e-3)
    assert evaluate(loader.dataset, predictions, None, ("bbox", "keypoints")) == results
