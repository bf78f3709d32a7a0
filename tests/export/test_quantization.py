"""INT8 files: what is quantised, what they find, and whether the report tells the truth."""

import json

import onnx
import pytest
import torch
from export.detectors import as_inputs, detector, photos
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn import quantization
from fastrcnn.data import make_data_loader
from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.engine.inference import inference
from fastrcnn.export import onnx as onnx_files

REGISTER = {
    f"tiny_{part}": {"img_dir": f"small/{part}", "ann_file": f"small/annotations/instances_{part}.json"}
    for part in ("train", "val")
}
EVALUATED = 12  # of 16


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(cfg, model, folder, report); the files are folder/model.onnx, …"""
    folder = tmp_path_factory.mktemp("int8")
    ensure_shapes(folder / "datasets" / "small", train=12, val=16)
    torch.manual_seed(0)
    data = ["DATASETS.REGISTER", str(REGISTER), "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]
    many = ["MODEL.ROI_HEADS.DETECTIONS_PER_IMG", "50", "MODEL.ROI_HEADS.SCORE_THRESH", "0.02"]
    cfg, model = detector("quick_start", *data, *many, "TEST.IMS_PER_BATCH", "5")
    with torch.no_grad():  # masks that fill their boxes, so that some fit
        model.roi_heads.mask.predictor.mask_fcn_logits.bias.add_(10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        counts = {"calibration_images": 7, "evaluate_images": EVALUATED, "runs": 3}
        report = quantization.quantize(cfg, model, {}, folder / "model.onnx", **counts)
        (loader,) = make_data_loader(cfg, is_train=False)
        inference(model, loader, cfg, folder / "inference")
    return cfg, model, folder, report


def test_convolutions_and_layers_are_int8(quantized):
    graph = onnx.load(quantized[2] / "model.onnx").graph
    source = {name: node.op_type for node in graph.node for name in node.output}
    weights = {value.name: value for value in graph.initializer}
    inside = outside = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        kinds = [source.get(name) for name in node.input[:2]]
        if any(name in weight for weight in node.input for name in ("cls_logits", "bbox_pred", "cls_score")):
            assert "DequantizeLinear" not in kinds[1:]
            outside += 1
        else:
            assert kinds == ["DequantizeLinear"] * 2
            inside += 1
    assert (inside, outside) == (37, 12)  # 20 of the backbone, 8 of FPN, 5 of the RPN, 2 of the mask head, fc6 and fc7
    assert sum(value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1 for value in weights.values()) > 30


def test_confident_detections_stay(quantized, test_data):
    cfg, _, folder, _ = quantized
    inputs, _ = as_inputs(photos(test_data, [(128, 128), (96, 128), (128, 100)]), cfg)
    plain, int8 = (onnx_files.load(folder / f"model{kind}.onnx")(*inputs) for kind in ("_float32", ""))
    nearest = []
    for boxes, scores, labels, image in zip(*plain[:3], range(3), strict=True):
        chosen = scores > 0.8
        gaps = (boxes[chosen][:, None] - int8[0][image][None]).abs().amax(2)
        gaps[labels[chosen][:, None] != int8[2][image][None]] = torch.inf
        nearest.append(gaps.amin(1))
    nearest = torch.cat(nearest)
    assert len(nearest) > 12
    # a model of random weights has near ties, of which NMS keeps now the one, now the other
    assert nearest.median() < 2
    assert (nearest < 5).float().mean() > 0.6


def test_report_tells_the_truth(quantized):
    _, _, folder, report = quantized
    assert (report.calibration_images, report.evaluated_images) == (7, EVALUATED)
    truth = COCO(str(folder / "datasets/small/annotations/instances_val.json"))
    ids = sorted(truth.imgs)[:EVALUATED]
    for task in ("bbox", "segm"):
        found = truth.loadRes(json.loads((folder / "inference" / f"{task}.json").read_text()))
        evaluation = COCOeval(truth, found, task)
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] > 0
        assert report.ap["tiny_val"][task]["float32"] == pytest.approx(evaluation.stats[0], abs=1e-5)
    sizes = [(folder / f"model{kind}.onnx").stat().st_size for kind in ("_float32", "")]
    assert [report.bytes[kind] for kind in ("float32", "int8")] == sizes
    saved = json.loads((folder / "model.json").read_text())
    assert saved["ap"] == report.ap
    assert saved["latency_ratio"] == report.latency["int8"].median / report.latency["float32"].median
    assert all(0 < value.low <= value.median <= value.high for value in report.latency.values())
    told = str(report)
    assert f"{report.ap['tiny_val']['bbox']['float32']:.4f}" in told
    assert f"latency of int8 / float32 {report.latency_ratio:.2f}" in told
