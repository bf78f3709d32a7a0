"""The measure against hand-computed cases and a slow reading of the official rules."""

import json

import numpy as np
import pycocotools.mask
import pytest
import torch

from fastrcnn.data.datasets.cityscapes import EVALUATED_CLASSES, IGNORED_IDS, LABEL_IDS
from fastrcnn.evaluation import evaluate, evaluate_cityscapes
from fastrcnn.evaluation.masks import encode_bitmaps
from fastrcnn.structures import BoxList

CAR, PERSON = LABEL_IDS["car"], LABEL_IDS["person"]


class Frames:
    """Instance ids in memory."""

    def __init__(self, ids: list[np.ndarray], classes=tuple(LABEL_IDS)):
        self.ids = ids
        self.categories = dict(enumerate(classes, 1))
        self.contiguous_category_id_to_json_id = {label: LABEL_IDS[name] for label, name in self.categories.items()}

    def __len__(self):
        return len(self.ids)

    def get_img_info(self, index):
        return {"height": self.ids[index].shape[0], "width": self.ids[index].shape[1]}

    def get_instance_ids(self, index):
        return self.ids[index]

    def label(self, name):
        return next(label for label, each in self.categories.items() if each == name)


def image(*regions, size=(60, 80)) -> np.ndarray:
    """(id, x1, y1, x2, y2), later ones on top."""
    ids = np.full(size, 7, dtype=np.int32)
    for number, x1, y1, x2, y2 in regions:
        ids[y1:y2, x1:x2] = number
    return ids


def found(dataset, *detections, size=(60, 80)) -> BoxList:
    """(class, score, x1, y1, x2, y2): boxes, and masks that fill them."""
    boxes = [each[2:] for each in detections]
    boxlist = BoxList(boxes, size[::-1])
    boxlist.add_field("labels", torch.tensor([dataset.label(each[0]) for each in detections]))
    boxlist.add_field("scores", torch.tensor([each[1] for each in detections], dtype=torch.float64))
    masks = torch.zeros(len(boxes), *size)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    boxlist.add_field("rle", encode_bitmaps(masks) if boxes else [])
    return boxlist


@pytest.mark.parametrize("task", ["segm", "bbox"])
def test_precision_and_recall_by_hand(task):
    """Two cars of 20 x 20 and a person, who nobody finds. The best car is exact, then comes one on nothing, then one
    with an IoU of 16 / 20, which counts up to 0.75."""
    dataset = Frames(
        [image((1000 * CAR, 0, 0, 20, 20), (1000 * CAR + 1, 40, 20, 60, 40), (1000 * PERSON, 65, 0, 80, 20))]
    )
    detections = ("car", 0.9, 0, 0, 20, 20), ("car", 0.8, 20, 40, 40, 60), ("car", 0.7, 40, 24, 60, 40)
    measures = evaluate_cityscapes(dataset, {0: found(dataset, *detections)}, task)
    # points (recall, precision): (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/3), joined by straight lines
    both, one = 0.5 + 0.5 * (1 / 2 + 2 / 3) / 2, 0.5
    assert measures["AP50/car"] == measures["AP75/car"] == pytest.approx(both)
    assert measures["AP/car"] == pytest.approx((6 * both + 4 * one) / 10)  # the IoU of 0.8 is not above 0.8
    assert measures["AP/person"] == 0
    assert measures["AP50"] == pytest.approx(both / 2)
    assert set(measures) == {f"{m}{c}" for m in ("AP", "AP50", "AP75") for c in ("", "/car", "/person")}


