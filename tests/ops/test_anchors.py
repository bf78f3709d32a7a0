"""Anchor grids: torchvision's generator, arithmetic by hand, compilers."""

import pytest
import torch
from support import DEVICE
from torch._subclasses import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fastrcnn.ops import grid_anchors
from fastrcnn.ops.reference import anchors as reference


def pyramid() -> tuple[list[tuple[int, int]], list[tuple[float, float]], list[torch.Tensor]]:
    sizes = [(5, 7), (3, 4), (1, 2)]
    return sizes, [(8.0, 8.0), (16.0, 12.5), (33.3, 32.0)], [torch.randn(a, 4, device=DEVICE) * 50 for a in (3, 1, 4)]


def test_equal_to_torchvision():
    generator = AnchorGenerator(((32, 40), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3).to(DEVICE)
    sizes = [(25, 34), (13, 17), (7, 9)]
    images = torch.empty(1, 3, 200, 272, device=DEVICE)
    features = [images.new_empty(1, 1, *size) for size in sizes]
    (want,) = generator(ImageList(images, [(200, 272)]), features)
    strides = [(200 // h, 272 // w) for h, w in sizes]
    assert grid_anchors(sizes, strides, generator.cell_anchors).equal(want)


def test_golden_values():
    """A C4 grid with the integer cell anchors of maskrcnn-benchmark."""
    cells = torch.tensor([[-15.0, -4, 30, 19], [-8, -8, 23, 23], [-3, -14, 18, 29]], device=DEVICE)
    anchors = grid_anchors([(2, 3)], [(16, 16)], [cells])
    assert anchors.shape == (18, 4)
    assert anchors[:3].equal(cells)
    assert anchors[4].tolist() == [8, -8, 39, 23]  # x = 1
    assert anchors[8].tolist() == [29, -14, 50, 29]  # x = 2
    assert anchors[9].tolist() == [-15, 12, 30, 35]  # y = 1, x = 0


def test_order_and_fractional_strides():
    sizes, strides, cells = pyramid()
    want = [
        [c[0] + x * sx, c[1] + y * sy, c[2] + x * sx, c[3] + y * sy]
        for (h, w), (sy, sx), level in zip(sizes, strides, cells, strict=True)
        for y in range(h)
        for x in range(w)
        for c in level.tolist()
    ]
    torch.testing.assert_close(grid_anchors(sizes, strides, cells).cpu(), torch.tensor(want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_is_that_of_the_cell_anchors(dtype):
    sizes, strides, cells = pyramid()
    cells = [c.to(dtype) for c in cells]
    anchors = grid_anchors(sizes, strides, cells)
    assert anchors.dtype == dtype
    wide = grid_anchors(sizes, strides, [c.double() for c in cells])
    # one rounding of the sum; of the products too, in float32, where the result is narrower than double
    assert (anchors.double() - wide).abs().max() <= torch.finfo(dtype).eps * wide.abs().max()


def test_empty_level():
    cells = torch.randn(3, 4, device=DEVICE)
    anchors = grid_anchors([(0, 4), (1, 2)], [(8, 8), (16, 16)], [cells, cells])
    assert anchors.equal(grid_anchors([(1, 2)], [(16, 16)], [cells]))


def test_errors():
    cells = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        grid_anchors([(1, 1)], [(8, 8), (16, 16)], [cells])
    with pytest.raises(ValueError, match="one entry per level"):
        grid_anchors([], [], [])
    with pytest.raises(ValueError, match=r"cell_anchors\[0\] must be \[A, 4\], got \(3, 5\)"):
        grid_anchors([(1, 1)], [(8, 8)], [torch.zeros(3, 5)])
    with pytest.raises(ValueError, match="dtype"):
        grid_anchors([(1, 1)] * 2, [(8, 8)] * 2, [cells, cells.double()])
    with pytest.raises(ValueError, match="dtype"):
        grid_anchors([(1, 1)], [(8, 8)], [cells.long()])
    with pytest.raises(
        ValueError, match=r"cell_anchors\[1\] must be on the device of cell_anchors\[0\], cpu, got meta"
    ):
        grid_anchors([(1, 1)] * 2, [(8, 8)] * 2, [cells, cells.to("meta")])


@pytest.mark.filterwarnings("error")
def test_no_gradient():
    cells = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    assert not grid_anchors([(2, 3)], [(8, 8)], [cells]).requires_grad
    assert not torch.ops.fastrcnn.grid_anchors([cells], [2, 3], [8.0, 8.0]).requires_grad


def test_opcheck_and_compile():
    sizes, strides, cells = pyramid()
    flat = [s for size in sizes for s in size], [s for stride in strides for s in stride]
    for gradient in (False, True):
        leaves = [c.clone().requires_grad_(gradient) for c in cells]
        torch.library.opcheck(torch.ops.fastrcnn.grid_anchors.default, (leaves, *flat))

    def of_features(features, cells):
        return grid_anchors([f.shape[-2:] for f in features], strides, cells)

    compiled = torch.compile(of_features, fullgraph=True, backend="aot_eager", dynamic=True)
    for extra in (0, 2):
        features = [torch.empty(1, h + extra, w + 3 * extra, device=DEVICE) for h, w in sizes]
        assert compiled(features, cells).equal(of_features(features, cells))
        assert compiled(features, cells).equal(
            reference.grid_anchors(
                cells, [s for f in features for s in f.shape[-2:]], [s for stride in strides for s in stride]
            )
        )


def test_traces_without_data():
    with FakeTensorMode():
        anchors = grid_anchors([(50, 60)], [(16, 16)], [torch.empty(3, 4, device=DEVICE)])
        assert anchors.shape == (9000, 4)
