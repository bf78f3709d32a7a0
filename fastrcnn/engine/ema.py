"""Exponential moving average of a model's weights (Polyak and Juditsky, 1992)."""

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of the model, `model`, whose every float parameter and buffer is, after each update, decay · itself +
    (1 − decay) · the model's. It begins as the model is; what is no float, such as counters, is copied."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source = model
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self) -> None:
        averages, values = [], []
        source = self.source.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(source[name])
            else:
                average.copy_(source[name])
        torch._foreach_lerp_(averages, values, 1 - self.decay)
