"""The NMS kernels against greedy NMS by definition: in the interpreter, or on a GPU where there is one."""

import importlib

import pytest
import torch
import torchvision
from support import DEVICE

from fastrcnn.ops.reference import nms as reference
from triton_kernels import nms as kernels
from triton_kernels.launch import Launch, override

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


@pytest.fixture(params=["segmented", "bitmask", "bands"])
def algorithm(request, monkeypatch):
    choose_algorithm(monkeypatch, request.param)


@pytest.fixture(params=["bitmask", "bands"])
def large_algorithm(request, monkeypatch):
    choose_algorithm(monkeypatch, request.param)


def choose_algorithm(monkeypatch, name: str) -> None:
    if name != "segmented":
        monkeypatch.setattr(kernels, "SEGMENTED_LIMIT", 0)
    if name == "bands":
        monkeypatch.setattr(kernels, "BAND", 64)


def assert_equal_to_the_reference(boxes, scores, threshold, max_output, labels=None, valid=None):
    got = op._triton_padded(boxes, scores, threshold, max_output, labels, valid)
    want = reference.nms_padded(boxes, scores, threshold, max_output, labels, valid)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("n", [1, 64, 65, 150])
def test_equal_to_the_reference(algorithm, n, labelled):
    boxes, scores, labels, valid = random_sets(2, n)
    valid[1] = valid[1] & (torch.arange(n, device=DEVICE) < 10)  # sets of different lengths
    for max_output in (3, n + 70):
        assert_equal_to_the_reference(boxes, scores, 0.4, max_output, labels if labelled else None, valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_boxes(algorithm, dtype):
    boxes, scores, labels, valid = random_sets(1, 90)
    assert_equal_to_the_reference(boxes.to(dtype), scores, 0.5, 90, labels, valid)


@pytest.mark.parametrize(("dtype", "count"), [(torch.uint8, 60), (torch.int32, 1), (torch.int64, 2)])
def test_labels_of_any_size(algorithm, dtype, count):
    """Groups within a block, over blocks and over bands; the largest label is what stands behind those that are out."""
    boxes, scores, _, valid = random_sets(2, 150)
    info = torch.iinfo(dtype)
    values = torch.linspace(float(info.min) / 2, float(info.max) / 2, count, dtype=torch.float64).to(dtype)
    values[-1], values[0] = info.max, info.min
    labels = values[torch.randint(0, count, (2, 150))].to(DEVICE)
    assert_equal_to_the_reference(boxes, scores, 0.3, 150, labels, valid)


@pytest.mark.parametrize("sizes", [(64, 136), (30, 34, 70, 66), (20, 160, 20), (200,)])
@pytest.mark.parametrize("band", [64, 128])
def test_groups_of_labels_on_the_borders_of_bands(monkeypatch, band, sizes):
    """Equal boxes with other labels, so that a group that is looked for in the wrong place shows."""
    choose_algorithm(monkeypatch, "bands")
    monkeypatch.setattr(kernels, "BAND", band)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None].to(DEVICE)
    scores = torch.linspace(1, 0, 200, device=DEVICE)[None]
    boxes = random_sets(1, 50)[0].repeat(1, 4, 1)
    boxes = torch.where(boxes.isfinite(), boxes, 0)  # all take part, so the borders stay where they are
    assert_equal_to_the_reference(boxes, scores, 0.5, 200, labels)


def test_empty_sets(algorithm):
    boxes, scores, _, _ = random_sets(2, 70)
    indices, counts = op._triton_padded(boxes, scores, 0.5, 9, None, torch.zeros_like(scores, dtype=torch.bool))
    assert (indices == -1).all()
    assert (counts == 0).all()
    for shape in ((0, 7), (2, 0)):
        found = op._triton_padded(torch.empty(*shape, 4, device=DEVICE), torch.empty(shape, device=DEVICE), 0.5, 3)
        assert found[0].tolist() == [[-1] * 3] * shape[0]


def test_many_kept_boxes(algorithm):
    """More kept boxes than one tile holds, none of which overlap, then their duplicates."""
    corner = torch.cartesian_prod(torch.arange(15.0), torch.arange(10.0)) * 10
    boxes = torch.cat([corner, corner + 9], 1).repeat(2, 1).to(DEVICE)[None]
    scores = torch.linspace(1, 0, 300, device=DEVICE)[None]
    indices, counts = op._triton_padded(boxes, scores, 0.5, 200)
    assert counts.tolist() == [150]
    assert indices[0, :150].tolist() == list(range(150))


