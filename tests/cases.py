"""Optimisers and a training loop that the tests of constrained descent share."""

from typing import Any

import torch
from torch import Tensor, nn


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, count: int, closure: bool = False
) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y.roll(1))
        loss.backward()
        return loss

    for _ in range(count):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
