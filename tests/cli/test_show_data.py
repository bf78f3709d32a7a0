import json

import numpy as np
import pytest
import torch
from config.small import small
from PIL import Image

from fastrcnn.cli import show_data
from fastrcnn.config import load_config
from fastrcnn.data import build_dataset, build_transforms
from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.structures import BoxList, ImageBatch, Keypoints, SegmentationMask, TargetBatch

REGISTER = {
    f"tiny_{part}": {"img_dir": f"small/{part}", "ann_file": f"small/annotations/instances_{part}.json"}
    for part in ("train", "val")
}
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATASETS.REGISTER", str(REGISTER)),
    *("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)", "SOLVER.IMS_PER_BATCH", "2"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    ensure_shapes(folder / "datasets" / "small", train=8, val=4)
    return folder


def annotations(workplace):
    return json.loads((workplace / "datasets/small/annotations/instances_train.json").read_text())


def test_sheet_and_what_is_told(workplace, monkeypatch, fastrcnn_command):
    monkeypatch.chdir(workplace)
    code, out, err = fastrcnn_command("show-data", "--count", "5", "--output", "new/sheet.png", *SMALL)
    assert code == 0, err
    with Image.open(workplace / "new/sheet.png") as sheet:
        assert sheet.size == (2 * 388 + 4, 3 * 388 + 4)  # 128 pixels, three times
    content = annotations(workplace)
    assert f"tiny_train: 8 images, {len(content['annotations'])} objects" in out
    for category in content["categories"]:
        own = [a["image_id"] for a in content["annotations"] if a["category_id"] == category["id"]]
        assert f"{category['name']} {len(own)} {len(set(own))}" in " ".join(out.split())
    areas = [a["bbox"][2] * a["bbox"][3] for a in content["annotations"]]
    assert f"{sum(area < 1024 for area in areas)} small" in out
    assert "warning" not in out
    assert "look" not in out
    assert "5 images written to new/sheet.png" in out

    code, out, err = fastrcnn_command("show-data", "--split", "test", "--count", "99", *SMALL)
    assert code == 0, err
    assert "tiny_val: 4 images" in out
    assert "4 images written to show_data.png" in out


def test_wrong_annotations_are_told(workplace, monkeypatch, fastrcnn_command):
    monkeypatch.chdir(workplace)
    content = annotations(workplace)
    first = content["annotations"][0]
    name = next(image["file_name"] for image in content["images"] if image["id"] == first["image_id"])
    content["categories"].append({"id": 77, "name": "never"})
    content["annotations"].append({**first, "id": 90001})
    content["annotations"].append({**first, "id": 90002, "bbox": [5, 5, 1, 40], "segmentation": []})
    content["annotations"].append({**first, "id": 90003, "bbox": [5, 5, 0, 40]})
    content["images"].append({**content["images"][0], "id": 9999})
    (workplace / "datasets/wrong.json").write_text(json.dumps(content))
    register = {"wrong": {"img_dir": "small/train", "ann_file": "wrong.json"}}
    changed = [
        "DATASETS.REGISTER",
        str(register),
        "DATASETS.TRAIN",
        "('wrong',)",
        "MODEL.ROI_BOX_HEAD.NUM_CLASSES",
        "8",
    ]
    code, out, err = fastrcnn_command("show-data", "--count", "1", *SMALL, *changed)
    assert code == 0, err
    assert "never" in out.split("have no object:")[1].splitlines()[0]
    assert f"1 boxes are narrower than 2 pixels, the first in image {name}" in out
    assert f"1 boxes are there twice, with the same class, the first in image {name}" in out
    assert "1 bad annotations skipped: 1 with a box of zero or negative size" in out
    assert "1 more images are left out" in out


def test_own_dataset_and_voc(workplace, monkeypatch, fastrcnn_command, test_data):
    monkeypatch.chdir(workplace)
    register = {
        "own": {"factory": "data.own_dataset:Squares", "args": {"count": 3}},
        "voc": {"data_dir": str(test_data / "bccd"), "split": "test", "classes": "RBC,WBC"},
    }
    keys = ["MODEL.MASK_ON", "False", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3", "DATASETS.REGISTER", str(register)]
    for name, told in (
        ("own", ("own: 3 images, 3 objects", "1 dark 0 0", "2 light 3 3", "look: 1 classes have no object: dark")),
        ("voc", ("voc: 72 images", "class 'Platelets', which `classes` does not name")),
    ):
        for split in ("train", "test"):
            chosen = [f"DATASETS.{split.upper()}", f"('{name}',)"]
            code, out, err = fastrcnn_command("show-data", "--split", split, "--count", "2", *SMALL, *keys, *chosen)
            assert code == 0, err
            for line in told:
                assert line in " ".join(out.split())


def test_bad_arguments(workplace, monkeypatch, fastrcnn_command):
    monkeypatch.chdir(workplace)
    for arguments, told in (
        (["--count", "0"], "--count is 0"),
        (["DATASETS.TRAIN", "('tiny_trian',)"], "tiny_train"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER'"),
    ):
        code, out, err = fastrcnn_command("show-data", *SMALL, *arguments)
        assert (code, out) == (2, "")
        assert told in err


@pytest.mark.parametrize("bgr", [True, False])
def test_pictures_are_what_augmentation_made(bgr, workplace, monkeypatch):
    """Mirrored images, pixel for pixel, and their targets."""
    monkeypatch.chdir(workplace)
    overrides = ["INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "1.0", "DATALOADER.NUM_WORKERS", "0", "INPUT.TO_BGR255", str(bgr)]
    if not bgr:
        overrides += ["INPUT.PIXEL_MEAN", "(0.48, 0.45, 0.4)", "INPUT.PIXEL_STD", "(0.2, 0.22, 0.25)"]
    cfg = load_config("quick_start", [*SMALL, *overrides])
    assert build_transforms(cfg, True) is not None
    plain = build_dataset(cfg, "tiny_train", True, transforms=lambda image, target: (image, target))
    sources = {np.asarray(image)[:, ::-1].tobytes(): target for image, target, _ in (plain[i] for i in range(8))}
    fed = [sample for _, sample in zip(range(8), show_data.samples(cfg, True), strict=False)]
    seen = set()
    for image, target, categories in fed:
        source = sources[np.asarray(image).tobytes()]  # a KeyError: not a mirrored image
        seen.add(id(source))
        assert categories == plain.categories
        assert target.get_field("labels").tolist() == source.get_field("labels").tolist()
        mirrored = source.bbox.clone()
        mirrored[:, [0, 2]] = 128 - source.bbox[:, [2, 0]]
        torch.testing.assert_close(target.bbox, mirrored)
        masks = target.get_field("masks").convert("mask").get_mask_tensor()
        want = source.get_field("masks").convert("mask").get_mask_tensor().flip(2)
        assert (masks != want).float().mean() < 0.002  # polygons' borders round differently when mirrored
    assert len(seen) == 8


def test_targets_of_a_batch():
    """Bitmaps, crowds and keypoints of images of different sizes come back as they went in."""
    cfg = small("e2e_keypoint_rcnn_R_50_FPN_1x")
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for height, width, count in ((40, 64, 2), (64, 30, 1), (50, 50, 0)):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        target = BoxList(torch.tensor([[3.0, 4, 20, 30], [5, 6, 25, 36]])[:count], (width, height))
        target.add_field("labels", torch.tensor([2, 1])[:count])
        target.add_field("iscrowd", torch.tensor([False, True])[:count])
        bitmaps = torch.randint(0, 2, (count, height, width), generator=generator, dtype=torch.uint8)
        target.add_field("masks", SegmentationMask(bitmaps, (width, height), mode="mask"))
        points = torch.rand(count, 17, 3, generator=generator) * 20 + 1
        target.add_field("keypoints", Keypoints(points, (width, height)))
        targets.append(target)
    batch = ImageBatch.from_tensors(images, [tuple(image.shape[1:]) for image in images], cfg)
    for got, want in zip(show_data.undo_normalisation(batch, cfg), images, strict=True):
        assert np.array_equal(np.asarray(got), want.permute(1, 2, 0).numpy())
    back = show_data.to_boxlists(batch, TargetBatch.from_boxlists(targets, batch))
    for got, want in zip(back, targets, strict=True):
        assert got.size == want.size
        assert torch.equal(got.bbox, want.bbox)
        for field in ("labels", "iscrowd"):
            assert torch.equal(got.get_field(field), want.get_field(field))
        assert torch.equal(got.get_field("masks").get_mask_tensor(), want.get_field("masks").get_mask_tensor())
        assert torch.equal(got.get_field("keypoints").keypoints, want.get_field("keypoints").keypoints)
