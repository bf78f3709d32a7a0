"""The operator benchmarks: every case with its inputs, its providers, the check of their results, bytes and operations.

`cases("cuda")` are the sizes of a Faster R-CNN R-50-FPN on images of 800 × 1333, `cases("cpu")` small ones. Providers:

    fastrcnn            the public operators of `fastrcnn.ops`
    torchvision         what users of torchvision or detectron2 run for the same result, in the layout that suits it
    reference           the definitions in `fastrcnn.ops.reference`, eager
    compiled reference  the same under `torch.compile`: one size per operator, on CUDA, where it compiles

A provider is called with the dictionary that `Case.make(device)` returned, and may be called again and again with it.
`Case.check` compares what it returned with the definition and raises AssertionError if it is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fastrcnn import ops
from fastrcnn.ops.reference import anchors as reference_anchors
from fastrcnn.ops.reference import box_coder as reference_box_coder
from fastrcnn.ops.reference import match as reference_match
from fastrcnn.ops.reference import nms as reference_nms
from fastrcnn.ops.reference import proposals as reference_proposals
from fastrcnn.ops.reference import roi_align as reference_roi_align

Inputs = dict[str, Any]
Provider = Callable[[Inputs], Any]

HEIGHT, WIDTH = 800, 1333
PADDED = 800, 1344  # the batch's image: both sides multiples of 32
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
PAIR = 14  # operations of an IoU test: 2 max, 2 min, 2 sub, 2 clamps, 1 mul, 2 for the union, 1 mul, 2 comparisons


@dataclass(frozen=True)
class Case:
    """One row of comparisons.

    op, label: what and how large. direction: "forward", "backward" or "both". make: device -> inputs, the same at each
    call. providers: name -> callable(inputs). check: (provider's name, its result, inputs) -> the largest relative
    error; raises AssertionError for a wrong result. bytes, operations: what any implementation must at least read and
    write in device memory, and compute (a fused multiply-add counts two); to be asked after a successful check of these
    inputs. ceiling: the key of `timing.ceilings()` that bounds the bytes. l2_bytes: what is read from L2 if nothing is
    merged or found in L1.
    """

    op: str
    label: str
    dtype: torch.dtype
    direction: str
    make: Callable[[torch.device], Inputs]
    providers: dict[str, Provider]
    check: Callable[[str, Any, Inputs], float]
    bytes: Callable[[Inputs], int]
    operations: Callable[[Inputs], int]
    ceiling: str = "copy_gb_per_s"
    l2_bytes: Callable[[Inputs], int] | None = None

    @property
    def group(self) -> str:
        return f"{self.op}, {self.label}, {str(self.dtype).removeprefix('torch.')}, {self.direction}"


def cases(device_type: str) -> list[Case]:
    """All cases for "cuda" or "cpu"."""
    makers = (_roi_align, _nms_sets, _nms_one_set, _proposals, _anchors, _box_coder, _match)
    return [case for make in makers for case in make(device_type == "cuda")]


# ---- shared


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], rms_limit: float, max_limit: float) -> float:
    """The largest error over the largest magnitude of want; AssertionError over either limit, or for NaN."""
    assert len(got) == len(want), f"{len(got)} results instead of {len(want)}"
    largest = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, f"shape {tuple(g.shape)} instead of {tuple(w.shape)}"
        if not w.numel():
            continue
        difference = g.double() - w
        rms = (difference.square().mean() / w.square().mean().clamp(min=1e-60)).sqrt().item()
        worst = (difference.abs().amax() / w.abs().amax().clamp(min=1e-30)).item()
        assert rms <= rms_limit, f"relative RMS error {rms:.2e} over {rms_limit:.0e}"
        assert worst <= max_limit, f"relative maximum error {worst:.2e} over {max_limit:.0e}"
        largest = max(largest, worst)
    return largest


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _remembered(inputs: Inputs, key: str, compute: Callable[[], Any]) -> Any:
    """Compute once per inputs: the truth that all providers are compared with."""
    if key not in inputs:
        inputs[key] = compute()
    return inputs[key]


def _directed(direction: str, forward: Provider, leaves: str | None = None, grad: str | None = None) -> Provider:
    """forward in this direction. leaves, grad: the inputs that get gradients, and the result's gradient."""

    def only_forward(inputs: Inputs) -> Any:
        with torch.no_grad():
            return forward(inputs)

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(inputs), inputs[leaves], inputs[grad])

    def backward(inputs: Inputs) -> tuple[Tensor, ...]:
        tape = _remembered(inputs, f"tape {id(forward)}", lambda: forward(inputs))
        return torch.autograd.grad(tape, inputs[leaves], inputs[grad], retain_graph=True)

    return {"forward": only_forward, "both": both, "backward": backward}[direction]


