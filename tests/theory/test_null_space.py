"""Claim 1: Prop. 1 on random models, and false versions of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings

from curvlab import theory
from curvlab.losses import CrossEntropy
from curvlab.models import MLP
from curvlab.theory import Setting


@cases(150)
@given(random_settings(dtypes=(torch.float32, torch.float64)))
def test_inclusion(setting: Setting) -> None:
    check = theory.null_space_inclusion(*setting.arguments)
    assert check.passed, check.cases
    for dims in check.series.values():
        assert dims["null of the inputs"] <= dims["null of the GGN"] <= dims["parameters"]


@cases(50)
@given(random_settings(examples=(1, 2), width=(7, 9), kinds=("mlp", "sequence")))
def test_unseen_updates(setting: Setting) -> None:
    check = theory.unseen_updates_change_nothing(*setting.arguments)
    assert check.passed, check.cases


def test_strict_and_equal() -> None:
    torch.manual_seed(0)
    model = MLP([6, 8, 4], "tanh").double()
    data = [(torch.randn(5, 6).double(), torch.zeros(5, dtype=torch.long))]
    check = theory.inclusion_strict_or_equal(model, data, "fc2", classes=4)
    assert (check.verdict, check.passed) == ("holds", True)
    assert check.series["squared error"]["null of the GGN"] == 4 * (8 - 5)
    assert check.series["cross-entropy"]["null of the GGN"] == 4 * (8 - 5) + 5  # 1 vᵀ, v in the span of five inputs


def test_a_layer_that_sees_everything_leaves_nothing_to_check() -> None:
    torch.manual_seed(0)
    model = MLP([3, 4], "tanh").double()
    data = [(torch.randn(9, 3).double(), torch.zeros(9, dtype=torch.long))]
    with pytest.raises(ValueError, match="compared nothing"):
        theory.unseen_updates_change_nothing(model, CrossEntropy(), data)


def dead() -> tuple[MLP, CrossEntropy, list[tuple[torch.Tensor, torch.Tensor]]]:
    """No unit of the hidden layer is ever on."""
    torch.manual_seed(0)
    model = MLP([4, 3, 3], "relu").double()
    torch.nn.init.constant_(model.fc1.bias, -100.0)  # type: ignore[arg-type, union-attr]
    return model, CrossEntropy(), [(torch.randn(6, 4).double(), torch.arange(6) % 3)]


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize(
    "claim",
    [
        theory.null_space_inclusion, theory.unseen_updates_change_nothing, theory.piecewise_linear_head,
        theory.approximate_null_spaces_nest, theory.small_steps_are_predicted,
    ],
    ids=lambda claim: claim.name,
)  # fmt: skip
def test_where_no_output_depends_on_the_weights_nothing_is_compared(claim: Any, layer: str) -> None:
    with pytest.raises(ValueError, match="compared nothing"):
        claim(*dead(), layer)


def test_inputs_that_are_zero_leave_the_layer_out() -> None:
    model, loss, ((x, y),) = dead()
    torch.nn.init.ones_(model.fc1.bias)  # type: ignore[arg-type, union-attr]
    for claim in (theory.null_space_inclusion, theory.unseen_updates_change_nothing, theory.piecewise_linear_head):
        check = claim(model, loss, [(0 * x, y)])
        assert check.passed, check.cases
        assert not any(case.name.startswith("fc1") for case in check.cases)


def test_a_wrong_curvature_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGN of something else than the layer's inputs: the check must not hold by construction."""
    from curvlab.curvature import GaussNewton

    setting = theory.random_setting("mlp", "tanh", examples=3, width=6)
    honest = GaussNewton.matmat
    monkeypatch.setattr(GaussNewton, "matmat", lambda self, v: honest(self, v.roll(1, -1)))
    assert not theory.null_space_inclusion(*setting.arguments).passed
