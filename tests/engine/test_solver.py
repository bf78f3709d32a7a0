import pytest
import torch
from engine.standins import TinyDetector, tiny_config

from fastrcnn.config import Config
from fastrcnn.engine import WarmupMultiStepLR, lr_factor, make_optimizer


@pytest.fixture
def cfg():
    cfg = Config()
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.STEPS = (60000, 80000)
    return cfg


@pytest.mark.parametrize(
    ("iteration", "lr"),
    [
        (0, 0.02 / 3),
        (250, 0.02 * 2 / 3),
        (499, 0.02 * (1 / 3 + 2 / 3 * 499 / 500)),
        (500, 0.02),
        (59999, 0.02),
        (60000, 0.002),
        (79999, 0.002),
        (80000, 0.0002),
        (90000, 0.0002),
    ],
)
def test_learning_rate_of_the_1x_schedule(cfg, iteration, lr):
    assert 0.02 * lr_factor(cfg, iteration) == pytest.approx(lr, rel=1e-12)


def test_constant_warmup(cfg):
    cfg.SOLVER.WARMUP_METHOD = "constant"
    assert [lr_factor(cfg, i) for i in (0, 499, 500)] == [cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.WARMUP_FACTOR, 1.0]


def test_schedule_sets_the_rate_of_every_group_without_drift(cfg):
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.STEPS = (6,)
    optimizer = make_optimizer(cfg, TinyDetector())
    schedule = WarmupMultiStepLR(cfg, optimizer)
    seen = []
    for _ in range(8):
        seen.append([group["lr"] for group in optimizer.param_groups])
        schedule.step()
    torch.testing.assert_close(torch.tensor(seen)[:, 1], 2 * torch.tensor(seen)[:, 0])
    assert [s[0] for s in seen] == pytest.approx([0.02 / 3, 0.01, 0.02 * 2 / 3, 0.02 * 5 / 6, 0.02, 0.02, 0.002, 0.002])


def test_groups_follow_the_names(tmp_path):
    cfg = tiny_config(tmp_path, WEIGHT_DECAY=1e-4, BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.0)
    model = TinyDetector()
    weights, biases = make_optimizer(cfg, model).param_groups
    assert {id(p) for p in weights["params"]} == {id(model.conv.weight), id(model.head.weight)}
    assert {id(p) for p in biases["params"]} == {id(model.conv.bias), id(model.head.bias)}
    assert (weights["lr"], weights["weight_decay"], weights["momentum"]) == (0.05, 1e-4, 0.9)
    assert (biases["lr"], biases["weight_decay"]) == (0.1, 0.0)


def test_step_is_the_textbook_update(tmp_path):
    cfg = tiny_config(tmp_path, WEIGHT_DECAY=0.1)
    model = TinyDetector().double()
    optimizer = make_optimizer(cfg, model)
    weight, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1)) if parameter.requires_grad else None
        optimizer.step()
        velocity = 0.9 * velocity[0] + 0.1 * (step + 1) + 0.1 * weight, 0.9 * velocity[1] + 0.1 * (step + 1)
        weight, bias = weight - 0.05 * velocity[0], bias - 0.1 * velocity[1]
    torch.testing.assert_close(model.head.weight.detach(), weight)
    torch.testing.assert_close(model.head.bias.detach(), bias)


def test_overflow_in_the_first_step_leaves_no_trace(tmp_path):
    """The fused SGD of torch starts from unset momentum after a step that the gradient scaler skipped."""
    model = TinyDetector()
    optimizer = make_optimizer(tiny_config(tmp_path, WEIGHT_DECAY=0.0), model)
    scaler = torch.amp.GradScaler("cpu")
    before = model.head.weight.detach().clone()
    for gradient in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((model.head.weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(model.head.weight.detach(), before - 0.05)
