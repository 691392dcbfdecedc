"""Claim 1: Prop. 1 on random models, and false versions of it."""

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


def test_a_wrong_curvature_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGN of something else than the layer's inputs: the check must not hold by construction."""
    from curvlab.curvature import GaussNewton

    setting = theory.random_setting("mlp", "tanh", examples=3, width=6)
    honest = GaussNewton.matmat
    monkeypatch.setattr(GaussNewton, "matmat", lambda self, v: honest(self, v.roll(1, -1)))
    assert not theory.null_space_inclusion(*setting.arguments).passed
