"""`fastrcnn.ops` in place of `torchvision.ops` in torchvision's own detector: the detections stay the same."""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import boxes as torchvision_boxes

import fastrcnn.ops as ops


@pytest.fixture
def model():
    """Random weights, batch norm calibrated and scores spread out, so that the order of detections is determined."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, box_score_thresh=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(torch.rand(2, 3, 320, 320))
        for layer in (model.rpn.head.cls_logits, model.roi_heads.box_predictor.cls_score):
            seen = []
            handle = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.flatten()))
            model.eval()([torch.rand(3, 200, 300)])
            handle.remove()
            layer.weight.mul_(2 / torch.cat(seen).std())
    return model


@torch.inference_mode()
def test_swapped_operators_give_the_same_detections(model, monkeypatch):
    images = [torch.rand(3, 200, 300), torch.rand(3, 240, 180)]
    want = model(images)
    assert sum(len(w["scores"]) for w in want) > 10

    calls = []

    def counted(name):
        def call(*args, **options):
            calls.append(name)
            return getattr(ops, name)(*args, **options)

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
