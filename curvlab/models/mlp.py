"""Plain multi-layer perceptron, small enough for exact curvature."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "identity": _identity,
}


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... of the given sizes, an activation between them and none after the last.

    `sizes` is (inputs, hidden..., outputs); `MLP([4, 8, 3])` has fc1 (4→8) and fc2 (8→3). Inputs (N, ...) are
    flattened to (N, sizes[0]). Draws its initial weights from PyTorch's global generator.
    Raises ValueError for fewer than two sizes, a size below one or an unknown activation.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Literal["relu", "tanh", "gelu", "identity"] = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive widths (inputs, ..., outputs), got {list(sizes)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; MLP knows {', '.join(ACTIVATIONS)}")
        self.sizes = tuple(sizes)
        self.activation = activation
        for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{i}", nn.Linear(n_in, n_out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, sizes[-1]) of inputs (N, ...) that flatten to (N, sizes[0])."""
        activate = ACTIVATIONS[self.activation]
        x = x.flatten(1)
        depth = len(self.sizes) - 1
        for i in range(1, depth):
            x = activate(self.get_submodule(f"fc{i}")(x))
        return self.get_submodule(f"fc{depth}")(x)
