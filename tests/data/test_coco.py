import json
import math
import pickle

import numpy as np
import pytest
import torch
from data.makers import annotation, edit_json, write_coco
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fastrcnn.data import COCODataset, DataError, read_image
from fastrcnn.data.datasets.abstract import read_image_size
from fastrcnn.data.datasets.coco import _runs
from fastrcnn.structures import PersonKeypoints

SQUARE = [5, 6, 15, 6, 15, 18, 5, 18]


def test_items(tmp_path):
    args = write_coco(
        tmp_path,
        [
            annotation(2, (1, 2, 3.5, 4), 7, segmentation=[SQUARE]),
            annotation(1, (30, 20, 20, 20), 3, segmentation=[SQUARE, SQUARE]),
        ],
    )
    dataset = COCODataset(**args)
    assert dataset.categories == {1: "cat", 2: "dog"}  # in order of the ids, not of the file
    assert dataset.contiguous_category_id_to_json_id == {1: 3, 2: 7}
    assert dataset.id_to_img_map == {0: 1, 1: 2}
    image, target, index = dataset[0]
    assert (index, image.size, image.getpixel((0, 0))) == (0, (40, 30), (20, 20, 20))
    assert target.bbox.tolist() == [[30, 20, 40, 30]]  # cut at the border
    assert target.get_field("labels").tolist() == [1]
    assert len(target.get_field("masks").polygons[0]) == 2
    _, target, _ = dataset[1]
    assert target.bbox.tolist() == [[1, 2, 4.5, 6]]
    assert target.get_field("labels").tolist() == [2]
    info = dataset.get_img_info(1)
    assert (info["width"], info["height"]) == (30, 40)


def test_labels_may_be_the_ids_of_the_file(tmp_path):
    args = write_coco(tmp_path, [annotation(1, (30, 20, 20, 20), 3), annotation(1, (1, 2, 3, 4), 7)])
    dataset = COCODataset(**args, json_category_ids=True)
    assert dataset.categories == {3: "cat", 7: "dog"}
    assert dataset.contiguous_category_id_to_json_id == {3: 3, 7: 7}
    assert dataset[0][1].get_field("labels").tolist() == [3, 7]


def test_real_annotations_against_pycocotools(test_data):
    folder = test_data / "coco_open"
    ann_file = folder / "annotations" / "instances_train2017.json"
    dataset = COCODataset(ann_file, folder / "train2017", keep_crowd=True)
    coco = COCO(ann_file)
    assert len(dataset) == 90
    assert sum(len(dataset.get_groundtruth(i)) for i in range(90)) == len(coco.anns) == 803
    category_ids = sorted(coco.cats)
    for index in range(90):
        target = dataset.get_groundtruth(index)
        annotations = coco.imgToAnns[dataset.ids[index]]
        want = torch.tensor([ann["bbox"] for ann in annotations]).reshape(-1, 4)
        torch.testing.assert_close(target.convert("xywh").bbox, want, atol=0.02, rtol=0)
        labels = [category_ids.index(ann["category_id"]) + 1 for ann in annotations]
        assert target.get_field("labels").tolist() == labels
        assert target.get_field("iscrowd").tolist() == [bool(ann["iscrowd"]) for ann in annotations]
        assert target.get_field("masks").mode == ("mask" if any(ann["iscrowd"] for ann in annotations) else "poly")
    image, target, _ = dataset[17]
    mask = target.get_field("masks").get_mask_tensor()
    assert mask.shape == (len(target), image.height, image.width)
    areas = torch.tensor([ann["area"] for ann in coco.imgToAnns[dataset.ids[17]]])
    torch.testing.assert_close(mask.flatten(1).sum(1).float(), areas.float(), rtol=0.1, atol=20)


def test_the_training_filter(tmp_path):
    crowd = annotation(2, iscrowd=1, segmentation={"size": [30, 40], "counts": [1200]})
    args = write_coco(
        tmp_path,
        [annotation(1), crowd, annotation(3, (4, 4, 1, 20)), annotation(4, (4, 4, 2, 2)), annotation(4, (4, 4, 1, 9))],
        [(i, 40, 30) for i in range(1, 6)],
    )
    assert COCODataset(**args).ids == [1, 2, 3, 4, 5]
    kept = COCODataset(**args, remove_images_without_annotations=True)
    assert kept.ids == [1, 4]
    assert kept.id_to_img_map == {0: 1, 1: 4}
    assert len(kept.get_groundtruth(1)) == 2


