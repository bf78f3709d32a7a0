import numpy as np
import pytest
import torch
from data.cityscapes_tree import HEIGHT, OBJECTS, WIDTH, write_cityscapes, write_frame
from PIL import Image

from fastrcnn.config import load_config
from fastrcnn.data import CityScapesDataset, DataError, build_dataset, check_num_classes, make_data_loader
from fastrcnn.data.datasets.cityscapes import EVALUATED_CLASSES, LABEL_IDS
from fastrcnn.evaluation import evaluate
from fastrcnn.evaluation.masks import encode_bitmaps

# boxes of OBJECTS: the drawn pixels, the person cut at the image's border, of the first car what the second leaves
BOXES = {
    "poly": [[4, 10, 24, 20], [14, 14, 34, 26], [50, 12, 63, 21], [0, 20, 6, 31]],
    "mask": [[0, 20, 6, 31], [4, 10, 24, 20], [14, 14, 34, 26], [50, 12, 63, 21]],
}
NAMES = {"poly": ["car", "car", "caravan", "person"], "mask": ["person", "car", "car", "caravan"]}


def test_label_table():
    assert len(LABEL_IDS) == 10
    assert EVALUATED_CLASSES == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_items(tmp_path, mode):
    dataset = CityScapesDataset(**write_cityscapes(tmp_path), split="train", mode=mode)
    assert len(dataset) == 2
    image, target, index = dataset[0]
    assert (image.size, target.size, index) == ((WIDTH, HEIGHT), (WIDTH, HEIGHT), 0)
    assert target.bbox.tolist() == BOXES[mode]
    assert [dataset.categories[label] for label in target.get_field("labels").tolist()] == NAMES[mode]
    masks = target.get_field("masks")
    assert masks.mode == mode
    assert dataset.get_img_info(0) == {"height": HEIGHT, "width": WIDTH, "id": "aachen_000000_000019"}
    assert dataset[1][1].bbox.shape == (0, 4)
    assert len(dataset[1][1].get_field("masks")) == 0
    ids = torch.from_numpy(dataset.get_instance_ids(0))
    if mode == "mask":
        assert torch.equal(masks.get_mask_tensor()[1:3].bool(), torch.stack([ids == 26000, ids == 26001]))
    else:
        # the polygon through the centres of the drawn outline's pixels
        assert masks.polygons[1][0].tolist() == [[14.5, 14.5], [33.5, 14.5], [33.5, 25.5], [14.5, 25.5]]


def test_the_two_modes_agree_where_nothing_is_hidden(tmp_path):
    corners = [[5, 3], [30, 8], [25, 20], [12, 27], [8, 12]]
    write_frame(tmp_path, "val", "ulm_000000_000001", [("truck", corners)])
    folders = {"img_dir": tmp_path / "leftImg8bit", "ann_dir": tmp_path / "gtFine"}
    drawn, outline = (CityScapesDataset(**folders, split="val", mode=mode)[0][1] for mode in ("mask", "poly"))
    assert drawn.bbox.tolist() == outline.bbox.tolist()
    bitmaps = [target.get_field("masks").get_mask_tensor().bool() for target in (drawn, outline)]
    assert (bitmaps[0] & bitmaps[1]).sum() / (bitmaps[0] | bitmaps[1]).sum() > 0.85


def test_filters(tmp_path):
    folders = write_cityscapes(tmp_path)
    big = CityScapesDataset(**folders, split="train", min_area=117)
    assert big[0][1].bbox.tolist() == [
        box for box in BOXES["mask"] if box[2] > 6
    ]  # the person's has 66, the caravan's 117
    cars = CityScapesDataset(**folders, split="train", classes=("bus", "car"))
    assert cars[0][1].get_field("labels").tolist() == [2, 2]
    assert cars.contiguous_category_id_to_json_id == {1: 28, 2: 26}
    for mode in ("poly", "mask"):
        kept = CityScapesDataset(**folders, split="train", mode=mode, remove_images_without_annotations=True)
        assert kept.id_to_img_map == {0: "aachen_000000_000019"}
        assert kept[0][0].size == (WIDTH, HEIGHT)
    for number in range(5):
        write_frame(tmp_path, "train", f"ulm_00000{number}_000001", OBJECTS[:1])
    mini = CityScapesDataset(**folders, split="train", mini=3)
    assert list(mini.id_to_img_map.values()) == ["aachen_000000_000019", "ulm_000001_000001", "ulm_000004_000001"]


def test_images_may_have_any_size(tmp_path):
    folders = write_cityscapes(tmp_path)
    write_frame(tmp_path, "train", "ulm_000000_000001", OBJECTS[:2], 48, 24)
    dataset = CityScapesDataset(**folders, split="train")
    assert dataset.get_img_info(2) == {"height": 24, "width": 48, "id": "ulm_000000_000001"}
    assert dataset[2][1].size == (48, 24)


