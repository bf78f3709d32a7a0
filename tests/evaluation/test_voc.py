import numpy as np
import pytest
import torch

from fastrcnn.evaluation import evaluate, evaluate_voc
from fastrcnn.structures import BoxList

SIZE = (100, 80)


class Dataset:
    """Ground truth per image: rows of (label, difficult, x1, y1, x2, y2)."""

    categories = {1: "cat", 2: "dog", 3: "bird"}  # noqa: RUF012

    def __init__(self, truths):
        self.truths = truths

    def __len__(self):
        return len(self.truths)

    def get_img_info(self, index):
        return {"width": SIZE[0], "height": SIZE[1]}

    def get_groundtruth(self, index):
        rows = torch.tensor(self.truths[index], dtype=torch.float32).reshape(-1, 6)
        boxlist = BoxList(rows[:, 2:], SIZE)
        boxlist.add_field("labels", rows[:, 0].long())
        boxlist.add_field("difficult", rows[:, 1].long())
        return boxlist


def predictions(rows_per_image):
    """Rows of (label, score, x1, y1, x2, y2)."""
    result = {}
    for index, rows in rows_per_image.items():
        rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        result[index] = BoxList(rows[:, 2:], SIZE)
        result[index].add_field("labels", rows[:, 0].long())
        result[index].add_field("scores", rows[:, 1])
    return result


CAT = [10, 10, 30, 30]
# cats, best first: right, doubled (wrong), on a difficult one (does not count), IoU 0.5 (right), elsewhere (wrong)
TRUTHS = [[[1, 0, *CAT], [1, 1, 50, 50, 70, 70]], [[1, 0, 0, 0, 20, 20], [2, 0, 40, 40, 60, 60]], [[1, 0, 5, 5, 9, 9]]]
FOUND = {
    0: [[1, 0.9, *CAT], [1, 0.8, 11, 11, 30, 30], [1, 0.7, 50, 50, 70, 70]],
    1: [[1, 0.6, 0, 0, 20, 10], [1, 0.5, 60, 0, 90, 10], [3, 0.4, 60, 0, 90, 10]],
}


def test_by_hand(tmp_path):
    """Precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3 of three cats; the dog is missed; there is no bird."""
    area = evaluate_voc(Dataset(TRUTHS), predictions(FOUND), tmp_path)
    cat = 1 / 3 + 2 / 3 * 1 / 3
    assert area == pytest.approx({"AP50": cat / 2, "AP50/cat": cat, "AP50/dog": 0.0})
    sampled = evaluate_voc(Dataset(TRUTHS), predictions(FOUND), use_07_metric=True)
    assert sampled["AP50/cat"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # recalls 0 to 0.3; 0.4 to 0.6
    text = (tmp_path / "result.txt").read_text()
    assert f"mean AP50: {cat / 2:.4f}" in text
    assert f"AP50/cat: {cat:.4f}" in text


def brute_force(truths, found, label, sampled):
    """The rule again, detection by detection, with a curve of plain Python."""
    detections = sorted(
        ((row[1], index, row[2:]) for index, rows in found.items() for row in rows if row[0] == label),
        key=lambda d: -d[0],
    )
    objects = {
        (index, number): row for index, rows in enumerate(truths) for number, row in enumerate(rows) if row[0] == label
    }
    positives = sum(not row[1] for row in objects.values())
    used, points, right, wrong = set(), [], 0, 0
    for _, index, box in detections:
        best, match = 0.0, None
        for key, row in objects.items():
            if key[0] != index:
                continue
            a, b = np.array(box), np.array(row[2:])
            shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
            iou = shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)
            if iou > best:
                best, match = iou, key
        if match is None or best < 0.5:
            wrong += 1
        elif objects[match][1]:
            continue
        elif match in used:
            wrong += 1
        else:
            used.add(match)
            right += 1
        points.append((right / positives, right / (right + wrong)))
    if sampled:
        return sum(max([p for r, p in points if r >= t / 10], default=0.0) for t in range(11)) / 11
    area, before = 0.0, 0.0
    for position, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[position:])
        before = recall
    return area


@pytest.mark.parametrize("sampled", [False, True])
def test_against_brute_force(sampled):
    rng = np.random.default_rng(3)
    truths, found = [], {}
    for index in range(12):
        corners = rng.integers(0, 60, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.integers(8, 20, corners.shape)], 1)
        labels, difficult = rng.integers(1, 3, len(boxes)), rng.random(len(boxes)) < 0.2
        truths.append(np.column_stack([labels, difficult, boxes]).astype(float).tolist())
        near = np.repeat(boxes, 3, 0) + rng.integers(-4, 5, (3 * len(boxes), 4))
        scores = rng.permutation(len(near)) / 64 + index / 2048  # distinct and exact in float32
        found[index] = np.column_stack([rng.integers(1, 3, len(near)), scores, near]).astype(float).tolist()
    got = evaluate_voc(Dataset(truths), predictions(found), use_07_metric=sampled)
    want = {name: brute_force(truths, found, label, sampled) for label, name in ((1, "cat"), (2, "dog"))}
    assert 0.05 < min(want.values()) < max(want.values()) < 0.95  # a case that can tell something
    for name, value in want.items():
        assert got[f"AP50/{name}"] == pytest.approx(value, abs=1e-9)
    assert got["AP50"] == pytest.approx(np.mean(list(want.values())), abs=1e-9)


def test_no_predictions_and_no_objects():
    assert evaluate_voc(Dataset(TRUTHS), {}) == {"AP50": 0.0, "AP50/cat": 0.0, "AP50/dog": 0.0}
    assert evaluate_voc(Dataset([[]]), predictions({0: []})) == {"AP50": -1.0}


def test_evaluate_recognises_the_dataset(tmp_path, caplog):
    with caplog.at_level("INFO"):
        measures = evaluate(Dataset(TRUTHS), predictions(FOUND), tmp_path / "new", iou_types=("bbox", "segm"))
    assert measures == {"bbox": evaluate_voc(Dataset(TRUTHS), predictions(FOUND))}
    assert (tmp_path / "new" / "result.txt").is_file()
    assert "no segm measures" in caplog.text
    assert "1 of 3 images have no prediction" in caplog.text
    sampled = evaluate(Dataset(TRUTHS), predictions(FOUND), None, use_07_metric=True)
    assert sampled["bbox"]["AP50"] != measures["bbox"]["AP50"]
