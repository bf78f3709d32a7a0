import re
from itertools import islice

import numpy as np
import pytest
import torch
from data.makers import annotation, write_coco

from fastrcnn.config import load_config
from fastrcnn.data import DataError, SampleError, make_data_loader
from fastrcnn.structures import BoxList, ImageBatch, TargetBatch

SQUARE = [5, 6, 15, 6, 15, 18, 5, 18]


def config(folder, *overrides: str, **entries):
    cfg = load_config(
        None,
        [
            *("MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "3", "SEED", "1"),
            *("INPUT.MIN_SIZE_TRAIN", "(30,)", "INPUT.MIN_SIZE_TEST", "60", "SOLVER.MAX_ITER", "10"),
            *("SOLVER.IMS_PER_BATCH", "2", "TEST.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
            *("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", *overrides),
        ],
    )
    entry = {"img_dir": str(folder / "images"), "ann_file": str(folder / "annotations.json")}
    cfg.DATASETS.REGISTER = {"mine": entry, **entries}
    return cfg


@pytest.fixture
def folder(tmp_path):
    """Seven images, wide and tall, one object in each, the fourth with none; the value of the pixels is 20 · id."""
    images = [(i, 40, 30) if i % 2 else (i, 30, 40) for i in range(1, 8)]
    objects = [annotation(i, (i, 6, 10, 12), segmentation=[SQUARE]) for i in range(1, 8) if i != 4]
    write_coco(tmp_path, objects, images)
    return tmp_path


def content(batch) -> list:
    images, targets, ids = batch
    return [images.pixels.flatten().tolist(), targets.boxes.flatten().tolist(), list(ids)]


def test_training_batches(folder):
    overrides = (
        "INPUT.HORIZONTAL_FLIP_PROB_TRAIN",
        "0.0",
        "DATALOADER.SIZE_DIVISIBILITY",
        "32",
        "MODEL.MASK_ON",
        "True",
    )
    loader = make_data_loader(config(folder, *overrides), is_train=True)
    assert len(loader) == 10
    assert loader.dataset.ids == [1, 2, 3, 5, 6, 7]
    seen = set()
    for images, targets, ids in loader:
        assert isinstance(images, ImageBatch)
        assert isinstance(targets, TargetBatch)
        assert len(images) == len(targets) == len(ids)
        assert images.pixels.shape[-2:] in ((32, 64), (64, 32))  # one group in each batch
        for k, index in enumerate(ids):
            image_id = loader.dataset.ids[index]
            info = loader.dataset.get_img_info(index)
            assert images.original_sizes[k].tolist() == [info["height"], info["width"]] == images.sizes[k].tolist()
            blue = images.pixels[k, 0, 0, 0] + 102.9801
            assert blue.item() == pytest.approx(20 * image_id, abs=1e-3)
            assert targets.boxes[k, 0].tolist() == [image_id, 6, image_id + 10, 18]
            assert targets.labels[k].tolist() == [1]
        assert targets.polygons.edges.shape[-2:] == (4, 4)
        seen.update(ids)
    assert seen == set(range(6))


def test_fields_that_the_model_does_not_learn_are_left_out(folder):
    _, targets, _ = next(iter(make_data_loader(config(folder), is_train=True)))
    assert targets.polygons is targets.masks is targets.keypoints is None


def test_images_without_objects_may_be_negatives(folder):
    entry = {"img_dir": str(folder / "images"), "ann_file": str(folder / "annotations.json")}
    cfg = config(folder, "DATASETS.TRAIN", "('all',)", all={**entry, "remove_images_without_annotations": "false"})
    loader = make_data_loader(cfg, is_train=True)
    labels = {index: row.tolist() for _, targets, ids in loader for index, row in zip(ids, targets.labels, strict=True)}
    assert labels[3] == [0]
    assert labels[2] == [1]


@pytest.mark.parametrize("start", [1, 4])
def test_resuming_gives_the_same_batches_augmentation_included(folder, start):
    cfg = config(folder, "INPUT.BRIGHTNESS", "0.5", "INPUT.MIN_SIZE_TRAIN", "(20, 30, 40)")
    whole = [content(batch) for batch in make_data_loader(cfg, is_train=True)]
    resumed = [content(batch) for batch in make_data_loader(cfg, is_train=True, start_iter=start)]
    assert resumed == whole[start:]
    assert len({str(batch) for batch in whole}) == 10


def test_workers_change_nothing_and_the_callers_random_numbers_stay(folder):
    overrides = ("INPUT.BRIGHTNESS", "0.5", "INPUT.MIN_SIZE_TRAIN", "(20, 30, 40)")
    torch.manual_seed(5)
    want_next = torch.rand(1)
    torch.manual_seed(5)
    alone = [content(batch) for batch in make_data_loader(config(folder, *overrides), is_train=True)]
    assert torch.rand(1) == want_next
    workers = make_data_loader(config(folder, *overrides, "DATALOADER.NUM_WORKERS", "2"), is_train=True)
    assert [content(batch) for batch in workers] == alone


def test_other_seeds_give_other_orders(folder):
    orders = set()
    for seed in range(4):
        loader = make_data_loader(config(folder, "SEED", str(seed)), is_train=True)
        orders.add(tuple(ids for _, _, ids in loader))
    assert len(orders) == 4


def test_ranks_train_on_different_images(folder):
    loaders = [make_data_loader(config(folder), is_train=True, rank=rank, world_size=2) for rank in range(2)]
    epochs = [[index for _, _, ids in islice(loader, 3) for index in ids] for loader in loaders]
    assert sorted(epochs[0] + epochs[1]) == list(range(6))


@pytest.mark.parametrize("grouping", ["True", "False"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_testing_shows_every_image_once(folder, world_size, grouping):
    cfg = config(folder, "DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    seen = []
    for rank in range(world_size):
        (loader,) = make_data_loader(cfg, is_train=False, rank=rank, world_size=world_size)
        assert loader.dataset_name == "mine"
        for images, ids in loader:
            assert isinstance(images, ImageBatch)
            assert len(images) == len(ids) <= 2 // world_size
            for k, index in enumerate(ids):
                info = loader.dataset.get_img_info(index)
                assert images.original_sizes[k].tolist() == [info["height"], info["width"]]
                assert images.sizes[k].tolist() == [2 * info["height"], 2 * info["width"]]
            seen += ids
    assert sorted(seen) == list(range(7))


def test_more_processes_than_images(folder):
    cfg = config(folder, "TEST.IMS_PER_BATCH", "9")
    loaders = [make_data_loader(cfg, is_train=False, rank=rank, world_size=9)[0] for rank in range(9)]
    assert sorted(index for loader in loaders for _, ids in loader for index in ids) == list(range(7))
    assert len(loaders[8]) == 0


def test_several_datasets_are_joined_for_training_and_kept_apart_for_testing(folder):
    entry = {"img_dir": str(folder / "images"), "ann_file": str(folder / "annotations.json")}
    names = "('mine', 'other')"
    cfg = config(folder, "DATASETS.TRAIN", names, "DATASETS.TEST", names, other=entry)
    assert len(make_data_loader(cfg, is_train=True).dataset) == 12
    loaders = make_data_loader(cfg, is_train=False)
    assert [(loader.dataset_name, len(loader.dataset)) for loader in loaders] == [("mine", 7), ("other", 7)]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_file_is_one_clear_message_also_from_a_worker(folder, workers):
    loader = make_data_loader(config(folder, "DATALOADER.NUM_WORKERS", workers), is_train=True)
    (folder / "images" / "3.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(error.value).startswith(f"image file {folder / 'images' / '3.png'} (image id 3) cannot be read")
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("is_train", [True, False])
def test_images_must_divide_among_the_processes(folder, is_train):
    key = "SOLVER.IMS_PER_BATCH" if is_train else "TEST.IMS_PER_BATCH"
    with pytest.raises(DataError, match=rf"{key} is 4; it must be a multiple of the number of processes, 3"):
        make_data_loader(config(folder, key, "4"), is_train, world_size=3)


def test_number_of_classes_must_fit(folder):
    cfg = config(folder, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81")
    message = r"MODEL\.ROI_BOX_HEAD\.NUM_CLASSES is 81; dataset 'mine' has 2 categories, the last with label {}"
    with pytest.raises(DataError, match=message.format("2, so it must be 3")):
        make_data_loader(cfg, is_train=True)
    cfg.DATASETS.JSON_CATEGORY_IDS = True
    with pytest.raises(DataError, match=message.format("7, so it must be 8")):
        make_data_loader(cfg, is_train=True)
    cfg.MODEL.RPN_ONLY = True
    assert len(make_data_loader(cfg, is_train=True)) == 10
    cfg.MODEL.RETINANET_ON = True  # as the original's recipes have it, beside RPN_ONLY
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    with pytest.raises(DataError, match=r"MODEL\.RETINANET\.NUM_CLASSES is 4; .* so it must be 8"):
        make_data_loader(cfg, is_train=True)


def test_missing_names_and_masks_are_errors(folder):
    with pytest.raises(DataError, match=r"DATASETS\.TRAIN is empty"):
        make_data_loader(config(folder, "DATASETS.TRAIN", "()"), is_train=True)
    loader = make_data_loader(config(folder, "MODEL.KEYPOINT_ON", "True"), is_train=True)
    with pytest.raises(DataError, match=r"MODEL\.KEYPOINT_ON is set, but dataset 'mine' has no keypoints"):
        next(iter(loader))


@pytest.mark.parametrize(("conventions", "shift"), [("modern", 0.5), ("torchvision", 0.0), ("detectron", 0.0)])
def test_keypoints_reach_the_batch(tmp_path, conventions, shift):
    """Mirrored with their image and their names; images with fewer than ten labelled ones are left out of training."""
    names = [f"{side}_{part}" for part in "abcde" for side in ("left", "right")]
    categories = [{"id": 3, "name": "cat", "keypoints": names}]
    points = [[2 * k + 3, k + 5, 1 + k % 2] for k in range(10)]
    few = [[*point[:2], 0] if k == 4 else point for k, point in enumerate(points)]
    flat = [[value for point in each for value in point] for each in (points, few)]
    anns = [annotation(1, (0, 0, 40, 30), keypoints=flat[0]), annotation(2, keypoints=flat[1])]
    write_coco(tmp_path, anns, categories=categories)
    overrides = f"MODEL.KEYPOINT_ON True MODEL.ROI_BOX_HEAD.NUM_CLASSES 2 MODEL.CONVENTIONS {conventions}".split()
    overrides += "INPUT.HORIZONTAL_FLIP_PROB_TRAIN 1.0 SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 1".split()
    cfg = config(tmp_path, *overrides)
    loader = make_data_loader(cfg, is_train=True)
    assert loader.dataset.ids == [1]
    ((images, targets, _),) = loader
    assert images.sizes.tolist() == [[30, 40]]
    mirrored = [points[k + 1 - 2 * (k % 2)] for k in range(10)]  # left ↔ right
    want = [[40 - (x + shift), y + shift, v] for x, y, v in mirrored]
    assert targets.keypoints[0].tolist() == [want]


def own(tmp_path, kind: str, arguments: str = "") -> object:
    (tmp_path / "catalogue.yaml").write_text(f"own: {{factory: 'data.own_dataset:{kind}', args: {{{arguments}}}}}\n")
    names = ("DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "0.0")
    return config(tmp_path, "PATHS_CATALOG", str(tmp_path / "catalogue.yaml"), *names)


def test_a_users_own_dataset(tmp_path):
    cfg = own(tmp_path, "Squares")
    for images, targets, ids in make_data_loader(cfg, is_train=True):
        assert targets.boxes.tolist() == [[[2, 3, 20, 21]]] * len(ids)
        assert targets.labels.tolist() == [[2]] * len(ids)
        red = images.pixels[:, 2, 0, 0] + 122.7717
        assert red.round().int().tolist() == list(ids)
    (loader,) = make_data_loader(cfg, is_train=False)
    assert sorted(index for _, ids in loader for index in ids) == list(range(6))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("Squares", "label: 3", r"labels are \[3\]; want 1 to MODEL\.ROI_BOX_HEAD\.NUM_CLASSES - 1 = 2"),
        ("Squares", "label: 0", r"labels are \[0\]"),
        ("Absent", "", r"cannot be read: .*absent\d\.png"),
        ("Untransformed", "", "the image is Image; want uint8"),
        ("Unlabelled", "", "the target is .*want a BoxList with the field labels"),
    ],
)
def test_mistakes_of_a_users_own_dataset(tmp_path, kind, arguments, message):
    loader = make_data_loader(own(tmp_path, kind, arguments), is_train=True)
    with pytest.raises(DataError, match=rf"dataset 'own', item \d: {message}"):
        list(loader)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_missing_image_of_a_users_own_dataset_names_it_also_from_a_worker(tmp_path, workers):
    cfg = own(tmp_path, "Absent")
    cfg.DATALOADER.NUM_WORKERS = int(workers)
    cfg.DATASETS.TRAIN = ("own", "own")
    with pytest.raises(SampleError, match=r"^dataset 'own', item [0-5]: cannot be read: .*absent\d\.png'$"):
        list(make_data_loader(cfg, is_train=True))


@pytest.mark.parametrize("info", ["{width: 40}", "{height: 30, width: null}", "{height: 0, width: 40}", "null"])
@pytest.mark.parametrize("grouping", [True, False])
def test_a_users_own_dataset_without_image_sizes(tmp_path, info, grouping):
    cfg = own(tmp_path, "Sized", f"info: {info}")
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    with pytest.raises(DataError, match=r"dataset 'own', item \d: get_img_info gave .*want the image's height and"):
        list(make_data_loader(cfg, is_train=True))


BAD_BOXES = {
    "[.nan, 3, 20, 21]": "NaN or infinity",
    "[2, 3, .inf, 21]": "NaN or infinity",
    "[20, 3, 20, 21]": "no area",
    "[20, 3, 2, 21]": "no area",
    "[40, 3, 50, 21]": "no part in the image",
    "[2, -9, 20, -1]": "no part in the image",
}


@pytest.mark.parametrize(("box", "reason"), BAD_BOXES.items())
def test_bad_boxes_of_a_users_own_dataset_are_left_out_with_one_warning(tmp_path, caplog, box, reason):
    cfg = own(tmp_path, "Squares", f"box: [[2, 3, 20, 21], {box}]")
    for _, targets, ids in make_data_loader(cfg, is_train=True):
        assert targets.boxes[targets.labels > 0].tolist() == [[2, 3, 20, 21]] * len(ids)
    (record,) = caplog.records
    assert re.match(rf"dataset 'own', item \d: box 1 is left out, it has {reason};", record.message)


def test_fields_stay_with_their_boxes_when_bad_ones_are_left_out(tmp_path, caplog):
    boxes = [*BAD_BOXES, "[0, 3, 30, 20]", "[7, 3, 30, 20]"]
    cfg = own(tmp_path, "Rows", f"box: [{', '.join(boxes)}]")
    cfg.MODEL.MASK_ON = True
    _, targets, _ = next(iter(make_data_loader(cfg, is_train=True)))
    assert targets.boxes[0, :2].tolist() == [[0, 3, 30, 20], [7, 3, 30, 20]]
    assert targets.labels[0].tolist() == [1, 2]
    assert targets.polygons.edges[0, :2, 0, 0].tolist() == [6, 7]
    assert len(caplog.records) == 1


def test_real_photos_keep_their_objects(test_data):
    folder = test_data / "coco_open"
    entry = {
        "img_dir": str(folder / "train2017"),
        "ann_file": str(folder / "annotations" / "instances_train2017.json"),
    }
    overrides = ("MODEL.ROI_BOX_HEAD.NUM_CLASSES", "81", "MODEL.MASK_ON", "True", "INPUT.MIN_SIZE_TRAIN", "(64,)")
    overrides += ("SOLVER.MAX_ITER", "60", "INPUT.HORIZONTAL_FLIP_PROB_TRAIN", "1.0", "INPUT.MAX_SIZE_TRAIN", "10000")
    loader = make_data_loader(config(folder, *overrides, mine=entry), is_train=True)
    seen = {}
    for images, targets, ids in loader:
        for k, index in enumerate(ids):
            seen[index] = True
            truth = loader.dataset.get_groundtruth(index)
            boxes = targets.boxes[k][targets.labels[k] > 0]
            height, width = images.sizes[k].tolist()
            back = BoxList(boxes, (width, height)).transpose(0).resize(truth.size)
            torch.testing.assert_close(back.bbox, truth.bbox, atol=1e-2, rtol=0)
            ours = targets.polygons.edges[k, 0, 0, :2].tolist()
            first = truth.get_field("masks").polygons[0][0][0].tolist() if len(truth) else [0, 0]
            want = [(truth.size[0] - first[0]) * width / truth.size[0], first[1] * height / truth.size[1]]
            np.testing.assert_allclose(ours, want, atol=1e-2)
    assert len(seen) == len(loader.dataset) == 89