@pytest.mark.parametrize("task", ["segm", "bbox"])
@pytest.mark.parametrize(
    ("region", "score"),
    [
        ((0, 20, 20, 40, 40), 1),  # void
        ((29, 20, 20, 40, 40), 1),  # a group of caravans is void
        ((29000, 20, 20, 40, 40), 0.5),  # a caravan is not
        ((CAR, 20, 20, 40, 40), 1),  # a group of the class
        ((PERSON, 20, 20, 40, 40), 0.5),  # of another
        ((1000 * CAR + 9, 25, 25, 34, 34), 0.5),  # an object of 81 pixels, under a detection of 400
        ((0, 20, 20, 31, 40), 0.775),  # 55 % void
    ],
)
def test_what_does_not_count(task, region, score):
    """A detection on the region, better than the right one, is wrong or ignored."""
    dataset = Frames([image((1000 * CAR, 0, 0, 16, 16), region)])
    detections = ("car", 0.9, 20, 20, 40, 40), ("car", 0.6, 0, 0, 16, 16)
    measures = evaluate_cityscapes(dataset, {0: found(dataset, *detections)}, task)
    # wrong: points (0, 0), (0, 0), (1, 1/2), so the area is 1/4
    if score == 0.775:  # a share of 0.55 is above 0.5, and not above 0.55
        assert (measures["AP50/car"], measures["AP75/car"]) == (1, 0.25)
        assert measures["AP/car"] == pytest.approx((1 + 9 * 0.25) / 10)
    else:
        assert measures["AP/car"] == (1 if score == 1 else 0.25)


def test_small_objects_need_not_be_found_and_excuse_what_lies_on_them():
    dataset = Frames([image((1000 * CAR, 0, 0, 20, 20), (1000 * CAR + 1, 40, 40, 49, 50))])
    right, on_small = ("car", 0.5, 0, 0, 20, 20), ("car", 0.9, 40, 40, 49, 50)
    for task in ("segm", "bbox"):
        assert evaluate_cityscapes(dataset, {0: found(dataset, right)}, task)["AP/car"] == 1
        assert evaluate_cityscapes(dataset, {0: found(dataset, on_small, right)}, task)["AP/car"] == 1


def test_second_detection_of_an_object_is_wrong():
    dataset = Frames([image((1000 * CAR, 0, 0, 20, 20))])
    twice = found(dataset, ("car", 0.5, 0, 0, 20, 20), ("car", 0.9, 0, 0, 20, 19))
    # at 0.95 only the worse one fits (IoU 0.95 exactly is not above), and the better comes first, wrong
    measures = evaluate_cityscapes(dataset, {0: twice}, "segm")
    assert (measures["AP50/car"], measures["AP75/car"]) == (1, 1)
    assert measures["AP/car"] == pytest.approx((9 + 0.25) / 10)


def test_nothing_to_find_nothing_found():
    dataset = Frames([image(), image((1000 * CAR, 0, 0, 20, 20))])
    assert evaluate_cityscapes(Frames([image()]), {}, "segm") == {"AP": -1, "AP50": -1, "AP75": -1}
    assert evaluate_cityscapes(dataset, {}, "bbox")["AP"] == 0
    assert evaluate_cityscapes(dataset, {1: found(dataset)}, "segm")["AP/car"] == 0
    with pytest.raises(ValueError, match="evaluated by bbox or segm"):
        evaluate_cityscapes(dataset, {}, "keypoints")