def test_the_training_filter_on_real_data(test_data):
    folder = test_data / "coco_open"
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    with_objects = {
        ann["image_id"] for ann in content["annotations"] if not ann["iscrowd"] and min(ann["bbox"][2:]) > 1
    }
    dataset = COCODataset(folder / "annotations" / "instances_train2017.json", folder / "train2017", True)
    assert set(dataset.ids) == with_objects


def test_keypoints(test_data):
    folder = test_data / "coco_open"
    ann_file = folder / "annotations" / "person_keypoints_train2017.json"
    dataset = COCODataset(ann_file, folder / "train2017", remove_images_without_annotations=True)
    coco = COCO(ann_file)
    assert dataset.categories == {1: "person"}
    for index, image_id in enumerate(dataset.ids):
        annotations = [ann for ann in coco.imgToAnns[image_id] if not ann["iscrowd"]]
        assert sum(ann["num_keypoints"] for ann in annotations) >= 10
        got = dataset.get_groundtruth(index).get_field("keypoints")
        want = torch.tensor([ann["keypoints"] for ann in annotations]).reshape(-1, 17, 3)
        assert isinstance(got, PersonKeypoints)
        assert torch.equal(got.keypoints[..., 2], want[..., 2].float())
        centres = torch.where(want[..., 2:] > 0, want[..., :2] + 0.5, 0)  # of the pixels that COCO names
        assert torch.equal(got.keypoints[..., :2], centres)
    assert len(dataset) > 5


def test_keypoints_stay_the_indices_of_pixels_on_demand(tmp_path):
    categories = [{"id": 3, "name": "cat", "keypoints": ["head", "tail"]}]
    arguments = write_coco(tmp_path, [annotation(1, keypoints=[1, 2, 2, 0, 0, 0])], categories=categories)
    keypoints = COCODataset(**arguments, keypoint_shift=0.0)[0][1].get_field("keypoints").keypoints
    assert keypoints.tolist() == [[[1, 2, 2], [0, 0, 0]]]


def test_keypoints_of_one_class_among_others(tmp_path):
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "man", "keypoints": ["head", "left_hand", "right_hand"]}]
    anns = [annotation(1), annotation(1, category_id=7, keypoints=[1, 2, 2, 3, 4, 1, 0, 0, 0])]
    dataset = COCODataset(**write_coco(tmp_path, anns, categories=categories), remove_images_without_annotations=True)
    keypoints = dataset[0][1].get_field("keypoints")
    assert keypoints.keypoints.tolist() == [[[0, 0, 0]] * 3, [[1.5, 2.5, 2], [3.5, 4.5, 1], [0, 0, 0]]]
    assert keypoints.flip_map == [0, 2, 1]


def test_an_rle_that_is_no_crowd_makes_bitmaps(tmp_path):
    bitmap = np.zeros((30, 40), dtype=np.uint8, order="F")
    bitmap[10:20, 3:9] = 1
    rle = coco_mask.encode(bitmap)
    rle["counts"] = rle["counts"].decode()
    args = write_coco(tmp_path, [annotation(segmentation=rle), annotation(segmentation=[SQUARE]), annotation(2)])
    dataset = COCODataset(**args)
    masks = dataset[0][1].get_field("masks")
    assert masks.mode == "mask"
    assert np.array_equal(masks.get_mask_tensor()[0], bitmap)
    assert masks.get_mask_tensor()[1].sum() == 120
    assert dataset[1][1].get_field("masks").polygons == [[]]


def test_crowds(tmp_path):
    crowd = annotation(1, iscrowd=1, segmentation={"size": [30, 40], "counts": [1000, 200]})
    args = write_coco(tmp_path, [annotation(1, segmentation=[SQUARE]), crowd])
    assert len(COCODataset(**args)[0][1]) == 1
    target = COCODataset(**args, keep_crowd=True)[0][1]
    assert target.get_field("iscrowd").tolist() == [False, True]
    assert target.get_field("masks").get_mask_tensor().flatten(1).sum(1).tolist() == [120, 200]


