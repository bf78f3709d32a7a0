"""The command as a user runs it, on a tiny model and a tiny dataset of shapes."""

import json

import pytest

from fastrcnn.analysis import Loading, Rate
from fastrcnn.cli import main
from fastrcnn.cli.analyze import limit
from fastrcnn.config import dump_config, load_config
from fastrcnn.data.datasets.shapes import ensure_shapes

TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) INPUT.MIN_SIZE_TRAIN (64,) SOLVER.IMS_PER_BATCH 2 DATASETS.TRAIN ('tiny',)"
).split()
REGISTER = {"tiny": {"img_dir": "small/train", "ann_file": "small/annotations/instances_train.json"}}


def test_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ensure_shapes(tmp_path / "datasets" / "small", train=4, val=4)
    options = "--size 60x90 --batch 2 --train --speed --data --workers 0 --seconds 0.05 --json analysis.json".split()
    main(["analyze", *options, *TINY, "DATASETS.REGISTER", str(REGISTER)])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert "2 × 60×90, float32 (padded to 64×96)" in out
    assert (report["size"], report["padded"]) == ([60, 90], [64, 96])
    row = next(line.split() for line in out.splitlines() if line.startswith("backbone.body.stem"))
    stem = next(part for part in report["parts"] if part["name"] == "backbone.body.stem")
    operations = 2 * 2 * 49 * 3 * 8 * 32 * 48
    assert stem["inference"]["flops"] == operations
    assert row[1] == f"{stem['parameters']:,}" == "1,192"  # 49 · 3 · 8, and a batch norm
    assert row[3] == f"{operations / 1e9:.2f}"
    for mode in ("inference", "training step"):
        rate = report["speed"][mode]
        assert rate["count"] >= 3
        assert 0 < rate["p20"] <= rate["images_per_second"] <= rate["p80"]
        assert f"{mode:<16}{rate['images_per_second']:.4g} images/s" in out
    loading = report["loading"]
    stages = [loading[stage] for stage in ("read", "transform", "collate")]
    assert min(stages) > 0
    assert report["limit"] in out
    # the stages together are what the main process needs for an image, but for what the machine does meanwhile
    assert 0.1 < loading["rates"]["0"]["images_per_second"] * sum(stages) < 10


def test_folder_of_a_run(tmp_path, capsys):
    (tmp_path / "config.yml").write_text(dump_config(load_config("quick_start", TINY)))
    main(["analyze", "--config-file", str(tmp_path), "--size", "64x64"])
    stem = next(line for line in capsys.readouterr().out.splitlines() if "backbone.body.stem" in line)
    assert stem.split()[1] == "1,192"


def test_which_limits():
    rates = {0: Rate(30.0, 29, 31, 5), 1: Rate(50.0, 49, 51, 5)}
    loading = Loading(8, 0.01, 0.01, 0.01, rates)
    assert limit(80.0, loading) == "loading with 1 worker limits training: 50 images/s, the model 80"
    assert limit(20.0, loading) == "the model limits training: 20 images/s, loading with 1 worker 50"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--size", "800"], "'800' is no size; want HEIGHTxWIDTH"),
        (["--batch", "0"], "batch (0) and size (128, 128) must be positive"),
        (["--config-file", "no_such_recipe"], "no_such_recipe"),
        (["--workers", "0,two"], "'0,two' is no list of numbers"),
        (
            ["--data", "--seconds", "0", *TINY, "DATASETS.REGISTER", str(REGISTER)],
            "instances_train.json does not exist",
        ),
    ],
)
def test_bad_input_is_told_in_a_line(arguments, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["analyze", *arguments])
    assert end.value.code == 2
    assert wanted in capsys.readouterr().err
