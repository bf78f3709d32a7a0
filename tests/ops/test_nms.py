"""NMS: brute force, torchvision, golden values, compilers."""

import pytest
import torch
import torchvision
from support import DEVICE
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastrcnn.ops import batched_nms, nms, nms_padded
from fastrcnn.ops.reference import nms as reference


def clustered_boxes(*shape: int, spread: float = 60.0) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * spread
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2) * 60], -1)


def awkward_sets(sets: int, n: int) -> dict[str, torch.Tensor]:
    """Boxes with ties, duplicates, inverted, empty and non-finite members, labels and a valid mask."""
    boxes = clustered_boxes(sets, n)
    scores = (torch.rand(sets, n) * 20).round() / 20
    inf, nan = float("inf"), float("nan")
    for i, change in enumerate(
        (lambda b: b[..., [2, 1, 0, 3]], lambda b: b[..., [0, 1, 0, 3]], lambda b: b * nan, lambda b: b + inf)
    ):
        boxes[:, i + 2 :: 17] = change(boxes[:, i + 2 :: 17])
    for i, value in enumerate((nan, inf, -inf)):
        scores[:, i + 7 :: 23] = value
    boxes[:, 1::11] = boxes[:, :1]
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": torch.randint(0, 4, (sets, n)),
        "valid": torch.rand(sets, n) < 0.8,
    }


def by_hand(boxes, scores, threshold, labels=None, valid=None) -> list[int]:
    """One set, as the textbook has it: IoU as a quotient in Python's doubles."""

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    usable = boxes.isfinite().all(1) & scores.isfinite()
    usable = usable if valid is None else usable & valid
    same = torch.ones(len(boxes), len(boxes)) if labels is None else labels[:, None] == labels
    rows, kept = boxes.tolist(), []
    for i in sorted(usable.nonzero().flatten().tolist(), key=lambda i: -scores[i].item()):
        if not any(same[i, k] and iou(rows[i], rows[k]) > threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
@pytest.mark.parametrize(
    "given", [(), ("labels",), ("valid",), ("labels", "valid")], ids=lambda g: "+".join(g) or "none"
)
def test_padded_equals_brute_force(n, given):
    sets = awkward_sets(2, n)
    options = {name: sets[name] for name in given}
    on_device = {name: value.to(DEVICE) for name, value in options.items()}
    boxes, scores = sets["boxes"], sets["scores"]
    for implementation in (nms_padded, reference.nms_padded):
        for max_output in (5, n + 3):
            found = implementation(boxes.to(DEVICE), scores.to(DEVICE), 0.4, max_output, **on_device)
            indices, counts = (x.cpu() for x in found)
            assert indices.shape == (2, max_output)
            assert (indices.dtype, counts.dtype) == (torch.int64, torch.int32)
            for s in range(2):
                one_set = {name: value[s] for name, value in options.items()}
                want = by_hand(boxes[s], scores[s], 0.4, **one_set)[:max_output]
                assert counts[s] == len(want)
                assert indices[s].tolist() == want + [-1] * (max_output - len(want))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_padded_equals_torchvision(threshold):
    boxes, scores = clustered_boxes(3, 300).to(DEVICE), torch.rand(3, 300, device=DEVICE)
    labels = torch.randint(0, 5, (3, 300), device=DEVICE)
    plain, counts = nms_padded(boxes, scores, threshold, 300)
    labelled, labelled_counts = nms_padded(boxes, scores, threshold, 300, labels)
    for s in range(3):
        assert plain[s, : counts[s]].equal(torchvision.ops.nms(boxes[s], scores[s], threshold))
        want = torchvision.ops.batched_nms(boxes[s], scores[s], labels[s], threshold)
        assert labelled[s, : labelled_counts[s]].equal(want)


def test_iou_equal_to_the_threshold_does_not_suppress():
    """3/10 in float32 exceeds the double 0.3, in which torchvision's CPU code compares."""
    boxes = torch.tensor([[[0.0, 0, 10, 1], [0, 0, 3, 1], [20, 0, 30, 1], [20, 0, 23.001, 1]]], device=DEVICE)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]], device=DEVICE)
    for implementation in (nms_padded, reference.nms_padded):
        assert implementation(boxes, scores, 0.3, 4)[0].tolist() == [[0, 1, 2, -1]]


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.1, [1, 3]), (0.3, [1, 3]), (0.5, [1, 3]), (0.8, [1, 2, 3, 4]), (0.9, [0, 1, 2, 3, 4])]
)
def test_golden_values_of_maskrcnn_benchmark(threshold, kept):
    rows = [(10, 10, 50, 60, 0.5), (11, 12, 48, 60, 0.7), (8, 9, 40, 50, 0.6), (100, 100, 150, 140, 0.9)]
    table = torch.tensor([*rows, (99, 110, 155, 139, 0.8)], device=DEVICE)
    boxes = table[:, :4] + torch.tensor([0, 0, 1, 1], device=DEVICE)  # its corners are inclusive
    assert sorted(nms(boxes, table[:, 4], threshold).tolist()) == kept
    indices, counts = nms_padded(boxes[None], table[None, :, 4], threshold, 5)
    assert sorted(indices[0, : counts[0]].tolist()) == kept


