"""NMS of many sets in one launch, and of one large set."""

from typing import Any

import torch
import torchvision
from torch import Tensor

from benchmarks.operators.case import HEIGHT, WIDTH, Case, Inputs, Provider, distinct, generator_of, random_boxes
from fastrcnn import ops
from fastrcnn.analysis import PAIR
from fastrcnn.ops.reference import nms as reference_nms


def check_greedy(
    boxes: Tensor, scores: Tensor, keep: Tensor, threshold: float, labels: Tensor | None = None, margin: float = 0.0
) -> None:
    """AssertionError unless keep, bool [N], is what greedy NMS keeps of boxes [N, 4]; one set.

    Greedy NMS is the only solution of: a box is kept unless a kept one of higher score (and its label) overlaps it. So
    it suffices to test that equation once. margin: pairs whose IoU lies this close to the threshold may go either way;
    without one the decision is the reference's, bit for bit.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    if labels is not None:
        order = order[torch.sort(labels[order], stable=True).indices]
        groups = order.split(labels[order].unique_consecutive(return_counts=True)[1].tolist())
    else:
        groups = (order,)
    for group in groups:
        kept, ranked = keep[group], boxes[group]
        surely, maybe = torch.zeros_like(kept), torch.zeros_like(kept)
        for rows in kept.nonzero()[:, 0].split(max(1, (1 << 26) // len(group))):
            later = torch.arange(len(group), device=rows.device) > rows[:, None]
            for found, limit in ((surely, threshold + margin), (maybe, threshold - margin)):
                hit = _overlaps(ranked[rows, None], ranked[None], limit, margin) & later
                found |= hit.any(0)
        wrongly_kept, wrongly_dropped = int((kept & surely).sum()), int((~kept & ~maybe).sum())
        assert not wrongly_kept, f"{wrongly_kept} of {len(group)} boxes are kept though a kept one overlaps them"
        assert not wrongly_dropped, (
            f"{wrongly_dropped} of {len(group)} boxes are dropped though no kept one overlaps them"
        )


def _overlaps(a: Tensor, b: Tensor, threshold: float, margin: float) -> Tensor:
    return (
        reference_nms.overlaps(a.double(), b.double(), threshold) if margin else reference_nms.overlaps(a, b, threshold)
    )


def _margin(provider: str, boxes: Tensor, classes: int = 1) -> float:
    """0 for our operators. torchvision's compiler may contract multiply-adds; and where it separates classes by an
    offset, coordinates are rounded at the offset's magnitude: 12 roundings relative to the shortest side."""
    if provider != "torchvision":
        return 0.0
    shortest = (boxes[..., 2:] - boxes[..., :2]).amin().item()
    return 1e-6 + (12 * 2**-24 * (boxes.amax().item() + 1) * classes / shortest if classes > 1 else 0.0)


