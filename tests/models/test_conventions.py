"""The legacy conventions, from their definitions: boxes whose last corner is a pixel, not the end of one.

A box (x1, y1, x2, y2) of maskrcnn-benchmark is (x1, y1, x2 + 1, y2 + 1) here; `inclusive` goes back.
"""

import math

import numpy as np
import pycocotools.mask
import pytest
import torch
from torchvision.ops import roi_align

import fastrcnn
from fastrcnn import ops
from fastrcnn.config import conventions_of
from fastrcnn.config.conventions import CONVENTIONS
from fastrcnn.models.anchors import cell_anchors, cell_anchors_of_levels
from fastrcnn.models.layers import FrozenBatchNorm2d
from fastrcnn.models.roi_heads.mask import MaskHead, mask_targets
from fastrcnn.models.roi_heads.sampling import Pooler
from fastrcnn.structures import DetectionBatch, TargetBatch
from fastrcnn.structures.batches import PolygonBatch

LEGACY = CONVENTIONS["maskrcnn-benchmark"]
RATIOS = (0.5, 1.0, 2.0)

# x1 y1 x2 y2, inclusive: ratios 0.5, 1, 2, then sizes
C4 = """
-15  -4  30  19    -38 -16  53  31    -84  -40  99  55   -176  -88 191 103   -360 -184 375 199
 -8  -8  23  23    -24 -24  39  39    -56  -56  71  71   -120 -120 135 135   -248 -248 263 263
 -3 -14  18  29    -14 -36  29  51    -36  -80  51  95    -80 -168  95 183   -168 -344 183 359
"""
FPN = """
 -22  -10   25   13      -14  -14   17   17      -10  -22   13   25
 -40  -20   47   27      -28  -28   35   35      -20  -44   27   51
 -84  -40   99   55      -56  -56   71   71      -36  -80   51   95
-164  -72  195  103     -112 -112  143  143      -76 -168  107  199
-332 -152  395  215     -224 -224  287  287     -148 -328  211  391
"""
RETINANET = """
-18      -8       25      15        -23.7183 -11.1191 30.7183 18.1191    -30.9228 -15.0488 37.9228 22.0488
-12      -12      19      19        -16.1587 -16.1587 23.1587 23.1587    -21.3984 -21.3984 28.3984 28.3984
-8       -20      15      27        -11.1191 -26.2381 18.1191 33.2381    -15.0488 -34.0976 22.0488 41.0976
"""


def table(text):
    return torch.tensor([float(x) for x in text.split()]).reshape(-1, 4)


def inclusive(boxes):
    return boxes - torch.tensor([0, 0, 1, 1], dtype=boxes.dtype)


def exclusive(boxes):
    return boxes + torch.tensor([0, 0, 1, 1], dtype=boxes.dtype)


def random_boxes(count, side=200.0, smallest=2.0):
    corner = torch.rand(count, 2, dtype=torch.float64) * side * 0.7
    return torch.cat([corner, corner + smallest + torch.rand(count, 2, dtype=torch.float64) * side / 2], 1)


def test_both_names_mean_the_same():
    assert CONVENTIONS["detectron"] == LEGACY


def test_golden_anchors():
    (c4,) = cell_anchors_of_levels((32, 64, 128, 256, 512), RATIOS, (16,), LEGACY)
    assert torch.equal(inclusive(c4), table(C4))
    levels = cell_anchors_of_levels((32, 64, 128, 256, 512), RATIOS, (4, 8, 16, 32, 64), LEGACY)
    assert torch.equal(inclusive(torch.cat(levels)), table(FPN))
    octaves = [32 * 2 ** (k / 3) for k in range(3)]
    torch.testing.assert_close(inclusive(cell_anchors(octaves, RATIOS, 8, LEGACY)), table(RETINANET), rtol=0, atol=5e-5)