def test_bad_annotations_are_skipped_with_one_counted_warning(tmp_path, caplog):
    bad = [
        annotation(bbox=(5, 5, 0, 3)),
        annotation(bbox=(5, 5, 3, -2)),
        annotation(bbox=(math.nan, 5, 3, 3)),
        annotation(bbox=(5, 5, math.inf, 3)),
        annotation(bbox=(41, 5, 3, 3)),
        annotation(bbox=(-9, 5, 3, 3)),
        annotation(category_id=99),
        annotation(image_id=99),
        annotation(bbox=(1, 2, 3)),
        {"image_id": 1, "category_id": 3},
        annotation(bbox=(None, 5, 3, 3)),
        annotation(segmentation=[[1, 2, 3, math.nan, 5, 6]]),
        annotation(segmentation=[[1, 2, 3]]),
        annotation(segmentation={"size": [3, 3], "counts": [9]}),
        annotation(segmentation={"size": [30, 40], "counts": [9]}),
        annotation(segmentation={"size": [30, 40], "counts": ["a", None]}),
        annotation(segmentation={"size": [30, 40], "counts": [[1], [2, 3]]}),
        annotation(segmentation={"size": [30, 40], "counts": [-1, 1201]}),
        annotation(segmentation={"size": [30, 40], "counts": {}}),
        annotation(segmentation={"size": 5, "counts": [1200]}),
        annotation(segmentation=[[*SQUARE, 1e9, 5]]),
        annotation(segmentation=5),
        annotation(segmentation=[7, 8]),
        annotation(category_id=[3]),
        annotation(image_id={"a": 1}),
        annotation(iscrowd="no"),
    ]
    args = write_coco(tmp_path, [annotation(), *bad, annotation(2)])
    dataset = COCODataset(**args)
    assert [len(dataset[i][1]) for i in range(2)] == [1, 1]
    (record,) = caplog.records
    assert f"{args['ann_file']}: {len(bad)} bad annotations" in record.message
    for part in (
        "2 with a box of zero or negative size (first: annotation id 2, image id 1)",
        "3 with NaN or infinity in the box",
        "2 with a box outside the image",
        "2 with a category id outside the list (first: annotation id 8, image id 1)",
        "2 with an unknown image id (first: annotation id 9, image id 99)",
        "1 with an iscrowd that is neither 0 nor 1",
        "1 with a segmentation that is neither polygons nor an RLE",
        "2 with no box",
        "1 with NaN or infinity in a polygon",
        "2 with a broken polygon",
        "1 with a polygon far outside the image",
        "2 with an RLE of another size",
        "5 with a broken RLE",
    ):
        assert part in record.message
    assert len(dataset.coco.anns) == 2  # the evaluator sees the same


