"""The optimizer and the learning-rate schedule: maskrcnn-benchmark's rules, and those of newer recipes."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastrcnn.config import Config

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over the parameters that require a gradient.

    Parameters with "bias" in their name learn at BASE_LR · BIAS_LR_FACTOR with WEIGHT_DECAY_BIAS, all others at BASE_LR
    with WEIGHT_DECAY; the weights of norms have a decay of their own where WEIGHT_DECAY_NORM is not negative.
    Parameters of equal settings share a group, and the fused step updates a group in few launches.
    """
    solver = cfg.SOLVER
    norms = {id(m.weight) for m in model.modules() if isinstance(m, _NORMS) and solver.WEIGHT_DECAY_NORM >= 0}
    groups: dict[str, dict[str, Any]] = {
        "weights": {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY},
        "biases": {"lr": solver.BASE_LR * solver.BIAS_LR_FACTOR, "weight_decay": solver.WEIGHT_DECAY_BIAS},
        "norms": {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY_NORM},
    }
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient")
    for name, parameter in parameters.items():
        kind = "biases" if "bias" in name else "norms" if id(parameter) in norms else "weights"
        groups[kind].setdefault("params", []).append(parameter)
    used = [group for group in groups.values() if "params" in group]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    if solver.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(used, lr=solver.BASE_LR, betas=solver.BETAS, eps=solver.EPSILON, fused=fused)
    optimizer = torch.optim.SGD(used, lr=solver.BASE_LR, momentum=solver.MOMENTUM, fused=fused)
    if solver.MOMENTUM != 0:
        # when float16 overflows in the first iteration, the fused step skips it and takes unset memory in the next
        for parameter in parameters.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(cfg: Config, iteration: int) -> float:
    """What the learning rate is multiplied by at an iteration, counted from 0: warm-up times the fall.

    Linear warm-up goes from WARMUP_FACTOR at iteration 0 to 1 at WARMUP_ITERS; constant warm-up stays at
    WARMUP_FACTOR until there. The fall is GAMMA for each of STEPS that is reached, or with LR_SCHEDULER "cosine"
    (1 + cos(π · iteration / MAX_ITER)) / 2.
    """
    solver = cfg.SOLVER
    warmup = 1.0
    if iteration < solver.WARMUP_ITERS:
        alpha = iteration / solver.WARMUP_ITERS if solver.WARMUP_METHOD == "linear" else 0.0
        warmup = solver.WARMUP_FACTOR * (1 - alpha) + alpha
    if solver.LR_SCHEDULER == "cosine":
        return warmup * (1 + math.cos(math.pi * min(iteration / max(solver.MAX_ITER, 1), 1))) / 2
    return warmup * solver.GAMMA ** sum(iteration >= step for step in solver.STEPS)


class LRSchedule:
    """Sets the learning rate of every group to its own rate times `lr_factor` of the iteration.

    The rate is a function of the config and the iteration alone: nothing accumulates, and a run resumed with another
    SOLVER follows it.
    """

    def __init__(self, cfg: Config, optimizer: torch.optim.Optimizer, iteration: int = 0):
        self.cfg = cfg
        self.optimizer = optimizer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.set(iteration)

    def set(self, iteration: int) -> None:
        self.iteration = iteration
        factor = lr_factor(self.cfg, iteration)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor

    def step(self) -> None:
        self.set(self.iteration + 1)

    @property
    def lr(self) -> float:
        """The learning rate of ordinary weights at this iteration."""
        return self.cfg.SOLVER.BASE_LR * lr_factor(self.cfg, self.iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set(state["iteration"])
