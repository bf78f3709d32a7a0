import pytest
import torch

from fastrcnn.structures import ImageList, to_image_list


def test_images_are_padded_with_zeros_at_the_bottom_and_right():
    images = [torch.rand(3, 10, 7) + 1, torch.rand(3, 4, 30) + 1]
    batch = to_image_list(images, size_divisible=8)
    assert batch.tensors.shape == (2, 3, 16, 32)
    assert batch.image_sizes == [(10, 7), (4, 30)]
    for image, slot, (h, w) in zip(images, batch.tensors, batch.image_sizes, strict=True):
        assert torch.equal(slot[:, :h, :w], image)
        assert slot.sum() == pytest.approx(image.sum().item(), rel=1e-5)
    assert to_image_list(batch) is batch
    assert len(batch) == 2


def test_tensors_of_three_and_four_dimensions():
    assert to_image_list(torch.ones(3, 5, 6)).tensors.shape == (1, 3, 5, 6)
    assert isinstance(to_image_list(torch.ones(2, 3, 5, 6), 4), ImageList)
    assert to_image_list(torch.ones(2, 3, 5, 6), 4).tensors.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\[5, 6\]"):
        to_image_list(torch.ones(5, 6))
    with pytest.raises(ValueError, match="at least one"):
        to_image_list([])
