import logging

import pytest
import torch
from engine import standins
from engine.standins import TestLoader, TinyDetector, tiny_config

from fastrcnn.engine import checkpoint, inference


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
