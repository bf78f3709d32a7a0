import contextlib
import copy
import io
import json
import logging

import numpy as np
import pycocotools.mask
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastrcnn.evaluation import check_expected_results, evaluate, evaluate_coco, evaluate_proposals, to_coco_results
from fastrcnn.structures import BoxList, Keypoints, SegmentationMask, cat_boxlist

FILES = {
    "bbox": ("coco_bbox_segm/instances_val2014_100.json", "coco_bbox_segm/instances_val2014_fakebbox100_results.json"),
    "segm": ("coco_bbox_segm/instances_val2014_100.json", "coco_bbox_segm/instances_val2014_fakesegm100_results.json"),
    "keypoints": ("coco_keypoints/gt_dataset.json", "coco_keypoints/dt_dataset.json"),
}


def coco_of(dataset):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(dataset)
        coco.createIndex()
    return coco


def fixture(folder, iou_type):
    truth, results = ((folder / "eval_fixtures" / name).read_text() for name in FILES[iou_type])
    expected = json.loads((folder / "eval_fixtures" / "expected.json").read_text())
    expected = expected["coco_keypoints" if iou_type == "keypoints" else "coco_bbox_segm"][iou_type]
    return coco_of(json.loads(truth)), json.loads(results), expected


def in_order(measures):
    return [value for name, value in measures.items() if "/" not in name]


class Dataset:
    """Images and annotations of a COCO object, as our datasets present them."""

    def __init__(self, coco):
        self.coco = coco
        self.id_to_img_map = dict(enumerate(sorted(coco.imgs)))
        self.contiguous_category_id_to_json_id = dict(enumerate(sorted(coco.cats), 1))
        self.categories = {k: coco.cats[c]["name"] for k, c in self.contiguous_category_id_to_json_id.items()}

    def __len__(self):
        return len(self.id_to_img_map)

    def get_img_info(self, index):
        return self.coco.imgs[self.id_to_img_map[index]]


def as_predictions(dataset, results, field=None):
    """COCO results as box lists with contiguous labels, what a model would hand over."""
    label_of = {c: k for k, c in dataset.contiguous_category_id_to_json_id.items()}
    predictions = {}
    for index, image_id in dataset.id_to_img_map.items():
        own = [result for result in results if result["image_id"] == image_id]
        info = dataset.get_img_info(index)
        boxes = torch.tensor([r.get("bbox", [0, 0, 1, 1]) for r in own], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxlist = BoxList(boxes.float(), (info["width"], info["height"]))
        boxlist.add_field("scores", torch.tensor([r["score"] for r in own]))
        boxlist.add_field("labels", torch.tensor([label_of[r["category_id"]] for r in own], dtype=torch.int64))
        if field == "rle":
            boxlist.add_field("rle", [r["segmentation"] for r in own])
        predictions[index] = boxlist
    return predictions


@pytest.mark.parametrize("iou_type", FILES)
def test_known_figures(test_data, iou_type, capsys):
    coco, results, expected = fixture(test_data, iou_type)
    dataset, given = copy.deepcopy(coco.dataset), copy.deepcopy(results)
    assert in_order(evaluate_coco(coco, results, iou_type)) == pytest.approx(expected, abs=1e-6)
    assert coco.dataset == dataset  # the data loader goes on with this object
    assert results == given
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("iou_type", "field"), [("bbox", None), ("segm", "rle")])
def test_known_figures_from_predictions(test_data, tmp_path, iou_type, field):
    coco, results, expected = fixture(test_data, iou_type)
    dataset = Dataset(coco)
    measures = evaluate(dataset, as_predictions(dataset, results, field), tmp_path, iou_types=(iou_type,))
    assert in_order(measures[iou_type]) == pytest.approx(expected, abs=1e-6)
    written = json.loads((tmp_path / f"{iou_type}.json").read_text())
    assert len(written) == len(results)
    assert in_order(evaluate_coco(coco, written, iou_type)) == pytest.approx(expected, abs=1e-6)


def test_ap_per_class_is_that_of_the_class_alone(test_data):
    coco, results, _ = fixture(test_data, "bbox")
    measures = evaluate_coco(coco, results, "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        alone = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        for category in coco.dataset["categories"]:
            alone.params.catIds = [category["id"]]
            alone.evaluate()
            alone.accumulate()
            alone.summarize()
            if alone.stats[0] < 0:
                assert f"AP/{category['name']}" not in measures
            else:
                assert measures[f"AP/{category['name']}"] == pytest.approx(alone.stats[0])


def tiny(**changes):
    """Two images, two classes; ids from 0, no area and no iscrowd, as files of users have them."""
    square = [[10.0, 10, 40, 10, 40, 40, 10, 40]]
    points = {"keypoints": [20, 20, 2, 30, 30, 2, 0, 0, 0]}
    return {
        "images": [{"id": 7, "width": 100, "height": 80}, {"id": 9, "width": 60, "height": 60}],
        "categories": [{"id": 3, "name": "box"}, {"id": 8, "name": "man", "keypoints": ["a", "b", "c"]}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 3, "bbox": [10, 10, 30, 30], "segmentation": square, **changes},
            {"id": 1, "image_id": 9, "category_id": 8, "bbox": [10, 10, 30, 30], "segmentation": square, **points},
        ],
    }