@pytest.mark.parametrize("valid_dtype", [None, torch.bool, torch.uint8])
@pytest.mark.parametrize("labelled", [False, True])
def test_segmented_without_order_and_counts(labelled, valid_dtype):
    boxes, _, labels, valid = random_sets(2, 100)
    boxes = torch.where(boxes.isfinite(), boxes, 0)
    scores = torch.linspace(1, 0, 100, device=DEVICE).expand(2, -1)
    labels, valid = labels if labelled else None, valid if valid_dtype else None
    want = reference.nms_padded(boxes, scores, 0.4, 70, labels, valid)
    marks = None if valid is None else valid.to(valid_dtype)
    assert all(map(torch.equal, kernels.nms_segmented(boxes, labels, None, None, 0.4, 70, marks), want))


@pytest.mark.parametrize("block", [32, 128])
def test_other_launch_configurations(algorithm, block):
    """What a tuner may try; only the mask decides on the block of the kernels that share it."""
    boxes, scores, labels, valid = random_sets(2, 150)
    with (
        override("nms_segmented", Launch(block, 2)),
        override("nms_mask", Launch(block, 2)),
        override("nms_pass", Launch(256, 2)),
        override("nms_finish", Launch(256, 2, 32)),
    ):
        for given in (None, labels):
            assert_equal_to_the_reference(boxes, scores, 0.4, 150, given, valid)


@pytest.mark.parametrize("passes", [1, 12])
def test_the_sweep_finishes_what_the_passes_leave(large_algorithm, passes):
    n = 150
    counts = torch.tensor([n, 77], dtype=torch.int32, device=DEVICE)
    order = torch.arange(n, device=DEVICE).expand(2, -1).contiguous()
    indices, kept = kernels.nms_bitmask(chain(n).repeat(2, 1, 1), None, order, counts, 0.5, n, passes=passes)
    for s, count in enumerate(counts.tolist()):
        want = list(range(0, count, 2))
        assert kept[s] == len(want)
        assert indices[s].tolist() == want + [-1] * (n - len(want))


def test_pass_and_sweep_from_any_state():
    """On a GPU a pass finds the blocks before its own in any state; here they run in order, so the state is made up."""
    n, blocks, pitch = 200, 4, 32
    boxes = random_sets(1, n)[0]
    boxes = torch.where(boxes.isfinite(), boxes, 0)
    order = torch.arange(n, device=DEVICE)[None]
    want, count = reference.nms_padded(boxes, torch.linspace(1, 0, n, device=DEVICE)[None], 0.4, n)
    mask = torch.empty(1, 256, pitch, dtype=torch.int32, device=DEVICE)
    alive, keep = torch.empty(2, 1, pitch, dtype=torch.int32, device=DEVICE)
    flags = torch.empty(1, 2, dtype=torch.int32, device=DEVICE)
    kept_counts, group_counts = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    indices = torch.full((1, n), -1, device=DEVICE)
    kept_boxes = torch.empty(1, n, 4, device=DEVICE)
    sizes = n, 0, 256, pitch, n
    arguments = mask, None, None, kept_counts, alive, keep, flags, *sizes
    shared = {"BLOCK": 64, "WORDS": kernels.WORDS}
    kernels.nms_mask_kernel[(1, blocks, blocks)](
        boxes, None, None, None, kept_counts, mask, alive, keep, flags, *sizes, 2, 0.4, BLOCK=64
    )
    kernels.nms_pass_kernel[(1, blocks)](*arguments, 0, 2, **shared)
    right = keep.clone()
    for first in range(blocks):  # up to it the pass before has settled
        keep[:, 2 * first + 2 : 2 * blocks] = 0x5A5A5A5A
        flags[:, 0], flags[:, 1] = first, kernels.NONE.value
        kernels.nms_pass_kernel[(1, blocks)](*arguments, 1, 2, **shared)
        assert keep[:, : 2 * blocks].equal(right[:, : 2 * blocks])
        assert flags[0, 1] == (first + 1 if first + 1 < blocks else kernels.NONE.value)

    keep[:, 2 : 2 * blocks] = 0x5A5A5A5A
    flags[:, 1] = 0
    kernels.nms_finish_kernel[(1,)](
        *(
            boxes,
            order,
            mask,
            None,
            None,
            kept_counts,
            group_counts,
            kept_boxes,
            alive,
            keep,
            flags,
            indices,
            *sizes,
            2,
        ),
        **shared,
        CHUNK=64,
    )
    assert indices.equal(want)
    assert kept_counts.equal(count)


def test_a_full_set_takes_no_further_band(monkeypatch):
    """Those of later bands cannot count: they are not even looked at."""
    choose_algorithm(monkeypatch, "bands")
    boxes = chain(200)[None]
    order = torch.arange(200, device=DEVICE)[None]
    order[:, 128:] = 1000
    indices, kept = kernels.nms_bitmask(boxes, None, order, None, 0.5, 40)
    assert kept.tolist() == [40]
    assert indices[0].tolist() == list(range(0, 80, 2))


@pytest.mark.parametrize(("sets", "n", "rows"), [(1, 10_000, 10_048), (1, 20_000, 10_048), (40, 5000, 5056)])
def test_bands_are_few_and_equal(sets, n, rows):
    assert kernels.band_rows(sets, n, 64) == rows


