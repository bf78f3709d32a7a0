"""What exported programs are made of gives the results of the operators that it stands for."""

import pytest
import torch

from fastrcnn import ops
from fastrcnn.export import operators
from fastrcnn.export.operators import PortableOperators


def boxes_of(*shape, side=100.0):
    corner = torch.rand(*shape, 2) * side
    return torch.cat([corner, corner + torch.rand(*shape, 2) * side / 2], -1)


def both(function):
    """What function() gives with the operators and with their portable definitions."""
    want = function()
    with PortableOperators():
        return function(), want


@pytest.mark.parametrize("labelled", [False, True])
def test_nms(labelled):
    boxes, scores = boxes_of(3, 200), torch.rand(3, 200)
    boxes[1, 5] = float("nan")
    scores[1, 7:9] = scores[1, 6]  # equal ones keep their order
    labels = torch.randint(1, 5, (3, 200)) if labelled else None
    valid = torch.rand(3, 200) > 0.3
    valid[2] = False
    got, want = both(lambda: ops.nms_padded(boxes, scores, 0.4, 50, labels, valid))
    assert 0 < want[1][0] <= 50
    assert want[1][2] == 0
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_nms_at_the_threshold():
    """An overlap of exactly the threshold does not suppress, however far the set is from the origin."""
    boxes = torch.tensor([[0.0, 0, 10, 3], [0, 0, 10, 10]]).expand(500, 2, 4).contiguous()  # IoU 3/10
    scores = torch.tensor([0.9, 0.8]).expand(500, 2)
    assert (operators.nms_padded(boxes, scores, 0.3, 2)[1] == 2).all()
    assert (operators.nms_padded(boxes, scores, 0.299, 2)[1] == 1).all()


@pytest.mark.parametrize("top", [(20, 30, 25), (1000, 1000, 1000)])
def test_proposals(top):
    grids = [(12, 16), (6, 8), (1, 1)]
    logits = [torch.randn(2, 3, *grid) for grid in grids]
    logits[0][0, 0, 0] = float("nan")
    deltas = [torch.randn(2, 12, *grid) * 0.3 for grid in grids]
    cells = [torch.tensor([[-s, -s, s, s], [-s, -s / 2, s, s / 2], [-s / 2, -s, s / 2, s]]) for s in (8.0, 16.0, 32.0)]
    sizes = torch.tensor([[90, 128], [60, 100]])
    names = ("pre_nms_top_n", "post_nms_top_n", "max_proposals")
    settings = dict(zip(names, top, strict=True), nms_threshold=0.7, min_size=1.0)
    got, want = both(
        lambda: ops.select_proposals(logits, deltas, cells, [(8, 8), (16, 16), (61, 43)], sizes, **settings)
    )
    filled = want[2].shape[1]
    assert want[2].sum() > 20
    assert not got[2][:, filled:].any()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine[:, :filled], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("last_pixel", [False, True])
def test_roi_align(aligned, ratio, last_pixel):
    features = [torch.randn(2, 4, 64 // s, 80 // s) for s in (1, 2, 4)]
    boxes, valid = boxes_of(2, 30, side=250.0), torch.rand(2, 30) > 0.2
    boxes[1, 3] = float("inf")
    settings = {"canonical_size": 64, "canonical_level": 3, "valid": valid, "last_pixel": last_pixel}
    scales = [0.25, 0.125, 0.0625]
    got, want = both(lambda: ops.multilevel_roi_align(features, boxes, (7, 5), scales, ratio, aligned, **settings))
    assert (want[~valid.flatten()] == 0).all()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_keypoints():
    heatmaps = torch.randn(12, 3, 14, 14)
    boxes = boxes_of(12, side=40.0) + torch.rand(12, 4)
    boxes[3] = 0  # an empty slot
    boxes[4, 2:] = 200  # larger than the image
    boxes[5] = float("nan")
    got, want = both(lambda: ops.heatmaps_to_keypoints(heatmaps, boxes, (60, 70)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4, equal_nan=True)
    whole = torch.zeros(12, dtype=torch.bool).index_fill_(0, torch.tensor([5]), True)
    assert want[0][~whole].isfinite().all()


def test_soft_nms():
    boxes, scores, labels = boxes_of(2, 40), torch.rand(2, 40), torch.randint(1, 3, (2, 40))
    got, want = both(lambda: ops.soft_nms_padded(boxes, scores, 10, "gaussian", labels=labels))
    torch.testing.assert_close(got, want)