def _compiled(function: Callable) -> Callable:
    """Compiled at the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _random_boxes(
    shape: tuple[int, ...], generator: torch.Generator, height: int, width: int, smallest: float = 16.0
) -> Tensor:
    """float32 [*shape, 4] inside the image, on a grid of 1/8 px; the last dimension of shape counts boxes.

    Sides are log-uniform, as scales of proposals are, and half of the boxes crowd round 8 objects per set.
    Eighths keep decisions about levels, sample counts and borders clear of rounding, so that float32 and the float64
    truth decide alike.
    """
    device = generator.device
    rand = partial(torch.rand, generator=generator, device=device)
    limit = torch.tensor([width, height], dtype=torch.float32, device=device)
    side = smallest * torch.exp(rand(*shape, 1) * torch.log(0.7 * limit.min() / smallest))
    aspect = torch.exp(rand(*shape, 1) * 1.4 - 0.7)
    size = torch.cat([side * aspect.sqrt(), side / aspect.sqrt()], -1)
    centre = rand(*shape, 2) * limit
    *sets, count = shape
    objects = torch.randint(min(8, count), (*sets, count), generator=generator, device=device)[..., None].expand_as(
        size
    )
    crowded = rand(*shape, 1) < 0.5
    size = torch.where(crowded, size.gather(-2, objects) * (0.8 + 0.4 * rand(*shape, 2)), size)
    jitter = (rand(*shape, 2) - 0.5) * 0.4 * size
    centre = torch.where(crowded, centre.gather(-2, objects) + jitter, centre)
    low = torch.minimum((centre - size / 2).clamp(min=0), limit - smallest)
    high = torch.maximum(torch.minimum(centre + size / 2, limit), low + smallest)
    return ((torch.cat([low, high], -1) * 8).round() / 8).contiguous()


def _distinct(shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
    """float32 numbers that all differ within the last dimension, in random order: no result hangs on ties."""
    order = torch.rand(shape, generator=generator, device=generator.device).argsort(-1)
    return torch.linspace(low, high, shape[-1], device=generator.device)[order]


# ---- multi-level ROIAlign


@dataclass(frozen=True)
class Pooling:
    """A setting of ROIAlign over a pyramid of 4 levels."""

    label: str
    images: int
    boxes: int  # per image
    output: int = 7
    ratio: int = 2
    height: int = HEIGHT
    width: int = PADDED[1]
    channels: int = 256

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        return [(self.images, self.channels, -(-self.height // s), -(-self.width // s)) for s in STRIDES[:4]]

    @property
    def settings(self) -> tuple:
        """As the reference takes them."""
        return [self.output, self.output], [1 / s for s in STRIDES[:4]], self.ratio, False, 224.0, 4


def _roi_align(full: bool) -> list[Case]:
    if not full:
        small = Pooling("2 images 256×320, 64 boxes each", 2, 64, height=256, width=320, channels=64)
        return [roi_align_case(small, torch.float32, direction) for direction in ("forward", "both")]
    low, wide = torch.bfloat16, torch.float32
    box = Pooling("8 images 800×1333, 512 boxes each, 7×7, ratio 2", 8, 512)
    mask = Pooling("8 images 800×1333, 128 boxes each, 14×14, ratio 2", 8, 128, output=14)
    adaptive = Pooling("8 images 800×1333, 512 boxes each, 7×7, ratio 0", 8, 512, ratio=0)
    inference = Pooling("1 image 800×1333, 1000 boxes, 7×7, ratio 2", 1, 1000)
    return [
        roi_align_case(box, low, "forward", compiled=True),
        *(roi_align_case(box, low, direction) for direction in ("backward", "both")),
        *(roi_align_case(box, wide, direction) for direction in ("forward", "backward", "both")),
        *(roi_align_case(box, dtype, "backward", deterministic=True) for dtype in (low, wide)),
        *(roi_align_case(mask, low, direction) for direction in ("forward", "backward")),
        *(roi_align_case(adaptive, low, direction) for direction in ("forward", "backward")),
        *(roi_align_case(inference, dtype, "forward") for dtype in (low, wide)),
    ]


def roi_align_case(
    pooling: Pooling, dtype: torch.dtype, direction: str, *, compiled: bool = False, deterministic: bool = False
) -> Case:
    """ROIAlign of a pyramid. torchvision's maps are contiguous, the others' channels_last; gradients likewise.

    Below float32 torchvision runs under autocast, as in a model: it casts maps and boxes to float32, and the result
    back. deterministic: ours under `torch.use_deterministic_algorithms`, which also fills every new tensor, and
    repeatable to the bit; torchvision's without.
    """
    settings, shapes = pooling.settings, pooling.shapes
    flat_shapes = [side for shape in shapes for side in shape]
    names = [str(level) for level in range(len(shapes))]
    theirs = torchvision.ops.MultiScaleRoIAlign(names, pooling.output, pooling.ratio)
    image_shapes = [(pooling.height, pooling.width)] * pooling.images

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        boxes = _random_boxes((pooling.images, pooling.boxes), generator, pooling.height, pooling.width)
        maps = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
        out_shape = pooling.images * pooling.boxes, pooling.channels, pooling.output, pooling.output
        inputs: Inputs = {"boxes": boxes, "contiguous": maps, "shapes": shapes, "settings": settings}
        inputs["channels last"] = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        if direction != "forward":
            grad = torch.randn(out_shape, generator=generator, device=device, dtype=dtype)
            inputs["grad"], inputs["grad channels last"] = grad, grad.contiguous(memory_format=torch.channels_last)
            for m in (*inputs["contiguous"], *inputs["channels last"]):
                m.requires_grad_()
        return inputs

    def ours(inputs: Inputs) -> Tensor:
        (size, _), scales, ratio, aligned, canonical_size, canonical_level = settings
        return ops.multilevel_roi_align(
            inputs["channels last"], inputs["boxes"], size, scales, ratio, aligned, canonical_size, canonical_level
        )

    def torchvision_pooler(inputs: Inputs) -> Tensor:
        features = dict(zip(names, inputs["contiguous"], strict=True))
        with torch.autocast(inputs["boxes"].device.type, dtype=dtype, enabled=dtype != torch.float32):
            return theirs(features, list(inputs["boxes"]), image_shapes)

    def reference(inputs: Inputs) -> Any:
        with torch.no_grad():
            result = None
            if direction != "backward":
                result = reference_roi_align.multilevel_roi_align(
                    inputs["channels last"], inputs["boxes"], None, *settings
                )
            if direction != "forward":
                result = reference_roi_align.multilevel_roi_align_backward(
                    inputs["grad channels last"], inputs["boxes"], None, flat_shapes, True, *settings
                )
            return result

    def truth(inputs: Inputs) -> list[Tensor]:
        boxes = inputs["boxes"].double()
        with torch.no_grad():
            if direction == "forward":
                maps = [m.double() for m in inputs["channels last"]]
                return [reference_roi_align.multilevel_roi_align(maps, boxes, None, *settings)]
            grad = inputs["grad channels last"].double()
            return reference_roi_align.multilevel_roi_align_backward(grad, boxes, None, flat_shapes, True, *settings)

    def check(provider: str, result: Any, inputs: Inputs) -> float:
        results = [result] if isinstance(result, Tensor) else list(result)
        if deterministic and provider == "fastrcnn":
            again = providers[provider](inputs)
            assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "a second run differs"
        want = _remembered(inputs, "truth", lambda: truth(inputs))
        return relative_error(results, want, *_roi_align_limits(dtype, pooling))

    ours_directed = _directed(direction, ours, "channels last", "grad channels last")
    providers = {
        "fastrcnn": _deterministic(ours_directed) if deterministic else ours_directed,
        "torchvision": _directed(direction, torchvision_pooler, "contiguous", "grad"),
        "reference": reference,
    }
    if compiled:
        function = _compiled(reference_roi_align.multilevel_roi_align)
        providers["compiled reference"] = _directed(
            direction, lambda inputs: function(inputs["channels last"], inputs["boxes"], None, *settings)
        )
    return Case(
        op="multi-level ROIAlign",
        label=pooling.label + (", deterministic" if deterministic else ""),
        dtype=dtype,
        direction=direction,
        make=make,
        providers=providers,
        check=check,
        bytes=partial(roi_align_bytes, direction),
        operations=lambda inputs: (
            2 * inputs["shapes"][0][1] * roi_align_taps(inputs)[0] * (2 if direction == "both" else 1)
        ),
        l2_bytes=_roi_align_l2_bytes if direction == "forward" else None,
    )


def _deterministic(call: Provider) -> Provider:
    def repeatable(inputs: Inputs) -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            return call(inputs)
        finally:
            torch.use_deterministic_algorithms(False)

    return repeatable


def _roi_align_limits(dtype: torch.dtype, pooling: Pooling) -> tuple[float, float]:
    """Relative RMS and maximum error: rounding of the results, and, for float32, of positions of up to this many pixels
    (half a unit in the last place, which shifts weight between neighbours of white noise)."""
    if dtype == torch.bfloat16:
        return 5e-3, 2e-2
    position = 2**-24 * max(pooling.shapes[0][2:])
    return 1e-6 + position, 1e-5 + 4 * position


def roi_align_taps(inputs: Inputs) -> tuple[int, int]:
    """Taps of non-zero weight of all bins, and how many different pixels they hit."""

    def count() -> tuple[int, int]:
        output, _, ratio, *_ = settings = inputs["settings"]
        regions = reference_roi_align.locate(inputs["shapes"], inputs["boxes"].double(), None, *settings)
        source, pixel, weight = reference_roi_align.flat_taps(regions, output, ratio)
        box = source // (output[0] * output[1])
        hit = (weight != 0) & regions.usable[box]
        key = (regions.level[box] << 40) + pixel
        return int(hit.sum()), len(key[hit].unique())

    return _remembered(inputs, "taps", count)


def roi_align_bytes(direction: str, inputs: Inputs) -> int:
    """Forward: each pixel that is hit read once, the result written. Backward: its gradient read, all maps' written."""
    features = inputs["channels last"]
    item, channels = features[0].element_size(), features[0].shape[1]
    (height, width), boxes = inputs["settings"][0], inputs["boxes"]
    bins = boxes[..., 0].numel() * height * width * channels * item
    forward = roi_align_taps(inputs)[1] * channels * item + bins + boxes.nbytes
    backward = bins + sum(f.nbytes for f in features) + boxes.nbytes
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def _roi_align_l2_bytes(inputs: Inputs) -> int:
    first = inputs["channels last"][0]
    return roi_align_taps(inputs)[0] * first.shape[1] * first.element_size()


