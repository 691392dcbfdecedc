"""What claims are checked on: a model, a loss, data and layers; and random ones of every kind."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from curvlab.models import MLP, RunningMean

Kind = Literal["mlp", "conv", "sequence"]
Activation = Literal["relu", "tanh", "gelu", "identity"]
LOSSES: dict[str, Loss] = {
    "cross-entropy": CrossEntropy(), "squared error": SquaredError(scale=0.6), "logistic": BinaryCrossEntropy(),
}  # fmt: skip
_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "identity": nn.Identity}


@dataclass(frozen=True)
class Setting:
    """What a claim is checked on; `claim.on(setting.name, *setting.arguments)`.

    Attributes:
        name: for the ledger.
        model, loss, data, layers: as every `fit` of `curvlab.curvature` takes them.
    """

    name: str
    model: nn.Module
    loss: Loss
    data: list[tuple[Tensor, Tensor]]
    layers: tuple[str, ...]

    @property
    def arguments(self) -> tuple[nn.Module, Loss, list[tuple[Tensor, Tensor]], tuple[str, ...]]:
        return self.model, self.loss, self.data, self.layers


def random_setting(
    kind: Kind = "mlp",
    activation: Activation = "tanh",
    loss: str = "cross-entropy",
    *,
    examples: int = 12,
    width: int = 5,
    classes: int = 3,
    depth: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Setting:
    """A model with random weights on random data, all from `seed`; `layers` are all its layers.

    Args:
        kind: an MLP on vectors; a convolution, pooling and a linear layer on images; a causal sequence model.
        loss: a key of `LOSSES`.
        width: of the hidden layers and the inputs (channels, for "conv").
        depth: layers of "mlp" and "sequence".
    """
    if kind not in ("mlp", "conv", "sequence") or loss not in LOSSES:
        raise ValueError(f"kind must be mlp, conv or sequence and loss one of {list(LOSSES)}, got {kind!r}, {loss!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [width + 1] + [width] * (depth - 1) + [classes]
        if kind == "conv":
            model: nn.Module = nn.Sequential(
                nn.Conv2d(2, width, 3, stride=(2, 1), padding=(1, 0)), _MODULES[activation](), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(2 * width, classes),
            )  # fmt: skip
            x = torch.randn(examples, 2, 6, 6)
        elif kind == "sequence":
            model, x = RunningMean(sizes, activation), torch.randn(examples, 3, width + 1)
        else:
            model, x = MLP(sizes, activation), torch.randn(examples, width + 1)
        positions = x.shape[:2] if kind == "sequence" else x.shape[:1]
        targets: dict[str, Any] = {
            "cross-entropy": torch.randint(classes, positions),
            "squared error": torch.randn(*positions, classes, dtype=dtype),
            "logistic": torch.rand(*positions, classes, dtype=dtype).round(),
        }
        # larger than the default start: outputs that are not near zero
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    model = model.to(dtype).eval()
    layers = tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    half = max(examples // 2, 1)
    data = list(zip(x.to(dtype).split(half), targets[loss].split(half), strict=True))
    return Setting(f"random {kind}, {activation}, {loss}, seed {seed}", model, LOSSES[loss], data, layers)
