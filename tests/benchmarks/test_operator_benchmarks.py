"""The operator benchmarks prove what they claim: right providers pass, wrong ones fail, counts and times are sane."""

import dataclasses
import math
import time

import pytest
import torch

from benchmarks import operators, timing
from benchmarks.operators.anchors import anchors_case
from benchmarks.operators.box_coder import box_coder_case
from benchmarks.operators.case import distinct, random_boxes, relative_error
from benchmarks.operators.match import match_case
from benchmarks.operators.nms import check_greedy, pair_tests
from benchmarks.operators.roi_align import Pooling, roi_align_bytes, roi_align_case, roi_align_taps
from benchmarks.test_operators import measure, unsuited
from fastrcnn.analysis import PAIR

CPU = torch.device("cpu")
CASES = operators.cases("cpu")


def case_of(op: str, kind: str = "", direction: str = "forward") -> operators.Case:
    return next(c for c in CASES if c.op == op and kind in c.label and c.direction == direction)


# ---- bytes and operations, counted by hand


def two_boxes_on_one_level() -> operators.Inputs:
    """One sample in the middle of each box: (1, 1), a pixel's own place, and (1.5, 1.5), between four."""
    return {
        "boxes": torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 3.0, 3.0]]]),
        "channels last": [torch.zeros(1, 2, 4, 4)],
        "shapes": [(1, 2, 4, 4)],
        "settings": ([1, 1], [1.0], 1, False, 224.0, 4),
    }


def test_taps_and_bytes_of_roi_align():
    inputs = two_boxes_on_one_level()
    assert roi_align_taps(inputs) == (5, 4)
    # 4 pixels × 2 channels and 2 × 2 results, 4 bytes each; 2 boxes of 16 bytes; a map of 4 × 4 × 2
    assert roi_align_bytes("forward", inputs) == 32 + 16 + 32
    assert roi_align_bytes("backward", inputs) == 16 + 128 + 32
    assert roi_align_bytes("both", inputs) == 80 + 176


def test_operations_and_l2_bytes_of_roi_align():
    pooling = Pooling("", 1, 1)
    forward, both = (roi_align_case(pooling, torch.float32, d) for d in ("forward", "both"))
    inputs = two_boxes_on_one_level()
    assert forward.operations(inputs) == 2 * 2 * 5
    assert both.operations(inputs) == 2 * forward.operations(inputs)
    assert forward.l2_bytes(inputs) == 5 * 2 * 4


def test_pair_tests():
    keep = torch.tensor([True, False, True, True])
    assert pair_tests(keep) == 3 + 1
    assert pair_tests(keep, torch.tensor([0, 0, 1, 0])) == 1 + 0 + 1


def test_bytes_of_the_streaming_operators():
    anchors = anchors_case("", [(1, 1)] * 5)
    assert anchors.bytes({}) == 15 * 16
    assert anchors.operations({}) == 15 * 4
    assert box_coder_case("decode", 1000, "", "forward").bytes({}) == 48_000
    assert box_coder_case("encode", 1000, "", "both").bytes({}) == 112_000
    inputs = {"boxes": torch.zeros(2, 6, 4), "gt": torch.zeros(2, 3, 4)}
    matching = match_case("", 2, 3, proposals=6)
    assert matching.bytes(inputs) == 2 * 6 * 16 + 2 * 3 * 16 + 2 * 3 + 2 * 6 * 12
    assert matching.operations(inputs) == 2 * 6 * 3 * PAIR


# ---- checks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.group.replace("×", "x"))
def test_every_provider_passes_its_check(case):
    inputs = case.make(CPU)
    for name, provider in case.providers.items():
        assert case.check(name, provider(inputs), inputs) <= 1e-4, name
    assert case.bytes(inputs) > 0
    assert case.operations(inputs) > 0


def without_the_last(result):
    """Padded NMS result whose first set lost its last box."""
    padded, counts = result[0].clone(), result[1].clone()
    counts[0] -= 1
    padded[0, counts[0]] = -1
    return padded, counts


def one_box_moved(result):
    boxes, scores, valid = result
    return boxes + torch.zeros_like(boxes).index_fill_(1, torch.tensor([3]), 0.5), scores, valid


def one_proposal_lost(result):
    boxes, scores, valid = result
    rest = torch.cat([torch.arange(2), torch.arange(3, boxes.shape[1])])
    return boxes[:, rest], scores[:, rest], valid[:, rest]


def first_background_matched(result):
    matched, iou = result[0].clone(), result[1]
    matched[0, (matched[0] == -1).nonzero()[0]] = 0
    return matched, iou


WRONG = [
    (case_of("multi-level ROIAlign"), lambda result: result * 1.001),
    (case_of("multi-level ROIAlign", direction="both"), lambda result: [result[0] + 1e-2, *result[1:]]),
    (case_of("NMS, many sets"), without_the_last),
    (case_of("NMS, many sets"), lambda result: (result[0], result[1] + 1)),
    (case_of("NMS, one set"), lambda result: result[:-1]),
    (case_of("NMS, one set"), lambda result: result.flip(0)),
    (case_of("proposal selection"), one_box_moved),
    (case_of("proposal selection"), one_proposal_lost),
    (case_of("anchors"), lambda result: result + 1e-3),
    (case_of("box coder", "encode"), lambda result: result * (1 + 1e-5)),
    (case_of("box coder", "clip", "both"), lambda result: [torch.zeros_like(result[0])]),
    (case_of("matching"), first_background_matched),
    (case_of("matching"), lambda result: (result[0], result[1] * (1 + 1e-6))),
]


