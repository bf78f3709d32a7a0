"""Heat maps to keypoints: the definition, the CPU's operator, torchvision's loop and brute force."""

import math

import pytest
import torch
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints as torchvisions

from fastrcnn.ops import heatmaps_to_keypoints
from fastrcnn.ops.reference import keypoints as reference

SIZE = (150, 200)


def definition(maps, boxes, max_size):
    return reference.heatmaps_to_keypoints(maps, boxes, *max_size)


EACH = pytest.mark.parametrize("function", [heatmaps_to_keypoints, definition])


def boxes_of(count, dtype=torch.float64):
    corner = torch.rand(count, 2, dtype=dtype) * 40
    sides = torch.rand(count, 2, dtype=dtype) ** 2 * 100
    return torch.cat([corner, corner + sides], 1).to(DEVICE)


def maps_of(kind, count, keypoints, side=28, dtype=torch.float64):
    if kind == "noise":
        return torch.randn(count, keypoints, side, side, dtype=dtype, device=DEVICE)
    if kind == "predicted":  # as the head makes them
        coarse = maps_of("noise", count, keypoints, side // 2, dtype)
        return F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    y, x = torch.meshgrid(*[torch.arange(side, dtype=dtype, device=DEVICE)] * 2, indexing="ij")
    peak = torch.rand(2, count, keypoints, 1, 1, dtype=dtype, device=DEVICE) * side
    return -((x - peak[0]) ** 2 + (y - peak[1]) ** 2) / 9  # one peak, also at the border


@EACH
@pytest.mark.parametrize("kind", ["noise", "predicted", "peak"])
def test_equals_torchvision(kind, function):
    maps, boxes = maps_of(kind, 30, 5), boxes_of(30)
    want, want_scores = torchvisions(maps, boxes)
    got, scores = function(maps, boxes, SIZE)
    assert got.dtype == scores.dtype == torch.float64
    torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-4)  # theirs are rounded to float32
    torch.testing.assert_close(scores, want_scores.double(), rtol=0, atol=1e-5)
    assert (got[..., 2] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32(dtype):
    maps, boxes = maps_of("predicted", 60, 17, 56, torch.float32).to(dtype), boxes_of(60, torch.float32)
    want, want_scores = torchvisions(maps.double(), boxes.double())
    for got, scores in (heatmaps_to_keypoints(maps, boxes, SIZE), definition(maps.float(), boxes, SIZE)):
        assert got.dtype == scores.dtype == torch.float32
        torch.testing.assert_close(scores, want_scores, rtol=0, atol=1e-4)
        # two positions that are equal up to rounding: either may be found
        assert ((got - want).abs().amax(2) < 0.1).float().mean() > 0.99


def cubic(x):
    """Keys' kernel with a = −0.75, from its definition."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def by_brute_force(heatmap, box):
    """Every position of one map [S, S], value by value."""
    side = len(heatmap)
    sizes = [max(box[k + 2] - box[k], 1.0) for k in (0, 1)]
    counts = [math.ceil(s) for s in sizes]
    weights = []
    for count in counts:
        rows = []
        for position in range(count):
            source = (position + 0.5) * side / count - 0.5
            row = [0.0] * side
            for tap in range(math.floor(source) - 1, math.floor(source) + 3):
                row[min(max(tap, 0), side - 1)] += cubic(source - tap)
            rows.append(row)
        weights.append(torch.tensor(rows, dtype=torch.float64))
    resized = weights[1] @ heatmap @ weights[0].T
    place = int(resized.argmax())
    row, column = place // counts[0], place % counts[0]
    x, y = ((c + 0.5) * s / n + b for c, s, n, b in zip((column, row), sizes, counts, box[:2], strict=True))
    return [x, y, 1.0], resized.max()


def test_equals_brute_force():
    maps, boxes = maps_of("noise", 25, 1, 7), boxes_of(25)
    boxes[0] = torch.tensor([3.0, 4, 3, 4])  # no area: one position
    boxes[1] = torch.tensor([3.0, 4, 3.2, 60.5])
    boxes[2] = torch.tensor([0.0, 0, 7, 7])  # the map itself
    got, scores = heatmaps_to_keypoints(maps, boxes, SIZE)
    for n, box in enumerate(boxes.tolist()):
        point, value = by_brute_force(maps[n, 0].cpu(), box)
        torch.testing.assert_close(got[n, 0].cpu(), torch.tensor(point, dtype=torch.float64))
        torch.testing.assert_close(scores[n, 0].cpu(), value)
    cell = int(maps[2, 0].argmax())
    assert got[2, 0].tolist() == [cell % 7 + 0.5, cell // 7 + 0.5, 1]


@EACH
def test_of_equal_values_the_first_is_the_keypoint(function):
    boxes, maps = torch.tensor([[10.0, 20, 30, 60]], device=DEVICE), torch.zeros(1, 1, 56, 56, device=DEVICE)
    assert function(maps, boxes, SIZE)[0][0, 0].tolist() == [10.5, 20.5, 1]


@EACH
def test_at_most_max_size_positions(function):
    """A box that is larger than the image is resolved more coarsely, one that is not finite by some number of them."""
    maps = maps_of("predicted", 3, 3)
    boxes = torch.tensor([[0.0, 0, 100, 80], [0, math.nan, 9, 9], [0, 0, math.inf, 9]], device=DEVICE).double()
    fine, coarse = function(maps, boxes, (80, 100))[0], function(maps, boxes, (20, 25))[0]
    resized = F.interpolate(maps[:1], (20, 25), mode="bicubic")[0].flatten(1)
    place = resized.argmax(1)
    assert coarse[0, :, 0].tolist() == ((place % 25 + 0.5) * 4).tolist()
    assert coarse[0, :, 1].tolist() == ((place // 25 + 0.5) * 4).tolist()
    torch.testing.assert_close(fine[0].float(), torchvisions(maps[:1], boxes[:1])[0][0])


@EACH
@pytest.mark.parametrize(("count", "keypoints"), [(0, 17), (3, 0)])
def test_nothing(count, keypoints, function):
    points, scores = function(torch.rand(count, keypoints, 14, 14), torch.rand(count, 4), SIZE)
    assert points.shape == (count, keypoints, 3)
    assert scores.shape == (count, keypoints)


def test_chunks(monkeypatch):
    maps, boxes = maps_of("noise", 9, 2), boxes_of(9)
    want = definition(maps, boxes, SIZE)
    monkeypatch.setattr(reference, "BLOCK", 4 * 2 * SIZE[0] * SIZE[1])
    for got, expected in zip(definition(maps, boxes, SIZE), want, strict=True):
        assert torch.equal(got, expected)


def test_reads_no_value():
    """The definition, which serves the GPU, too."""
    with FakeTensorMode():
        points, scores = definition(torch.rand(6, 17, 56, 56), torch.rand(6, 4), SIZE)
    assert points.shape == (6, 17, 3)
    assert scores.shape == (6, 17)


def test_errors():
    maps, boxes = torch.rand(2, 3, 8, 8), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"heatmaps must have the shape \[N, K, S, S\], got \[2, 3, 8, 7\]"):
        heatmaps_to_keypoints(maps[..., :7], boxes, SIZE)
    with pytest.raises(ValueError, match=r"boxes must have the shape \[2, 4\]"):
        heatmaps_to_keypoints(maps, boxes[:1], SIZE)
    with pytest.raises(ValueError, match="max_size must be positive"):
        heatmaps_to_keypoints(maps, boxes, (0, 5))
