"""Recall of proposals against pycocotools."""

import contextlib
import io

import numpy as np
import pycocotools.mask
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.evaluation import evaluate, evaluate_proposals
from fastrcnn.evaluation.proposals import AREAS
from fastrcnn.structures import BoxList

LIMITS = (3, 10, 100)


@pytest.fixture(scope="module")
def truth(test_data):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(test_data / "coco_open" / "annotations" / "instances_val2017.json"))


def proposals_near(truth, rng):
    """Twelve boxes about each object, crowds included, and as many anywhere; only those that could be matched with one
    object alone. Some images have none."""
    proposals = {}
    for image_id, image in truth.imgs.items():
        objects = np.array([a["bbox"] for a in truth.imgToAnns[image_id]], dtype=float).reshape(-1, 4)
        if image_id % 7 == 0 or not len(objects):
            continue
        near = np.repeat(objects, 12, 0)
        near[:, :2] += rng.normal(size=(len(near), 2)) * near[:, 2:] * 0.1
        near[:, 2:] *= np.exp(rng.normal(size=(len(near), 2)) * 0.2)
        size = np.array([image["width"], image["height"]])
        boxes = np.concatenate([near, rng.uniform(size=near.shape) * [*size / 2, *size / 2] + [0, 0, 4, 4]])
        ious = np.array(pycocotools.mask.iou(boxes, objects, [0] * len(objects)))
        boxes = torch.from_numpy(boxes[(ious >= 0.45).sum(1) <= 1])
        boxlist = BoxList(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float(), tuple(size.tolist()))
        boxlist.add_field("objectness", torch.from_numpy(rng.permutation(len(boxes)) / len(boxes)))
        proposals[image_id] = boxlist
    return proposals


def by_pycocotools(truth, proposals):
    """COCOeval without classes -> recall by (area, limit)."""
    results = []
    for image_id, boxlist in proposals.items():
        boxes, scores = boxlist.bbox.double(), boxlist.get_field("objectness").tolist()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        results += [
            {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}
            for box, score in zip(boxes, scores, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(LIMITS)
        evaluation.params.areaRng = [list(bounds) for bounds in AREAS.values()]
        evaluation.params.areaRngLbl = list(AREAS)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]  # [IoU, area, limit]
    return {
        f"AR{name}@{limit}": recall[:, area, column].mean()
        for area, name in enumerate(AREAS)
        for column, limit in enumerate(LIMITS)
    }


def test_is_pycocotools_where_no_box_could_be_of_two_objects(truth):
    proposals = proposals_near(truth, np.random.default_rng(0))
    got, want = evaluate_proposals(truth, proposals, LIMITS), by_pycocotools(truth, proposals)
    assert got == pytest.approx(want, abs=1e-12)
    assert 0 < got["AR@3"] < got["AR@10"] < got["AR@100"] < 1
    assert sum(0 < value < 1 for value in got.values()) > 15


def test_names_and_limits(truth):
    proposals = proposals_near(truth, np.random.default_rng(1))
    measures = evaluate_proposals(truth, proposals)
    sizes = ("", "s", "m", "l", "96-128", "128-256", "256-512", "512-inf")
    assert set(measures) == {f"AR{size}@{limit}" for size in sizes for limit in (100, 1000)}
    one = min(proposals)
    assert evaluate_proposals(truth, proposals, image_ids=[one]) == evaluate_proposals(
        truth, {one: proposals[one]}, image_ids=[one]
    )
    assert set(evaluate_proposals(truth, {}).values()) <= {0.0, -1.0}


def test_of_a_dataset(truth):
    """`evaluate` of proposals alone, by index."""

    class Dataset:
        def __init__(self):
            self.coco, self.id_to_img_map = truth, dict(enumerate(sorted(truth.imgs)))

        def __len__(self):
            return len(self.id_to_img_map)

        def get_img_info(self, index):
            return truth.imgs[self.id_to_img_map[index]]

    by_id = proposals_near(truth, np.random.default_rng(2))
    dataset = Dataset()
    by_index = {index: by_id[image_id] for index, image_id in dataset.id_to_img_map.items() if image_id in by_id}
    measures = evaluate(dataset, by_index, None, box_only=True)
    assert measures == {"box_proposal": evaluate_proposals(truth, by_id)}
