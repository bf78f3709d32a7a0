import numpy as np
import pytest
import torch
import torchvision

from fastrcnn.structures import (
    FLIP_LEFT_RIGHT,
    FLIP_TOP_BOTTOM,
    BoxList,
    Keypoints,
    SegmentationMask,
    boxlist_iou,
    cat_boxlist,
    remove_small_boxes,
)

SIZE = (20, 12)


def random_boxes(n: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Whole-pixel boxes of at least one pixel inside the image, [n, 4]."""
    x = torch.stack([torch.randperm(size[0] + 1)[:2].sort().values for _ in range(n)])
    y = torch.stack([torch.randperm(size[1] + 1)[:2].sort().values for _ in range(n)])
    return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), 1).float()


def paint(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """bool [N, H, W]: the pixels that each box covers."""
    out = torch.zeros(len(boxes), size[1], size[0], dtype=torch.bool)
    for canvas, (x1, y1, x2, y2) in zip(out, boxes.int().tolist(), strict=True):
        canvas[y1:y2, x1:x2] = True
    return out


def full(n: int = 6) -> BoxList:
    boxes = BoxList(random_boxes(n), SIZE)
    boxes.add_field("labels", torch.arange(n))
    boxes.add_field("names", [f"box {i}" for i in range(n)])
    boxes.add_field("masks", SegmentationMask(paint(boxes.bbox, SIZE), SIZE, "mask"))
    corners = torch.cat((boxes.bbox[:, :2], boxes.bbox[:, 2:]), 1).reshape(n, 2, 2)
    boxes.add_field("keypoints", Keypoints(torch.cat((corners, torch.ones(n, 2, 1)), 2), SIZE))
    return boxes


@pytest.mark.parametrize("mode", ["xyxy", "xywh"])
@pytest.mark.parametrize(("method", "axis"), [(FLIP_LEFT_RIGHT, 2), (FLIP_TOP_BOTTOM, 1)])
def test_flip_moves_boxes_as_it_moves_their_pixels(mode, method, axis):
    boxes = full()
    flipped = boxes.convert(mode).transpose(method)
    assert flipped.mode == mode
    want = paint(boxes.bbox, SIZE).flip(axis)
    assert torch.equal(paint(flipped.convert("xyxy").bbox, SIZE), want)
    assert torch.equal(flipped.get_field("masks").get_mask_tensor().bool(), want)
    assert flipped.get_field("names") == boxes.get_field("names")
    twice = flipped.transpose(method).convert("xyxy")
    assert torch.equal(twice.bbox, boxes.bbox)
    assert torch.equal(twice.get_field("keypoints").keypoints, boxes.get_field("keypoints").keypoints)


def test_flip_rejects_other_methods():
    with pytest.raises(ValueError, match="FLIP_LEFT_RIGHT"):
        full().transpose(2)


@pytest.mark.parametrize("mode", ["xyxy", "xywh"])
def test_crop_cuts_boxes_as_it_cuts_their_pixels(mode):
    boxes, window = full(), (3, 2, 15, 9)
    cropped = boxes.convert(mode).crop(window)
    want = paint(boxes.bbox, SIZE)[:, 2:9, 3:15]
    assert cropped.size == (12, 7)
    assert torch.equal(paint(cropped.convert("xyxy").bbox, (12, 7)), want)
    assert torch.equal(cropped.get_field("masks").get_mask_tensor().bool(), want)
    inside = cropped.clip_to_image()
    assert torch.equal(inside.get_field("labels"), torch.arange(6)[want.flatten(1).any(1)])


def test_crop_window_is_made_whole_and_kept_inside():
    cropped = full().crop((-4.4, 2.6, 3.2, 99))
    assert cropped.size == (3, 9)
    assert cropped.get_field("masks").size == cropped.get_field("keypoints").size == (3, 9)


@pytest.mark.parametrize("mode", ["xyxy", "xywh"])
def test_resize_by_whole_factors_repeats_pixels(mode):
    boxes = full()
    resized = boxes.convert(mode).resize((SIZE[0] * 3, SIZE[1] * 2))
    want = paint(boxes.bbox, SIZE).repeat_interleave(2, 1).repeat_interleave(3, 2)
    assert torch.equal(paint(resized.convert("xyxy").bbox, resized.size), want)
    corners = resized.convert("xyxy").bbox.reshape(-1, 2, 2)
    assert torch.equal(resized.get_field("keypoints").keypoints[..., :2], corners)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        ([4, 0], [4, 0]),
        ([], []),
        (3, [3]),
        (-1, [5]),
        (torch.tensor([5, 5, 1]), [5, 5, 1]),
        (torch.tensor([True, False, True, False, False, True]), [0, 2, 5]),
        ([False] * 6, []),
        (np.array([2, 3]), [2, 3]),
    ],
)
def test_indexing_takes_the_same_rows_of_every_field(index, rows):
    boxes = full()
    part = boxes[index]
    assert len(part) == len(rows)
    assert torch.equal(part.bbox, boxes.bbox[torch.tensor(rows, dtype=torch.int64)])
    assert part.get_field("labels").tolist() == rows
    assert part.get_field("names") == [f"box {i}" for i in rows]
    assert torch.equal(part.get_field("masks").get_mask_tensor().bool(), paint(part.bbox, SIZE))
    assert torch.equal(part.get_field("keypoints").keypoints[..., :2].reshape(-1, 4), part.bbox)


def test_iou_and_area_against_counted_pixels():
    first, second = BoxList(random_boxes(7), SIZE), BoxList(random_boxes(5), SIZE).convert("xywh")
    a, b = paint(first.bbox, SIZE).flatten(1).double(), paint(second.convert("xyxy").bbox, SIZE).flatten(1).double()
    inter = a @ b.T
    want = inter / (a.sum(1)[:, None] + b.sum(1) - inter)
    torch.testing.assert_close(boxlist_iou(first, second).double(), want, rtol=1e-6, atol=0)
    assert first.area().tolist() == a.sum(1).tolist()
    assert second.area().tolist() == b.sum(1).tolist()


def test_iou_of_boxes_without_area_is_zero_and_sizes_must_agree():
    point = BoxList([[3, 3, 3, 3]], SIZE)
    assert boxlist_iou(point, point).tolist() == [[0]]
    with pytest.raises(ValueError, match="different size"):
        boxlist_iou(point, BoxList([[3, 3, 3, 3]], (9, 9)))


def test_convert_against_torchvision():
    boxes = torch.rand(8, 4) * 5
    boxes[:, 2:] += boxes[:, :2]
    got = BoxList(boxes, SIZE).convert("xywh")
    torch.testing.assert_close(got.bbox, torchvision.ops.box_convert(boxes, "xyxy", "xywh"))
    torch.testing.assert_close(got.convert("xyxy").bbox, boxes)


def test_clip_keeps_or_drops_what_is_outside():
    boxes = BoxList([[-5, -5, 4, 4], [18, 10, 30, 30], [25, 3, 30, 6], [4, 4, 4, 9]], SIZE)
    boxes.add_field("labels", torch.arange(4))
    clipped = boxes.clip_to_image()
    assert clipped.bbox.tolist() == [[0, 0, 4, 4], [18, 10, 20, 12]]
    assert clipped.get_field("labels").tolist() == [0, 1]
    assert boxes.clip_to_image(remove_empty=False).bbox.tolist()[2:] == [[20, 3, 20, 6], [4, 4, 4, 9]]
    assert boxes.bbox[0, 0] == -5


def test_cat_joins_every_kind_of_field():
    boxes = full()
    again = cat_boxlist([boxes[:2], boxes[2:2], boxes[2:]])
    assert torch.equal(again.bbox, boxes.bbox)
    assert again.get_field("labels").tolist() == list(range(6))
    assert again.get_field("names") == boxes.get_field("names")
    assert torch.equal(again.get_field("masks").get_mask_tensor(), boxes.get_field("masks").get_mask_tensor())
    assert torch.equal(again.get_field("keypoints").keypoints, boxes.get_field("keypoints").keypoints)


@pytest.mark.parametrize("other", [BoxList([], (3, 3)), BoxList([], SIZE, "xywh"), full(2).copy_with_fields("labels")])
def test_cat_of_different_kinds_is_an_error(other):
    with pytest.raises(ValueError, match="must agree"):
        cat_boxlist([BoxList([], SIZE), other])


def test_remove_small_boxes():
    boxes = BoxList([[0, 0, 2, 9], [0, 0, 3, 3], [0, 0, 9, 2.9]], SIZE)
    assert remove_small_boxes(boxes, 3).bbox.tolist() == [[0, 0, 3, 3]]


def test_no_boxes():
    empty = BoxList([], SIZE)
    empty.add_field("labels", torch.zeros(0, dtype=torch.int64))
    for moved in (empty.resize((5, 5)), empty.transpose(0), empty.crop((0, 0, 5, 5)), empty.clip_to_image(), empty[[]]):
        assert moved.bbox.shape == (0, 4)
        assert moved.has_field("labels")
    assert boxlist_iou(empty, full(3)).shape == (0, 3)


def test_bad_arguments_name_what_came():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        BoxList(torch.zeros(2, 3), SIZE)
    with pytest.raises(ValueError, match="cxcywh"):
        BoxList(torch.zeros(2, 4), SIZE, "cxcywh")
    boxes = BoxList(torch.zeros(2, 4), SIZE)
    with pytest.raises(ValueError, match="'labels' has length 3; there are 2"):
        boxes.add_field("labels", torch.zeros(3))
    with pytest.raises(KeyError, match="scores"):
        boxes.get_field("scores")
    with pytest.raises(KeyError, match="scores"):
        boxes.copy_with_fields(["scores"])
    assert boxes.copy_with_fields(["scores"], skip_missing=True).fields() == []
