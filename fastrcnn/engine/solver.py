"""The optimizer and the learning-rate schedule, by maskrcnn-benchmark's rules."""

from typing import Any

import torch
from torch import nn

from fastrcnn.config import Config


def make_optimizer(cfg: Config, model: nn.Module) -> torch.optim.SGD:
    """SGD with momentum over the parameters that require a gradient.

    Parameters with "bias" in their name learn at BASE_LR · BIAS_LR_FACTOR with WEIGHT_DECAY_BIAS, all others (affine
    weights of norms included) at BASE_LR with WEIGHT_DECAY. Parameters of equal settings share a group, and the fused
    step updates a group in few launches.
    """
    solver = cfg.SOLVER
    weights, biases = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if "bias" in name else weights).append(parameter)
    if not weights and not biases:
        raise ValueError("the model has no parameter that requires a gradient")
    groups = [
        {"params": weights, "lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY},
        {"params": biases, "lr": solver.BASE_LR * solver.BIAS_LR_FACTOR, "weight_decay": solver.WEIGHT_DECAY_BIAS},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    optimizer = torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, fused=fused)
    if solver.MOMENTUM != 0:
        # when float16 overflows in the first iteration, the fused step skips it and takes unset memory in the next
        for parameter in (*weights, *biases):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(cfg: Config, iteration: int) -> float:
    """What the learning rate is multiplied by at an iteration, counted from 0: warm-up times GAMMA for each of STEPS
    that is reached.

    Linear warm-up goes from WARMUP_FACTOR at iteration 0 to 1 at WARMUP_ITERS; constant warm-up stays at
    WARMUP_FACTOR until there.
    """
    solver = cfg.SOLVER
    warmup = 1.0
    if iteration < solver.WARMUP_ITERS:
        if solver.WARMUP_METHOD == "linear":
            alpha = iteration / solver.WARMUP_ITERS
            warmup = solver.WARMUP_FACTOR * (1 - alpha) + alpha
        elif solver.WARMUP_METHOD == "constant":
            warmup = solver.WARMUP_FACTOR
        else:
            raise ValueError(f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}: use 'linear' or 'constant'")
    return warmup * solver.GAMMA ** sum(iteration >= step for step in solver.STEPS)


class WarmupMultiStepLR:
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
