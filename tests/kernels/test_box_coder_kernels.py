import math

import pytest
import torch
import triton
from support import DEVICE, TOLERANCES, assert_accurate

from fastrcnn.ops.reference import box_coder as reference
from triton_kernels import box_coder as kernels
from triton_kernels.launch import Launch, override

WEIGHTS = [10.0, 8.0, 5.0, 4.0]
MAX_LOG = 4.135
BLOCK = kernels.config(4, 3).block
CLIPS = ("no", "size", "sizes")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the boxes past the end of a block


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN, so that rows that a kernel does not write show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_boxes(*shape):
    corner = torch.rand(*shape, 2) * 100
    return torch.cat((corner, corner + 4 + torch.rand(*shape, 2) * 60), -1)


def inputs(first, anchors, dtype, clip="no"):
    """grad, deltas, boxes, anchors, sizes, size; of shapes first, anchors [..., 4]."""
    shape = torch.broadcast_shapes((*first, 4), (*anchors, 4))
    tensors = torch.randn(shape), torch.randn(*first, 4) * 8, random_boxes(*first), random_boxes(*anchors)
    sizes = torch.randint(40, 120, (*shape[:1], *[1] * (len(shape) - 2), 2), dtype=torch.int32, device=DEVICE)
    sizes, size = sizes if clip == "sizes" else None, [70, 90] if clip == "size" else None
    return *(x.to(DEVICE, dtype) for x in tensors), sizes, size


def widened(*tensors):
    return [x.double() for x in tensors]


def check(got, want, dtype, like):
    for g, w, x in zip(got, want, like, strict=True):
        assert g.dtype == x.dtype
        assert_accurate(g, w, dtype)


def check_encode(first, anchors, dtype, inclusive):
    grad, _, boxes, anchors, *_ = inputs(first, anchors, dtype)
    got = kernels.encode_boxes(boxes, anchors, WEIGHTS, inclusive)
    check([got], [reference.encode_boxes(*widened(boxes, anchors), WEIGHTS, inclusive)], dtype, [boxes])
    got = kernels.encode_boxes_backward(grad, boxes, anchors, WEIGHTS, inclusive, True)
    want = reference.encode_boxes_backward(*widened(grad, boxes, anchors), WEIGHTS, inclusive, True)
    check(got, want, dtype, (boxes, anchors))
    alone = kernels.encode_boxes_backward(grad, boxes, anchors, WEIGHTS, inclusive, False)
    torch.testing.assert_close(alone, (got[0], anchors.new_empty(0)), rtol=0, atol=0)


def check_decode(first, anchors, dtype, inclusive, clip):
    grad, deltas, _, anchors, sizes, size = inputs(first, anchors, dtype, clip)
    rest = sizes, WEIGHTS, MAX_LOG, size, inclusive
    got = kernels.decode_boxes(deltas, anchors, *rest)
    check([got], [reference.decode_boxes(*widened(deltas, anchors), *rest)], dtype, [deltas])
    got = kernels.decode_boxes_backward(grad, deltas, anchors, *rest, True)
    want = reference.decode_boxes_backward(*widened(grad, deltas, anchors), *rest, True)
    check(got, want, dtype, (deltas, anchors))
    alone = kernels.decode_boxes_backward(grad, deltas, anchors, *rest, False)
    torch.testing.assert_close(alone, (got[0], anchors.new_empty(0)), rtol=0, atol=0)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_encode(dtype, inclusive):
    check_encode((BLOCK + 3,), (BLOCK + 3,), dtype, inclusive)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_decode(dtype, inclusive, clip):
    check_decode((BLOCK + 3,), (BLOCK + 3,), dtype, inclusive, clip)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
def test_sizes(n):
    check_encode((n,), (n,), torch.float32, False)
    check_decode((n,), (n,), torch.float32, False, "sizes")


# anchors of all images, of all classes, of both; in a way that must be copied; one for all; and deltas that broadcast
SHAPES = [((3, 5), (5,)), ((7, 3), (7, 1)), ((2, 5, 3), (5, 1)), ((2, 3, 5), (2, 1, 5)), ((6,), (1,)), ((5, 1), (1, 7))]


