"""Matching of anchors with ground truth."""

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from benchmarks.operators.case import (
    HEIGHT,
    STRIDES,
    WIDTH,
    Case,
    Inputs,
    Provider,
    cells,
    compile_fully,
    generator_of,
    grids_of,
    random_boxes,
    relative_error,
    remembered,
)
from fastrcnn import ops
from fastrcnn.analysis import PAIR
from fastrcnn.ops.reference import anchors as reference_anchors
from fastrcnn.ops.reference import match as reference_match


def cases(full: bool) -> list[Case]:
    if not full:
        return [match_case("2 images × 20 k anchors × 10", 2, 10, grids=grids_of(256, 320))]
    return [
        match_case("8 images × 267 k anchors × 100", 8, 100, grids=grids_of(HEIGHT, WIDTH)),
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
        generator = generator_of(device)
        gt = random_boxes((images, objects), generator, height, width)
        if grids:
            strides = [float(s) for s in STRIDES for _ in range(2)]
            sides = [side for grid in grids for side in grid]
            boxes = reference_anchors.grid_anchors([c.to(device) for c in cells()], sides, strides)
        else:
            boxes = random_boxes((images, count), generator, height, width)
        return {"boxes": boxes, "gt": gt, "valid": torch.ones(images, objects, dtype=torch.bool, device=device)}

    def arguments(inputs: Inputs) -> tuple:
        return inputs["boxes"], inputs["gt"], inputs["valid"], high, low, low_quality

    def image_by_image(inputs: Inputs) -> tuple[Tensor, None]:
        all_boxes = inputs["boxes"].expand(images, count, 4)
        pairs = zip(inputs["gt"], all_boxes, strict=True)
        return torch.stack([matcher(torchvision.ops.box_iou(gt, boxes)) for gt, boxes in pairs]), None

    def check(provider: str, result: tuple[Tensor, Tensor | None], inputs: Inputs) -> float:
        matched, iou = result
        want, want_iou = remembered(inputs, "truth", lambda: reference_match.match_boxes(*arguments(inputs)))
        assert matched.shape == want.shape
        assert matched.dtype == torch.int64
        wrong = matched != want
        if provider != "fastrcnn":  # a compiler may contract multiply-adds, and another order of additions rounds anew
            wrong &= ~remembered(inputs, "doubtful", lambda: _doubtful(*arguments(inputs)))
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
        function = compile_fully(reference_match.match_boxes)
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
