"""`fastrcnn.ops` in place of `torchvision.ops` in torchvision's own detector: the detections stay the same."""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import boxes as torchvision_boxes

import fastrcnn.ops as ops


@pytest.fixture
def model():
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, box_score_thresh=0.011)
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(50)
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
    return model.eval()


@torch.inference_mode()
def test_swapped_operators_give_the_same_detections(model, monkeypatch):
    images = [torch.rand(3, 200, 300), torch.rand(3, 240, 180)]
    want = model(images)
    assert sum(len(w["scores"]) for w in want) > 20

    calls = []

    def counted(name):
        def call(*args):
            calls.append(name)
            return getattr(ops, name)(*args)

        return call

    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = ops.MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
    for name in ("batched_nms", "clip_boxes_to_image", "remove_small_boxes", "box_iou"):
        monkeypatch.setattr(torchvision_boxes, name, counted(name))
    got = model(images)
    assert {"batched_nms", "clip_boxes_to_image", "remove_small_boxes"} <= set(calls)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-4, atol=1e-5)
