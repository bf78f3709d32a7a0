import pytest
import torch
from engine.standins import TinyDetector, tiny_config

from fastrcnn.config import Config
from fastrcnn.engine import LRSchedule, lr_factor, make_optimizer


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
    schedule = LRSchedule(cfg, optimizer)
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


def test_cosine_is_torchs(cfg):
    """Against torch's closed form, warm-up apart."""
    cfg.SOLVER.LR_SCHEDULER, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = "cosine", 20, 0
    peer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(peer, T_max=20)
    for iteration in range(21):
        assert lr_factor(cfg, iteration) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        peer.step()
        schedule.step()
    assert lr_factor(cfg, 25) == 0
    plain = [lr_factor(cfg, i) for i in range(8)]
    cfg.SOLVER.WARMUP_ITERS = 6
    warm = [1 / 3 + 2 / 3 * min(i / 6, 1) for i in range(8)]
    assert [lr_factor(cfg, i) for i in range(8)] == pytest.approx([a * b for a, b in zip(plain, warm, strict=True)])


class WithNorms(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.groups = torch.nn.GroupNorm(2, 4)


def test_weights_of_norms_have_their_own_decay(tmp_path):
    model = WithNorms()
    cfg = tiny_config(tmp_path, WEIGHT_DECAY=0.1, WEIGHT_DECAY_BIAS=0.2)
    assert len(make_optimizer(cfg, model).param_groups) == 2
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    decay = {id(p): group["weight_decay"] for group in make_optimizer(cfg, model).param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "conv.weight": 0.1,
        "conv.bias": 0.2,
        "norm.weight": 0.0,
        "norm.bias": 0.2,
        "groups.weight": 0.0,
        "groups.bias": 0.2,
    }


def test_adamw_is_the_textbook_update(tmp_path):
    """Loshchilov and Hutter, 2019, with the rates and decays of the groups."""
    cfg = tiny_config(tmp_path, OPTIMIZER="AdamW", BETAS=(0.8, 0.95), EPSILON=1e-3, WEIGHT_DECAY=0.1)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.3
    model = TinyDetector().double()
    optimizer = make_optimizer(cfg, model)
    values = {"weight": model.head.weight.detach().clone(), "bias": model.head.bias.detach().clone()}
    mean, square = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0)
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step) if parameter.requires_grad else None
        optimizer.step()
        for name, lr, decay in (("weight", 0.05, 0.1), ("bias", 0.1, 0.3)):
            mean[name] = 0.8 * mean[name] + 0.2 * 0.1 * step
            square[name] = 0.95 * square[name] + 0.05 * (0.1 * step) ** 2
            move = mean[name] / (1 - 0.8**step) / ((square[name] / (1 - 0.95**step)) ** 0.5 + 1e-3)
            values[name] = values[name] * (1 - lr * decay) - lr * move
    torch.testing.assert_close(model.head.weight.detach(), values["weight"])
    torch.testing.assert_close(model.head.bias.detach(), values["bias"])


def test_steps_fall_by_gamma(cfg):
    cfg.SOLVER.GAMMA = 0.5
    assert [lr_factor(cfg, i) for i in (59999, 60000, 80000)] == [1.0, 0.5, 0.25]
