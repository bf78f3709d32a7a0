import pytest
import torch
from support import DEVICE, TOLERANCES, assert_accurate

from fastrcnn.ops.reference import box_coder as reference
from triton_kernels import box_coder as kernels

WEIGHTS = [10.0, 8.0, 5.0, 4.0]
MAX_LOG = 4.135
ROWS = (0, 1, kernels.BLOCK + 3)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the boxes past the end of a block


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN, so that rows that a kernel does not write show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n, dtype):
    corner = torch.rand(2, n, 2) * 100
    boxes, anchors = torch.cat((corner, corner + 4 + torch.rand(2, n, 2) * 60), -1)
    sizes = torch.randint(40, 120, (n, 2), dtype=torch.int32)
    tensors = torch.randn(n, 4), torch.randn(n, 4) * 8, boxes, anchors, sizes  # grad, deltas, …
    return [x.to(DEVICE, dtype if x.is_floating_point() else None) for x in tensors]


def widened(*tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


def check(got, want, dtype, like):
    for g, w, x in zip(got, want, like, strict=True):
        assert g.dtype == x.dtype
        assert_accurate(g, w, dtype)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_encode(n, dtype):
    grad, _, boxes, anchors, _ = inputs(n, dtype)
    got = kernels.encode_boxes(boxes, anchors, WEIGHTS)
    check([got], [reference.encode_boxes(*widened(boxes, anchors), WEIGHTS)], dtype, [boxes])
    got = kernels.encode_boxes_backward(grad, boxes, anchors, WEIGHTS)
    want = reference.encode_boxes_backward(*widened(grad, boxes, anchors), WEIGHTS)
    check(got, want, dtype, (boxes, anchors))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_decode(n, dtype, clip):
    grad, deltas, _, anchors, sizes = inputs(n, dtype)
    sizes = sizes if clip else None
    got = kernels.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    check([got], [reference.decode_boxes(*widened(deltas, anchors, sizes), WEIGHTS, MAX_LOG)], dtype, [deltas])
    got = kernels.decode_boxes_backward(grad, deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    want = reference.decode_boxes_backward(*widened(grad, deltas, anchors, sizes), WEIGHTS, MAX_LOG)
    check(got, want, dtype, (deltas, anchors))


def test_float64_is_computed_in_float64():
    grad, deltas, boxes, anchors, sizes = inputs(5, torch.float64)
    torch.testing.assert_close(
        kernels.encode_boxes(boxes, anchors, WEIGHTS),
        reference.encode_boxes(boxes, anchors, WEIGHTS),
        rtol=0,
        atol=1e-12,
    )
    got = kernels.decode_boxes_backward(grad, deltas, anchors, sizes, [1.0, 1.0, 1.0, 1.0], 4.0)
    want = reference.decode_boxes_backward(grad, deltas, anchors, sizes, [1.0, 1.0, 1.0, 1.0], 4.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_half_deltas_with_float_anchors():
    grad, deltas, _, anchors, sizes = inputs(9, torch.float32)
    deltas = deltas.half()
    got = kernels.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    check([got], [reference.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG)], torch.float32, [anchors])
    got = kernels.decode_boxes_backward(grad, deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    want = reference.decode_boxes_backward(*widened(grad, deltas, anchors), sizes, WEIGHTS, MAX_LOG)
    check(got[:1], want[:1], torch.float16, [deltas])
    check(got[1:], want[1:], torch.float32, [anchors])


def test_nan_stays_in_its_box():
    _, deltas, _, anchors, sizes = inputs(8, torch.float32)
    deltas[2, 0] = deltas[3, 3] = float("nan")
    deltas[4, 2] = float("inf")
    got = kernels.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    want = reference.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want.isnan().sum() == 4
