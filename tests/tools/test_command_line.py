"""The two tools as a user runs them, on a tiny model and a tiny dataset of shapes."""

import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.engine import checkpoint

TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5 MODEL.ROI_HEADS.SCORE_THRESH 0.01 "
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.IMS_PER_BATCH 2 "
    "TEST.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1 SOLVER.CHECKPOINT_PERIOD 2 SOLVER.WARMUP_ITERS 2"
).split()
REGISTER = {
    f"tiny_{part}": {"img_dir": f"small/{part}", "ann_file": f"small/annotations/instances_{part}.json"}
    for part in ("train", "val")
}
TINY += ["DATASETS.REGISTER", str(REGISTER), "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    ensure_shapes(folder / "datasets" / "small", train=8, val=4)
    return folder


@pytest.fixture
def tool(workplace, repository, monkeypatch, capsys):
    """tool("train.py", arguments…) → (exit code, stdout, stderr), run in this process."""
    monkeypatch.chdir(workplace)

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name.removesuffix(".py") + "_tool", repository / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            code = module.main() or 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_quick_start_resume_and_test(tool, workplace):
    code, out, err = tool("train.py", *TINY)
    assert code == 0, err
    first = workplace / "output" / "quick_start"
    names = {p.name for p in first.iterdir()}
    expected = {"config.yml", "inference", "labels.json", "last_checkpoint", "log.txt", "loss_curves.png"}
    expected |= {"metrics.jsonl", "model_0000002.pth", "model_0000004.pth", "model_final.pth", "val_detections.png"}
    assert names == expected
    for name in expected - {"last_checkpoint", "model_0000002.pth", "model_0000004.pth"}:
        assert name in out
    assert "python tools/test.py --weights output/quick_start" in out
    assert min(Image.open(first / "val_detections.png").size) > 384  # 4 images in a row
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"} < set(lines[0])
    assert set(lines[-1]["eval"]["tiny_val"]) == {"bbox", "segm"}

    # a second run has its own folder, and --resume goes on with the last
    assert tool("train.py", *TINY, "SOLVER.MAX_ITER", "2", "--skip-test")[0] == 0
    second = workplace / "output" / "quick_start-2"
    assert not (second / "val_detections.png").exists()
    assert tool("train.py", "--resume", *TINY)[0] == 0
    assert sorted(p.name for p in (workplace / "output").iterdir()) == ["quick_start", "quick_start-2"]
    whole, parts = (checkpoint.read(folder / "model_final.pth") for folder in (first, second))
    assert whole["iteration"] == parts["iteration"] == 4
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value), name
    for index, state in whole["optimizer"]["state"].items():
        assert torch.equal(parts["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])

    # without arguments the last quick start is tested, with the config that its checkpoint carries
    before = (second / "inference/tiny_val/bbox.json").read_bytes()
    (second / "inference/tiny_val/bbox.json").unlink()
    code, out, err = tool("test.py")
    assert code == 0, err
    assert (second / "inference/tiny_val/bbox.json").read_bytes() == before
    figures = lines[-1]["eval"]["tiny_val"]["segm"]
    assert f"tiny_val: segm AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}" in out

    # one checkpoint, another folder and a changed key
    arguments = ("--weights", str(first / "model_0000002.pth"), "MODEL.MASK_ON", "False", "OUTPUT_DIR", "output/other")
    code, out, err = tool("test.py", *arguments)
    assert code == 0, err
    assert "segm" not in out
    assert (workplace / "output/other/inference/tiny_val/predictions.pth").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config-file", "absent.yaml"], "absent.yaml"),
        (["SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "no value"),
        (["MODEL.DEVICE", "cpu", "SOLVER.LOG_PERIOD", "0"], "SOLVER.LOG_PERIOD is 0"),
        ([*TINY, "DATASETS.TRAIN", "('shape_train',)"], "shapes_train"),
        ([*TINY, "MODEL.ROI_BOX_HEAD.NUM_CLASSES", "9"], "MODEL.ROI_BOX_HEAD.NUM_CLASSES is 9"),
        ([*TINY, "MODEL.WEIGHT", "absent.pth"], "absent.pth"),
        ([*TINY, "OUTPUT_DIR", "taken"], "taken holds the checkpoints of another run"),
        ([*TINY, "OUTPUT_DIR", "broken", "--resume"], "no checkpoint in broken can be read: model_0000001.pth"),
    ],
)
def test_mistakes_in_training_end_with_one_message(tool, workplace, arguments, told):
    for folder in ("taken", "broken"):
        (workplace / folder).mkdir(exist_ok=True)
        (workplace / folder / "model_0000001.pth").write_bytes(b"not a checkpoint")
    if "OUTPUT_DIR" not in arguments:
        arguments = [*arguments, "OUTPUT_DIR", "mistakes"] if len(arguments) % 2 == 0 else arguments
    code, out, err = tool("train.py", *arguments)
    assert code == 2
    assert out == ""
    assert told in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert (workplace / "taken/model_0000001.pth").read_bytes() == b"not a checkpoint"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_no_gpu(tool, workplace, name, repository):
    arguments = [
        "--config-file",
        str(repository / "configs/quick_start.yaml"),
        "MODEL.DEVICE",
        "cuda",
        "OUTPUT_DIR",
        "gpu",
    ]
    (workplace / "weights.pth").write_bytes(b"")
    code, _, err = tool(name, *arguments, *(["--weights", "weights.pth"] if name == "test.py" else []))
    assert code == 2
    assert "MODEL.DEVICE is 'cuda'" in err
    assert not (workplace / "gpu").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--weights", "absent"], "no checkpoint at absent"),
        (["--weights", "plain.pth"], "plain.pth carries no config: name one with --config-file"),
        (["OUTPUT_DIR", "empty"], "no checkpoint at empty"),
    ],
)
def test_mistakes_in_testing_end_with_one_message(tool, workplace, arguments, told):
    torch.save({"model": {"x": torch.ones(1)}}, workplace / "plain.pth")
    code, _, err = tool("test.py", *arguments)
    assert code == 2
    assert told in err


