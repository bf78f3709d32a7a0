"""Training and testing on a tiny model and a tiny dataset of shapes, and what all commands have in common."""

import argparse
import json
import logging
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support import TINY as SMALLEST

import fastrcnn
from fastrcnn import cli
from fastrcnn.config import find_config, load_config
from fastrcnn.data.datasets.shapes import ensure_shapes
from fastrcnn.engine import checkpoint

REGISTER = {
    f"tiny_{part}": {"img_dir": f"small/{part}", "ann_file": f"small/annotations/instances_{part}.json"}
    for part in ("train", "val")
}
TINY = [
    *SMALLEST,
    *("DATASETS.REGISTER", str(REGISTER), "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    ensure_shapes(folder / "datasets" / "small", train=8, val=4)
    return folder


@pytest.fixture
def tool(workplace, monkeypatch, fastrcnn_command):
    monkeypatch.chdir(workplace)
    return fastrcnn_command


def test_quick_start_resume_and_test(tool, workplace):
    code, out, err = tool("train", *TINY)
    assert code == 0, err
    first = workplace / "output" / "quick_start"
    names = {p.name for p in first.iterdir()}
    expected = {"config.yml", "inference", "labels.json", "last_checkpoint", "log.txt", "loss_curves.png"}
    expected |= {"metrics.jsonl", "model_0000002.pth", "model_0000004.pth", "model_final.pth", "val_detections.png"}
    expected.add("report.html")
    assert names == expected
    for name in expected - {"last_checkpoint", "model_0000002.pth", "model_0000004.pth"}:
        assert name in out
    assert "fastrcnn test --weights output/quick_start" in out
    assert min(Image.open(first / "val_detections.png").size) > 384  # 4 images, each beside its ground truth
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"} < set(lines[0])
    assert set(lines[-1]["eval"]["tiny_val"]) == {"bbox", "segm"}

    # a second run has its own folder, and --resume goes on with the last
    assert tool("train", *TINY, "SOLVER.MAX_ITER", "2", "--skip-test")[0] == 0
    second = workplace / "output" / "quick_start-2"
    assert not (second / "val_detections.png").exists()
    assert tool("train", "--resume", *TINY)[0] == 0
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
    code, out, err = tool("test")
    assert code == 0, err
    assert (second / "inference/tiny_val/bbox.json").read_bytes() == before
    figures = lines[-1]["eval"]["tiny_val"]["segm"]
    assert f"tiny_val: segm AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}" in out

    # one checkpoint, another folder and a changed key
    arguments = ("--weights", str(first / "model_0000002.pth"), "MODEL.MASK_ON", "False", "OUTPUT_DIR", "output/other")
    code, out, err = tool("test", *arguments)
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
    code, out, err = tool("train", *arguments)
    assert code == 2
    assert out == ""
    assert told in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert (workplace / "taken/model_0000001.pth").read_bytes() == b"not a checkpoint"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["train", "test"])
def test_no_gpu(tool, workplace, name):
    arguments = [
        "--config-file",
        "quick_start",
        "MODEL.DEVICE",
        "cuda",
        "OUTPUT_DIR",
        "gpu",
    ]
    (workplace / "weights.pth").write_bytes(b"")
    code, _, err = tool(name, *arguments, *(["--weights", "weights.pth"] if name == "test" else []))
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
    code, _, err = tool("test", *arguments)
    assert code == 2
    assert told in err


def test_stack_trace_of_a_mistake_is_in_the_log_only(tool, workplace):
    (workplace / "datasets/mine").mkdir(exist_ok=True)
    (workplace / "datasets/mine/broken.json").write_text("{")
    register = "{'mine': {'img_dir': 'mine', 'ann_file': 'mine/broken.json'}}"
    arguments = [*TINY, "DATASETS.REGISTER", register, "DATASETS.TRAIN", "('mine',)", "OUTPUT_DIR", "traced"]
    code, _, err = tool("train", *arguments)
    assert code == 2
    assert "broken.json" in err
    assert "Traceback" not in err
    assert "Traceback" in (workplace / "traced/log.txt").read_text()
    assert logging.getLogger("fastrcnn").handlers == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_examples_that_parse(tool, name):
    code, out, _ = tool(name, "--help")
    assert code == 0
    assert "examples:" in out
    module = cli.command(name)
    text = module.EXAMPLES.replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^  (?:fastrcnn|torchrun) .*", text, re.M)]
    assert commands
    for command in commands:
        words = command[command.index("fastrcnn") :]
        assert words[1] == name
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        end = next((i for i, word in enumerate(words) if word in (">", ">>", "|")), len(words))
        args = parser.parse_intermixed_args(words[2:end])
        load_config(None, split_options(args))
        if getattr(args, "config_file", None) and not args.config_file.startswith(("my", "output/")):
            assert find_config(args.config_file)


def split_options(args):
    """The KEY VALUE pairs of a command, whose other positional arguments come first."""
    words = getattr(args, "opts", [])
    return words[next((i for i, word in enumerate(words) if re.match(r"[A-Z]+[._A-Z]+$", word)), len(words)) :]


def test_overview_names_every_command(tool, monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["fastrcnn", *arguments])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        out = capsys.readouterr().out
        assert all(f"\n    {name}" in out for name in cli.COMMANDS)
    assert tool("--version")[1] == f"fastrcnn {fastrcnn.__version__}\n"
    code, _, err = tool("trian")
    assert code == 2
    assert "invalid choice: 'trian'" in err


def test_tools_and_module_are_the_same_commands(repository):
    shims = sorted((repository / "tools").rglob("*.py"))
    assert len(shims) == len(cli.COMMANDS) - 1  # completion is for the installed command alone
    for shim in shims:
        [name] = re.findall(r'main\(\["([\w-]+)"', shim.read_text())
        assert name in cli.COMMANDS
    for command in ([str(repository / "tools" / "convert_weights.py")], ["-m", "fastrcnn", "convert-weights"]):
        done = subprocess.run(
            [sys.executable, *command, "absent.pth", "out.pth"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no weights at absent.pth\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(tool, shell, tmp_path):
    pytest.importorskip("shtab")
    code, out, _ = tool("completion", shell)
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert "show-mask-heatmaps" in out
    if shell == "bash":
        (tmp_path / "completion").write_text(out)
        ask = "source completion; COMP_WORDS=(fastrcnn conv); COMP_CWORD=1; _shtab_fastrcnn; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["convert-weights", "convert-cityscapes"]


def test_missing_extra_says_how_to_install(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = tool("completion", "bash")
    assert code == 2
    assert "pip install 'fastrcnn[completion]'" in err


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
