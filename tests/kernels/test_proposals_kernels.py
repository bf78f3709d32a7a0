"""The kernels of proposal selection against the definition: in the interpreter, or on a GPU where there is one."""

import pytest
import torch
from support import DEVICE

from fastrcnn.ops import proposals as op
from fastrcnn.ops.reference import proposals as reference
from triton_kernels import launch
from triton_kernels import nms as nms_kernels
from triton_kernels import proposals as kernels
from triton_kernels.launch import Launch

GRIDS = [(9, 11), (4, 6), (2, 3), (1, 2), (1, 1)]
CELLS = [3, 3, 1, 3, 3]
IMAGE_SIZES = [(72, 88), (50, 81)]
NAMES = "pre_nms_top_n post_nms_top_n max_proposals nms_threshold min_size weights per_batch".split()
OPTIONS = dict(zip(NAMES, (40, 30, 50, 0.6, 1e-3, [1.0, 1.0, 1.0, 1.0], False), strict=True))


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN and of the largest integers, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def distinct(batch: int, channels: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of which no two are equal in a level of an image: which of equal ones are taken is not defined."""
    n = channels * h * w
    order = torch.stack([torch.randperm(n) for _ in range(batch)])
    return ((order - n // 2) / 16).view(batch, channels, h, w).to(DEVICE, dtype)


def network(levels: int = 3, dtype: torch.dtype = torch.float32, size_dtype: torch.dtype = torch.int32) -> list:
    """logits, deltas, cell anchors, image sizes and flat strides of two images."""
    grids, cells = GRIDS[:levels], CELLS[:levels]
    shapes = torch.tensor([[-1.0, -1, 1, 1], [-2, -1, 2, 1], [-1, -2, 1, 2]])
    return [
        [distinct(2, a, h, w, dtype) for a, (h, w) in zip(cells, grids, strict=True)],
        [(0.4 * torch.randn(2, 4 * a, h, w)).to(DEVICE, dtype) for a, (h, w) in zip(cells, grids, strict=True)],
        [shapes[:a].to(DEVICE) * 8.0 * 2**level for level, a in enumerate(cells)],
        torch.tensor(IMAGE_SIZES, dtype=size_dtype, device=DEVICE),
        [float(s) for level in range(levels) for s in (8 * 2**level, 8.25 * 2**level)],
    ]


def check(inputs: list, **changes) -> tuple[torch.Tensor, ...]:
    """The kernels' results equal those of the definition; returns them."""
    options = (OPTIONS | changes).values()
    got = op._triton(*inputs, *options)
    want = reference.select_proposals(*inputs, *options)
    assert got[2].equal(want[2])
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bool]
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    return got


LAYOUTS = {
    "nchw": lambda level: torch.contiguous_format,
    "nhwc": lambda level: torch.channels_last,
    "mixed": lambda level: torch.channels_last if level % 2 else torch.contiguous_format,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_the_definition(layout, dtype):
    inputs = network(dtype=dtype)
    logits_format = LAYOUTS[layout]
    deltas_format = LAYOUTS[layout] if layout != "mixed" else lambda level: LAYOUTS[layout](level + 1)
    inputs[0] = [x.contiguous(memory_format=logits_format(level)) for level, x in enumerate(inputs[0])]
    inputs[1] = [x.contiguous(memory_format=deltas_format(level)) for level, x in enumerate(inputs[1])]
    valid = check(inputs, max_proposals=500)[2]
    assert valid[:, 0].all()
    assert not valid.all()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_proposals": 500},
        {"max_proposals": 500, "per_batch": True},
        {"max_proposals": 17, "per_batch": True},
        {"post_nms_top_n": 7},
        {"pre_nms_top_n": 5000, "post_nms_top_n": 5000},  # more than any level has
        {"pre_nms_top_n": 1},
        {"min_size": 16.0, "weights": [10.0, 10.0, 5.0, 5.0]},
        {"min_size": 1000.0},  # leaves nothing
        {"max_proposals": 0},
    ],
    ids=str,
)
def test_options(changes):
    check(network(), **changes)


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize("size_dtype", [torch.int32, torch.int64])
def test_number_of_levels(levels, size_dtype):
    check(network(levels, size_dtype=size_dtype), max_proposals=90, per_batch=levels == 5)


def test_more_levels_than_the_kernels_take():
    inputs = network(5)
    inputs = [x * 2 if isinstance(x, list) else x for x in inputs]
    boxes, _, valid = check(inputs)
    assert valid.any()
    assert boxes.shape == (2, 50, 4)


def test_logits_and_deltas_of_different_dtypes():
    inputs = network()
    inputs[0] = [
        x.to(dtype) for x, dtype in zip(inputs[0], (torch.bfloat16, torch.float16, torch.float32), strict=True)
    ]
    inputs[1][1] = inputs[1][1].half()
    check(inputs)


