"""LeNet-5 for 28×28 grey images."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class LeNet5(nn.Sequential):
    """LeNet-5 with max-pooling, 61,706 parameters: (N, 1, 28, 28) images to (N, 10) logits.

    A `Sequential` of named layers (conv1, conv2, fc1, fc2, fc3 and what lies between), so that it can be cut
    below an edited layer (`curvlab.capture.split_at`). Draws its initial weights from PyTorch's global
    generator; seed that before building it. Raises ValueError for an unknown activation or images of
    another shape.
    """

    def __init__(self, activation: Literal["relu", "tanh"] = "relu") -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; LeNet5 knows {', '.join(_ACTIVATIONS)}")
        act = _ACTIVATIONS[activation]
        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Conv2d(1, 6, kernel_size=5, padding=2)), ("act1", act()), ("pool1", nn.MaxPool2d(2)),
            ("conv2", nn.Conv2d(6, 16, kernel_size=5)), ("act2", act()), ("pool2", nn.MaxPool2d(2)),
            ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(16 * 5 * 5, 120)), ("act3", act()),
            ("fc2", nn.Linear(120, 84)), ("act4", act()),
            ("fc3", nn.Linear(84, 10)),
        ]  # fmt: skip
        super().__init__(OrderedDict(layers))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
            raise ValueError(f"LeNet5 takes images of shape (N, 1, 28, 28), got {tuple(x.shape)}")
        return super().forward(x)