def test_anchors_of_one_stride_are_of_all_sizes():
    sizes = (32, 64, 128)
    (modern,) = cell_anchors_of_levels(sizes, RATIOS, (16,), CONVENTIONS["modern"])
    (rounded,) = cell_anchors_of_levels(sizes, RATIOS, (16,), CONVENTIONS["torchvision"])
    side = [[s] * 3 for s in sizes]  # sizes in the outer loop
    torch.testing.assert_close(ops.box_area(modern).sqrt(), torch.tensor(side).flatten().float())
    assert (rounded[3:6, 2] * 2).tolist() == [32, 64, 128]  # ratios in the outer loop; 1.0 is the second


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_box_coding_is_that_of_inclusive_boxes(weights):
    proposals, boxes = random_boxes(50), random_boxes(50)
    got = ops.encode_boxes(exclusive(boxes), exclusive(proposals), weights)
    wx, wy, ww, wh = weights
    want = []
    for (px1, py1, px2, py2), (x1, y1, x2, y2) in zip(proposals.tolist(), boxes.tolist(), strict=True):
        pw, ph, w, h = px2 - px1 + 1, py2 - py1 + 1, x2 - x1 + 1, y2 - y1 + 1
        px, py, x, y = px1 + 0.5 * pw, py1 + 0.5 * ph, x1 + 0.5 * w, y1 + 0.5 * h
        want.append((wx * (x - px) / pw, wy * (y - py) / ph, ww * math.log(w / pw), wh * math.log(h / ph)))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(inclusive(ops.decode_boxes(got, exclusive(proposals), weights)), boxes)


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.1, [1, 3]), (0.3, [1, 3]), (0.5, [1, 3]), (0.8, [1, 2, 3, 4]), (0.9, [0, 1, 2, 3, 4])]
)
def test_golden_nms(threshold, kept):
    boxes = torch.tensor(
        [[10, 10, 50, 60], [11, 12, 48, 60], [8, 9, 40, 50], [100, 100, 150, 140], [99, 110, 155, 139]]
    )
    scores = torch.tensor([[0.5, 0.7, 0.6, 0.9, 0.8]])
    indices, count = ops.nms_padded(exclusive(boxes.float())[None], scores, threshold, 5)
    assert sorted(indices[0, : count[0]].tolist()) == kept


SCALES = (0.25, 0.125, 0.0625, 0.03125)


def pooler(*overrides):
    keys = f"MODEL.CONVENTIONS maskrcnn-benchmark MODEL.ROI_BOX_HEAD.POOLER_SCALES {','.join(map(str, SCALES))}"
    keys += " MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7 MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2"
    cfg = fastrcnn.load_config(None, [*keys.split(), *overrides])
    return Pooler(cfg, cfg.MODEL.ROI_BOX_HEAD)


def test_level_and_place_of_a_region():
    """The level by the area of width x2 − x1 + 1, the samples between the inclusive corners."""
    corner = torch.rand(60, 2, dtype=torch.float64) * 100
    # some at the border between two levels: an area taken without the + 1 would put them a level lower
    side = torch.cat([torch.tensor([112.0, 224, 448, 112.4, 223.4, 447.9, 111.9, 0.3]), torch.rand(52) * 700]).double()
    boxes = torch.cat([corner, corner + side[:, None] - 1], 1)
    features = [torch.randn(1, 3, 256 // 2**k, 256 // 2**k, dtype=torch.float64) for k in range(4)]
    got = pooler()(features, exclusive(boxes)[None], torch.ones(1, 60, dtype=torch.bool))
    seen = set()
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        area = (x2 - x1 + 1) * (y2 - y1 + 1)
        level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-6)), 2), 5) - 2
        roi = torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64)
        torch.testing.assert_close(got[index : index + 1], roi_align(features[level], roi, 7, SCALES[level], 2, False))
        seen.add(level)
    assert seen == {0, 1, 2, 3}


def test_frozen_batch_norm_has_no_eps():
    norm = FrozenBatchNorm2d(2, LEGACY.frozen_bn_eps)
    norm.running_var.copy_(torch.tensor([0.25, 1e-6]))
    assert norm(torch.ones(1, 2, 1, 1)).flatten().tolist() == pytest.approx([2, 1000])


