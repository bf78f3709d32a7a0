"""The average of the weights: by its closed form, against torch's, and through a whole run."""

import pytest
import torch
from engine import standins
from engine.standins import TinyDetector, tiny_config
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastrcnn.engine import WeightAverage, checkpoint, trainer


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)


def test_closed_form_and_torchs():
    torch.manual_seed(0)
    model = Counting()
    average = WeightAverage(model, 0.9)
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    peer.update_parameters(model)  # its first update is a copy
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.norm.train()(torch.randn(8, 4, 2, 2))
        average.update()
        peer.update_parameters(model)
        for name, value in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
        if value.is_floating_point():
            torch.testing.assert_close(value, peer.module.state_dict()[name], msg=name)
    assert average.model.norm.num_batches_tracked == 5
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


@pytest.fixture
def _standins(monkeypatch):
    monkeypatch.setattr(trainer, "build_model", lambda cfg: TinyDetector())
    monkeypatch.setattr(trainer, "make_data_loader", standins.make_data_loader)


def assert_same(first, second):
    """Any nesting of dicts, lists and tensors, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"config", "seed"}:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def modern(folder, **solver):
    return tiny_config(folder, OPTIMIZER="AdamW", LR_SCHEDULER="cosine", EMA_DECAY=0.7, ACCUMULATE_STEPS=2, **solver)


@pytest.mark.usefixtures("_standins")
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    """6 iterations are 3 and 3 more: weights, average, optimizer and schedule."""
    trainer.train(modern(tmp_path / "whole", MAX_ITER=6), skip_test=True)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model_0000003.pth").write_bytes((tmp_path / "whole" / "model_0000003.pth").read_bytes())
    trainer.train(modern(tmp_path / "parts", MAX_ITER=6), resume=True, skip_test=True)
    whole, parts = (checkpoint.read(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    assert_same(whole, parts)
    assert not torch.equal(whole["model"]["conv.weight"], whole["trained"]["conv.weight"])


@pytest.mark.usefixtures("_standins")
def test_average_is_what_is_evaluated_and_saved(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "test_all", lambda model, loaders, cfg: seen.append(model.state_dict()) or {})
    trainer.train(modern(tmp_path, MAX_ITER=4, TEST_PERIOD=0))
    contents = checkpoint.read(tmp_path / "model_final.pth")
    assert_same(dict(seen[0]), dict(contents["model"]))
    # from the checkpoint of iteration 3, one update by hand
    before = checkpoint.read(tmp_path / "model_0000003.pth")
    for name, value in contents["trained"].items():
        torch.testing.assert_close(contents["model"][name], 0.7 * before["model"][name] + 0.3 * value, msg=name)


@pytest.mark.usefixtures("_standins")
def test_average_may_be_switched_on_and_off_on_resume(tmp_path):
    plain = tiny_config(tmp_path, MAX_ITER=3)
    trainer.train(plain, skip_test=True)
    saved = checkpoint.read(tmp_path / "model_final.pth")
    plain.SOLVER.EMA_DECAY, plain.SOLVER.MAX_ITER = 0.7, 4
    trainer.train(plain, resume=True, skip_test=True)
    on = checkpoint.read(tmp_path / "model_final.pth")
    name = "conv.weight"  # the average began at the weights
    torch.testing.assert_close(on["model"][name], 0.7 * saved["model"][name] + 0.3 * on["trained"][name])
    plain.SOLVER.EMA_DECAY = 0.0
    plain.SOLVER.MAX_ITER = 5
    trainer.train(plain, resume=True, skip_test=True)
    off = checkpoint.read(tmp_path / "model_final.pth")
    assert "trained" not in off
    plain.SOLVER.OPTIMIZER = "AdamW"
    with pytest.raises(ValueError, match=r"another SOLVER\.OPTIMIZER"):
        trainer.train(plain, resume=True, skip_test=True)
