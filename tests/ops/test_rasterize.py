import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastrcnn.ops.rasterize import RASTERIZE, rasterize_polygons
from fastrcnn.ops.reference import rasterize as reference

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # within pycocotools


def pack(instances):
    """Instances, each a list of parts [V, 2] -> edges [1, G, E, 4], parts [1, G, E], number of parts."""
    per_slot = max([sum(len(p) for p in parts) for parts in instances] + [1]) + 2  # some empty slots
    edges = torch.zeros(1, len(instances), per_slot, 4)
    index = torch.full((1, len(instances), per_slot), -1)
    for slot, parts in enumerate(instances):
        rows = [torch.cat((p, p.roll(-1, 0)), 1) for p in parts]
        ids = [torch.full((len(p),), i) for i, p in enumerate(parts)]
        if rows:
            filled = sum(len(r) for r in rows)
            edges[0, slot, :filled], index[0, slot, :filled] = torch.cat(rows), torch.cat(ids)
    return edges.to(DEVICE), index.to(DEVICE), max([len(p) for p in instances] + [1])


def by_pycocotools(parts, box, side):
    """parts: list of float32 [V, 2]; everything else in float64."""
    if not parts:
        return np.zeros((side, side))
    box = box.double().numpy()
    scale = side / np.maximum(box[2:] - box[:2], 0.1)
    flat = [((p.double().numpy() - box[:2]) * scale).flatten().tolist() for p in parts]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, side, side)))


def compare(instances, boxes, side):
    """boxes [N, 4], one per instance."""
    edges, parts, num_parts = pack(instances)
    matched = torch.arange(len(instances), device=DEVICE)[None]
    got = rasterize_polygons(edges, parts, num_parts, boxes[None].to(DEVICE), matched, side)
    assert got.dtype == torch.float32
    want = np.stack([by_pycocotools(p, b, side) for p, b in zip(instances, boxes, strict=True)])
    np.testing.assert_array_equal(got[0].cpu().numpy(), want)
    return want


def random_instances(kind, count):
    instances, boxes = [], []
    for _ in range(count):
        parts = []
        for _ in range(int(torch.randint(1, 4, ()))):
            points = torch.rand(int(torch.randint(3, 12, ())), 2) * 60
            if kind == "star":  # not self-intersecting, as most annotations
                angle = torch.rand(len(points)).sort().values * 2 * torch.pi
                points = 30 + torch.rand(len(points), 1) * 28 * torch.stack((angle.cos(), angle.sin()), 1)
            if kind == "integer":
                points = points.round()
            if kind == "axis":
                points = points.round().repeat_interleave(2, 0)
                points[:, 0] = points[:, 0].roll(1)
            parts.append(points)
        corner, size = torch.rand(2) * 40 - 5, torch.rand(2) * 50 + 2
        if kind in ("integer", "axis"):
            corner, size = corner.round(), torch.tensor([28.0, 28.0])
        instances.append(parts)
        boxes.append(torch.cat((corner, corner + size)))
    return instances, torch.stack(boxes)


@pytest.mark.parametrize("side", [14, 28, 56])
@pytest.mark.parametrize("kind", ["random", "star", "integer", "axis"])
def test_equals_pycocotools(kind, side):
    masks = compare(*random_instances(kind, 300), side)
    assert 0.05 < masks.mean() < 0.95


def test_equals_pycocotools_in_chunks(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 20_000)
    compare(*random_instances("random", 40), 28)


def test_special_polygons():
    square = torch.tensor([[10.0, 10], [20, 10], [20, 20], [10, 20]])
    instances = [
        [],  # no part
        [square, square],  # twice the same part: a union
        [square + 100],  # outside
        [square * 1000 - 12000],  # around the box
        [square[:3]],
        [square[[0, 0, 1, 1]]],  # no area
        [square - 13.7],  # negative coordinates
        [torch.tensor([[0.0, 0], [3e4, 1], [0, 2]])],
    ]
    boxes = torch.tensor([[5.0, 5, 30, 30]]).repeat(len(instances), 1)
    want = compare(instances, boxes, 28)
    assert want[0].max() == 0
    assert want[3].min() == 1
    compare(instances, boxes, 1)
    flat = boxes.clone()
    flat[:, 2] = flat[:, 0]  # a box without width counts as 0.1 px wide
    compare(instances, flat, 28)


