"""Claims on models that no random setting makes, in both precisions: attention, layer norm, dilation, one example."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab import theory
from curvlab.losses import BinaryCrossEntropy, CrossEntropy, SquaredError

DOUBLE_ONLY = (theory.remainder_order, theory.loss_difference_is_linear, theory.small_steps_are_predicted)
WHOLE = (
    theory.null_space_inclusion, theory.unseen_updates_change_nothing, theory.bregman_is_kl,
    theory.fisher_is_gauss_newton, theory.sampled_fisher_is_unbiased, theory.sandwich, theory.own_curvature_bound,
    theory.bound_in_the_ggn, theory.ekfac_best_diagonal, theory.coupling_is_bounded,
    theory.exact_null_spaces_combine, theory.curvatures_add_up_to_a_factor, theory.confining_is_nearest,
)  # fmt: skip
ONE_LAYER = (
    theory.spectra_are_right, theory.approximate_null_spaces_nest, theory.one_curvature_nests,
    theory.overlap_is_the_share,
)  # fmt: skip
WITH_EDITS = (
    theory.descent_in_the_null_space, theory.leaking_costs_curvature, theory.prediction_along_edits,
    theory.budget_in_measured_nats,
)  # fmt: skip


class Attention(nn.Module):
    """A causal block: attention and a GELU MLP, residual, layer norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.up, self.down, self.head = nn.LayerNorm(4), nn.Linear(4, 7), nn.Linear(7, 4), nn.Linear(4, 5)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scores = self.query(x) @ self.key(x).mT / 2
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        x = x + scores.masked_fill(later, -1e9).softmax(-1) @ self.value(x)
        out: Tensor = self.head(x + self.down(self.activation(self.up(self.norm(x)))))
        return out


def subject(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, list[Any], list[Any], tuple[str, ...]]:
    """Model, loss, data, edits and layers."""
    torch.manual_seed(5)
    loss: Any
    layers: tuple[str, ...]
    if name == "attention, ignored labels":
        model: nn.Module = Attention()
        x, y = torch.randn(8, 3, 4), torch.randint(5, (8, 3))
        y[0, 0], y[2, :2] = -100, -100
        loss, layers, half = CrossEntropy(), ("value", "up", "down"), 4
    elif name == "dilated convolution":
        first, last = nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2), nn.Linear(12, 4)
        model = nn.Sequential(first, nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), last)
        x, y = torch.randn(8, 2, 7, 7), torch.rand(8, 4, dtype=dtype).round()
        loss, layers, half = BinaryCrossEntropy(), ("0", "4"), 4
    elif name == "one example, more outputs than inputs":
        model = nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 4))
        x, y = torch.randn(2, 3), torch.randint(4, (2,))
        loss, layers, half = CrossEntropy(), ("0", "2"), 1
    else:
        model = nn.Sequential(nn.Linear(3, 7), nn.Softplus(), nn.LayerNorm(7), nn.Linear(7, 2))
        x, y = torch.randn(12, 3), torch.randn(12, 2, dtype=dtype)
        loss, layers, half = SquaredError(0.7), ("0", "3"), 6
    x = x.to(dtype)
    return model.to(dtype).eval(), loss, [(x[:half], y[:half])], [(x[half:], y[half:])], layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["attention, ignored labels", "dilated convolution", "one example, more outputs than inputs", "layer norm"]
)
def test_every_claim_comes_out_as_expected(name: str, dtype: torch.dtype) -> None:
    model, loss, data, edits, layers = subject(name, dtype)
    calls: list[tuple[Any, Any]] = [(claim, (model, loss, data, layers)) for claim in WHOLE]
    calls += [(claim, (model, loss, data, layer)) for claim in ONE_LAYER for layer in layers[:2]]
    calls += [(claim, (model, loss, data, edits, layers)) for claim in WITH_EDITS]
    if dtype == torch.float64:
        calls += [(claim, (model, loss, data, layers)) for claim in DOUBLE_ONLY]
    compared = set()
    for claim, arguments in calls:
        cases = claim.function(*arguments).cases
        assert all(case.as_expected for case in cases), (claim.name, cases)
        if cases:  # else nothing meets its conditions
            compared.add(claim.name)
    assert len(compared) >= len(WHOLE) + 5


def test_dimensions_in_single_precision() -> None:
    """Inputs whose singular values fall below single precision's resolution are counted as the GGN counts them."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(2, 9), nn.Softplus(), nn.Linear(9, 3))
    check = theory.inclusion_strict_or_equal(model, [(torch.randn(12, 2), torch.zeros(12))], "2", classes=3)
    assert check.passed, check.cases


def test_fitted_targets_in_single_precision() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))
    assert theory.on_fitted_targets(model, [(torch.randn(8, 4), torch.zeros(8))], "2").passed