def slow(dataset, predictions) -> dict[str, list[float]]:
    """Class → average precision at each overlap, masks: the official rules one after another."""
    result = {}
    for label, name in dataset.categories.items():
        if name not in EVALUATED_CLASSES:
            continue
        number, row = LABEL_IDS[name], []
        for threshold in np.arange(0.5, 1.0, 0.05):
            verdicts, missed, any_object = [], 0, False
            for index, ids in enumerate(dataset.ids):
                boxlist = predictions.get(index)
                masks = []
                for k in range(0 if boxlist is None else len(boxlist)):
                    mask = pycocotools.mask.decode(boxlist.get_field("rle")[k]) > 0
                    if boxlist.get_field("labels")[k] == label and mask.any():
                        masks.append((mask, boxlist.get_field("scores")[k].item()))
                regions = {each: ids == each for each in np.unique(ids) if each == number or each // 1000 == number}
                for each, region in regions.items():
                    if each < 1000 or region.sum() < 100:
                        continue
                    any_object = True
                    scores = [s for m, s in masks if (m & region).sum() / (m | region).sum() > threshold]
                    missed += not scores
                    verdicts += [(s, rank == 0) for rank, s in enumerate(sorted(scores, reverse=True))]
                for mask, score in masks:
                    if any((mask & r).sum() / (mask | r).sum() > threshold for r in regions.values()):
                        continue
                    excused = (mask & np.isin(ids, IGNORED_IDS)).sum()
                    excused += sum((mask & r).sum() for e, r in regions.items() if e < 1000 or r.sum() < 100)
                    if excused / mask.sum() <= threshold:
                        verdicts.append((score, False))
            if not any_object:
                row.append(None)
                continue
            points = []
            for least in sorted({score for score, _ in verdicts}):
                right = sum(good for score, good in verdicts if score >= least)
                shown = sum(score >= least for score, _ in verdicts)
                points.append((right / shown, right / (sum(good for _, good in verdicts) + missed)))
            points.append((points[-1][0] if points else 0, 0))
            recall = np.array([r for _, r in points])
            steps = np.convolve(np.concatenate([recall[:1], recall, [0]]), [-0.5, 0, 0.5], "valid")
            row.append(float(np.dot([p for p, _ in points], steps)))
        result[name] = row
    return result


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_rules_on_random_frames(seed):
    rng = np.random.default_rng(seed)
    classes = ("car", "person", "trailer", "bus")
    frames, predictions = [], {}
    dataset = Frames(frames, classes)
    for index in range(4):
        regions, detections = [], []
        for number in range(10):
            x, y, w, h = rng.integers((0, 0, 5, 5), (60, 40, 30, 30)).tolist()
            name = rng.choice(classes)
            kind = rng.choice(
                [LABEL_IDS[name], rng.choice(IGNORED_IDS), 1000 * LABEL_IDS[name] + number], p=[0.2, 0.1, 0.7]
            )
            regions.append((kind, x, y, x + w, y + h))
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.integers(-3, 4, 4).tolist()
                box = (max(x + dx, 0), max(y + dy, 0), min(x + w + dw, 80), min(y + h + dh, 60))
                detections.append((name, float(rng.integers(1, 20)) / 20, *box))
        frames.append(image(*regions))
        predictions[index] = found(dataset, *detections)
    want, got = slow(dataset, predictions), evaluate_cityscapes(dataset, predictions, "segm")
    with_objects = {name: row for name, row in want.items() if None not in row}
    assert len(with_objects) >= 2
    for name, row in with_objects.items():
        assert got[f"AP/{name}"] == pytest.approx(np.mean(row))
        assert (got[f"AP50/{name}"], got[f"AP75/{name}"]) == pytest.approx((row[0], row[5]))
    assert got["AP"] == pytest.approx(np.mean(list(with_objects.values())))
    assert 0 < got["AP"] < 1


def test_evaluate_chooses_it_and_returns_its_measures(tmp_path, caplog):
    dataset = Frames([image((1000 * CAR, 0, 0, 20, 20), (1000 * PERSON, 60, 0, 80, 20))])
    predictions = {0: found(dataset, ("car", 0.9, 0, 0, 20, 20))}
    with caplog.at_level("INFO"):
        measures = evaluate(dataset, predictions, tmp_path, ("bbox", "segm"))
    for task in ("bbox", "segm"):
        assert measures[task] == evaluate_cityscapes(dataset, predictions, task)
        assert (measures[task]["AP"], measures[task]["AP/car"], measures[task]["AP/person"]) == (0.5, 1, 0)
        assert json.loads((tmp_path / f"{task}.json").read_text())[0]["category_id"] == CAR
    assert "AP75/person" in caplog.text