def perfect():
    boxes = {}
    for index, (size, label) in enumerate([((100, 80), 1), ((60, 60), 2)]):
        mask = np.zeros((size[1], size[0]), np.uint8, order="F")
        mask[10:40, 10:40] = 1
        boxes[index] = BoxList(torch.tensor([[10.0, 10, 40, 40]]), size)
        boxes[index].add_field("scores", torch.tensor([0.5]))
        boxes[index].add_field("labels", torch.tensor([label]))
        boxes[index].add_field("rle", [pycocotools.mask.encode(mask)])
        boxes[index].get_field("rle")[0]["counts"] = boxes[index].get_field("rle")[0]["counts"].decode()
        boxes[index].add_field("keypoints", Keypoints([[[20.5, 20.5, 1], [30.5, 30.5, 1], [3, 3, 1]]], size))
    return boxes


def test_labels_may_be_the_ids_of_the_file():
    """With gaps between them, in which a model may find things that no annotation can be."""
    dataset = Dataset(coco_of(tiny()))
    dataset.contiguous_category_id_to_json_id = {3: 3, 8: 8}
    predictions = {k: b.copy_with_fields(["scores"]) for k, b in perfect().items()}
    for index, label in enumerate((3, 8)):
        twice = torch.cat([predictions[index].bbox] * 2)
        predictions[index] = BoxList(twice, predictions[index].size)
        predictions[index].add_field("scores", torch.tensor([0.5, 0.9]))
        predictions[index].add_field("labels", torch.tensor([label, 5]))
    assert evaluate(dataset, predictions, None)["bbox"]["AP"] == pytest.approx(1.0)


def test_perfect_predictions_on_a_plain_file():
    measures = evaluate(Dataset(coco_of(tiny())), perfect(), None, iou_types=("bbox", "segm", "keypoints"))
    for task, classes in (("bbox", {"box", "man"}), ("segm", {"box", "man"}), ("keypoints", {"man"})):
        assert measures[task]["AP"] == pytest.approx(1.0)
        assert {name for name in measures[task] if "/" in name} == {f"AP/{name}" for name in classes}
    assert measures["bbox"]["APl"] == -1  # there are no large objects


def test_keypoints_count_from_the_middle_of_a_pixel():
    """COCO's x = 20 is the middle of pixel 20, our 20.5."""
    [result] = to_coco_results(Dataset(coco_of(tiny())), {1: perfect()[1]}, "keypoints")
    assert result["keypoints"][:6] == [20, 20, 1, 30, 30, 1]
    assert (result["image_id"], result["category_id"]) == (9, 8)


def test_keypoints_are_moved_as_the_dataset_moved_them():
    dataset = Dataset(coco_of(tiny()))
    dataset.keypoint_shift = 0.0
    [result] = to_coco_results(dataset, {1: perfect()[1]}, "keypoints")
    assert result["keypoints"][:6] == [20.5, 20.5, 1, 30.5, 30.5, 1]


def test_another_number_of_keypoints_is_an_error():
    predictions = perfect()
    predictions[1].add_field("keypoints", torch.rand(1, 17, 3))
    with pytest.raises(ValueError, match="results have 17 keypoints, the ground truth has 3"):
        evaluate(Dataset(coco_of(tiny())), {1: predictions[1]}, None, iou_types=("keypoints",))


def test_no_detections_give_zeros(tmp_path):
    empty = {index: boxlist[torch.zeros(1, dtype=torch.bool)] for index, boxlist in perfect().items()}
    for predictions in ({}, empty):
        measures = evaluate(Dataset(coco_of(tiny())), predictions, tmp_path, iou_types=("bbox", "segm", "keypoints"))
        for task in ("bbox", "segm", "keypoints"):
            assert measures[task]["AP"] == measures[task]["AP50"] == measures[task]["AP/man"] == 0
            assert json.loads((tmp_path / f"{task}.json").read_text()) == []


