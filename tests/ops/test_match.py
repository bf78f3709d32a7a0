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
    for requires_grad in (False, True):
        leaves = boxes.clone().requires_grad_(requires_grad), gt.clone().requires_grad_(requires_grad)
        matched, iou = match_boxes(*leaves, *arguments)
        assert not matched.requires_grad
        assert not iou.requires_grad
    compiled = torch.compile(match_boxes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(boxes, gt, *arguments), match_boxes(boxes, gt, *arguments))
    with FakeTensorMode():
        empty = torch.empty(3, 4, dtype=torch.bool)
        matched, iou = match_boxes(torch.empty(11, 4), torch.empty(3, 4, 4), empty, 0.7, 0.3, True)
        assert matched.shape == iou.shape == (3, 11)


def test_errors():
    boxes, gt, valid = random_boxes(2, 9), random_boxes(2, 3), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    rest = 0.5, 0.5, False
    with pytest.raises(ValueError, match="low"):
        match_boxes(boxes, gt, valid, 0.3, 0.5, False)
    with pytest.raises(ValueError, match=r"boxes must have the shape .* \[2, 9, 3\]"):
        match_boxes(boxes[..., :3], gt, valid, *rest)
    with pytest.raises(ValueError, match="gt_valid"):
        match_boxes(boxes, gt, valid[:, :2], *rest)
    with pytest.raises(ValueError, match="3 images"):
        match_boxes(random_boxes(3, 9), gt, valid, *rest)
    with pytest.raises(ValueError, match=r"boxes must be of floating point, got torch\.int64"):
        match_boxes(boxes.long(), gt, valid, *rest)
    with pytest.raises(ValueError, match=r"gt_valid must be of torch\.bool, got torch\.float32"):
        match_boxes(boxes, gt, valid.float(), *rest)
    with pytest.raises(ValueError, match="gt_boxes must be on the device of boxes"):
        match_boxes(boxes, gt.to("meta"), valid, *rest)


def step_inputs():
    boxes, gt, valid = random_boxes(3, 5000, integer=True), random_boxes(3, 16), torch.rand(3, 16, device=DEVICE) > 0.5
    boxes[0, 7] = gt[1, 1] = float("nan")
    return boxes, gt, valid


def both(boxes, gt, valid):
    return *match_boxes(boxes, gt, valid, 0.7, 0.3, True), *match_boxes(boxes[0], gt, valid, 0.5, 0.5, False)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph():
    static = step_inputs()
    both(*static)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(*static)
    for _ in range(2):
        changed = step_inputs()
        for old, new in zip(static, changed, strict=True):
            old.copy_(new)
        graph.replay()
        want = both(*(x.cpu() for x in changed))
        torch.testing.assert_close([x.cpu() for x in results], list(want), rtol=0, atol=0)


@pytest.mark.gpu
def test_many_anchors_on_the_gpu():
    boxes, gt, valid = random_boxes(267_000), random_boxes(8, 128), torch.rand(8, 128, device=DEVICE) > 0.3
    got = [match_boxes(boxes, gt, valid, 0.7, 0.3, True) for _ in range(2)]
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=0)
    want = match_boxes(boxes.cpu(), gt.cpu(), valid.cpu(), 0.7, 0.3, True)
    torch.testing.assert_close([x.cpu() for x in got[0]], list(want), rtol=0, atol=0)


@pytest.mark.gpu
def test_memory_is_independent_of_ground_truths():
    boxes = random_boxes(1 << 20)
    peaks = []
    for slots in (1, 512):
        gt, valid = random_boxes(1, slots), torch.ones(1, slots, dtype=torch.bool, device=DEVICE)
        match_boxes(boxes, gt, valid, 0.7, 0.3, True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        match_boxes(boxes, gt, valid, 0.7, 0.3, True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + (1 << 20)
