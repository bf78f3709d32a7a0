import json
from functools import partial

import numpy as np
import pytest
from data.cityscapes_tree import write_cityscapes

from fastrcnn.data import CityScapesDataset, COCODataset


@pytest.fixture
def convert(fastrcnn_command):
    return partial(fastrcnn_command, "convert-cityscapes")


def test_coco_files_hold_the_same_objects(convert, tmp_path):
    folders = write_cityscapes(tmp_path)
    code, out, err = convert("--datadir", tmp_path, "--outdir", tmp_path / "annotations")
    path = tmp_path / "annotations" / "instancesonly_filtered_gtFine_train.json"
    assert code == 0, err
    assert f"{path}: 2 images, 3 objects" in out
    content = json.loads(path.read_text())
    assert [category["name"] for category in content["categories"]][:3] == ["person", "rider", "car"]
    images = tmp_path / "images"  # as docs/cityscapes.md says
    images.mkdir()
    for image in folders["img_dir"].glob("train/*/*.png"):
        (images / image.name).symlink_to(image)
    found = COCODataset(path, images)
    wanted = CityScapesDataset(**folders, split="train", classes=tuple(found.categories.values()))
    assert len(found) == len(wanted) == 2
    for (_, got, _), (_, want, _) in zip(found, wanted, strict=True):
        assert got.bbox.tolist() == want.bbox.tolist()
        assert got.get_field("labels").tolist() == want.get_field("labels").tolist()
        bitmaps = [each.get_field("masks").get_mask_tensor().numpy() for each in (got, want)]
        assert np.array_equal(*bitmaps)
    areas = [int(mask.sum()) for mask in wanted[0][1].get_field("masks").get_mask_tensor()]
    assert [annotation["area"] for annotation in content["annotations"]] == areas


def test_folder_of_the_unpacked_archive_and_a_wrong_one(convert, tmp_path):
    write_cityscapes(tmp_path / "gtFine_trainvaltest", "val")
    arguments = ("--outdir", tmp_path / "out", "--dataset", "cityscapes_instance_only")
    assert convert("--datadir", tmp_path, *arguments)[0] == 0
    assert (tmp_path / "out" / "instancesonly_filtered_gtFine_val.json").is_file()
    code, _, err = convert("--datadir", tmp_path / "out", *arguments)
    assert code == 2
    assert "has none of the folders train, val, test" in err
