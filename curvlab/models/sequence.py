"""A small causal sequence model: each layer's weight is used at every position, later positions see earlier ones."""

from typing import Literal

import torch
from torch import Tensor, nn

from curvlab.models.mlp import ACTIVATIONS


class RunningMean(nn.Module):
    """(N, T, d) → (N, T, classes): layers fc1, fc2, …, before each a position's mean with what came before it.

    The mean over the past is attention with equal weights: enough for positions to couple as they do in a
    language model. Draws its initial weights from PyTorch's global generator.
    """

    def __init__(self, sizes: list[int], activation: Literal["relu", "tanh", "gelu", "identity"] = "tanh") -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive widths (inputs, ..., outputs), got {list(sizes)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; RunningMean knows {', '.join(ACTIVATIONS)}")
        self.sizes, self.activation = tuple(sizes), activation
        for i in range(1, len(sizes)):
            self.add_module(f"fc{i}", nn.Linear(sizes[i - 1], sizes[i]))

    def forward(self, x: Tensor) -> Tensor:
        depth = len(self.sizes) - 1
        for i in range(1, depth + 1):
            count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
            x = self.get_submodule(f"fc{i}")((x + x.cumsum(1) / count[:, None]) / 2)
            if i < depth:
                x = ACTIVATIONS[self.activation](x)
        return x
