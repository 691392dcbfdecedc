"""What a claim accepts as its subject, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab import theory
from curvlab.losses import CrossEntropy
from curvlab.models import MLP


def subject() -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return MLP([9, 6, 3], "tanh").double(), [(torch.randn(4, 9).double(), torch.tensor([0, 1, 2, 0]))]


def test_loaders_and_losses_of_torch() -> None:
    model, data = subject()
    ours = theory.piecewise_linear_head(MLP([9, 6, 3], "relu").double(), CrossEntropy(), data)
    assert ours.passed
    loader = DataLoader(TensorDataset(*data[0]), batch_size=3)
    for claim in (theory.null_space_inclusion, theory.spectra_are_right, theory.own_curvature_bound):
        layer = "fc1" if claim is theory.spectra_are_right else "*"
        check = claim(model, nn.CrossEntropyLoss(), loader, layer)
        assert check.passed, check.cases


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(x))


def test_refusals() -> None:
    model, data = subject()
    (x, y) = data[0]
    claim = theory.null_space_inclusion
    with pytest.raises(ValueError, match=r"\(inputs, targets\)"):
        claim(model, CrossEntropy(), [(x, y, torch.ones(4, 1))])
    with pytest.raises(ValueError, match="at least one"):
        claim(model, CrossEntropy(), [])
    with pytest.raises(ValueError, match="returns a SimpleNamespace"):
        claim(Wrapped(model), CrossEntropy(), data)
    with pytest.raises(ValueError, match="bfloat16"):
        claim(model.bfloat16(), CrossEntropy(), [(x.bfloat16(), y)])
    with pytest.raises(TypeError, match="is no loss"):
        claim(model, "cross-entropy", data)