def legacy_paste(mask, box, height, width, threshold):
    """Masker of maskrcnn-benchmark, in numpy; box inclusive."""
    side = len(mask)
    padded = np.pad(mask, 1)
    scale = (side + 2) / side
    x1, y1, x2, y2 = box
    cx, cy, hw, hh = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2 * scale, (y2 - y1) / 2 * scale
    x1, y1, x2, y2 = (int(v) for v in (cx - hw, cy - hh, cx + hw, cy + hh))
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)

    def taps(length):
        source = np.clip((np.arange(length) + 0.5) * (side + 2) / length - 0.5, 0, side + 1)
        low = np.floor(source).astype(int)
        return low, np.minimum(low + 1, side + 1), source - low

    (ya, yb, fy), (xa, xb, fx) = taps(h), taps(w)
    rows = padded[ya] * (1 - fy)[:, None] + padded[yb] * fy[:, None]
    resized = rows[:, xa] * (1 - fx) + rows[:, xb] * fx
    image = np.zeros((height, width), bool)
    left, right, top, bottom = max(x1, 0), min(x2 + 1, width), max(y1, 0), min(y2 + 1, height)
    if left < right and top < bottom:
        image[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1] > threshold
    return image


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_pasting(threshold, repository):
    """Also at the image's border; the masks are 64ths so that no value lies within rounding of the threshold."""
    path = "e2e_mask_rcnn_R_50_FPN_1x"
    overrides = ["MODEL.CONVENTIONS", "detectron", "MODEL.ROI_MASK_HEAD.POSTPROCESS_MASKS_THRESHOLD", str(threshold)]
    with torch.device("meta"):
        head = MaskHead(fastrcnn.load_config(path, overrides), 16, None)
    masks = torch.randint(0, 65, (30, 14, 14)) / 64
    # sixteenths: the sums are exact in float32 and float64 alike
    boxes = (torch.rand(30, 4) * torch.tensor([60, 40, 60, 40]) * 16).round() / 16
    boxes = torch.cat([boxes[:, :2] - 8, boxes[:, :2] + boxes[:, 2:]], 1)
    got = head.paste(masks, exclusive(boxes), (50, 70))
    want = np.stack(
        [legacy_paste(m, b, 50, 70, threshold) for m, b in zip(masks.double().numpy(), boxes.tolist(), strict=True)]
    )
    assert want.any(axis=(1, 2)).sum() > 20
    assert (got.numpy() != want).mean() < 1e-4  # where an interpolated value is the threshold up to rounding


def test_mask_targets_are_cropped_at_the_inclusive_corners():
    """Polygons moved to the corner, scaled by side / (x2 − x1), then rasterised by pycocotools."""
    polygon = torch.tensor([[12.0, 10], [70, 22], [55, 80], [20, 66]])
    polygons = PolygonBatch.from_polygons([[[polygon]]], 1)
    targets = TargetBatch(
        torch.zeros(1, 1, 4), torch.ones(1, 1).long(), torch.zeros(1, 1, dtype=torch.bool), polygons=polygons
    )
    boxes = torch.tensor([[[11.0, 9, 71, 81], [20, 20, 50, 60], [30, 5, 90, 50]]])
    got = mask_targets(targets, boxes, torch.zeros(1, 3, dtype=torch.int64), 28, LEGACY)
    for mask, box in zip(got[0], inclusive(boxes[0]), strict=True):
        moved = (polygon - box[:2]) * (28 / (box[2:] - box[:2]))
        (code,) = pycocotools.mask.frPyObjects([moved.double().flatten().tolist()], 28, 28)
        assert np.array_equal(mask.numpy() > 0, pycocotools.mask.decode(code) > 0)


def test_detections_are_scaled_by_their_inclusive_corners():
    boxes = random_boxes(6, 100).float()[None]
    sizes, original = torch.tensor([[80, 100]], dtype=torch.int32), torch.tensor([[200, 240]], dtype=torch.int32)
    prepared = LEGACY.for_scaling(exclusive(boxes), sizes, original)
    batch = DetectionBatch(prepared, torch.ones(1, 6), torch.ones(1, 6).long(), torch.tensor([6]), sizes, original)
    want = exclusive(boxes[0] * torch.tensor([2.4, 2.5, 2.4, 2.5]))
    torch.testing.assert_close(batch.to_boxlists()[0].bbox, want)
    same = CONVENTIONS["modern"].for_scaling(boxes, sizes, original)
    assert torch.equal(same, boxes)


def test_the_key_chooses():
    for name, conventions in CONVENTIONS.items():
        assert conventions_of(fastrcnn.load_config(None, ["MODEL.CONVENTIONS", name])) == conventions
    cfg = fastrcnn.load_config(None, ["MODEL.CONVENTIONS", "detectron", "MODEL.RESNETS.FROZEN_BN_EPS", "0.5"])
    assert conventions_of(cfg).frozen_bn_eps == 0.5