# ---- NMS


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


def _nms_sets(full: bool) -> list[Case]:
    if not full:
        return [nms_sets_case("2 images × 3 levels × 200 boxes", 6, 200, height=256, width=320)]
    return [nms_sets_case("8 images × 5 levels × 2000 boxes, IoU 0.7", 40, 2000)]


def nms_sets_case(label: str, sets: int, count: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """NMS of many sets; the padded result has room for all boxes, so that nobody may stop early."""
    threshold = 0.7

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        boxes = _random_boxes((sets, count), generator, height, width)
        return {"boxes": boxes, "scores": _distinct((sets, count), generator, 0, 1)}

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


def _nms_one_set(full: bool) -> list[Case]:
    if not full:
        return [nms_case(1000, 10, height=256, width=320)]
    batched = [nms_case(count, 80) for count in (10, 1000, 10_000, 20_000, 80_000, 100_000, 200_000)]
    return [*batched, *(nms_case(count, 1) for count in (1000, 10_000))]


def nms_case(count: int, classes: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """One set: `batched_nms` of so many classes, or `nms` for one."""
    threshold = 0.5

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        inputs = {"boxes": _random_boxes((count,), generator, height, width)}
        inputs["scores"] = _distinct((count,), generator, 0, 1)
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


# ---- proposal selection


def _proposals(full: bool) -> list[Case]:
    if not full:
        return [proposals_case("2 images 256×320, 200 to 100", 2, 200, 100, height=256, width=320)]
    return [
        proposals_case("8 images 800×1333, 2000 to 1000", 8, 2000, 1000),
        proposals_case("1 image 800×1333, 1000 to 1000", 1, 1000, 1000),
    ]


def _grids(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


@cache
def _cells() -> tuple[Tensor, ...]:
    """torchvision's cell anchors, [3, 4] per level."""
    return tuple(_their_generator().cell_anchors)


def _their_generator() -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), (RATIOS,) * len(ANCHOR_SIZES))


def proposals_case(label: str, images: int, before: int, after: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """From the outputs of a region proposal network to the best `after` of an image, `before` per level before NMS."""
    threshold = 0.7
    grids = _grids(height, width)
    pairs = [(float(s), float(s)) for s in STRIDES]
    strides = [float(s) for s in STRIDES for _ in range(2)]
    counts = [3 * h * w for h, w in grids]
    weights = [1.0, 1.0, 1.0, 1.0]

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        logits = _distinct((images, sum(counts)), generator, -12, 1).split(counts, 1)
        inputs: Inputs = {"cells": [c.to(device) for c in _cells()]}
        inputs["logits"] = [x.reshape(images, 3, h, w) for x, (h, w) in zip(logits, grids, strict=True)]
        inputs["deltas"] = [
            # no box leaves the image altogether: how empty ones are dropped differs between the providers
            (0.15 * torch.randn(images, 12, h, w, generator=generator, device=device)).clamp(-0.3, 0.3)
            for h, w in grids
        ]
        inputs["sizes"] = torch.tensor([[height, width]] * images, dtype=torch.int32).to(device)
        inputs["anchors"] = [
            reference_anchors.grid_anchors([cells], grid, stride)
            for cells, grid, stride in zip(inputs["cells"], grids, pairs, strict=True)
        ]
        return inputs

    def ours(inputs: Inputs) -> tuple[Tensor, ...]:
        return ops.select_proposals(
            inputs["logits"],
            inputs["deltas"],
            inputs["cells"],
            pairs,
            inputs["sizes"],
            pre_nms_top_n=before,
            post_nms_top_n=after,
            max_proposals=after,
            nms_threshold=threshold,
            min_size=0.0,
        )

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        return reference_proposals.select_proposals(
            *(inputs[key] for key in ("logits", "deltas", "cells", "sizes")),
            *(strides, before, after, after, threshold, 0.0, weights, False),
        )

    def in_plain_operators(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        return decode_all_then_select(
            inputs["logits"], inputs["deltas"], inputs["anchors"], (height, width), before, after, threshold
        )

    def candidates(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Per level: the best logits [B, k] and their boxes [B, k, 4], falling, in float64."""
        levels = []
        for logits, deltas, anchors in zip(*(inputs[key] for key in ("logits", "deltas", "anchors")), strict=True):
            flat = logits.permute(0, 2, 3, 1).flatten(1)
            best, index = flat.topk(min(before, flat.shape[1]), dim=1)
            codes = deltas.permute(0, 2, 3, 1).reshape(images, -1, 4).double()
            codes = codes.gather(1, index[..., None].expand(-1, -1, 4))
            limits = inputs["sizes"][:, None].expand(*index.shape, 2).reshape(-1, 2)
            boxes = reference_box_coder.decode_boxes(
                codes.flatten(0, 1), anchors.double()[index.flatten()], limits, weights, reference_box_coder.MAX_LOG
            )
            levels.append((best.double(), boxes.view(*index.shape, 4)))
        return levels

    def check(provider: str, result: Any, inputs: Inputs) -> float:
        levels = _remembered(inputs, "candidates", lambda: candidates(inputs))
        # exp and rounding move borders by up to 1e-3 px of boxes a few pixels wide; torchvision adds level offsets
        margin = 5e-3 if provider == "torchvision" else 1e-3
        largest = 0.0
        for image in range(images):
            boxes, logits = result[image] if isinstance(result, list) else _valid_logits(*(x[image] for x in result))
            truth_logits = torch.cat([best[image] for best, _ in levels])
            truth_boxes = torch.cat([decoded[image] for _, decoded in levels])
            level = torch.cat([torch.full_like(best[image], i) for i, (best, _) in enumerate(levels)]).long()
            ranked, order = truth_logits.sort()
            place = torch.searchsorted(ranked, logits.double()).clamp(max=len(ranked) - 1)
            nearer = (ranked[place] - logits).abs() > (ranked[(place - 1).clamp(min=0)] - logits).abs()
            slot = order[(place - nearer.long()).clamp(min=0)]
            assert len(slot.unique()) == len(slot), "a proposal came twice"
            assert (truth_logits[slot].diff() < 0).all(), "the proposals are not in falling score order"
            assert len(slot) <= after, f"{len(slot)} proposals, wanted at most {after}"
            largest = max(largest, relative_error([boxes], [truth_boxes[slot]], 1e-5, 1e-5))
            keep = torch.zeros_like(level, dtype=torch.bool).index_fill_(0, slot, True)
            seen = level >= 0 if len(slot) < after else truth_logits >= truth_logits[slot].amin()
            part = truth_boxes[seen], truth_logits[seen], keep[seen]
            check_greedy(*part, threshold, level[seen], margin)
        return largest

    providers = {"fastrcnn": ours, "torchvision": in_plain_operators}
    if images * before <= 1000:  # one launch after the other for each box
        providers["reference"] = reference
    chosen = images * sum(min(before, count) for count in counts)
    return Case(
        op="proposal selection",
        label=label,
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers=providers,
        check=check,
        bytes=lambda inputs: images * sum(counts) * 4 + chosen * 16 + images * after * (16 + 4 + 1),
        operations=lambda inputs: images * sum(counts) + chosen * 34,  # a comparison each; decode and clip
    )


def _valid_logits(boxes: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    assert (valid[1:] <= valid[:-1]).all(), "invalid slots are not last"
    return boxes[valid], torch.logit(scores[valid].double())


def decode_all_then_select(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    size: tuple[int, int],
    before: int,
    after: int,
    threshold: float,
) -> list[tuple[Tensor, Tensor]]:
    """The usual sequence of PyTorch operators: decode every anchor, top-k per level, then image by image.

    Its anchors [A, 4] per level are given. Returns boxes and logits of each image.
    """
    images = len(logits[0])
    rows = torch.arange(images, device=logits[0].device)[:, None]
    coder = TorchvisionBoxCoder((1.0, 1.0, 1.0, 1.0))
    best_logits, best_boxes, best_levels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        codes = level_deltas.permute(0, 2, 3, 1).reshape(-1, 4)
        boxes = coder.decode_single(codes, level_anchors.repeat(images, 1)).view(images, -1, 4)
        flat = level_logits.permute(0, 2, 3, 1).flatten(1)
        best, index = flat.topk(min(before, flat.shape[1]), dim=1)
        best_logits.append(best)
        best_boxes.append(boxes[rows, index])
        best_levels.append(torch.full_like(index[0], level))
    all_logits, all_boxes, levels = torch.cat(best_logits, 1), torch.cat(best_boxes, 1), torch.cat(best_levels)
    results = []
    for boxes, scores in zip(all_boxes, all_logits, strict=True):
        finite = torch.isfinite(boxes).all(1) & torch.isfinite(scores)
        of_level = levels
        if not finite.all():
            boxes, scores, of_level = boxes[finite], scores[finite], of_level[finite]
        boxes = torchvision.ops.clip_boxes_to_image(boxes, size)
        full = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if full.sum().item() != len(boxes):
            boxes, scores, of_level = boxes[full], scores[full], of_level[full]
        keep = torchvision.ops.batched_nms(boxes, scores, of_level, threshold)[:after]
        results.append((boxes[keep], scores[keep]))
    return results


# ---- anchors


def _anchors(full: bool) -> list[Case]:
    if not full:
        return [anchors_case("20 k", _grids(256, 320))]
    return [
        anchors_case("267 k (800×1333)", _grids(HEIGHT, WIDTH), compiled=True),
        anchors_case("100 M", [(5000 >> level, 5000 >> level) for level in range(5)]),
    ]


def anchors_case(label: str, grids: list[tuple[int, int]], compiled: bool = False) -> Case:
    pairs = [(float(s), float(s)) for s in STRIDES]
    flat_grids = [side for grid in grids for side in grid]
    strides = [side for pair in pairs for side in pair]
    count = 3 * sum(h * w for h, w in grids)

    def make(device: torch.device) -> Inputs:
        theirs = _their_generator()
        theirs.set_cell_anchors(torch.float32, device)
        # tensors on the device, as its forward makes them
        their_strides = [[torch.full((), s, dtype=torch.int64, device=device) for _ in range(2)] for s in STRIDES]
        return {"cells": [c.to(device) for c in _cells()], "generator": theirs, "strides": their_strides}

    def reference(function: Callable) -> Provider:
        return lambda inputs: function(inputs["cells"], flat_grids, strides)

    def truth(inputs: Inputs) -> Tensor:
        return reference_anchors.grid_anchors([c.double() for c in inputs["cells"]], flat_grids, strides)

    providers = {
        "fastrcnn": lambda inputs: ops.grid_anchors(grids, pairs, inputs["cells"]),
        "torchvision": lambda inputs: torch.cat(inputs["generator"].grid_anchors(grids, inputs["strides"])),
        "reference": reference(reference_anchors.grid_anchors),
    }
    if compiled:
        providers["compiled reference"] = reference(_compiled(reference_anchors.grid_anchors))
    return Case(
        op="anchors",
        label=label,
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers=providers,
        # whole numbers below 2²⁴: float32 is exact
        check=lambda _, result, inputs: relative_error(
            [result], [_remembered(inputs, "truth", lambda: truth(inputs))], 0.0, 0.0
        ),
        bytes=lambda inputs: 16 * count,
        operations=lambda inputs: 4 * count,
        ceiling="write_gb_per_s",
    )


# ---- box coder


def _box_coder(full: bool) -> list[Case]:
    sizes = ((100_000, "100 k"), (10_000_000, "10 M")) if full else ((20_000, "20 k"),)
    return [
        box_coder_case(kind, count, label, direction, compiled=full and count == 100_000 and direction == "forward")
        for count, label in sizes
        for kind in ("encode", "decode", "decode and clip")
        for direction in ("forward", "both")
    ]


def box_coder_case(kind: str, count: int, label: str, direction: str, compiled: bool = False) -> Case:
    """Gradients of encode are taken of the boxes, those of decode of the deltas."""
    weights = [10.0, 10.0, 5.0, 5.0]
    encodes, clips = kind == "encode", kind == "decode and clip"
    coder = TorchvisionBoxCoder(tuple(weights))

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        # one crowd per 1000 boxes, or all would be of one crowd
        anchors = _random_boxes((count // 1000, 1000), generator, HEIGHT, WIDTH).flatten(0, 1)
        deltas = torch.randn(count, 4, generator=generator, device=device)
        first = _random_boxes((count // 1000, 1000), generator, HEIGHT, WIDTH).flatten(0, 1) if encodes else deltas
        inputs: Inputs = {"first": first, "anchors": anchors}
        inputs["sizes"] = torch.tensor([[HEIGHT, WIDTH]], dtype=torch.int32).to(device).expand(count, 2)
        if direction != "forward":
            inputs["leaves"] = [first.requires_grad_()]
            inputs["grad"] = torch.randn(count, 4, generator=generator, device=device)
        return inputs

    def ours(inputs: Inputs) -> Tensor:
        if encodes:
            return ops.encode_boxes(inputs["first"], inputs["anchors"], weights)
        return ops.decode_boxes(inputs["first"], inputs["anchors"], weights, (HEIGHT, WIDTH) if clips else None)

    def theirs(inputs: Inputs) -> Tensor:
        if encodes:
            return coder.encode_single(inputs["first"], inputs["anchors"])
        boxes = coder.decode_single(inputs["first"], inputs["anchors"])
        return torchvision.ops.clip_boxes_to_image(boxes, (HEIGHT, WIDTH)) if clips else boxes

    def reference(
        inputs: Inputs,
        dtype: torch.dtype = torch.float32,
        encode: Callable = reference_box_coder.encode_boxes,
        decode: Callable = reference_box_coder.decode_boxes,
    ) -> Tensor:
        first, anchors = inputs["first"].to(dtype), inputs["anchors"].to(dtype)
        if encodes:
            return encode(first, anchors, weights)
        return decode(first, anchors, inputs["sizes"] if clips else None, weights, reference_box_coder.MAX_LOG)

    def truth(inputs: Inputs) -> list[Tensor]:
        result = _directed(direction, partial(reference, dtype=torch.float64), "leaves", "grad 64")(
            inputs if direction == "forward" else inputs | {"grad 64": inputs["grad"].double()}
        )
        return [x.double() for x in ([result] if direction == "forward" else result)]

    def check(_: str, result: Any, inputs: Inputs) -> float:
        want = _remembered(inputs, "truth", lambda: truth(inputs))
        got = [result] if direction == "forward" else list(result)
        if clips and direction == "both":
            # which side of the border a corner lies on is decided by rounding where it is this close
            with torch.no_grad():
                corners = reference_box_coder.decode_boxes(
                    inputs["first"].double(), inputs["anchors"].double(), None, weights, reference_box_coder.MAX_LOG
                )
            limit = torch.tensor([WIDTH, HEIGHT] * 2, device=corners.device)
            clear = (torch.minimum(corners.abs(), (corners - limit).abs()) > 1e-2).all(1, keepdim=True)
            got, want = [g * clear for g in got], [w * clear for w in want]
        return relative_error(got, want, 1e-6, 1e-5)

    providers: dict[str, Provider] = {
        "fastrcnn": _directed(direction, ours, "leaves", "grad"),
        "torchvision": _directed(direction, theirs, "leaves", "grad"),
        "reference": _directed(direction, reference, "leaves", "grad"),
    }
    if compiled:
        functions = {
            "encode": _compiled(reference_box_coder.encode_boxes),
            "decode": _compiled(reference_box_coder.decode_boxes),
        }
        providers["compiled reference"] = _directed(direction, partial(reference, **functions))
    arithmetic = 24 if encodes else 34 if clips else 26
    # forward: two arrays in, one out; backward: the gradient and both arrays in, one out
    return Case(
        op="box coder",
        label=f"{kind}, {label}",
        dtype=torch.float32,
        direction=direction,
        make=make,
        providers=providers,
        check=check,
        bytes=lambda inputs: count * 16 * (3 if direction == "forward" else 7),
        operations=lambda inputs: count * arithmetic * (1 if direction == "forward" else 2),
    )


# ---- matching


def _match(full: bool) -> list[Case]:
    if not full:
        return [match_case("2 images × 20 k anchors × 10", 2, 10, grids=_grids(256, 320))]
    return [
        match_case("8 images × 267 k anchors × 100", 8, 100, grids=_grids(HEIGHT, WIDTH)),
        match_case("8 images × 2000 proposals × 100", 8, 100, proposals=2000, compiled=True),
    ]


def match_case(
    label: str,
    images: int,
    objects: int,
    grids: list[tuple[int, int]] | None = None,
    proposals: int = 0,
    compiled: bool = False,
) -> Case:
    """Anchors of these grids, shared by all images, with the low-quality rule; or so many proposals without it."""
    low_quality = grids is not None
    high, low = (0.7, 0.3) if low_quality else (0.5, 0.5)
    height, width = (grids[0][0] * STRIDES[0], grids[0][1] * STRIDES[0]) if grids else (HEIGHT, WIDTH)
    count = 3 * sum(h * w for h, w in grids) if grids else proposals
    matcher = Matcher(high, low, low_quality)

    def make(device: torch.device) -> Inputs:
        generator = _generator(device)
        gt = _random_boxes((images, objects), generator, height, width)
        if grids:
            strides = [float(s) for s in STRIDES for _ in range(2)]
            sides = [side for grid in grids for side in grid]
            boxes = reference_anchors.grid_anchors([c.to(device) for c in _cells()], sides, strides)
        else:
            boxes = _random_boxes((images, count), generator, height, width)
        return {"boxes": boxes, "gt": gt, "valid": torch.ones(images, objects, dtype=torch.bool, device=device)}

    def arguments(inputs: Inputs) -> tuple:
        return inputs["boxes"], inputs["gt"], inputs["valid"], high, low, low_quality

    def image_by_image(inputs: Inputs) -> tuple[Tensor, None]:
        all_boxes = inputs["boxes"].expand(images, count, 4)
        pairs = zip(inputs["gt"], all_boxes, strict=True)
        return torch.stack([matcher(torchvision.ops.box_iou(gt, boxes)) for gt, boxes in pairs]), None

    def check(provider: str, result: tuple[Tensor, Tensor | None], inputs: Inputs) -> float:
        matched, iou = result
        want, want_iou = _remembered(inputs, "truth", lambda: reference_match.match_boxes(*arguments(inputs)))
        assert matched.shape == want.shape
        assert matched.dtype == torch.int64
        wrong = matched != want
        if provider != "fastrcnn":  # a compiler may contract multiply-adds, and another order of additions rounds anew
            wrong &= ~_remembered(inputs, "doubtful", lambda: _doubtful(*arguments(inputs)))
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} boxes are matched with something else"
        if iou is None:
            return 0.0
        assert provider != "fastrcnn" or torch.equal(iou, want_iou), "the best IoUs differ"
        return relative_error([iou], [want_iou.double()], 1e-6, 1e-6)

    providers: dict[str, Provider] = {
        "fastrcnn": lambda inputs: ops.match_boxes(*arguments(inputs)),
        "torchvision": image_by_image,
        "reference": lambda inputs: reference_match.match_boxes(*arguments(inputs)),
    }
    if compiled:
        function = _compiled(reference_match.match_boxes)
        providers["compiled reference"] = lambda inputs: function(*arguments(inputs))
    return Case(
        op="matching",
        label=label,
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers=providers,
        check=check,
        bytes=lambda inputs: inputs["boxes"].nbytes + inputs["gt"].nbytes + images * (objects + count * (8 + 4)),
        operations=lambda inputs: images * count * objects * PAIR,  # an IoU, its quotient and a running maximum
    )


def _doubtful(boxes: Tensor, gt: Tensor, valid: Tensor, high: float, low: float, low_quality: bool) -> Tensor:
    """bool [B, A]: the match hangs on the sixth digit of an IoU. All ground truths are taken as valid."""
    images = []
    for image, objects in enumerate(gt.double()):
        iou = torchvision.ops.box_iou(objects, boxes.expand(len(gt), *boxes.shape[-2:])[image].double())  # [G, A]
        best, second = iou.topk(2, dim=0).values
        near = (best - second < 1e-6) | ((best - high).abs() < 1e-6) | ((best - low).abs() < 1e-6)
        if low_quality:
            near |= ((iou.amax(1, keepdim=True) - iou) < 1e-6).any(0)
        images.append(near)
    return torch.stack(images)
