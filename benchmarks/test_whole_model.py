"""Latency of whole detectors, ours beside torchvision's: same weights, same image, same process.

The detections are compared first: no time is reported of a model that finds something else.
"""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

import fastrcnn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Path(__file__).parent.parent / "configs" / "torchvision" / "mask_rcnn_R_50_FPN.yaml"
HEIGHT, WIDTH = 800, 1067


@torch.no_grad()
def spread(model, layer, deviation: float, image: torch.Tensor) -> None:
    """Scale a layer so that its output has this standard deviation."""
    seen = []
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out.flatten()))
    model([image])
    handle.remove()
    factor = deviation / torch.cat(seen).std()
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


@pytest.fixture(scope="module", params=[100, 5], ids=["100 objects", "5 objects"])
def pair(request):
    """torchvision's Mask R-CNN R-50-FPN with random weights that find so many objects, and ours with the same.

    Ours works on all of its 100 slots whatever is found, torchvision's on what it found.
    """
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 25, 34), size=(HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    norms = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        theirs.backbone.train()(image)
    theirs.eval()
    heads = theirs.roi_heads.box_predictor
    for layer, deviation in ((theirs.rpn.head.cls_logits, 1.0), (heads.cls_score, 3.0), (heads.bbox_pred, 1.0)):
        spread(theirs, layer, deviation, image[0])
    pixels = (image[0] * 255).round().byte()
    with torch.inference_mode():
        best = theirs([pixels.float() / 255])[0]["scores"]
    threshold = 0.05 if request.param == 100 else (best[request.param - 1] + best[request.param]).item() / 2
    theirs.roi_heads.score_thresh = threshold
    overrides = ["MODEL.DEVICE", DEVICE, "MODEL.RESNETS.FROZEN_BN_EPS", "1e-5"]
    cfg = fastrcnn.load_config(CONFIG, [*overrides, "MODEL.ROI_HEADS.SCORE_THRESH", str(threshold)])
    ours = fastrcnn.build_model(cfg).eval()
    fastrcnn.weights.load(ours, theirs.state_dict())
    batch = fastrcnn.ImageBatch.from_images([pixels], cfg).to(DEVICE)
    theirs.to(DEVICE)
    prepared, _ = theirs.transform([pixels.to(DEVICE).float() / 255])
    with torch.inference_mode():
        want = theirs_without_pasting(theirs, prepared)[0]
        got = ours(batch).to_boxlists()[0]
    assert len(got) == len(want["scores"]) == request.param
    same = (got.get_field("scores") - want["scores"].cpu()).abs() < 1e-3
    assert same.float().mean() >= 0.98  # rounding decides which of two overlapping boxes with equal scores stays
    return ours, batch, theirs, prepared, request.param


def theirs_without_pasting(model, prepared):
    """From the prepared batch to boxes, scores, labels and 28×28 masks: the part that both models have."""
    features = model.backbone(prepared.tensors)
    proposals, _ = model.rpn(prepared, features)
    return model.roi_heads(features, proposals, prepared.image_sizes)[0]


@pytest.mark.parametrize("provider", ["fastrcnn", "torchvision"])
def test_latency(provider, pair, benchmark):
    ours, batch, theirs, prepared, objects = pair

    @torch.inference_mode()
    def step():
        result = ours(batch) if provider == "fastrcnn" else theirs_without_pasting(theirs, prepared)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"Mask R-CNN R-50-FPN inference, {HEIGHT}×{WIDTH}, batch 1, {objects} objects, {DEVICE}"
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
