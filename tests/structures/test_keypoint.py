import pytest
import torch

from fastrcnn.structures import FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, Keypoints, PersonKeypoints
from fastrcnn.structures.keypoint import flip_map_of

SIZE = (30, 20)


def person() -> PersonKeypoints:
    points = torch.cat((torch.rand(3, 17, 2) * torch.tensor(SIZE), torch.full((3, 17, 1), 2.0)), 2)
    points[1, 4] = 0
    return PersonKeypoints(points, SIZE)


def test_flip_swaps_left_and_right():
    keypoints = person()
    flipped = keypoints.transpose(FLIP_LEFT_RIGHT)
    names = PersonKeypoints.NAMES
    for i, name in enumerate(names):
        mirrored = name.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right")
        want = keypoints.keypoints[:, names.index(mirrored)].clone()
        want[:, 0] = torch.where(want[:, 2] > 0, SIZE[0] - want[:, 0], 0)
        torch.testing.assert_close(flipped.keypoints[:, i], want)


@pytest.mark.parametrize(("method", "axis"), [(FLIP_LEFT_RIGHT, 1), (FLIP_TOP_BOTTOM, 0)])
def test_flip_moves_a_keypoint_with_its_pixel(method, axis):
    image = torch.zeros(SIZE[1], SIZE[0])
    image[4, 7] = 1
    got = Keypoints([[[7.5, 4.5, 2]]], SIZE).transpose(method).keypoints[0, 0]
    y, x = image.flip(axis).nonzero()[0].tolist()
    assert got.tolist() == [x + 0.5, y + 0.5, 2]


@pytest.mark.parametrize("method", [FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM])
def test_flip_twice_is_nothing(method):
    keypoints = person()
    twice = keypoints.transpose(method).transpose(method)
    assert isinstance(twice, PersonKeypoints)
    torch.testing.assert_close(twice.keypoints, keypoints.keypoints)


def test_resize_scales_and_leaves_unlabelled_at_zero():
    keypoints = person()
    resized = keypoints.resize((15, 60))
    assert resized.size == (15, 60)
    torch.testing.assert_close(resized.keypoints, keypoints.keypoints * torch.tensor([0.5, 3, 1]))
    assert resized.keypoints[1, 4].tolist() == [0, 0, 0]


def test_crop_forgets_what_is_outside():
    keypoints = Keypoints([[[5, 5, 2], [25, 5, 1], [12, 19, 2]]], SIZE).crop((4, 2, 20, 12))
    assert keypoints.keypoints.tolist() == [[[1, 3, 2], [0, 0, 0], [0, 0, 0]]]
    assert keypoints.size == (16, 10)


def test_indexing_and_cat():
    keypoints = person()
    again = Keypoints.cat([keypoints[[2]], keypoints[:2]])
    assert torch.equal(again.keypoints, keypoints.keypoints[[2, 0, 1]])
    assert isinstance(again, PersonKeypoints)
    assert len(keypoints[torch.tensor([False, True, False])]) == 1


def test_flip_map_by_name():
    assert flip_map_of(["head", "left_hand", "right_hand", "left_wing"]) == [0, 2, 1, 3]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        Keypoints(torch.zeros(2, 3), SIZE)
    with pytest.raises(ValueError, match="permutation"):
        Keypoints(torch.zeros(1, 2, 3), SIZE, [1, 1])