def test_real_polygons(test_data):
    path = test_data / "coco_open" / "annotations" / "instances_train2017.json"
    annotations = [a for a in json.loads(path.read_text())["annotations"] if not a["iscrowd"]]
    instances = [[torch.tensor(p).view(-1, 2) for p in a["segmentation"]] for a in annotations]
    boxes = torch.tensor([a["bbox"] for a in annotations])
    boxes = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    boxes = boxes + (torch.rand(boxes.shape) - 0.5) * 0.3 * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    compare(instances, boxes, 28)


def test_matched():
    instances, _ = random_instances("star", 6)
    edges, parts, num_parts = pack(instances)
    edges, parts = edges.view(2, 3, -1, 4), parts.view(2, 3, -1)
    boxes = torch.tensor([0.0, 0, 60, 60], device=DEVICE).expand(2, 4, 4)
    matched = torch.tensor([[2, -1, 0, 0], [1, 1, -2, 2]], device=DEVICE)
    got = rasterize_polygons(edges, parts, num_parts, boxes, matched, 14)
    for image in range(2):
        for region, slot in enumerate(matched[image].tolist()):
            want = by_pycocotools(instances[3 * image + slot] if slot >= 0 else [], boxes[0, 0].cpu(), 14)
            np.testing.assert_array_equal(got[image, region].cpu().numpy(), want)


def test_nan_gives_an_empty_mask():
    edges, parts, num_parts = pack(random_instances("star", 3)[0])
    boxes = torch.tensor([0.0, 0, 60, 60], device=DEVICE).repeat(1, 3, 1)
    matched = torch.arange(3, device=DEVICE)[None]
    clean = rasterize_polygons(edges, parts, num_parts, boxes, matched, 14)
    boxes[0, 1, 2], boxes[0, 2, 0] = float("nan"), -float("inf")
    got = rasterize_polygons(edges, parts, num_parts, boxes, matched, 14)
    assert torch.equal(got[0, 0], clean[0, 0])
    assert clean[0, 1:].sum() > 0
    assert got[0, 1:].sum() == 0


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0)])
def test_zero_sizes(shape):
    b, g, e, r = shape
    parts, matched = torch.zeros(b, g, e, dtype=torch.int64), torch.full((b, r), -1)
    got = rasterize_polygons(torch.rand(b, g, e, 4), parts, 1, torch.rand(b, r, 4), matched, 14)
    assert got.shape == (b, r, 14, 14)
    assert got.sum() == 0


def test_opcheck_compile_fake_and_strides():
    instances, boxes = random_instances("star", 4)
    edges, parts, num_parts = pack(instances)
    boxes, matched = boxes[None].to(DEVICE), torch.tensor([[3, 0, -1, 1]], device=DEVICE)
    arguments = edges, parts, num_parts, boxes, matched, 14
    opcheck(RASTERIZE, arguments)
    want = rasterize_polygons(*arguments)
    assert want.sum() > 0
    compiled = torch.compile(rasterize_polygons, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), want)
    strided = edges.mT.contiguous().mT, parts.mT.contiguous().mT, num_parts, boxes.mT.contiguous().mT, matched, 14
    assert torch.equal(rasterize_polygons(*strided), want)
    with FakeTensorMode():
        slots = torch.empty(2, 3, 7, dtype=torch.int64)
        out = rasterize_polygons(torch.empty(2, 3, 7, 4), slots, 2, torch.empty(2, 5, 4), slots[:, 0, :5], 28)
        assert out.shape == (2, 5, 28, 28)


def test_errors():
    edges, parts = torch.rand(2, 3, 7, 4), torch.zeros(2, 3, 7, dtype=torch.int64)
    boxes, matched = torch.rand(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="parts"):
        rasterize_polygons(edges, parts[:, :2], 1, boxes, matched, 14)
    with pytest.raises(ValueError, match="matched"):
        rasterize_polygons(edges, parts, 1, boxes, matched[:1], 14)
    with pytest.raises(ValueError, match="2 images"):
        rasterize_polygons(edges[:1], parts[:1], 1, boxes, matched, 14)
