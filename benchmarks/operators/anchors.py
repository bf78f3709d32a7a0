"""The anchors of all levels."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.case import (
    HEIGHT,
    STRIDES,
    WIDTH,
    Case,
    Inputs,
    Provider,
    cells,
    compile_fully,
    grids_of,
    relative_error,
    remembered,
    their_generator,
)
from fastrcnn import ops
from fastrcnn.ops.reference import anchors as reference_anchors


def cases(full: bool) -> list[Case]:
    if not full:
        return [anchors_case("20 k", grids_of(256, 320))]
    return [
        anchors_case("267 k (800×1333)", grids_of(HEIGHT, WIDTH), compiled=True),
        anchors_case("100 M", [(5000 >> level, 5000 >> level) for level in range(5)]),
    ]


def anchors_case(label: str, grids: list[tuple[int, int]], compiled: bool = False) -> Case:
    pairs = [(float(s), float(s)) for s in STRIDES]
    flat_grids = [side for grid in grids for side in grid]
    strides = [side for pair in pairs for side in pair]
    count = 3 * sum(h * w for h, w in grids)

    def make(device: torch.device) -> Inputs:
        theirs = their_generator()
        theirs.set_cell_anchors(torch.float32, device)
        # tensors on the device, as its forward makes them
        their_strides = [[torch.full((), s, dtype=torch.int64, device=device) for _ in range(2)] for s in STRIDES]
        return {"cells": [c.to(device) for c in cells()], "generator": theirs, "strides": their_strides}

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
        providers["compiled reference"] = reference(compile_fully(reference_anchors.grid_anchors))
    return Case(
        op="anchors",
        label=label,
        dtype=torch.float32,
        direction="forward",
        make=make,
        providers=providers,
        # whole numbers below 2²⁴: float32 is exact
        check=lambda _, result, inputs: relative_error(
            [result], [remembered(inputs, "truth", lambda: truth(inputs))], 0.0, 0.0
        ),
        bytes=lambda inputs: 16 * count,
        operations=lambda inputs: 4 * count,
        ceiling="write_gb_per_s",
    )