def test_views_with_any_strides():
    """Every second image, a part of the channels, transposed."""
    inputs = network()
    sizes = inputs[3].t().contiguous().t()
    want = check(inputs)
    for view in (
        lambda x: torch.cat([x[:1], torch.full_like(x[:1], 7.0), x[1:]])[::2],
        lambda x: torch.cat([torch.full_like(x, 7.0), x], 1)[:, x.shape[1] :],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        got = check([list(map(view, inputs[0])), list(map(view, inputs[1])), inputs[2], sizes, inputs[4]])
        assert all(map(torch.equal, got, want))


def test_zero_sized():
    inputs = network()
    inputs[0][1], inputs[1][1] = inputs[0][1][:, :, :0], inputs[1][1][:, :, :0]
    check(inputs)
    nothing = [[x[:, :, :0] for x in maps] for maps in inputs[:2]]
    assert [tuple(x.shape) for x in op._triton(*nothing, *inputs[2:], *OPTIONS.values())] == [(2, 0, 4), (2, 0), (2, 0)]
    no_image = [[x[:0] for x in maps] for maps in inputs[:2]] + [inputs[2], inputs[3][:0], inputs[4]]
    assert [tuple(x.shape) for x in op._triton(*no_image, *OPTIONS.values())] == [(0, 36, 4), (0, 36), (0, 36)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_dropped(dtype):
    inputs = network(dtype=dtype)
    for x, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        inputs[0][0][:, :, 3:5, x] = value
        for channel in range(4):
            inputs[1][1][:, channel::4, channel, x] = value
    boxes, scores, valid = check(inputs)
    assert valid.any()
    assert boxes.isfinite().all()
    inputs[0] = [torch.full_like(x, float("nan")) for x in inputs[0]]
    boxes, scores, valid = check(inputs)
    assert not valid.any()
    assert not boxes.any()
    assert not scores.any()


def test_equal_logits_of_levels_and_images():
    """The earlier image, then the earlier level comes first; so it does where the sigmoid is 1."""
    inputs = network(5)
    for level in inputs[0]:
        level[1] = level[0]
    for offset in (0.0, 100.0):
        shifted = [[level + offset for level in inputs[0]], *inputs[1:]]
        _, scores, valid = check(shifted, max_proposals=60, per_batch=True)
        assert 0 < valid[1].sum() <= valid[0].sum()
    assert scores[valid].eq(1).all()


def test_equal_logits_within_a_level():
    """Some of them, each once."""
    inputs = network(1)
    inputs[0] = [torch.zeros_like(inputs[0][0])]
    inputs[1] = [torch.zeros_like(inputs[1][0])]
    inputs[3] = inputs[3] * 0 + 1000
    inputs[2] = [inputs[2][0] + 100]
    boxes, scores, valid = op._triton(*inputs, *(OPTIONS | {"nms_threshold": 1.0}).values())
    assert valid.all()
    assert scores.eq(0.5).all()
    assert all(len(image.unique(dim=0)) == 30 for image in boxes)


def test_long_sets_go_through_the_bitmask(monkeypatch):
    inputs = network()
    want = check(inputs)
    monkeypatch.setattr(nms_kernels, "prefer_segmented", lambda *_: False)
    assert all(map(torch.equal, check(inputs), want))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("block", "num_warps"), [(16, 1), (32, 2), (256, 8)])
def test_any_launch_configuration(layout, block, num_warps):
    inputs = network()
    inputs[0], inputs[1] = ([x.contiguous(memory_format=LAYOUTS[layout](0)) for x in maps] for maps in inputs[:2])
    other = Launch(block, num_warps)
    with (
        launch.record() as seen,
        launch.override("proposal_keys", other),
        launch.override("proposal_decode", other),
        launch.override("proposal_merge", other),
    ):
        check(inputs)
    assert [name for name, _, _ in seen if name.startswith("proposal")] == [
        "proposal_keys",
        "proposal_decode",
        "proposal_merge",
    ]


def test_keys_are_the_logits_in_the_order_of_anchors():
    inputs = network()
    best, boxes, valid = kernels.candidates(*inputs, 1000, 0.0, [1.0] * 4, 4.0)
    assert best.shape == (6, 297)
    for row, (image, level) in enumerate((image, level) for image in range(2) for level in range(3)):
        want = inputs[0][level][image].flatten().sort(descending=True).values
        assert best[row, : len(want)].equal(want)
        assert best[row, len(want) :].eq(float("-inf")).all()
        assert not valid[row, len(want) :].any()
    assert boxes.isfinite().all()


def graph_inputs() -> list:
    inputs = network(5, dtype=torch.bfloat16)
    return [[x.contiguous(memory_format=torch.channels_last) for x in maps] for maps in inputs[:2]] + inputs[2:]


@pytest.mark.gpu
def test_no_host_synchronisation():
    inputs = graph_inputs()
    op._SELECT_PROPOSALS(*inputs, *OPTIONS.values())
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = op._SELECT_PROPOSALS(*inputs, *OPTIONS.values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = [[x.cpu() for x in maps] for maps in inputs[:3]] + [inputs[3].cpu(), inputs[4]]
    want = op._SELECT_PROPOSALS(*on_cpu, *OPTIONS.values())
    assert got[2].cpu().equal(want[2])
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("per_batch", [False, True])
def test_replays_in_a_graph_with_other_inputs(per_batch):
    torch.use_deterministic_algorithms(False)  # it fills what torch.empty allocates
    inputs = graph_inputs()
    options = (OPTIONS | {"per_batch": per_batch}).values()
    op._SELECT_PROPOSALS(*inputs, *options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op._SELECT_PROPOSALS(*inputs, *options)
    for _ in range(2):
        for old, new in zip(inputs[:2], graph_inputs()[:2], strict=True):
            for x, y in zip(old, new, strict=True):
                x.copy_(y)
        inputs[3].sub_(3)
        graph.replay()
        want = op._SELECT_PROPOSALS(*inputs, *options)
        assert want[2].any()
        assert all(map(torch.equal, outputs, want))
