import json

import numpy as np
import pycocotools.mask
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastrcnn.config.conventions import CONVENTIONS
from fastrcnn.evaluation import encode_masks, masks
from fastrcnn.structures import BoxList

TORCHVISION = CONVENTIONS["torchvision"]


def detections(count, size=(70, 50)):
    corners = torch.rand(count, 2) * torch.tensor([50.0, 30.0])
    boxlist = BoxList(torch.cat([corners, corners + 3 + torch.rand(count, 2) * 25], 1), size)
    boxlist.add_field("scores", torch.rand(count))
    boxlist.add_field("mask", torch.rand(count, 14, 14))
    return boxlist


@pytest.mark.parametrize(
    "pixels", [1 << 24, 3 * 70 * 50, 1]
)  # one chunk, chunks of three, one mask larger than a chunk
def test_codes_are_those_of_the_pasted_masks(pixels, monkeypatch):
    monkeypatch.setattr(masks, "_CHUNK_PIXELS", pixels)
    boxlist = detections(7)
    encoded = encode_masks(boxlist, TORCHVISION)
    want = paste_masks_in_image(boxlist.get_field("mask")[:, None], boxlist.bbox, (50, 70))[:, 0] > 0.5
    got = np.stack([pycocotools.mask.decode(code) for code in encoded.get_field("rle")])
    np.testing.assert_array_equal(got, want.numpy())
    assert json.loads(json.dumps(encoded.get_field("rle"))) == encoded.get_field("rle")
    assert set(encoded.fields()) == {"scores", "rle"}
    assert boxlist.has_field("mask")


def test_a_mask_channel_and_no_detections():
    boxlist = detections(2)
    plain = encode_masks(boxlist, TORCHVISION).get_field("rle")
    boxlist.add_field("mask", boxlist.get_field("mask")[:, None])
    assert encode_masks(boxlist, TORCHVISION).get_field("rle") == plain
    assert encode_masks(detections(0), TORCHVISION).get_field("rle") == []


def test_continuous_rule_is_handed_on():
    """A mask of ones fills its box: the continuous rule keeps the pixels whose middle is inside."""
    boxlist = BoxList(torch.tensor([[10.0, 20.0, 30.0, 40.0]]), (70, 50))
    boxlist.add_field("mask", torch.ones(1, 14, 14))
    [code] = encode_masks(boxlist, CONVENTIONS["modern"]).get_field("rle")
    want = np.zeros((50, 70), np.uint8)
    want[20:40, 10:30] = 1
    np.testing.assert_array_equal(pycocotools.mask.decode(code), want)


def test_inclusive_corners_of_the_legacy_conventions():
    """Their mask is pasted at the last pixel, x2 − 1 of our box."""
    boxlist = detections(3)
    inclusive = boxlist.copy_with_fields(["mask"])
    inclusive.bbox = boxlist.bbox - boxlist.bbox.new_tensor([0, 0, 1, 1])
    want = encode_masks(inclusive, TORCHVISION).get_field("rle")
    assert encode_masks(boxlist, CONVENTIONS["detectron"]).get_field("rle") == want
    assert encode_masks(boxlist, TORCHVISION).get_field("rle") != want


def test_masks_that_are_pasted_already():
    boxlist = detections(2)
    boxlist.add_field("mask", torch.rand(2, 50, 70) > 0.5)
    got = np.stack([pycocotools.mask.decode(code) for code in encode_masks(boxlist, TORCHVISION).get_field("rle")])
    np.testing.assert_array_equal(got, boxlist.get_field("mask").numpy())