@pytest.mark.parametrize("sets", [1, 3, 40, 1000, 2048])
@pytest.mark.parametrize("n", [4097, 16_385, 200_000, 3_000_000])
def test_scratch_is_bounded(sets, n):
    rows = kernels.band_rows(sets, n, 64)
    assert sets * rows * -(-rows // 1024) * 128 <= kernels.MASK_BYTES
    assert -(-n // rows) * rows >= n


def test_offsets_past_2_to_31():
    """The bitmask of the last of 260 sets starts at word 2.17e9; the others are empty, and nothing touches theirs."""
    sets, n, rows, pitch = 260, 64, 16_384, 512
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # it stays untouched, and so takes no memory
    mask = torch.empty(sets, rows, pitch, dtype=torch.int32, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    boxes = torch.zeros(sets, n, 4, device=DEVICE)
    boxes[-1] = chain(n)
    counts = torch.zeros(sets, dtype=torch.int32, device=DEVICE)
    counts[-1] = n
    order = torch.arange(n, device=DEVICE).expand(sets, -1).contiguous()
    alive, keep = torch.empty(2, sets, pitch, dtype=torch.int32, device=DEVICE)
    flags = torch.empty(sets, 1, dtype=torch.int32, device=DEVICE)
    kept_boxes = torch.empty(sets, n, 4, device=DEVICE)
    kept_counts, group_counts = torch.zeros(2, sets, dtype=torch.int32, device=DEVICE)
    indices = torch.full((sets, n), -1, device=DEVICE)
    sizes = n, 0, rows, pitch, n
    state = counts, kept_counts
    kernels.nms_mask_kernel[(sets, 1, 1)](boxes, None, None, *state, mask, alive, keep, flags, *sizes, 1, 0.5, BLOCK=64)
    shared = {"BLOCK": 64, "WORDS": kernels.WORDS}
    kernels.nms_pass_kernel[(sets, 1)](mask, None, *state, alive, keep, flags, *sizes, 0, 1, **shared)
    kernels.nms_finish_kernel[(sets,)](
        *(boxes, order, mask, None, *state, group_counts, kept_boxes, alive, keep, flags, indices, *sizes, 1),
        **shared,
        CHUNK=64,
    )
    assert kept_counts.tolist() == [0] * (sets - 1) + [32]
    assert indices[-1, :32].tolist() == list(range(0, n, 2))
    assert mask[-1, 1, 0] == 1


def test_ragged(algorithm):
    boxes, scores, labels, _ = random_sets(1, 100)
    boxes, scores, labels = boxes[0], scores[0], labels[0]
    assert op._triton_nms(boxes, scores, 0.5).equal(reference.nms(boxes, scores, 0.5))
    for idxs in (labels, labels * 2.0**60 - 2.0**60, labels > 1):
        got = op._triton_batched(boxes, scores, idxs, 0.5)
        assert got.equal(reference.batched_nms(boxes, scores, idxs, 0.5))
    assert op._triton_nms(boxes[:0], scores[:0], 0.5).shape == (0,)


def test_not_a_number_as_in_torchvision(algorithm):
    """Such boxes overlap nothing and stay, such scores come first; with a category that is NaN nothing overlaps."""
    boxes, scores, _, _ = random_sets(1, 130)
    boxes, scores = boxes[0], scores[0]
    scores[7::23], scores[8::23], scores[9::23] = float("nan"), float("inf"), float("-inf")
    want = torchvision.ops.nms(boxes.cpu(), scores.cpu(), 0.5).to(DEVICE)
    assert op._triton_nms(boxes, scores, 0.5).equal(want)
    idxs = torch.zeros_like(scores)
    assert op._triton_batched(boxes, scores, idxs, 0.5).equal(want)
    assert len(op._triton_batched(boxes, scores, idxs * float("nan"), 0.5)) == 130


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_overlaps_close_to_the_threshold(algorithm, threshold):
    """Pairs with IoU 1e-5 above and below it, far from each other; torchvision's CPU code decides the same."""
    side = torch.rand(60, 2) * 90 + 10
    corner = torch.cartesian_prod(torch.arange(6.0), torch.arange(10.0)) * 200
    boxes = torch.cat([corner, corner + side], 1)
    other = boxes.clone()
    offset = torch.where(torch.arange(60) % 2 == 0, 1e-5, -1e-5)
    other[:, 2] = boxes[:, 0] + side[:, 0] * (threshold + offset)  # inside the first: the IoU is the ratio of widths
    boxes = torch.cat([boxes, other])
    scores = torch.linspace(1, 0, 120)
    want = torchvision.ops.nms(boxes, scores, threshold)
    assert want.tolist() == [*range(60), *range(61, 120, 2)]
    assert op._triton_nms(boxes.to(DEVICE), scores.to(DEVICE), threshold).cpu().equal(want)