def test_broken_and_missing_files(tmp_path):
    folders = write_cityscapes(tmp_path)
    with pytest.raises(DataError, match="mode is 'box'; want one of mask, poly"):
        CityScapesDataset(**folders, split="train", mode="box")
    with pytest.raises(DataError, match="no objects of class 'dog'; there are person"):
        CityScapesDataset(**folders, split="train", classes=("car", "dog"))
    annotations = folders["ann_dir"] / "train" / "aachen"
    (annotations / "aachen_000000_000019_gtFine_instanceIds.png").unlink()
    with pytest.raises(DataError, match=r"gtFine/train/\*/aachen_000000_000019_\*_instanceIds\.png does not exist"):
        CityScapesDataset(**folders, split="train")[0]
    path = annotations / "aachen_000000_000019_gtFine_polygons.json"
    whole = path.read_text()
    for broken in (whole[:-5], whole.replace("imgWidth", "width"), whole.replace("[4, 10]", "[4]"), "[1, 2]"):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"gtFine_polygons\.json cannot be read"):
            CityScapesDataset(**folders, split="train", mode="poly")[0]
    path.write_text(whole.replace("64", "65"))
    with pytest.raises(DataError, match=r"polygons\.json is for 65x32; the image is 64x32"):
        CityScapesDataset(**folders, split="train", mode="poly")[0]
    path = folders["ann_dir"] / "train/bonn/bonn_000001_000019_gtFine_instanceIds.png"
    for pixels, message in (
        (np.zeros((HEIGHT, 9), np.uint16), "is 9x32; the image is 64x32"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), "has colours"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(DataError, match=f"instanceIds.png {message}"):
            CityScapesDataset(**folders, split="train")[1]
    path.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"instanceIds\.png cannot be read"):
        CityScapesDataset(**folders, split="train")[1]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRCNN_DATASETS", str(tmp_path))
    for split in ("train", "val"):
        write_cityscapes(tmp_path / "cityscapes", split)
    return tmp_path


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_names_and_class_counts_of_the_original_recipes(tree, mode):
    """Nine classes with the background, as in the original's binarymask recipe, are the eight that are evaluated;
    eleven, as in its poly recipe, are all."""
    for number, classes in ((9, EVALUATED_CLASSES), (11, tuple(LABEL_IDS))):
        cfg = load_config(None, ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", str(number)])
        train = build_dataset(cfg, f"cityscapes_{mode}_instance_train", is_train=True)
        test = build_dataset(cfg, f"cityscapes_{mode}_instance_val", is_train=False)
        mini = build_dataset(cfg, f"cityscapes_{mode}_instance_minival", is_train=False)
        assert (len(train), len(test), len(mini)) == (1, 2, 2)  # images without objects stay for testing
        assert tuple(train.categories.values()) == classes
        check_num_classes(cfg, "cityscapes", train)
    cfg = load_config(None, ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "7"])
    with pytest.raises(DataError, match="so it must be 11"):
        check_num_classes(cfg, "cityscapes", build_dataset(cfg, f"cityscapes_{mode}_instance_train", is_train=True))


def test_own_entry(tree):
    entry = {"img_dir": "cityscapes/leftImg8bit", "ann_dir": "cityscapes/gtFine", "split": "val", "mode": "poly"}
    entry |= {"classes": "car, person", "min_area": 70, "remove_images_without_annotations": "false"}
    cfg = load_config(None, ["DATASETS.REGISTER", str({"mine": entry})])
    dataset = build_dataset(cfg, "mine", is_train=True)
    assert dataset.categories == {1: "car", 2: "person"}
    assert [len(dataset[index][1]) for index in range(2)] == [2, 0]


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_perfect_detections_measure_one(tree, tmp_path, mode):
    """The masks of the ground truth as detections: hidden parts make the outlines worse than the visible pixels."""
    cfg = load_config(None, ["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "11"])
    dataset = build_dataset(cfg, f"cityscapes_{mode}_instance_val", is_train=False)
    predictions = {}
    for index in range(len(dataset)):
        found = dataset.get_groundtruth(index)
        found.add_field("scores", torch.ones(len(found)))
        found.add_field("objectness", torch.ones(len(found)))
        codes = encode_bitmaps(found.get_field("masks").get_mask_tensor()) if len(found) else []
        found.add_field("rle", codes)
        predictions[index] = found
    measures = evaluate(dataset, predictions, tmp_path / "out", ("bbox", "segm"))
    assert measures["bbox"]["AP/car"] == 1
    assert measures["segm"]["AP50/car"] == 1
    assert "AP/caravan" not in measures["segm"]
    assert "AP/person" not in measures["segm"]  # 66 pixels are too few
    if mode == "mask":
        assert measures["segm"]["AP"] == 1
    recall = evaluate(dataset, predictions, None, box_only=True)
    assert recall["box_proposal"]["AR@100"] == 1


@pytest.mark.parametrize("mode", ["poly", "mask"])
def test_batches(tree, mode):
    options = "MODEL.MASK_ON True MODEL.ROI_BOX_HEAD.NUM_CLASSES 11 INPUT.MIN_SIZE_TRAIN (64,) SOLVER.IMS_PER_BATCH 1"
    names = f"DATASETS.TRAIN ('cityscapes_{mode}_instance_train',) DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 1"
    (images, targets, _), *_ = make_data_loader(load_config(None, f"{options} {names}".split()), is_train=True)
    assert images.sizes.tolist() == [[64, 128]]
    assert int(targets.valid.sum()) == 4
    assert (targets.polygons is not None) == (mode == "poly")
