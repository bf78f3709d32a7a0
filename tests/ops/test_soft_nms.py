"""Soft-NMS against a brute force in double precision."""

import math

import pytest
import torch
from support import DEVICE

from fastrcnn import ops


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def brute_force(boxes, scores, labels, valid, *, method, iou_threshold, sigma, min_score, max_output):
    """Class by class as the paper has it, in Python's floats, then the best of all classes."""
    found = []
    for label in set(labels):
        left = {i: scores[i] for i in range(len(boxes)) if labels[i] == label and valid[i]}
        while left:
            best = max(left, key=left.get)
            score = left.pop(best)
            if score < min_score:
                break
            found.append((score, best))
            for i in left:
                iou = overlap(boxes[best], boxes[i])
                if method == "gaussian":
                    left[i] *= math.exp(-iou * iou / sigma)
                elif iou > iou_threshold:
                    left[i] *= 1 - iou
    return sorted(found, reverse=True)[:max_output]


def random_sets(sets, count, dtype=torch.float64):
    corner = torch.rand(sets, count, 2, dtype=dtype) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(sets, count, 2, dtype=dtype) * 40], 2)
    scores = torch.rand(sets, count, dtype=dtype)
    return boxes, scores, torch.randint(1, 4, (sets, count)), torch.rand(sets, count) < 0.8


@pytest.mark.parametrize("max_output", [5, 200])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_equals_brute_force(method, max_output):
    boxes, scores, labels, valid = random_sets(3, 60)
    settings = {"method": method, "iou_threshold": 0.3, "sigma": 0.4, "min_score": 0.05, "max_output": max_output}
    arguments = (x.to(DEVICE) for x in (boxes, scores, labels, valid))
    b, s, c, v = arguments
    indices, found, counts = ops.soft_nms_padded(b, s, labels=c, valid=v, **settings)
    assert found.dtype == torch.float64
    for row in range(3):
        want = brute_force(*(x[row].tolist() for x in (boxes, scores, labels, valid)), **settings)
        count = counts[row].item()
        assert count == len(want) > 3
        assert indices[row, :count].tolist() == [i for _, i in want]
        torch.testing.assert_close(found[row, :count].cpu(), torch.tensor([x for x, _ in want], dtype=torch.float64))
        assert (indices[row, count:] == -1).all()
        assert (found[row, count:] == 0).all()
    if max_output == 200:
        assert (counts < valid.sum(1).to(DEVICE)).any()  # some fell below the least score


def test_float32_is_near_float64():
    boxes, scores, labels, valid = random_sets(2, 40, torch.float32)
    want = ops.soft_nms_padded(boxes.double(), scores.double(), 30, labels=labels, valid=valid)
    got = ops.soft_nms_padded(boxes.to(DEVICE), scores.to(DEVICE), 30, labels=labels.to(DEVICE), valid=valid.to(DEVICE))
    assert torch.equal(got[0].cpu(), want[0])
    torch.testing.assert_close(got[1].cpu().double(), want[1], rtol=1e-5, atol=1e-6)


def test_without_overlap_it_sorts():
    corner = torch.arange(6.0)[:, None] * 10
    boxes = torch.cat([corner, corner, corner + 8, corner + 8], 1)[None]
    scores = torch.tensor([[0.2, 0.9, 0.5, float("nan"), 0.5, 0.7]])
    indices, found, counts = ops.soft_nms_padded(boxes, scores, 8)
    assert indices.tolist() == [[1, 5, 2, 4, 0, -1, -1, -1]]  # equal scores in their order, NaN takes no part
    assert counts.tolist() == [5]
    torch.testing.assert_close(found[0, :5], torch.tensor([0.9, 0.7, 0.5, 0.5, 0.2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "hard"}, "method must be"),
        ({"sigma": 0.0}, "sigma"),
        ({"max_output": -1}, "max_output"),
        ({"scores": torch.rand(2, 4)}, r"scores must be \[S, N\]"),
        ({"boxes": torch.rand(2, 3, 5)}, r"boxes must be \[S, N, 4\]"),
        ({"labels": torch.rand(2, 3)}, "labels must be integers"),
        ({"valid": torch.ones(2, 3)}, "valid must be bool"),
    ],
)
def test_errors(change, message):
    arguments = {"boxes": torch.rand(2, 3, 4), "scores": torch.rand(2, 3), "max_output": 3}
    with pytest.raises(ValueError, match=message):
        ops.soft_nms_padded(**(arguments | change))
