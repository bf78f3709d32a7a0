import pytest
import torch
import torchvision.ops as tv
from support import DEVICE

from fastrcnn.ops import boxes as ours

FORMATS = ("xyxy", "xywh", "cxcywh")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int16)


def random_boxes(*shape, dtype=torch.float32):
    corner = torch.rand(*shape, 2) * 60 - 10
    return torch.cat((corner, corner + torch.rand(*shape, 2) * 40), -1).to(DEVICE, dtype)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_torchvisions(dtype):
    a, b = random_boxes(3, 9, dtype=dtype), random_boxes(3, 7, dtype=dtype)
    a[0, 0, 2:] = a[0, 0, :2]
    a[0, 1, 2:] -= 60
    b[0, 0] = a[0, 0]
    for fmt in FORMATS:
        same(ours.box_area(a, fmt), tv.box_area(a, fmt))
        same(ours.box_iou(a, b, fmt), tv.box_iou(a, b, fmt))
        for out_fmt in FORMATS:
            same(ours.box_convert(a, fmt, out_fmt), tv.box_convert(a, fmt, out_fmt))
    same(ours.clip_boxes_to_image(a, (33, 44)), tv.clip_boxes_to_image(a, (33, 44)))
    same(ours.remove_small_boxes(a[0], 12), tv.remove_small_boxes(a[0], 12))
    same(ours.box_iou(a[0], b[0]), tv.box_iou(a[0], b[0]))


def test_rotated_boxes_as_torchvision():
    boxes = torch.tensor([[10.0, 20, 8, 4, 30]])
    same(ours.box_convert(boxes, "cxcywhr", "xywhr"), tv.box_convert(boxes, "cxcywhr", "xywhr"))


def test_by_hand():
    a, b = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 15, 10], [10, 10, 20, 20], [0, 0, 10, 10]])
    torch.testing.assert_close(ours.box_iou(a, b), torch.tensor([[1 / 3, 0, 1]]))
    assert ours.box_convert(b, "xyxy", "cxcywh").tolist()[0] == [10, 5, 10, 10]
    assert ours.clip_boxes_to_image(b, (8, 12)).tolist() == [[5, 0, 12, 8], [10, 8, 12, 8], [0, 0, 10, 8]]
    assert ours.remove_small_boxes(
        torch.tensor([[0.0, 0, 3, 3], [0, 0, 3, 2.9], [0, 0, 9, float("nan")]]), 3
    ).tolist() == [0]


def test_nan_and_zero_sizes():
    boxes = random_boxes(4)
    boxes[0, 0] = float("nan")
    assert ours.box_iou(boxes, boxes)[0].isnan().all()
    assert not ours.box_iou(boxes, boxes)[1:, 1:].isnan().any()
    same(ours.clip_boxes_to_image(boxes, (9, 9)), tv.clip_boxes_to_image(boxes, (9, 9)))
    empty = random_boxes(0)
    assert ours.box_iou(empty, boxes).shape == (0, 4)
    assert ours.box_area(empty).shape == ours.remove_small_boxes(empty, 1.0).shape == (0,)
    assert ours.box_convert(empty, "xyxy", "xywh").shape == ours.clip_boxes_to_image(empty, (5, 5)).shape == (0, 4)


def test_gradients():
    a, b = random_boxes(5, dtype=torch.float64).requires_grad_(), random_boxes(3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(ours.box_iou, (a, b))
    torch.autograd.gradcheck(lambda x: ours.box_convert(x, "xyxy", "cxcywh"), (a,))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.box_area(torch.rand(2, 4), "yx"),
        lambda m: m.box_iou(*torch.rand(2, 3, 4), "yx"),
        lambda m: m.box_convert(torch.rand(2, 4), "yx", "xyxy"),
    ],
)
def test_errors_are_torchvisions(call):
    with pytest.raises(ValueError) as want:
        call(tv)
    with pytest.raises(ValueError) as got:
        call(ours)
    assert str(got.value) == str(want.value)
