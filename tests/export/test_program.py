"""Exported detectors find what the model finds, at other sizes and numbers of images, and without this package."""

import json
import os
import re
import runpy
import subprocess
import sys
from shutil import which

import pytest
import torch
from export.detectors import CATEGORIES, assert_same, detector, photos
from torchvision.transforms.functional import to_pil_image

import fastrcnn
from fastrcnn.cli import main
from fastrcnn.config import ConfigError, dump_config
from fastrcnn.export import (
    METADATA,
    ExportModule,
    export_aoti,
    export_program,
    export_pt2,
    load_aoti,
    load_pt2,
    metadata,
)

FAMILIES = [
    "quick_start",
    "e2e_faster_rcnn_R_50_FPN_1x",
    "e2e_keypoint_rcnn_R_50_FPN_1x",
    "e2e_mask_rcnn_R_50_C4_1x",
    "e2e_mask_rcnn_fbnet",
    "rpn_R_50_FPN_1x",
    "retinanet/retinanet_R-50-FPN_1x",
    "modern/cascade_mask_rcnn_R_50_FPN_3x",
    "dcn/e2e_mask_rcnn_mdconv_R_50_FPN_1x",
    "torchvision/mask_rcnn_R_50_FPN",
    "torchvision/faster_rcnn_MobileNetV3_FPN",
    "torchvision/retinanet_R_50_FPN_V2",
]
SIDES = [[(128, 128)], [(96, 140), (60, 200), (130, 70)], [(33, 20), (64, 64)]]  # of three batches
EMPTY = torch.full((3, 64, 96), 127, dtype=torch.uint8)  # nothing is found in an image of one colour


