from pathlib import Path

import pytest
from data.makers import annotation, voc_object, write_coco, write_voc
from data.own_dataset import Squares

from fastrcnn.config import load_config
from fastrcnn.data import COCODataset, DataError, DatasetCatalog, PascalVOCDataset, build_dataset


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    return load_config()


def test_built_in_names(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    assert DatasetCatalog.get("coco_2014_minival") == {
        "factory": "COCODataset",
        "args": {
            "root": tmp_path / "coco/val2014",
            "ann_file": tmp_path / "coco/annotations/instances_minival2014.json",
        },
    }
    keypoints = DatasetCatalog.get("keypoints_coco_2014_train")["args"]
    assert keypoints["ann_file"] == tmp_path / "coco/annotations/person_keypoints_train2014.json"
    voc = DatasetCatalog.get("voc_2007_test")
    assert voc == {"factory": "PascalVOCDataset", "args": {"data_dir": tmp_path / "voc/VOC2007", "split": "test"}}
    assert DatasetCatalog.get("voc_2012_val_cocostyle")["factory"] == "COCODataset"
    monkeypatch.delenv("FASTRCNN_DATASETS")
    assert DatasetCatalog.get("coco_2017_val")["args"]["root"] == Path("datasets/coco/val2017")


def test_unknown_name_gives_the_nearest(cfg):
    with pytest.raises(DataError, match=r"no dataset 'coco_2017_tran'; the nearest names are coco_2017_train"):
        DatasetCatalog.get("coco_2017_tran")
    cfg.DATASETS.REGISTER = {"my_cats": {"img_dir": "a", "ann_file": "b"}}
    with pytest.raises(DataError, match="my_cats"):
        build_dataset(cfg, "my_cat", is_train=True)


def test_registered_coco_for_training_and_testing(cfg, tmp_path):
    crowd = annotation(1, iscrowd=1, segmentation={"size": [30, 40], "counts": [1200]})
    write_coco(tmp_path / "mine", [annotation(1), crowd])
    entry = {"img_dir": "mine/images", "ann_file": "mine/annotations.json"}
    cfg.DATASETS.REGISTER = {"mine": entry, "all": {**entry, "remove_images_without_annotations": "false"}}
    train, test = (build_dataset(cfg, "mine", is_train) for is_train in (True, False))
    assert isinstance(train, COCODataset)
    assert (train.ids, test.ids) == ([1], [1, 2])
    assert (len(train[0][1]), len(test[0][1])) == (1, 2)
    assert build_dataset(cfg, "all", is_train=True).ids == [1, 2]


def test_registered_voc_for_training_and_testing(cfg, tmp_path, monkeypatch):
    write_voc(tmp_path / "elsewhere", {"a": [voc_object(), voc_object(difficult=1)]})
    monkeypatch.setenv("MY_DATA", str(tmp_path / "elsewhere"))
    cfg.DATASETS.REGISTER = {"mine": {"data_dir": "$MY_DATA", "split": "train", "classes": "dog, cat"}}
    train, test = (build_dataset(cfg, "mine", is_train) for is_train in (True, False))
    assert isinstance(train, PascalVOCDataset)
    assert train.classes == ("dog", "cat")
    assert (len(train[0][1]), len(test[0][1])) == (1, 2)


def test_catalogue_in_a_yaml_file(cfg, tmp_path):
    write_voc(tmp_path / "pets", {"a": [voc_object()]})
    path = tmp_path / "catalogue.yaml"
    path.write_text("pets:\n  data_dir: pets\n  split: train\n  classes: [dog, cat]\n")
    cfg.PATHS_CATALOG = str(path)
    assert build_dataset(cfg, "pets", is_train=True).categories == {1: "dog", 2: "cat"}
    path.write_text("- pets\n")
    with pytest.raises(DataError, match=r"catalogue\.yaml holds no mapping"):
        build_dataset(cfg, "pets", is_train=True)


def test_catalogue_in_a_python_file_of_the_original_form(cfg, tmp_path):
    write_coco(tmp_path / "mine", [annotation(1)])
    path = tmp_path / "paths_catalog.py"
    path.write_text(
        "import os\n\n\nclass DatasetCatalog:\n    DATA_DIR = os.environ['FASTRCNN_DATASETS']\n\n"
        "    @staticmethod\n    def get(name):\n        if name == 'my_coco':\n"
        "            root = os.path.join(DatasetCatalog.DATA_DIR, 'mine')\n"
        "            args = dict(root=root + '/images', ann_file=root + '/annotations.json')\n"
        "            return dict(factory='COCODataset', args=args)\n"
        "        raise RuntimeError('Dataset not available: {}'.format(name))\n"
    )
    cfg.PATHS_CATALOG = str(path)
    assert build_dataset(cfg, "my_coco", is_train=True).ids == [1]
    with pytest.raises(DataError, match="no dataset 'my_cocoo'"):
        build_dataset(cfg, "my_cocoo", is_train=True)
    with pytest.raises(DataError, match=r"coco/annotations/instances_val2017\.json does not exist"):
        build_dataset(cfg, "coco_2017_val", is_train=False)
    path.write_text("nothing = 1\n")
    with pytest.raises(DataError, match="has no class DatasetCatalog"):
        build_dataset(cfg, "my_coco", is_train=True)
    cfg.PATHS_CATALOG = str(tmp_path / "missing.py")
    with pytest.raises(DataError, match=r"missing\.py does not exist"):
        build_dataset(cfg, "my_coco", is_train=True)


def test_own_dataset_by_module_and_class(cfg, tmp_path):
    path = tmp_path / "catalogue.yaml"
    path.write_text("squares: {factory: 'data.own_dataset:Squares', args: {count: 3}}\n")
    cfg.PATHS_CATALOG = str(path)
    dataset = build_dataset(cfg, "squares", is_train=True, transforms=lambda image, target: (image, target))
    assert type(dataset).__qualname__ == Squares.__qualname__
    assert dataset.categories == {1: "dark", 2: "light"}
    assert dataset.name_to_id["light"] == 2
    assert dataset[1][2] == 1
    for factory, message in (("Squares", "'module:Class'"), ("data.own_dataset:Circles", "cannot be imported")):
        path.write_text(f"squares: {{factory: '{factory}'}}\n")
        with pytest.raises(DataError, match=message):
            build_dataset(cfg, "squares", is_train=True)


@pytest.mark.parametrize(
    "entry",
    [{"img_dir": "a"}, {"img_dir": "a", "ann_file": "b", "split": "c"}, {"data_dir": "a"}, {}],
)
def test_entry_of_no_known_form(cfg, entry):
    cfg.DATASETS.REGISTER = {"mine": entry}
    with pytest.raises(DataError, match=r"dataset 'mine' has the entry .*img_dir, ann_file"):
        build_dataset(cfg, "mine", is_train=True)


def test_empty_dataset_is_an_error_with_its_name(cfg, tmp_path):
    write_coco(tmp_path / "mine", [])
    cfg.DATASETS.REGISTER = {"mine": {"img_dir": "mine/images", "ann_file": "mine/annotations.json"}}
    with pytest.raises(DataError, match=r"dataset 'mine' is empty.*annotations\.json"):
        build_dataset(cfg, "mine", is_train=True)
    assert len(build_dataset(cfg, "mine", is_train=False)) == 2


def test_shapes_are_made_on_first_use(cfg, tmp_path, monkeypatch):
    roots = []

    def make(root: Path) -> None:
        roots.append(root)
        write_coco(root, [annotation(1)])
        (root / "images").rename(root / "val")
        (root / "annotations").mkdir()
        (root / "annotations.json").rename(root / "annotations" / "instances_val.json")

    monkeypatch.setattr("fastrcnn.data.catalog.ensure_shapes", make)
    assert build_dataset(cfg, "shapes_val", is_train=True).ids == [1]
    assert roots == [tmp_path / "shapes"]