def test_half_precision_is_computed_in_float32():
    boxes, scores = clustered_boxes(1, 100).to(DEVICE), torch.rand(1, 100, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        low = boxes.to(dtype)
        want = torchvision.ops.nms(low[0].float(), scores[0].to(dtype).float(), 0.5)
        indices, counts = nms_padded(low, scores.to(dtype), 0.5, 100)
        assert indices[0, : counts[0]].equal(want)
        assert nms(low[0], scores[0].to(dtype), 0.5).equal(want)


def test_double_precision_stays():
    """The IoUs 0.5 ± 1e-9 cannot be told apart in float32."""
    boxes = torch.tensor(
        [[[0, 0, 1, 1], [0, 0, 0.5 + 1e-9, 1], [3, 0, 4, 1], [3, 0, 3.5 - 1e-9, 1]]], dtype=torch.float64
    )
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]], dtype=torch.float64)
    for implementation in (nms_padded, reference.nms_padded):
        assert implementation(boxes.to(DEVICE), scores.to(DEVICE), 0.5, 4)[0].tolist() == [[0, 2, 3, -1]]


def test_no_sets():
    indices, counts = nms_padded(torch.empty(0, 7, 4, device=DEVICE), torch.empty(0, 7, device=DEVICE), 0.5, 3)
    assert indices.shape == (0, 3)
    assert counts.shape == (0,)


@pytest.mark.parametrize("n", [0, 1, 64, 500, 1200])  # torchvision loops over categories above 1000 boxes
def test_ragged_equals_torchvision(n):
    boxes, scores = clustered_boxes(n).to(DEVICE), torch.rand(n, device=DEVICE)
    idxs = torch.randint(-2, 20, (n,), device=DEVICE)
    assert nms(boxes, scores, 0.5).equal(torchvision.ops.nms(boxes, scores, 0.5))
    assert batched_nms(boxes, scores, idxs, 0.5).equal(torchvision.ops.batched_nms(boxes, scores, idxs, 0.5))
    if n <= 500:
        assert reference.nms(boxes, scores, 0.5).equal(nms(boxes, scores, 0.5))
        assert reference.batched_nms(boxes, scores, idxs, 0.5).equal(batched_nms(boxes, scores, idxs, 0.5))