@pytest.mark.parametrize("name", FAMILIES)
def test_module_of_every_family(name, test_data):
    """Not traced: the definitions of which an exported program consists."""
    cfg, model = detector(name)
    counts = [assert_same(cfg, model, ExportModule(cfg, model), photos(test_data, sides)) for sides in SIDES]
    assert sum(map(sum, counts)) > 12


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES)
def test_file_of_every_family(name, test_data, tmp_path):
    cfg, model = detector(name)
    export_pt2(cfg, model, {}, tmp_path / "model.pt2")
    exported = load_pt2(tmp_path / "model.pt2")
    counts = [assert_same(cfg, model, exported, photos(test_data, sides)) for sides in SIDES]
    assert sum(map(sum, counts)) > 12


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return detector("quick_start", "MODEL.ROI_HEADS.SCORE_THRESH", "0.9")


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The file and what the command said, (path, stdout)."""
    cfg, model = trained
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.yml").write_text(dump_config(cfg))
    torch.save({"model": model.state_dict(), "categories": CATEGORIES}, folder / "weights.pth")
    arguments = ["--config-file", folder / "config.yml", "--weights", folder / "weights.pth"]
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr("builtins.print", lambda *values: told.append(" ".join(map(str, values))))
        main([str(a) for a in ("export", "--output", folder / "model.pt2", *arguments)])
    return folder / "model.pt2", "\n".join(told)


@pytest.fixture(scope="module")
def loaded(written):
    """The file as a function, and its metadata."""
    files = {METADATA: ""}
    program = torch.export.load(written[0], extra_files=files)
    return program.module(), json.loads(files[METADATA])


def test_command(written):
    path, told = written
    assert f"written to {path}, {path.stat().st_size / 2**20:.1f} MiB" in told
    found = re.search(
        r"differences from the model, (\d+) detections .*boxes (\S+), scores (\S+), labels (\S+), masks (\S+)", told
    )
    assert int(found[1]) > 4
    assert all(float(value) < 1e-4 for value in found.groups()[1:])


def test_file_finds_what_the_model_finds(trained, loaded, test_data):
    exported, _ = loaded
    for sides in SIDES:
        assert sum(assert_same(*trained, exported, photos(test_data, sides))) > len(sides)
    assert assert_same(*trained, exported, [EMPTY]) == [0]
    counts = assert_same(*trained, exported, [EMPTY, *photos(test_data, [(90, 60)])])
    assert counts[0] == 0 < counts[1]


def test_metadata(loaded):
    _, facts = loaded
    assert facts["outputs"] == ["boxes", "scores", "labels", "count", "masks"]
    assert facts["categories"] == {str(label): name for label, name in CATEGORIES.items()}
    assert (facts["min_size"], facts["max_size"], facts["size_divisibility"], facts["mask_size"]) == (128, 128, 32, 28)
    assert (facts["antialias"], facts["last_pixel"], facts["paste_continuous"]) == (True, False, True)
    assert facts["fastrcnn"] == fastrcnn.__version__


ALONE = """
import runpy, sys
sys.modules.update(fastrcnn=None, triton_kernels=None)  # importing them fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(repository, *arguments):
    """What examples/run_exported.py prints where this package cannot be imported: [(name, score, box)]."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE, repository / "examples" / "run_exported.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r"(.+) (\S+) at (.+)", line).groups() for line in done.stdout.splitlines()]
    return [(name, float(score), [float(side) for side in box.split(", ")]) for name, score, box in lines]


def assert_predicted(found, predicted):
    assert len(found) == len(predicted) > 3
    for (name, score, box), label, want, sides in zip(
        found, predicted.get_field("labels").tolist(), predicted.get_field("scores"), predicted.bbox, strict=True
    ):
        assert name == CATEGORIES.get(label, str(label))
        assert abs(score - want) < 1e-4
        torch.testing.assert_close(torch.tensor(box), sides, rtol=0, atol=0.06)  # printed with two decimals


def example(repository):
    return runpy.run_path(str(repository / "examples" / "run_exported.py"))["detect"]


@pytest.mark.parametrize("name", ["e2e_mask_rcnn_R_50_C4_1x", "e2e_keypoint_rcnn_R_50_FPN_1x"])
def test_example_follows_the_conventions(name, repository, test_data):
    """Resizing and scaling of older and of modern weights, with the untraced module in the place of the file."""
    cfg, model = detector(name, "MODEL.CONVENTIONS", "modern" if "keypoint" in name else "maskrcnn-benchmark")
    (image,) = photos(test_data, [(300, 211)])
    found = example(repository)(ExportModule(cfg, model), metadata(cfg, {}), to_pil_image(image))
    predicted = fastrcnn.Predictor(cfg, model.state_dict())(image)
    assert len(predicted) > 3
    assert torch.equal(found["labels"], predicted.get_field("labels"))
    torch.testing.assert_close(found["scores"], predicted.get_field("scores"), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["boxes"], predicted.bbox, rtol=0, atol=0.05)
    if "keypoints" in found:
        points = predicted.get_field("keypoints").keypoints
        torch.testing.assert_close(found["keypoints"], points, rtol=0, atol=0.05)


@pytest.mark.parametrize("sides", [(300, 211), (60, 400), (128, 90)])
def test_example_resizes_as_torchvision(sides, repository, test_data):
    """To half a grey level: with INPUT.ANTIALIAS False the model resizes numbers, the example bytes."""
    cfg, model = detector("torchvision/mask_rcnn_R_50_FPN")
    module, seen = ExportModule(cfg, model), []
    (image,) = photos(test_data, [sides])
    example(repository)(lambda *inputs: seen.append(inputs) or module(*inputs), metadata(cfg, {}), to_pil_image(image))
    want = fastrcnn.ImageBatch.from_images([image], cfg)
    assert torch.equal(seen[0][1], want.sizes.long())
    half = 0.5 / 255 / min(cfg.INPUT.PIXEL_STD) + 1e-5
    torch.testing.assert_close(module.normalised(*seen[0]), want.pixels, rtol=0, atol=half)


def test_example_finds_what_the_predictor_finds(trained, written, repository, test_data, tmp_path):
    cfg, model = trained
    (image,) = photos(test_data, [(300, 211)])
    to_pil_image(image).save(tmp_path / "photo.png")
    found = run_alone(repository, written[0], tmp_path / "photo.png")
    predicted = fastrcnn.Predictor(cfg, model.state_dict())(tmp_path / "photo.png")
    assert_predicted(found, predicted)


@pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_package(trained, repository, test_data, tmp_path):
    cfg, model = trained
    export_aoti(cfg, model, CATEGORIES, tmp_path / "model.pt2")
    exported = load_aoti(tmp_path / "model.pt2")
    for sides in SIDES:
        assert sum(assert_same(cfg, model, exported, photos(test_data, sides))) > len(sides)
    assert assert_same(cfg, model, exported, [EMPTY]) == [0]
    (image,) = photos(test_data, [(300, 211)])
    to_pil_image(image).save(tmp_path / "photo.png")
    found = run_alone(repository, tmp_path / "model.pt2", tmp_path / "photo.png")
    predicted = fastrcnn.Predictor(cfg, model.state_dict())(tmp_path / "photo.png")
    assert_predicted(found, predicted)


def test_refusals(trained, tmp_path):
    cfg, model = trained
    with pytest.raises(ValueError, match=r"model.zip: the name must end in \.pt2"):
        export_pt2(cfg, model, {}, tmp_path / "model.zip")
    augmented = cfg.clone()
    augmented.TEST.BBOX_AUG.ENABLED = True
    with pytest.raises(ConfigError, match=r"TEST\.BBOX_AUG\.ENABLED"):
        export_program(augmented, model)