@pytest.mark.parametrize(("case", "spoil"), WRONG)
def test_wrong_results_fail_the_check(case, spoil):
    inputs = case.make(CPU)
    right = case.providers["fastrcnn"](inputs)
    case.check("fastrcnn", right, inputs)
    with pytest.raises(AssertionError):
        case.check("fastrcnn", spoil(right), inputs)


def test_nan_fails_every_tolerance():
    with pytest.raises(AssertionError):
        relative_error([torch.tensor([1.0, math.nan])], [torch.ones(2, dtype=torch.float64)], 1.0, 1.0)


def test_greedy_check_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes((60,), generator, 100, 120)
    scores = distinct((60,), generator, 0, 1)
    labels = torch.randint(3, (60,), generator=generator)
    keep = torch.zeros(60, dtype=torch.bool)
    for i in scores.argsort(descending=True).tolist():
        others = (keep & (labels == labels[i])).nonzero()[:, 0].tolist()
        keep[i] = all(iou(boxes[i].tolist(), boxes[j].tolist()) <= 0.4 for j in others)
    check_greedy(boxes, scores, keep, 0.4, labels)
    check_greedy(boxes, scores, keep, 0.4, labels, margin=1e-3)
    for i in range(60):
        wrong = keep.clone()
        wrong[i] = ~wrong[i]
        with pytest.raises(AssertionError):
            check_greedy(boxes, scores, wrong, 0.4, labels)


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def test_margin_lets_close_pairs_go_either_way():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU 0.5
    scores = torch.tensor([1.0, 0.5])
    kept, dropped = torch.tensor([True, True]), torch.tensor([True, False])
    for keep in (kept, dropped):
        check_greedy(boxes, scores, keep, 0.5 + 1e-4, margin=1e-3)
    check_greedy(boxes, scores, kept, 0.5 + 1e-4, margin=1e-5)
    with pytest.raises(AssertionError):
        check_greedy(boxes, scores, dropped, 0.5 + 1e-4, margin=1e-5)


# ---- measuring


def fast(case: operators.Case, monkeypatch, **providers) -> operators.Case:
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    return dataclasses.replace(case, providers=case.providers | providers)


def test_a_failed_check_gets_no_time_and_leaves_the_others_theirs(monkeypatch):
    case = case_of("anchors")
    right = case.providers["fastrcnn"]
    outcomes = measure(fast(case, monkeypatch, fastrcnn=lambda inputs: right(inputs) + 1), CPU)
    assert isinstance(outcomes["fastrcnn"].problem, AssertionError)
    assert outcomes["fastrcnn"].extra is None
    assert outcomes["fastrcnn"].skip is None
    extra = outcomes["torchvision"].extra
    assert extra["eager_us"]["p20"] <= extra["eager_us"]["median"] <= extra["eager_us"]["p80"]
    assert extra["gb_per_s"] == pytest.approx(case.bytes({}) / extra["eager_us"]["median"] / 1e3)
    assert extra["error"] == 0
    assert {"kind", "op", "case", "dtype", "direction", "provider", "device", "graph_cold_us"} <= extra.keys()


def test_lack_of_memory_is_a_reason_to_skip(monkeypatch):
    def greedy(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    outcome = measure(fast(case_of("anchors"), monkeypatch, torchvision=greedy), CPU)["torchvision"]
    assert outcome.skip == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert outcome.extra is None


def test_reasons_to_skip():
    half = RuntimeError("\"roi_align_forward_kernel\" not implemented for 'BFloat16'")
    assert unsuited("torchvision", half).startswith("unsupported")
    assert unsuited("compiled reference", ValueError("no")).startswith("does not compile")
    assert unsuited("compiled reference", AssertionError("wrong")) is None
    assert unsuited("fastrcnn", RuntimeError("illegal memory access")) is None


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"p20": 2.0, "median": 3.5, "p80": 5.0}


def test_eager_times_have_the_right_order():
    times = timing.eager_us({"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(8e-3)}, budget=0.02)
    assert times["short"]["p20"] >= 1e3
    assert times["long"]["p20"] >= 8e3
    assert times["short"]["p20"] < times["long"]["p20"]


def test_calls_are_measured_in_turn():
    seen = []
    timing.eager_us({name: lambda name=name: (seen.append(name), time.sleep(0.011)) for name in "ab"}, budget=0)
    rounds = timing.LEAST_ROUNDS
    assert seen[2:] == ["a", "b"] * rounds  # after one call each, to plan with


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
def test_without_a_gpu_there_are_no_device_times():
    assert timing.graph_us({"call": lambda: None}) == {"call": None}
    assert timing.peak_mib(lambda: None) is None
    assert timing.ceilings() is None


@pytest.mark.gpu
def test_graph_times():
    with timing.side_stream():
        resident = torch.ones(timing._l2_bytes() // 4 // 4, device="cuda")
        calls = {"sum": lambda: resident.sum(), "waits": lambda: resident[0].item()}
        for call in calls.values():
            call()
        warm, cold = timing.graph_us(calls), timing.graph_us(calls, cold=True)
    assert warm["waits"] is None
    assert cold["waits"] is None
    assert 0 < warm["sum"]["median"] < cold["sum"]["median"] < 1000
    assert timing.peak_mib(lambda: torch.ones(2**20, device="cuda")) == pytest.approx(4, abs=0.1)


@pytest.mark.gpu
def test_ceilings_of_a_gpu():
    ceilings = timing.ceilings()
    assert ceilings["l2_read_gb_per_s"] > 0.5 * ceilings["copy_gb_per_s"] > 10
    assert ceilings["write_gb_per_s"] > 10
    assert ceilings["fp32_tflops"] > 1