def test_crowds_neither_count_nor_harm():
    crowd = tiny()
    crowd["annotations"].append({**crowd["annotations"][0], "id": 5, "bbox": [50, 50, 40, 20], "iscrowd": 1})
    predictions = perfect()
    extra = BoxList(torch.tensor([[55.0, 52, 70, 60]]), (100, 80))
    extra.add_field("scores", torch.tensor([0.9]))
    extra.add_field("labels", torch.tensor([1]))
    both = BoxList(torch.cat([extra.bbox, predictions[0].bbox]), (100, 80))
    for name in ("scores", "labels"):
        both.add_field(name, torch.cat([extra.get_field(name), predictions[0].get_field(name)]))
    predictions[0] = both
    assert evaluate(Dataset(coco_of(crowd)), predictions, None)["bbox"]["AP"] == pytest.approx(1.0)
    assert evaluate(Dataset(coco_of(tiny())), predictions, None)["bbox"]["AP"] == pytest.approx(0.75)


def test_an_instance_without_polygon_is_an_empty_mask():
    for nothing in ([], [[1.0, 2, 3, 4]]):
        measures = evaluate(Dataset(coco_of(tiny(segmentation=nothing))), perfect(), None, iou_types=("segm",))
        assert measures["segm"]["AP/box"] == 0
        assert measures["segm"]["AP/man"] == pytest.approx(1.0)


def test_subset_of_the_images():
    dataset = Dataset(coco_of(tiny()))
    dataset.id_to_img_map = {0: 9}
    assert evaluate(dataset, {0: perfect()[1]}, None)["bbox"]["AP"] == pytest.approx(1.0)


class OwnDataset:
    """A dataset by the contract: no `coco`, no `get_groundtruth`, targets in the frame of the resized image."""

    def __init__(self, dataset, mode):
        self.dataset, self.mode = dataset, mode
        self.categories = dataset.categories

    def __len__(self):
        return len(self.dataset)

    def get_img_info(self, index):
        info = self.dataset.get_img_info(index)
        return {"height": info["height"], "width": info["width"]}

    def __getitem__(self, index):
        info = self.dataset.get_img_info(index)
        annotations = self.dataset.coco.imgToAnns[info["id"]]
        label_of = {c: k for k, c in self.dataset.contiguous_category_id_to_json_id.items()}
        size = (info["width"], info["height"])
        target = BoxList(torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4), size, "xywh")
        target.add_field("labels", torch.tensor([label_of[a["category_id"]] for a in annotations], dtype=torch.int64))
        target.add_field("iscrowd", torch.tensor([bool(a["iscrowd"]) for a in annotations]))
        if self.mode == "poly":
            polygons = [[] if a["iscrowd"] else a["segmentation"] for a in annotations]
            target.add_field("masks", SegmentationMask(polygons, size))
        return torch.zeros(3, 1, 1), target.resize((2 * size[0], 2 * size[1])), index


def test_own_dataset_is_measured_as_the_same_data_in_coco_form(test_data):
    coco, results, _ = fixture(test_data, "bbox")
    dataset = Dataset(coco)
    predictions = as_predictions(dataset, results)
    for annotation in coco.dataset["annotations"]:  # the classes of size go by the box where there is no mask
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    want = evaluate(dataset, predictions, None)["bbox"]
    assert evaluate(OwnDataset(dataset, None), predictions, None)["bbox"] == pytest.approx(want, abs=1e-5)


def test_own_dataset_with_masks():
    dataset = Dataset(coco_of({**tiny(), "annotations": [{**a, "iscrowd": 0} for a in tiny()["annotations"]]}))
    measures = evaluate(OwnDataset(dataset, "poly"), perfect(), None, iou_types=("bbox", "segm"))
    assert measures["bbox"]["AP/box"] == measures["segm"]["AP/man"] == pytest.approx(1.0)


@pytest.mark.parametrize("box", [[5, 5, float("nan"), 9], [5, 5, 5, 9], [9, 5, 5, 9], [900, 5, 950, 9]])
def test_bad_boxes_of_an_own_dataset_are_no_objects(box):
    class WithBadBox(OwnDataset):
        def __getitem__(self, index):
            image, target, _ = super().__getitem__(index)
            bad = BoxList([box], target.size)
            bad.add_field("labels", torch.tensor([1]))
            bad.add_field("iscrowd", torch.tensor([False]))
            return image, cat_boxlist([target.convert("xyxy"), bad]), index

    dataset = Dataset(coco_of({**tiny(), "annotations": [{**a, "iscrowd": 0} for a in tiny()["annotations"]]}))
    measures = evaluate(WithBadBox(dataset, None), perfect(), None)
    assert measures["bbox"]["AP"] == pytest.approx(1.0)


def greedy_recall(boxes, objects):
    """Average recall of one image, pair by pair."""

    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    left, open_, found = list(range(len(boxes))), list(range(len(objects))), []
    while left and open_:
        value, i, j = max((iou(boxes[i], objects[j]), i, j) for i in left for j in open_)
        found.append(value)
        left.remove(i)
        open_.remove(j)
    return [sum(value >= t / 100 for value in found) for t in range(50, 100, 5)]


