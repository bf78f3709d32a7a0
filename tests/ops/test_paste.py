import pytest
import torch
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import grid_sample
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastrcnn.ops.paste import PASTE, paste_masks
from fastrcnn.ops.reference import paste as reference

SIZE = (47, 61)


def random_boxes(count, scale=40.0):
    centre = torch.rand(count, 2) * torch.tensor([61.0, 47])
    half = torch.rand(count, 2) * scale / 2 + 0.2
    return torch.cat((centre - half, centre + half), 1).to(DEVICE)


def by_grid_sample(masks, boxes, size):
    """detectron2's rule, one mask after the other, in float64."""
    out = []
    for mask, (x1, y1, x2, y2) in zip(masks.double(), boxes.double().tolist(), strict=True):
        y = (torch.arange(size[0], device=DEVICE, dtype=torch.float64) + 0.5 - y1) / (y2 - y1) * 2 - 1
        x = (torch.arange(size[1], device=DEVICE, dtype=torch.float64) + 0.5 - x1) / (x2 - x1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        out.append(grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize("side", [1, 14, 28])
@pytest.mark.parametrize("scale", [2.0, 40.0, 300.0])  # tiny, ordinary, larger than the image
def test_integer_rule_is_torchvisions(side, scale):
    masks, boxes = torch.rand(40, side, side, device=DEVICE), random_boxes(40, scale)
    want = paste_masks_in_image(masks[:, None], boxes, SIZE)[:, 0]
    assert want.amax((1, 2)).min() > 0
    # a source position, up to side + 2, is rounded in either: half a unit in the last place each, weights change by it
    limit = max((side + 2) * 2**-23, 1e-6)
    torch.testing.assert_close(paste_masks(masks, boxes, SIZE, None), want, rtol=0, atol=limit)
    got, clear = paste_masks(masks, boxes, SIZE), (want - 0.5).abs() > limit
    assert got.dtype == torch.bool
    assert torch.equal(got[clear], (want > 0.5)[clear])


@pytest.mark.parametrize("scale", [2.0, 40.0, 300.0])
def test_continuous_rule_is_grid_samples(scale):
    masks, boxes = torch.rand(40, 28, 28, device=DEVICE), random_boxes(40, scale)
    boxes[:5] += 200  # outside
    want = by_grid_sample(masks, boxes, SIZE)
    # a source position in float32 is off by 28 / box side · 61 · 2⁻²⁴
    torch.testing.assert_close(paste_masks(masks, boxes, SIZE, None, True).double(), want, rtol=0, atol=2e-4)
    large = boxes[:, 2:] - boxes[:, :2] > 20
    large = large.all(1)
    torch.testing.assert_close(
        paste_masks(masks[large], boxes[large], SIZE, None, True).double(), want[large], rtol=0, atol=1e-5
    )
    assert scale < 40 or large.any()


def test_threshold_is_inclusive_only_in_the_continuous_rule():
    masks, boxes = torch.full((1, 4, 4), 0.5, device=DEVICE), torch.tensor([[2.0, 2, 10, 10]], device=DEVICE)
    assert paste_masks(masks, boxes, (12, 12)).sum() == 0
    assert paste_masks(masks, boxes, (12, 12), continuous=True)[0, 2:10, 2:10].sum() > 30


def test_box_outside_the_image():
    masks = torch.ones(4, 4, 4, device=DEVICE)
    boxes = torch.tensor([[-30.0, 5, -20, 15], [70, 5, 80, 15], [5, -30, 15, -20], [5, 50, 15, 60]], device=DEVICE)
    for continuous in (False, True):
        assert paste_masks(masks, boxes, SIZE, None, continuous).abs().max() == 0


@pytest.mark.parametrize("continuous", [False, True])
def test_not_finite_or_inverted(continuous):
    masks, boxes = torch.ones(6, 4, 4, device=DEVICE), random_boxes(1).repeat(6, 1)
    clean = paste_masks(masks, boxes, SIZE, None, continuous)
    boxes[1, 0], boxes[2, 3], boxes[3, 1] = float("nan"), float("inf"), -float("inf")
    boxes[4] = boxes[4, [2, 3, 0, 1]] + torch.tensor([40.0, 40, 0, 0], device=DEVICE)
    boxes[5] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    got = paste_masks(masks, boxes, SIZE, None, continuous)
    torch.testing.assert_close(got[0], clean[0])
    assert clean[0].max() > 0
    assert got[1:5].abs().max() == 0
    assert not got.isnan().any()


def test_chunks(monkeypatch):
    masks, boxes = torch.rand(7, 14, 14, device=DEVICE), random_boxes(7)
    want = paste_masks(masks, boxes, SIZE)
    monkeypatch.setattr(reference, "BLOCK", 2 * SIZE[0] * SIZE[1])
    assert torch.equal(paste_masks(masks, boxes, SIZE), want)
    assert 0 < want.float().mean() < 1


def test_autocast_and_half():
    masks, boxes = torch.rand(5, 28, 28, device=DEVICE), random_boxes(5)
    want = paste_masks(masks, boxes, SIZE, None)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(paste_masks(masks, boxes, SIZE, None), want, rtol=0, atol=0)
    got = paste_masks(masks.half(), boxes, SIZE, None)
    torch.testing.assert_close(got, paste_masks(masks.half().float(), boxes, SIZE, None))


@pytest.mark.parametrize(("masks", "size"), [((0, 28, 28), (9, 9)), ((3, 0, 0), (9, 9)), ((3, 28, 28), (0, 9))])
def test_zero_sizes(masks, size):
    for threshold in (None, 0.5):
        got = paste_masks(torch.rand(masks), torch.rand(masks[0], 4), size, threshold)
        assert got.shape == (masks[0], *size)
        assert got.sum() == 0


def test_opcheck_compile_fake_and_strides():
    masks, boxes = torch.rand(3, 14, 14, device=DEVICE), random_boxes(3)
    opcheck(PASTE, (masks, boxes, *SIZE, None, False))
    opcheck(PASTE, (masks, boxes, *SIZE, 0.5, True))
    compiled = torch.compile(paste_masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks, boxes, SIZE), paste_masks(masks, boxes, SIZE))
    strided = paste_masks(masks.mT.contiguous().mT, boxes.t().contiguous().t(), SIZE, None)
    torch.testing.assert_close(strided, paste_masks(masks, boxes, SIZE, None), rtol=0, atol=1e-6)
    with FakeTensorMode():
        out = paste_masks(torch.empty(3, 28, 28, dtype=torch.float16), torch.empty(3, 4), (80, 90))
        assert out.shape == (3, 80, 90)
        assert out.dtype == torch.bool


def test_errors():
    with pytest.raises(ValueError, match="masks"):
        paste_masks(torch.rand(2, 1, 14, 14), torch.rand(2, 4), SIZE)
    with pytest.raises(ValueError, match="boxes"):
        paste_masks(torch.rand(2, 14, 14), torch.rand(3, 4), SIZE)
