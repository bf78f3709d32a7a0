"""The NMS kernels against greedy NMS by definition: in the interpreter, or on a GPU where there is one."""

import importlib

import pytest
import torch
from support import DEVICE

from fastrcnn.ops.reference import nms as reference
from triton_kernels import nms as kernels

op = importlib.import_module("fastrcnn.ops.nms")  # the package's attribute of this name is the function

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinite boxes


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty is full of NaN and of the largest integers, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_sets(sets: int, n: int) -> tuple[torch.Tensor, ...]:
    """Boxes, tied scores, labels and a valid mask; some boxes inverted, empty or not finite."""
    corner = torch.rand(sets, n, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(sets, n, 2) * 60], -1)
    boxes[:, 2::17] = boxes[:, 2::17, [2, 1, 0, 3]]
    boxes[:, 3::17, 2] = boxes[:, 3::17, 0]
    boxes[:, 4::17, 1] = float("nan")
    boxes[:, 5::17, 3] = float("inf")
    scores = (torch.rand(sets, n) * 50).round() / 50
    parts = boxes, scores, torch.randint(0, 3, (sets, n)), torch.rand(sets, n) < 0.8
    return tuple(x.to(DEVICE) for x in parts)


def chain(n: int) -> torch.Tensor:
    """Each box overlaps only its neighbours, so greedy NMS decides one box per pass: the worst case."""
    x = torch.arange(n) * 3.0
    return torch.stack([x, torch.zeros(n), x + 10, torch.full((n,), 10.0)], 1).to(DEVICE)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("limit", [4096, 0], ids=["segmented", "bitmask"])
def test_equal_to_the_reference(monkeypatch, limit, n, labelled):
    monkeypatch.setattr(kernels, "SEGMENTED_LIMIT", limit)
    boxes, scores, labels, valid = random_sets(2, n)
    valid[1] = valid[1] & (torch.arange(n, device=DEVICE) < 10)  # sets of different lengths
    labels = labels if labelled else None
    for max_output in (3, n, n + 70):
        got = op._triton_padded(boxes, scores, 0.4, max_output, labels, valid)
        want = reference.nms_padded(boxes, scores, 0.4, max_output, labels, valid)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [4096, 0], ids=["segmented", "bitmask"])
def test_low_precision_boxes(monkeypatch, limit, dtype):
    monkeypatch.setattr(kernels, "SEGMENTED_LIMIT", limit)
    boxes, scores, labels, valid = random_sets(1, 90)
    boxes = boxes.to(dtype)
    got = op._triton_padded(boxes, scores, 0.5, 90, labels, valid)
    assert all(map(torch.equal, got, reference.nms_padded(boxes, scores, 0.5, 90, labels, valid)))


@pytest.mark.parametrize("limit", [4096, 0], ids=["segmented", "bitmask"])
def test_empty_sets(monkeypatch, limit):
    monkeypatch.setattr(kernels, "SEGMENTED_LIMIT", limit)
    boxes, scores, _, _ = random_sets(2, 70)
    indices, counts = op._triton_padded(boxes, scores, 0.5, 9, None, torch.zeros_like(scores, dtype=torch.bool))
    assert (indices == -1).all()
    assert (counts == 0).all()
    for shape in ((0, 7), (2, 0)):
        found = op._triton_padded(torch.empty(*shape, 4, device=DEVICE), torch.empty(shape, device=DEVICE), 0.5, 3)
        assert found[0].tolist() == [[-1] * 3] * shape[0]


def test_many_kept_boxes():
    """More kept boxes than one tile holds, none of which overlap, then their duplicates."""
    corner = torch.cartesian_prod(torch.arange(15.0), torch.arange(10.0)) * 10
    boxes = torch.cat([corner, corner + 9], 1).repeat(2, 1).to(DEVICE)[None]
    scores = torch.linspace(1, 0, 300, device=DEVICE)[None]
    indices, counts = op._triton_padded(boxes, scores, 0.5, 200)
    assert counts.tolist() == [150]
    assert indices[0, :150].tolist() == list(range(150))


@pytest.mark.parametrize("passes", [1, 3, 16])
def test_the_sweep_finishes_what_the_passes_leave(passes):
    n = 150
    counts = torch.tensor([n, 77], dtype=torch.int32, device=DEVICE)
    boxes = chain(n).repeat(2, 1, 1)
    keep = kernels.nms_bitmask(boxes, None, counts, 0.5, passes)
    for s, count in enumerate(counts.tolist()):
        assert keep[s].nonzero().flatten().tolist() == list(range(0, count, 2))


def test_sets_in_groups(monkeypatch):
    """Bitmasks that do not fit together are computed one group of sets after the other."""
    boxes, scores, labels, _ = random_sets(3, 70)
    monkeypatch.setattr(kernels, "SEGMENTED_LIMIT", 0)
    monkeypatch.setattr(kernels, "MASK_BYTES", 2 * 128 * 32 * 4)  # two sets
    got = op._triton_padded(boxes, scores, 0.5, 70, labels)
    assert all(map(torch.equal, got, reference.nms_padded(boxes, scores, 0.5, 70, labels)))


def test_ragged():
    boxes, scores, labels, _ = random_sets(1, 100)
    boxes, scores, labels = boxes[0], scores[0], labels[0]
    assert op._triton_nms(boxes, scores, 0.5).equal(reference.nms(boxes, scores, 0.5))
    assert op._triton_batched(boxes, scores, labels, 0.5).equal(reference.batched_nms(boxes, scores, labels, 0.5))
    assert op._triton_nms(boxes[:0], scores[:0], 0.5).shape == (0,)
