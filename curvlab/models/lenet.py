"""LeNet-5 for 28×28 grey images."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}


class LeNet5(nn.Module):
    """LeNet-5 with max-pooling, 61,706 parameters: (N, 1, 28, 28) images to (N, 10) logits.

    Draws its initial weights from PyTorch's global generator; seed that before building it. Raises ValueError
    for an unknown activation or images of another shape.
    """

    def __init__(self, activation: Literal["relu", "tanh"] = "relu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; LeNet5 knows {', '.join(_ACTIVATIONS)}")
        self.activation = activation
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
            raise ValueError(f"LeNet5 takes images of shape (N, 1, 28, 28), got {tuple(x.shape)}")
        # Never in place: curvature code hooks the values on both sides of every activation.
        activate = _ACTIVATIONS[self.activation]
        x = F.max_pool2d(activate(self.conv1(x)), 2)
        x = F.max_pool2d(activate(self.conv2(x)), 2)
        x = activate(self.fc1(x.flatten(1)))
        x = activate(self.fc2(x))
        return self.fc3(x)
