"""Encoding and decoding of boxes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder

from benchmarks.operators.case import (
    HEIGHT,
    WIDTH,
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
from fastrcnn.analysis import DECODE, DECODE_AND_CLIP, ENCODE
from fastrcnn.ops.reference import box_coder as reference_box_coder


def cases(full: bool) -> list[Case]:
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
        generator = generator_of(device)
        # one crowd per 1000 boxes, or all would be of one crowd
        anchors = random_boxes((count // 1000, 1000), generator, HEIGHT, WIDTH).flatten(0, 1)
        deltas = torch.randn(count, 4, generator=generator, device=device)
        first = random_boxes((count // 1000, 1000), generator, HEIGHT, WIDTH).flatten(0, 1) if encodes else deltas
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
        result = directed(direction, partial(reference, dtype=torch.float64), "leaves", "grad 64")(
            inputs if direction == "forward" else inputs | {"grad 64": inputs["grad"].double()}
        )
        return [x.double() for x in ([result] if direction == "forward" else result)]

    def check(_: str, result: Any, inputs: Inputs) -> float:
        want = remembered(inputs, "truth", lambda: truth(inputs))
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
        "fastrcnn": directed(direction, ours, "leaves", "grad"),
        "torchvision": directed(direction, theirs, "leaves", "grad"),
        "reference": directed(direction, reference, "leaves", "grad"),
    }
    if compiled:
        functions = {
            "encode": compile_fully(reference_box_coder.encode_boxes),
            "decode": compile_fully(reference_box_coder.decode_boxes),
        }
        providers["compiled reference"] = directed(direction, partial(reference, **functions))
    arithmetic = ENCODE if encodes else DECODE_AND_CLIP if clips else DECODE
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
