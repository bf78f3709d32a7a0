"""What the cases of all operators share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

Inputs = dict[str, Any]
Provider = Callable[[Inputs], Any]

HEIGHT, WIDTH = 800, 1333
PADDED = 800, 1344  # the batch's image: both sides multiples of 32
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Case:
    """One row of comparisons.

    op, label: what and how large. direction: "forward", "backward" or "both". make: device -> inputs, the same at each
    call. providers: name -> callable(inputs). check: (provider's name, its result, inputs) -> the largest relative
    error; raises AssertionError for a wrong result. bytes, operations: what any implementation must at least read and
    write in device memory, and compute (a fused multiply-add counts two); to be asked after a successful check of these
    inputs. ceiling: the key of `benchmarks.timing.ceilings()` that bounds the bytes. l2_bytes: what is read from L2 if
    nothing is merged or found in L1.
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


def generator_of(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def remembered(inputs: Inputs, key: str, compute: Callable[[], Any]) -> Any:
    """Compute once per inputs: the truth that all providers are compared with."""
    if key not in inputs:
        inputs[key] = compute()
    return inputs[key]


def directed(direction: str, forward: Provider, leaves: str | None = None, grad: str | None = None) -> Provider:
    """forward in this direction. leaves, grad: the inputs that get gradients, and the result's gradient."""

    def only_forward(inputs: Inputs) -> Any:
        with torch.no_grad():
            return forward(inputs)

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(inputs), inputs[leaves], inputs[grad])

    def backward(inputs: Inputs) -> tuple[Tensor, ...]:
        tape = remembered(inputs, f"tape {id(forward)}", lambda: forward(inputs))
        return torch.autograd.grad(tape, inputs[leaves], inputs[grad], retain_graph=True)

    return {"forward": only_forward, "both": both, "backward": backward}[direction]


def compile_fully(function: Callable) -> Callable:
    """Compiled at the first call."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def random_boxes(
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


def distinct(shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
    """float32 numbers that all differ within the last dimension, in random order: no result hangs on ties."""
    order = torch.rand(shape, generator=generator, device=generator.device).argsort(-1)
    return torch.linspace(low, high, shape[-1], device=generator.device)[order]


def grids_of(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


@cache
def cells() -> tuple[Tensor, ...]:
    """torchvision's cell anchors, [3, 4] per level."""
    return tuple(their_generator().cell_anchors)


def their_generator() -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), (RATIOS,) * len(ANCHOR_SIZES))