def test_categories_are_exact_where_an_offset_is_not():
    """At 1e6 px times category 90 a float32 holds whole multiples of 8 px only."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [5, 0, 9, 4], [1e6, 0, 1e6 + 9, 4]], device=DEVICE)
    scores = torch.tensor([0.9, 0.8, 0.7], device=DEVICE)
    assert batched_nms(boxes, scores, torch.full((3,), 90, device=DEVICE), 0.1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("boxes", "scores"), [((3, 5, 4), (5,)), ((5,), (5,)), ((5, 5), (5,)), ((5, 4), (5, 1)), ((5, 4), (4,))]
)
def test_errors_are_torchvisions(boxes, scores):
    arguments = torch.rand(boxes, device=DEVICE), torch.rand(scores, device=DEVICE), 0.5
    with pytest.raises(RuntimeError) as theirs:
        torchvision.ops.nms(*arguments)
    with pytest.raises(RuntimeError) as ours:
        nms(*arguments)
    assert str(ours.value) in str(theirs.value)
    with pytest.raises(RuntimeError):
        batched_nms(arguments[0], arguments[1], torch.zeros(scores, device=DEVICE), 0.5)


def test_errors_name_the_argument():
    boxes, scores = torch.rand(2, 5, 4), torch.rand(2, 5)
    with pytest.raises(RuntimeError, match="same type"):
        nms(boxes[0], scores[0].double(), 0.5)
    with pytest.raises(RuntimeError, match="idxs"):
        batched_nms(boxes[0], scores[0], torch.zeros(4), 0.5)
    with pytest.raises(RuntimeError, match=r"boxes must be of floating point, got torch.int32"):
        nms(boxes[0].int(), scores[0].int(), 0.5)
    with pytest.raises(RuntimeError, match=r"scores must be on the device of boxes, cpu, got meta"):
        nms(boxes[0], scores[0].to("meta"), 0.5)
    with pytest.raises(RuntimeError, match=r"idxs must be on the device of boxes, cpu, got meta"):
        batched_nms(boxes[0], scores[0], torch.zeros(5, device="meta"), 0.5)
    with pytest.raises(ValueError, match=r"scores must be of floating point, got torch.int64"):
        nms_padded(boxes, scores.long(), 0.5, 3)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch.float32"):
        nms_padded(boxes, scores, 0.5, 3, labels=scores)
    with pytest.raises(ValueError, match=r"valid must be bool, got torch.uint8"):
        nms_padded(boxes, scores, 0.5, 3, valid=torch.ones(2, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels must be on the device of boxes, cpu, got meta"):
        nms_padded(boxes, scores, 0.5, 3, labels=torch.ones(2, 5, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="boxes must be"):
        nms_padded(boxes[0], scores, 0.5, 3)
    for name in ("labels", "valid"):
        with pytest.raises(ValueError, match=rf"{name} must be \[S, N\] = \(2, 5\), got \(2, 4\)"):
            nms_padded(boxes, scores, 0.5, 3, **{name: torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="max_output"):
        nms_padded(boxes, scores, 0.5, -1)


def test_opcheck():
    sets = {name: value.to(DEVICE) for name, value in awkward_sets(2, 30).items()}
    boxes, scores, labels, valid = sets.values()
    torch.library.opcheck(torch.ops.fastrcnn.nms_padded.default, (boxes, scores, 0.5, 7))
    torch.library.opcheck(torch.ops.fastrcnn.nms_padded.default, (boxes, scores, 0.5, 7, labels, valid))
    torch.library.opcheck(torch.ops.fastrcnn.nms.default, (boxes[0], scores[0], 0.5))
    torch.library.opcheck(torch.ops.fastrcnn.batched_nms.default, (boxes[0], scores[0], labels[0], 0.5))


def test_compiles():
    boxes, scores = clustered_boxes(3, 50).to(DEVICE), torch.rand(3, 50, device=DEVICE)
    compiled = torch.compile(nms_padded, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (50, 37):
        got, want = compiled(boxes[:, :n], scores[:, :n], 0.5, n), nms_padded(boxes[:, :n], scores[:, :n], 0.5, n)
        assert all(map(torch.equal, got, want))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_ragged_compiles():
    def best(boxes, scores, idxs):
        kept = nms(boxes, scores, 0.5)
        return boxes[kept], scores[batched_nms(boxes, scores, idxs, 0.5)].sum()

    boxes, scores = clustered_boxes(50).to(DEVICE), torch.rand(50, device=DEVICE)
    idxs = torch.randint(0, 3, (50,), device=DEVICE)
    got = torch.compile(best, fullgraph=True, backend="aot_eager")(boxes, scores, idxs)
    for value, want in zip(got, best(boxes, scores, idxs), strict=True):
        assert value.equal(want)


@pytest.mark.parametrize("labelled", [False, True])
def test_ragged_traces_without_data(labelled):
    """The number of kept boxes is an unknown size, with which computation goes on."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        boxes, scores = torch.empty(9, 4, device=DEVICE), torch.empty(9, device=DEVICE)
        idxs = torch.empty(9, dtype=torch.int64, device=DEVICE)
        kept = batched_nms(boxes, scores, idxs, 0.5) if labelled else nms(boxes, scores, 0.5)
        assert (kept.dtype, kept.device, kept.dim()) == (torch.int64, boxes.device, 1)
        assert isinstance(kept.shape[0], torch.SymInt)
        assert boxes[kept].shape == (kept.shape[0], 4)


def test_traces_without_data():
    with FakeTensorMode():
        boxes, scores = torch.empty(2, 3000, 4, device=DEVICE), torch.empty(2, 3000, device=DEVICE)
        indices, counts = nms_padded(boxes, scores, 0.5, 1000)
        assert (indices.shape, counts.shape) == ((2, 1000), (2,))