def compressed(bitmap: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(bitmap, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def test_run_lengths_are_read_as_pycocotools_writes_them():
    random = np.random.default_rng(0)
    bitmaps = [random.random((h, w)) < p for h, w in ((30, 40), (1, 1), (300, 500)) for p in (0, 0.001, 0.1, 0.9, 1)]
    for bitmap in bitmaps:
        pixels = bitmap.T.flatten()
        changes = np.flatnonzero(np.diff(pixels, prepend=False))
        want = np.diff(changes, prepend=0, append=len(pixels))
        assert _runs(compressed(bitmap)["counts"]).tolist() == want.tolist()


def test_broken_compressed_masks_are_skipped(tmp_path, caplog):
    bitmap = np.zeros((30, 40))
    bitmap[5:20, 10:30] = 1
    good = compressed(bitmap)
    counts = good["counts"]
    # cut short, cut within a number, a number without end, other characters, other runs, none
    broken = [counts[:-1], counts[:1], counts + "o", "o" * 40, counts + "é", "~" + counts, counts + counts, " ", ""]
    anns = [annotation(segmentation={**good, "counts": each}) for each in broken]
    dataset = COCODataset(**write_coco(tmp_path, [*anns, annotation(segmentation=good)]))
    assert np.array_equal(dataset[0][1].get_field("masks").get_mask_tensor(), bitmap[None])
    assert f"{len(broken)} with a broken RLE (first: annotation id 1, image id 1)" in caplog.text


def test_bad_keypoints_are_skipped_but_not_their_boxes(tmp_path, caplog):
    categories = [{"id": 3, "name": "cat", "keypoints": ["head"]}, {"id": 7, "name": "dog", "keypoints": 5}]
    points = [[4, 5, 2], [4, 5], [math.nan, 5, 2], ["a", "b", "c"], 3, [], None]
    anns = [annotation(keypoints=each) for each in points]
    dataset = COCODataset(**write_coco(tmp_path, anns, categories=categories))
    keypoints = dataset[0][1].get_field("keypoints").keypoints[:, 0].tolist()
    assert keypoints == [[4.5, 5.5, 2]] + [[0, 0, 0]] * 6
    assert "4 bad annotations skipped: 4 with keypoints of the wrong number or with NaN (only these" in caplog.text


def test_odd_ids_and_areas_of_annotations_are_replaced(tmp_path):
    args = write_coco(tmp_path, [annotation(area="big"), annotation(area=math.nan), annotation(area=7)])
    edit_json(args["ann_file"], lambda content: content["annotations"][1].update(id=[1]))
    anns = COCODataset(**args).coco.anns
    assert {number: ann["area"] for number, ann in anns.items()} == {1: 120, 2: 120, 3: 7}


def test_good_files_give_no_warning(test_data, caplog):
    folder = test_data / "coco_open"
    COCODataset(folder / "annotations" / "instances_val2017.json", folder / "val2017")
    assert not caplog.records


def test_the_evaluators_view_is_complete(tmp_path, capsys):
    triangle = [0, 0, 8, 0, 0, 6]
    rle = {"size": [30, 40], "counts": [1000, 200]}
    entries = [annotation(), annotation(segmentation=[triangle]), annotation(segmentation=rle)]
    args = write_coco(tmp_path, [{k: v for k, v in entry.items() if k != "iscrowd"} for entry in entries])
    coco = COCODataset(**args).coco
    assert [ann["area"] for ann in coco.anns.values()] == [120, 24, 200]
    assert all(ann["iscrowd"] == 0 for ann in coco.anns.values())
    coco.loadRes([{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}])
    assert "index" not in capsys.readouterr().out.split("Loading")[0]


def test_image_without_size_is_measured(tmp_path):
    args = write_coco(tmp_path, [annotation(2)])
    edit_json(args["ann_file"], lambda content: [image.pop("width") for image in content["images"]])
    dataset = COCODataset(**args)
    assert [dataset.get_img_info(i)["width"] for i in range(2)] == [40, 30]
    for odd in ("40", math.nan, -3, [40], 40.5, None):
        edit_json(args["ann_file"], lambda content, odd=odd: content["images"][0].update(width=odd))
        assert COCODataset(**args)[0][0].size == (40, 30)
    (args["root"] / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png \(image id 2\) does not exist"):
        COCODataset(**args)
    (args["root"] / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))  # Pillow: SyntaxError
    with pytest.raises(DataError, match=r"2\.png \(image id 2\) cannot be read"):
        COCODataset(**args)


def test_missing_and_broken_images(tmp_path):
    args = write_coco(tmp_path, [annotation(1)], [(i, 40, 30) for i in range(1, 5)])
    dataset = COCODataset(**args)
    (args["root"] / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png \(image id 1\) does not exist"):
        dataset[0]
    (args["root"] / "2.png").write_text("no picture")
    with pytest.raises(DataError, match=r"2\.png \(image id 2\) cannot be read"):
        dataset[1]
    Image.effect_noise((40, 30), 50).save(args["root"] / "3.png", "JPEG")
    data = (args["root"] / "3.png").read_bytes()
    (args["root"] / "3.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"3\.png \(image id 3\) cannot be read: .*truncated"):
        dataset[2]
    Image.new("RGB", (30, 40)).save(args["root"] / "4.png")
    with pytest.raises(DataError, match=r"4\.png \(image id 4\) is 30x40; its annotations are for 40x30"):
        dataset[3]


def test_an_image_is_read_by_its_path_alone(tmp_path, monkeypatch):
    path = tmp_path / "grey.png"
    Image.new("L", (40, 30), 77).save(path)
    assert read_image(str(path)).getpixel((3, 3)) == (77, 77, 77)
    with pytest.raises(DataError, match=r"absent\.png does not exist$"):
        read_image(tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"grey\.png cannot be read: .*decompression bomb"):
        read_image(path)
    with pytest.raises(DataError, match=r"grey\.png \(image id 4\) cannot be read: .*decompression bomb"):
        read_image_size(path, 4)


def test_grey_images_become_rgb(tmp_path):
    args = write_coco(tmp_path, [])
    Image.new("L", (40, 30), 77).save(args["root"] / "1.png")
    assert COCODataset(**args)[0][0].getpixel((3, 3)) == (77, 77, 77)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("[]", "no list 'images'"),
        ('{"images": [], "categories": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\] needs id and file_name"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "twice"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}', "'1'"),
        ('{"images": [{"id": [1], "file_name": "a.png"}], "annotations": [], "categories": []}', r"the id \[1\]"),
        ('{"images": [{"id": 1, "file_name": 7}], "annotations": [], "categories": []}', "the file_name 7"),
    ],
)
def test_missing_and_broken_annotation_files(tmp_path, text, message):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        COCODataset(path, tmp_path)
    assert str(path) in str(error.value)


def test_copies_for_other_processes_are_whole_and_leave_the_evaluators_view(tmp_path):
    dataset = COCODataset(**write_coco(tmp_path, [annotation(2, segmentation=[SQUARE])]))
    assert len(dataset.coco.anns) == 1
    copy = pickle.loads(pickle.dumps(dataset))
    assert "coco" not in copy.__dict__
    assert torch.equal(copy[1][1].bbox, dataset[1][1].bbox)