@pytest.mark.parametrize(("first", "anchors"), SHAPES)
def test_broadcasting(first, anchors):
    check_encode(first, anchors, torch.float32, False)
    for clip in CLIPS:
        check_decode(first, anchors, torch.float32, True, clip)
    check_decode(first, anchors, torch.float16, False, "sizes")


def test_what_broadcasts_is_not_copied():
    anchors = random_boxes(7)
    for view, shape, want in (
        (anchors, (3, 7, 4), 1),
        (anchors[:, None], (7, 3, 4), 3),
        (anchors[:, None], (2, 7, 3, 4), 3),
        (anchors[:1], (2, 7, 4), 14),
        (anchors, (7, 4), 1),
    ):
        rows, repeat = kernels.repeated_rows(view, shape)
        assert rows.data_ptr() == anchors.data_ptr()
        assert repeat == want
        index = torch.arange(math.prod(shape[:-1]))
        torch.testing.assert_close(rows[index // repeat % len(rows)].view(shape), view.expand(shape))


@pytest.mark.parametrize("launch", [Launch(32, 1), Launch(512, 8)])
def test_other_configurations(launch):
    with override("box_coder", launch):
        check_encode((2, 40), (40,), torch.float32, True)
        check_decode((2, 40), (40,), torch.float32, True, "sizes")


def test_half_deltas_with_float_anchors():
    grad, deltas, _, anchors, sizes, _ = inputs((3, 9), (9,), torch.float32, "sizes")
    deltas, rest = deltas.half(), (sizes, WEIGHTS, MAX_LOG, None, False)
    got = kernels.decode_boxes(deltas, anchors, *rest)
    check([got], [reference.decode_boxes(*widened(deltas, anchors), *rest)], torch.float32, [anchors])
    got = kernels.decode_boxes_backward(grad, deltas, anchors, *rest, True)
    want = reference.decode_boxes_backward(*widened(grad, deltas, anchors), *rest, True)
    check(got[:1], want[:1], torch.float16, [deltas])
    check(got[1:], want[1:], torch.float32, [anchors])


def test_nan_stays_in_its_box():
    _, deltas, _, anchors, sizes, _ = inputs((8,), (8,), torch.float32, "sizes")
    deltas[2, 0] = deltas[3, 3] = float("nan")
    deltas[4, 2] = float("inf")
    rest = sizes, WEIGHTS, MAX_LOG, None, False
    got, want = kernels.decode_boxes(deltas, anchors, *rest), reference.decode_boxes(deltas, anchors, *rest)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert want.isnan().sum() == 4


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter can start at the last block")
@pytest.mark.parametrize("power", [29, 31])  # numbers past 2³¹, and boxes past 2³¹
def test_offsets_past_32_bits(monkeypatch, power):
    """The last boxes of tensors whose other pages are never touched."""
    from triton.runtime import interpreter

    torch.use_deterministic_algorithms(False)
    owners = (1 << power) // 5 + 20
    last, rest = divmod(owners * 5, BLOCK)
    assert rest > 5
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (last, 0, 0)))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # it would copy everything
    monkeypatch.setattr(triton, "cdiv", lambda a, b: 1)
    try:
        deltas, anchors, _ = (torch.empty(owners, n, 4, dtype=torch.float16) for n in (5, 1, 5))
    except RuntimeError as error:
        pytest.skip(f"memory that is never touched is not granted: {error}")
    sizes, rows = torch.tensor([[40, 60]], dtype=torch.int32), rest // 5
    deltas[-rows:], anchors[-rows:, 0] = torch.randn(rows, 5, 4), random_boxes(rows)
    got = kernels.decode_boxes(deltas, anchors, sizes, WEIGHTS, MAX_LOG, None, False)[-rows:]
    want = reference.decode_boxes(*widened(deltas[-rows:], anchors[-rows:]), sizes, WEIGHTS, MAX_LOG)
    assert_accurate(got, want, torch.float16)
