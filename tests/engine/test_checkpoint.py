import logging
from pathlib import Path

import pytest
import torch
from engine.standins import TinyDetector, tiny_config

from fastrcnn.engine import checkpoint
from fastrcnn.engine.solver import LRSchedule, make_optimizer


@pytest.fixture
def cfg(tmp_path):
    return tiny_config(tmp_path)


def parts(cfg, seed=0):
    torch.manual_seed(seed)
    model = TinyDetector()
    optimizer = make_optimizer(cfg, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    schedule = LRSchedule(cfg, optimizer)
    return checkpoint.Checkpointer(
        cfg.OUTPUT_DIR, model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), {"config": "text"}
    )


def test_what_is_saved_comes_back(cfg, tmp_path):
    saved = parts(cfg, 0)
    path = saved.save(5)
    assert path.name == "model_0000005.pth"
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth\n"
    fresh = parts(cfg, 1)
    assert not torch.equal(fresh.parts["model"].conv.weight, saved.parts["model"].conv.weight)
    contents = checkpoint.read(path)
    assert contents["config"] == "text"
    assert fresh.restore(contents) == 5
    for name, value in saved.parts["model"].state_dict().items():
        assert torch.equal(fresh.parts["model"].state_dict()[name], value)
    ours, theirs = (p.parts["optimizer"].state_dict()["state"] for p in (fresh, saved))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k]["momentum_buffer"], theirs[k]["momentum_buffer"]) for k in theirs)


def test_settings_of_the_config_win_over_those_of_the_file(cfg):
    path = parts(cfg).save(4)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 0.5, 0.7, 0.3
    resumed = parts(cfg)
    resumed.restore(checkpoint.read(path))
    resumed.parts["scheduler"].set(4)  # after warm-up
    group = resumed.parts["optimizer"].param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.7, 0.3)


@pytest.mark.parametrize("crash", ["write", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(cfg, tmp_path, monkeypatch, crash):
    saver = parts(cfg)
    path = saver.save(5)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    def half(contents, file):
        file.write(before[: len(before) // 2])
        fail()

    saver.parts["model"].conv.weight.data.zero_()
    target, name, replacement = {
        "write": (torch, "save", half),
        "fsync": (checkpoint.os, "fsync", fail),
        "replace": (checkpoint.os, "replace", fail),
    }[crash]
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(OSError, match="No space left"):
        saver.save(5)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000005.pth"]


def test_damaged_newest_falls_back_with_a_warning(cfg, tmp_path, caplog):
    saver = parts(cfg)
    saver.save(3)
    damaged = saver.save(6)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "fastrcnn"):
        path, contents = checkpoint.read_last(tmp_path)
    assert path.name == "model_0000003.pth"
    assert contents["iteration"] == 3
    assert "model_0000006.pth cannot be read" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: model_0000006.pth, model_0000003.pth"):
        checkpoint.read_last(tmp_path)


def test_order_of_candidates(tmp_path):
    for name in ("final", "0000005", "0000010", "0000007", "x"):
        (tmp_path / f"model_{name}.pth").write_bytes(b"x")
    names = [p.name for p in checkpoint.candidates(tmp_path)]
    assert names == ["model_0000010.pth", "model_0000007.pth", "model_0000005.pth", "model_final.pth"]
    (tmp_path / "last_checkpoint").write_text("/elsewhere/model_0000007.pth")  # a path of the original program
    assert next(checkpoint.candidates(tmp_path)).name == "model_0000007.pth"
    assert checkpoint.find(tmp_path).name == "model_0000007.pth"
    assert list(checkpoint.candidates(tmp_path / "absent")) == []


def test_files_that_are_no_checkpoints(tmp_path, cfg):
    with pytest.raises(FileNotFoundError, match="absent"):
        checkpoint.read(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.find(tmp_path)
    other = tmp_path / "other.pth"
    torch.save({"weights": {}}, other)
    with pytest.raises(ValueError, match=r"other.pth .* no 'model'"):
        checkpoint.read(other)
    torch.save({"model": TinyDetector().state_dict()}, other)
    with pytest.raises(ValueError, match="no optimizer, scheduler, scaler, iteration"):
        parts(cfg).restore(checkpoint.read(other))


def test_code_in_a_file_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    torch.save({"model": {"x": Attack()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth cannot be read"):
        checkpoint.read(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()