def test_stack_trace_of_a_mistake_is_in_the_log_only(tool, workplace):
    (workplace / "datasets/mine").mkdir(exist_ok=True)
    (workplace / "datasets/mine/broken.json").write_text("{")
    register = "{'mine': {'img_dir': 'mine', 'ann_file': 'mine/broken.json'}}"
    arguments = [*TINY, "DATASETS.REGISTER", register, "DATASETS.TRAIN", "('mine',)", "OUTPUT_DIR", "traced"]
    code, _, err = tool("train.py", *arguments)
    assert code == 2
    assert "broken.json" in err
    assert "Traceback" not in err
    assert "Traceback" in (workplace / "traced/log.txt").read_text()
    assert logging.getLogger("fastrcnn").handlers == []


@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_help_shows_examples_that_parse(tool, name, repository):
    code, out, _ = tool(name, "--help")
    assert code == 0
    assert "examples:" in out
    assert "torchrun --nproc_per_node=2" in out
    assert "docs/config.md" in out
    for word in out.split():
        if word.startswith("configs/"):
            assert (repository / word).exists(), word


def test_ctrl_c_of_a_process_leaves_a_checkpoint(workplace, repository):
    """A real process, a real signal."""
    arguments = [*TINY, "SOLVER.MAX_ITER", "100000", "OUTPUT_DIR", "stopped"]
    process = subprocess.Popen(
        [sys.executable, str(repository / "tools" / "train.py"), *arguments],
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stderr:
        if "iter: 3 " in line:
            process.send_signal(2)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "--resume" in rest.splitlines()[-1]
    assert "Traceback" not in rest
    assert checkpoint.read_last(workplace / "stopped")[1]["iteration"] >= 3