def test_recall_of_proposals():
    rng = np.random.default_rng(0)
    images, annotations, proposals, recalled = [], [], {}, {limit: np.zeros(10) for limit in (5, 20)}
    for image_id in range(6):
        corners = rng.uniform(0, 60, (4, 2))
        objects = np.concatenate([corners, corners + rng.uniform(10, 40, (4, 2))], 1).astype(np.float32).astype(float)
        boxes = (np.repeat(objects, 5, 0) + rng.uniform(-8, 8, (20, 4))).astype(np.float32)
        scores = rng.permutation(20).astype(np.float32)
        images.append({"id": image_id, "width": 100, "height": 100})
        annotations += [
            {"id": 0, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": 9999, "bbox": [x, y, X - x, Y - y]}
            for x, y, X, Y in objects.tolist()
        ]
        annotations.append({**annotations[-1], "iscrowd": 1, "bbox": [0, 0, 100, 100]})
        proposals[image_id] = BoxList(torch.from_numpy(boxes), (100, 100))
        proposals[image_id].add_field("objectness", torch.from_numpy(scores))
        for limit, counts in recalled.items():
            counts += greedy_recall(boxes[np.argsort(-scores)][:limit].astype(float).tolist(), objects.tolist())
    truth = coco_of({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
    got = evaluate_proposals(truth, proposals, limits=(5, 20))
    for limit, counts in recalled.items():
        assert got[f"AR@{limit}"] == got[f"ARl@{limit}"] == pytest.approx(counts.mean() / 24)
        assert got[f"ARs@{limit}"] == -1
    assert 0 < got["AR@5"] < got["AR@20"] < 1


def test_box_only():
    predictions = perfect()
    measures = evaluate(Dataset(coco_of(tiny())), {0: predictions[0]}, None, box_only=True)
    assert set(measures) == {"box_proposal"}
    assert measures["box_proposal"]["AR@100"] == measures["box_proposal"]["AR@1000"] == 0.5


def test_expected_results(caplog):
    measures = {"bbox": {"AP": 0.37}}
    with caplog.at_level(logging.INFO):
        assert check_expected_results(measures, [["bbox", "AP", [0.38, 0.005]]], sigma_tol=4)
        assert not check_expected_results(measures, [["bbox", "AP", [0.38, 0.005]]], sigma_tol=1)
        assert not check_expected_results(measures, [["segm", "AP", [0.38, 0.005]]])
    verdicts = [(record.levelname, record.getMessage().split(":")[0]) for record in caplog.records]
    assert verdicts == [("INFO", "PASS"), ("ERROR", "FAIL"), ("ERROR", "FAIL")]
    assert "not measured" in caplog.text


def test_table_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        evaluate(Dataset(coco_of(tiny())), perfect(), None, expected_results=[["bbox", "AP", [1.0, 0.01]]])
    text = caplog.text.split("bbox on 2 images")[1]
    lines = [line.split() for line in text.splitlines()]
    assert ["AP", "AP50", "AP75", "APs", "APm", "APl"] in lines
    assert ["1.0000", "1.0000", "1.0000", "1.0000", "-", "-"] in lines
    assert ["box", "man"] in lines
    assert "PASS: bbox AP" in text


def test_messages_name_what_is_wrong():
    dataset = Dataset(coco_of(tiny()))
    resized = {0: perfect()[0].copy_with_fields(["scores", "labels"]).resize((200, 160))}
    with pytest.raises(ValueError, match=r"image id 7 .*\(200, 160\).*\(100, 80\)"):
        evaluate(dataset, resized, None)
    with pytest.raises(ValueError, match="index 2, the dataset has 2"):
        evaluate(dataset, {2: perfect()[0]}, None)
    with pytest.raises(ValueError, match="no field 'rle'"):
        evaluate(dataset, {0: perfect()[0].copy_with_fields(["scores", "labels"])}, None, iou_types=("segm",))
    stranger = perfect()
    stranger[0].add_field("labels", torch.tensor([5]))
    with pytest.raises(ValueError, match=r"image id 7\) has label 5, wanted one of 1..2"):
        evaluate(dataset, stranger, None)
    with pytest.raises(ValueError, match="image id 1"):
        evaluate_coco(dataset.coco, [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}], "bbox")
    with pytest.raises(ValueError, match="'mask', wanted one of bbox, segm, keypoints"):
        evaluate_coco(dataset.coco, [], "mask")
    boxes_only = tiny()
    del boxes_only["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match="annotation 0 of image id 7 has no segmentation"):
        evaluate_coco(coco_of(boxes_only), [], "segm")
