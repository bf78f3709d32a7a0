import xml.etree.ElementTree as ElementTree

import pytest
import torch
from data.makers import voc_object, write_voc

from fastrcnn.data import DataError, PascalVOCDataset

CLASSES = ("dog", "cat")
BLOOD = ("RBC", "WBC", "Platelets")


def test_items(tmp_path):
    objects = [voc_object((1, 1, 40, 30)), voc_object((6, 7, 15, 18), "dog", difficult=1)]
    folder = write_voc(tmp_path, {"a": objects, "b": []})
    dataset = PascalVOCDataset(folder, "train", use_difficult=True, classes=CLASSES)
    assert dataset.categories == {1: "dog", 2: "cat"}
    image, target, index = dataset[0]
    assert (image.size, index) == ((40, 30), 0)
    # pixels 1 to 40 and 1 to 30, both included, are the whole image
    assert target.bbox.tolist() == [[0, 0, 40, 30], [5, 6, 15, 18]]
    assert target.get_field("labels").tolist() == [2, 1]
    assert target.get_field("difficult").tolist() == [False, True]
    assert dataset.get_img_info(0) == {"height": 30, "width": 40}
    assert dataset[1][1].bbox.shape == (0, 4)
    easy = PascalVOCDataset(folder, "train", classes=CLASSES)
    assert easy[0][1].get_field("labels").tolist() == [2]


def test_real_annotations(test_data):
    folder = test_data / "bccd"
    for split, count in (("train", 205), ("val", 87), ("test", 72)):
        dataset = PascalVOCDataset(folder, split, use_difficult=True, classes=BLOOD)
        lines = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        assert len(dataset) == len(lines) == count
        for index in (0, count - 1):
            tree = ElementTree.parse(folder / "Annotations" / f"{lines[index]}.xml")
            names = [element.text for element in tree.findall("object/name")]
            image, target, _ = dataset[index]
            assert image.size == target.size == (640, 480)
            assert [dataset.categories[label] for label in target.get_field("labels").tolist()] == names
            corners = torch.tensor([[float(e.text) for e in box] for box in tree.findall("object/bndbox")])
            want = corners - torch.tensor([1, 1, 0, 0])
            torch.testing.assert_close(target.bbox, want.clamp(min=0))


def test_bad_objects_are_skipped_with_one_counted_warning(tmp_path, caplog):
    bad = [
        voc_object((9, 9, 8, 20)),
        voc_object((9, 20, 18, 3)),
        voc_object(("nan", 9, 18, 20)),
        voc_object(("", 9, 18, 20)),
        voc_object((41, 9, 58, 20)),
        "<object><name>cat</name></object>",
    ]
    dataset = PascalVOCDataset(write_voc(tmp_path, {"a": [*bad, voc_object()]}), "train", classes=CLASSES)
    assert dataset[0][1].bbox.tolist() == [[5, 6, 15, 18]]
    (record,) = caplog.records
    assert "6 bad annotations" in record.message
    assert "2 with a box of zero or negative size (first: object 1 of a.xml)" in record.message
    assert "3 with a missing or unreadable box (first: object 3 of a.xml)" in record.message
    assert "1 with a box outside the image" in record.message


def test_unknown_class_says_what_to_do(test_data):
    with pytest.raises(DataError, match=r"BloodImage_00001\.xml: class 'WBC' is not one of aeroplane.*`classes:"):
        PascalVOCDataset(test_data / "bccd", "train")


def test_objects_of_classes_that_are_not_asked_for_are_skipped(test_data, caplog):
    dataset = PascalVOCDataset(test_data / "bccd", "val", use_difficult=True, classes=("WBC", "RBC"))
    everything = PascalVOCDataset(test_data / "bccd", "val", use_difficult=True, classes=("WBC", "RBC", "Platelets"))
    others = 0
    for index in range(len(dataset)):
        target, whole = dataset.get_groundtruth(index), everything.get_groundtruth(index)
        assert torch.equal(target.bbox, whole.bbox[whole.get_field("labels") < 3])
        others += int((whole.get_field("labels") == 3).sum())
    assert f"{others} with class 'Platelets', which `classes` does not name (first: object" in caplog.text
    assert others > 50


def test_missing_and_broken_files(tmp_path):
    folder = write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object()]})
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        PascalVOCDataset(folder, "val", classes=CLASSES)
    dataset = PascalVOCDataset(folder, "train", classes=CLASSES)
    (folder / "JPEGImages" / "b.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"b\.jpg \(image id b\) cannot be read"):
        dataset[1]
    (folder / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"b\.jpg \(image id b\) does not exist"):
        dataset[1]
    (folder / "Annotations" / "b.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"b\.xml \(image id b\) cannot be read"):
        PascalVOCDataset(folder, "train", classes=CLASSES)
    (folder / "Annotations" / "b.xml").unlink()
    with pytest.raises(DataError, match=r"b\.xml \(image id b\) does not exist"):
        PascalVOCDataset(folder, "train", classes=CLASSES)


def test_image_without_size_is_measured(tmp_path):
    folder = write_voc(tmp_path, {"a": [voc_object()]})
    path = folder / "Annotations" / "a.xml"
    text = path.read_text()
    for odd in ("", "<width>inf</width>", "<width>-4</width>", "<width>wide</width>"):
        path.write_text(text.replace("<width>40</width>", odd))
        assert PascalVOCDataset(folder, "train", classes=CLASSES).get_img_info(0) == {"height": 30, "width": 40}
