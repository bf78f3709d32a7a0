"""Proposal selection: from the RPN's outputs to proposals."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder

from benchmarks.operators.case import (
    HEIGHT,
    STRIDES,
    WIDTH,
    Case,
    Inputs,
    cells,
    distinct,
    generator_of,
    grids_of,
    relative_error,
    remembered,
)
from benchmarks.operators.nms import check_greedy
from fastrcnn import ops
from fastrcnn.analysis import DECODE_AND_CLIP
from fastrcnn.ops.reference import anchors as reference_anchors
from fastrcnn.ops.reference import box_coder as reference_box_coder
from fastrcnn.ops.reference import proposals as reference_proposals


def cases(full: bool) -> list[Case]:
    if not full:
        return [proposals_case("2 images 256×320, 200 to 100", 2, 200, 100, height=256, width=320)]
    return [
        proposals_case("8 images 800×1333, 2000 to 1000", 8, 2000, 1000),
        proposals_case("1 image 800×1333, 1000 to 1000", 1, 1000, 1000),
    ]


def proposals_case(label: str, images: int, before: int, after: int, height: int = HEIGHT, width: int = WIDTH) -> Case:
    """From the outputs of a region proposal network to the best `after` of an image, `before` per level before NMS."""
    threshold = 0.7
    grids = grids_of(height, width)
    pairs = [(float(s), float(s)) for s in STRIDES]
    strides = [float(s) for s in STRIDES for _ in range(2)]
    counts = [3 * h * w for h, w in grids]
    weights = [1.0, 1.0, 1.0, 1.0]

    def make(device: torch.device) -> Inputs:
        generator = generator_of(device)
        logits = distinct((images, sum(counts)), generator, -12, 1).split(counts, 1)
        inputs: Inputs = {"cells": [c.to(device) for c in cells()]}
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
        levels = remembered(inputs, "candidates", lambda: candidates(inputs))
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
        operations=lambda inputs: images * sum(counts) + chosen * DECODE_AND_CLIP,  # a comparison each
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
