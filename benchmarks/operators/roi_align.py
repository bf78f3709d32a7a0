"""Multi-level ROIAlign."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor

from benchmarks.operators.case import (
    HEIGHT,
    PADDED,
    STRIDES,
    Case,
    Inputs,
    Provider,
    compile_fully,
    directed,
    generator_of,
    random_boxes,
    relative_error,
    remembered,
)
from fastrcnn import ops
from fastrcnn.ops.reference import roi_align as reference_roi_align


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


def cases(full: bool) -> list[Case]:
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
        generator = generator_of(device)
        boxes = random_boxes((pooling.images, pooling.boxes), generator, pooling.height, pooling.width)
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
        want = remembered(inputs, "truth", lambda: truth(inputs))
        return relative_error(results, want, *_roi_align_limits(dtype, pooling))

    ours_directed = directed(direction, ours, "channels last", "grad channels last")
    providers = {
        "fastrcnn": _deterministic(ours_directed) if deterministic else ours_directed,
        "torchvision": directed(direction, torchvision_pooler, "contiguous", "grad"),
        "reference": reference,
    }
    if compiled:
        function = compile_fully(reference_roi_align.multilevel_roi_align)
        providers["compiled reference"] = directed(
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

    return remembered(inputs, "taps", count)


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