def pair_tests(keep: Tensor, labels: Tensor | None = None) -> int:
    """IoU tests that any order of work needs: a kept box against all kept before it, a dropped one against one."""
    counts = keep.sum()[None] if labels is None else torch.bincount(labels[keep])
    return int((counts * (counts - 1) // 2).sum() + (~keep).sum())


def cases_of_many_sets(full: bool) -> list[Case]:
    if not full:
        return [nms_sets_case("2 images × 3 levels × 200 boxes", 6, 200, height=256, width=320)]
    return [nms_sets_case("8 images × 5 levels × 2000 boxes, IoU 0.7", 40, 2000)]


def nms_sets_case(label: str, sets: int, count: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """NMS of many sets; the padded result has room for all boxes, so that nobody may stop early."""
    threshold = 0.7

    def make(device: torch.device) -> Inputs:
        generator = generator_of(device)
        boxes = random_boxes((sets, count), generator, height, width)
        return {"boxes": boxes, "scores": distinct((sets, count), generator, 0, 1)}

    def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return ops.nms_padded(inputs["boxes"], inputs["scores"], threshold, count)

    def loop(inputs: Inputs) -> list[Tensor]:
        pairs = zip(inputs["boxes"], inputs["scores"], strict=True)
        return [torchvision.ops.nms(boxes, scores, threshold) for boxes, scores in pairs]

    def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return reference_nms.nms_padded(inputs["boxes"], inputs["scores"], threshold, count)

    def check(provider: str, result: Any, inputs: Inputs) -> float:
        if isinstance(result, tuple):
            padded, counts = result
            assert (padded >= 0).sum(1).equal(counts.long()), "counts do not count the indices"
            ends = counts.tolist()
            assert all((row[n:] == -1).all() for row, n in zip(padded, ends, strict=True)), "padding is not -1"
            result = [row[:n] for row, n in zip(padded, ends, strict=True)]
        assert len(result) == sets
        masks = [_kept_mask(kept, scores) for kept, scores in zip(result, inputs["scores"], strict=True)]
        for boxes, scores, keep in zip(inputs["boxes"], inputs["scores"], masks, strict=True):
            check_greedy(boxes, scores, keep, threshold, margin=_margin(provider, boxes))
        inputs.setdefault("kept", masks)
        return 0.0

    return Case(
        op="NMS, many sets",
        label=label,
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers={"fastrcnn": ours, "torchvision": loop, "reference": reference},
        check=check,
        bytes=lambda inputs: sets * count * (16 + 4 + 8) + 4 * sets,
        operations=lambda inputs: PAIR * sum(pair_tests(keep) for keep in inputs["kept"]),
    )


def _kept_mask(kept: Tensor, scores: Tensor) -> Tensor:
    """Indices in falling score order -> bool [N]."""
    ranked = scores[kept]
    assert (ranked[1:] < ranked[:-1]).all(), "the indices are not in falling score order"
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, kept, True)


def cases_of_one_set(full: bool) -> list[Case]:
    if not full:
        return [nms_case(1000, 10, height=256, width=320)]
    batched = [nms_case(count, 80) for count in (10, 1000, 10_000, 20_000, 80_000, 100_000, 200_000)]
    return [*batched, *(nms_case(count, 1) for count in (1000, 10_000))]


def nms_case(count: int, classes: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """One set: `batched_nms` of so many classes, or `nms` for one."""
    threshold = 0.5

    def make(device: torch.device) -> Inputs:
        generator = generator_of(device)
        inputs = {"boxes": random_boxes((count,), generator, height, width)}
        inputs["scores"] = distinct((count,), generator, 0, 1)
        inputs["labels"] = torch.randint(classes, (count,), generator=generator, device=device)
        return inputs

    def provider(module: Any) -> Provider:
        if classes == 1:
            return lambda inputs: module.nms(inputs["boxes"], inputs["scores"], threshold)
        return lambda inputs: module.batched_nms(inputs["boxes"], inputs["scores"], inputs["labels"], threshold)

    def check(name: str, result: Tensor, inputs: Inputs) -> float:
        keep = _kept_mask(result, inputs["scores"])
        margin = _margin(name, inputs["boxes"], classes)
        check_greedy(inputs["boxes"], inputs["scores"], keep, threshold, inputs["labels"], margin)
        inputs.setdefault("kept", keep)
        return 0.0

    providers = {"fastrcnn": provider(ops), "torchvision": provider(torchvision.ops)}
    if count <= 2000:  # one launch after the other for each box
        providers["reference"] = provider(reference_nms)
    return Case(
        op="NMS, one set",
        label=f"{count} boxes" + (f", {classes} classes" if classes > 1 else ""),
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers=providers,
        check=check,
        bytes=lambda inputs: count * (16 + 4 + (8 if classes > 1 else 0)) + 8 * int(inputs["kept"].sum()),
        operations=lambda inputs: PAIR * pair_tests(inputs["kept"], inputs["labels"]),
    )