def test_categories_of_any_dtype():
    boxes, scores = clustered_boxes(90).to(DEVICE), torch.rand(90, device=DEVICE)
    idxs = torch.randint(0, 2, (90,), device=DEVICE)
    want = torchvision.ops.batched_nms(boxes, scores, idxs, 0.5)
    for same in (idxs.bool(), idxs.byte(), idxs - 2**62, idxs * 0.5, idxs.half() - 3):
        assert batched_nms(boxes, scores, same, 0.5).equal(want)


def test_boxes_that_are_not_finite():
    """As in torchvision they stay, and NaN scores come first; the padded form never keeps either."""
    sets = awkward_sets(1, 200)
    boxes, scores = sets["boxes"][0], sets["scores"][0]
    want = torchvision.ops.nms(boxes, scores, 0.4)
    for implementation in (nms, reference.nms):
        assert implementation(boxes.to(DEVICE), scores.to(DEVICE), 0.4).cpu().equal(want)
    indices, counts = nms_padded(boxes[None].to(DEVICE), scores[None].to(DEVICE), 0.4, 200)
    kept = indices[0, : counts[0]].cpu()
    assert boxes[kept].isfinite().all()
    assert scores[kept].isfinite().all()


def far_from_threshold(n: int, threshold: float) -> torch.Tensor:
    """Boxes in a grid of cells, each overlapping only those of its cell, with IoU at least 1e-4 off the threshold.

    torchvision's CUDA code may contract multiply and add, and then decides otherwise very close to the threshold.
    """
    cells = torch.randint(0, max(n // 8, 1), (n,))
    corner = torch.stack([cells % 256, cells // 256], 1) * 100.0
    start = torch.randint(0, 10, (n,)) * 2.0
    side = 20 + torch.randint(0, 10, (n,)) * 2.0  # IoUs are quotients of small integers
    low, high = corner[:, 0] + start, corner[:, 0] + start + side
    boxes = torch.stack([low, corner[:, 1], high, corner[:, 1] + 50], 1)
    values = torch.arange(1, 30)
    distance = (values[:, None] / values[None, :] - threshold).abs()
    assert distance.min() > 1e-4
    return boxes


GPU_CASES = [(1000, 1000), (6000, 100), (6000, 6000), (40_000, 40_000)]  # segmented, and bitmask of one and more bands


@pytest.mark.gpu
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("n", "max_output"), GPU_CASES)
def test_no_host_synchronisation(n, max_output, labelled):
    boxes, scores = clustered_boxes(2, n, spread=900).cuda(), torch.rand(2, n).cuda()
    labels = torch.randint(0, 3, (2, n)).cuda() if labelled else None
    nms_padded(boxes, scores, 0.5, max_output, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices, counts = nms_padded(boxes, scores, 0.5, max_output, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    labels = None if labels is None else labels.cpu()
    want, want_counts = nms_padded(boxes.cpu(), scores.cpu(), 0.5, max_output, labels)
    assert indices.cpu().equal(want)
    assert counts.cpu().equal(want_counts)


@pytest.mark.gpu
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("n", "max_output"), GPU_CASES)
def test_replays_in_a_graph_with_other_inputs(n, max_output, labelled):
    def inputs():
        labels = torch.randint(0, 3, (2, n)) if labelled else None
        found = clustered_boxes(2, n, spread=900), torch.rand(2, n), labels, torch.rand(2, n) < 0.9
        return [None if x is None else x.cuda() for x in found]

    def call(boxes, scores, labels, valid):
        return nms_padded(boxes, scores, 0.5, max_output, labels, valid)

    buffers = inputs()
    call(*buffers)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*buffers)
    for _ in range(2):
        for buffer, value in zip(buffers, inputs(), strict=True):
            if buffer is not None:
                buffer.copy_(value)
        graph.replay()
        want = call(*(None if x is None else x.cpu() for x in buffers))
        assert all(map(torch.equal, (x.cpu() for x in captured), want))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [10, 1000, 3000, 10_000, 50_000])
def test_ragged_equals_torchvisions_cuda(n):
    boxes, scores = far_from_threshold(n, 0.4321).cuda(), torch.randperm(n).float().cuda()
    assert nms(boxes, scores, 0.4321).equal(torchvision.ops.nms(boxes, scores, 0.4321))


@pytest.mark.gpu
def test_many_boxes_of_many_categories():
    boxes, scores = far_from_threshold(100_000, 0.4321).cuda(), torch.randperm(100_000).float().cuda()
    idxs = torch.randint(0, 80, (100_000,)).cuda()
    assert batched_nms(boxes, scores, idxs, 0.4321).equal(torchvision.ops.batched_nms(boxes, scores, idxs, 0.4321))
