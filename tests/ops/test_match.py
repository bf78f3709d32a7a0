import pytest
import torch
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from fastrcnn.ops.match import MATCH, match_boxes
from fastrcnn.ops.reference import match as reference


def random_boxes(*shape, integer=False):
    corner, side = torch.rand(*shape, 2) * 30, torch.rand(*shape, 2) * 20 + 1
    if integer:  # many exact ties
        corner, side = (corner / 4).round(), (side / 4).ceil()
    return torch.cat((corner, corner + side), -1).to(DEVICE)


def by_torchvision(boxes, gt_boxes, gt_valid, high, low, allow_low_quality):
    matched, ious = [], []
    for image, (gt, valid) in enumerate(zip(gt_boxes, gt_valid, strict=True)):
        own = boxes if boxes.dim() == 2 else boxes[image]
        slots = valid.nonzero()[:, 0]
        if len(slots) == 0:
            matched.append(torch.full((len(own),), -1, device=own.device))
            ious.append(torch.zeros(len(own), device=own.device))
            continue
        quality = box_iou(gt[slots], own)
        index = Matcher(high, low, allow_low_quality)(quality)
        matched.append(torch.where(index >= 0, slots[index.clamp(min=0)], index))
        ious.append(quality.max(0).values)
    return torch.stack(matched), torch.stack(ious)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize(("high", "low", "low_quality"), [(0.7, 0.3, True), (0.5, 0.5, False), (0.5, 0.0, True)])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_equals_torchvision(monkeypatch, shared, integer, high, low, low_quality, block):
    monkeypatch.setattr(reference, "_block", lambda boxes: block)
    boxes = random_boxes(300, integer=integer) if shared else random_boxes(4, 300, integer=integer)
    gt, valid = random_boxes(4, 7, integer=integer), torch.rand(4, 7, device=DEVICE) > 0.4
    valid[2] = False
    gt[1, 3] = torch.tensor([90.0, 90, 95, 95])  # touches nothing, so that IoU 0 is its best
    valid[1, 3] = True
    want = by_torchvision(boxes, gt, valid, high, low, low_quality)
    got = match_boxes(boxes, gt, valid, high, low, low_quality)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if low_quality:
        assert (got[0][1] >= 0).float().mean() > (got[1][1] >= high).float().mean()
    torch.testing.assert_close(reference.match_boxes(boxes, gt, valid, high, low, low_quality), want, rtol=0, atol=0)


def test_equals_brute_force():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [20, 20, 30, 30], [0, 0, 10, 3]])
    gt = torch.tensor([[[50.0, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 80]]])
    valid = torch.tensor([[False, True, True, True]])
    matched, iou = match_boxes(boxes, gt, valid, 0.5, 0.4, False)
    assert matched.tolist() == [[1, 1, -2, -1, -1]]  # the first of the equal ground truths
    torch.testing.assert_close(iou, torch.tensor([[1, 0.5, 0.4, 1 / 6, 0.3]]))
    assert match_boxes(boxes, gt, valid, 0.5, 0.4, True)[0].tolist() == [[1, 1, -2, 3, -1]]


def test_nan_never_matches():
    boxes, gt = random_boxes(2, 20), random_boxes(2, 3)
    boxes[0, 4, 2] = float("nan")
    boxes[0, 5] = float("inf")
    gt[1, 1, 0] = float("nan")
    gt[0, 0] = torch.tensor([90.0, 90, 95, 95])
    valid = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    matched, iou = match_boxes(boxes, gt, valid, 0.5, 0.3, True)
    assert matched[0, 4:6].tolist() == [-1, -1]
    assert iou[0, 4:6].tolist() == [0, 0]
    assert not iou.isnan().any()
    others = [i for i in range(20) if i not in (4, 5)]
    assert (matched[0, others] >= 0).all()  # they tie at IoU 0 with the ground truth that touches nothing
    valid[1, 1] = False  # leaving out the ground truth with NaN changes nothing
    torch.testing.assert_close(match_boxes(boxes, gt, valid, 0.5, 0.3, True), (matched, iou))
    boxes[:] = float("nan")
    assert (match_boxes(boxes, gt, valid, 0.5, 0.3, True)[0] == -1).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_zero_sizes(shape):
    b, a, g = shape
    valid = torch.ones(b, g, dtype=torch.bool, device=DEVICE)
    for call in (match_boxes, reference.match_boxes):
        matched, iou = call(random_boxes(b, a), random_boxes(b, g), valid, 0.5, 0.5, True)
        assert matched.shape == iou.shape == (b, a)
        assert (matched == -1).all()
        assert (iou == 0).all()


def test_other_dtypes_and_strides():
    boxes, gt, valid = random_boxes(2, 40), random_boxes(2, 3), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    want = match_boxes(boxes, gt, valid, 0.5, 0.3, True)
    strided = boxes.transpose(0, 1).contiguous().transpose(0, 1), gt.mT.contiguous().mT
    torch.testing.assert_close(match_boxes(*strided, valid, 0.5, 0.3, True), want)
    half = match_boxes(boxes.half(), gt.half(), valid, 0.5, 0.3, True)
    torch.testing.assert_close(half, match_boxes(boxes.half().float(), gt.half().float(), valid, 0.5, 0.3, True))
    assert match_boxes(boxes.double(), gt, valid, 0.5, 0.3, True)[1].dtype == torch.float64


def test_opcheck_compile_and_fake():
    boxes, gt, valid = random_boxes(2, 9), random_boxes(2, 3), torch.tensor([[True, False, True]] * 2, device=DEVICE)
    arguments = valid, 0.5, 0.3, True
    opcheck(MATCH, (boxes, gt, *arguments))
    opcheck(MATCH, (boxes[0], gt.half(), *arguments))
    compiled = torch.compile(match_boxes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(boxes, gt, *arguments), match_boxes(boxes, gt, *arguments))
    assert not match_boxes(boxes.requires_grad_(), gt, *arguments)[1].requires_grad
    with FakeTensorMode():
        empty = torch.empty(3, 4, dtype=torch.bool)
        matched, iou = match_boxes(torch.empty(11, 4), torch.empty(3, 4, 4), empty, 0.7, 0.3, True)
        assert matched.shape == iou.shape == (3, 11)


def test_errors():
    boxes, gt, valid = random_boxes(2, 9), random_boxes(2, 3), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="low"):
        match_boxes(boxes, gt, valid, 0.3, 0.5, False)
    with pytest.raises(ValueError, match="gt_valid"):
        match_boxes(boxes, gt, valid[:, :2], 0.5, 0.5, False)
    with pytest.raises(ValueError, match="3 images"):
        match_boxes(random_boxes(3, 9), gt, valid, 0.5, 0.5, False)
