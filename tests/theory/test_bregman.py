"""Claim 2: Prop. 2 on random smooth models and inside linear regions; wrong matrices and a wrong library."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases, random_settings
from torch import Tensor, nn

from curvlab import theory
from curvlab.curvature import GaussNewton
from curvlab.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from curvlab.theory import Check, Setting, bregman

SMOOTH = ("tanh", "gelu", "identity")


def wrong(check: Check) -> list[object]:
    return [case for case in check.cases if not case.as_expected]


@cases(30)
@given(random_settings(activations=SMOOTH, width=(2, 4)), st.integers(0, 2**31))
def test_remainder(setting: Setting, seed: int) -> None:
    if isinstance(setting.model, nn.Sequential):
        setting.model[2] = nn.AvgPool2d(2)  # max-pooling has kinks
    check = theory.remainder_order(*setting.arguments, seed=seed, directions=3)
    assert check.passed, wrong(check)


@cases(10)
@given(random_settings(activations=("relu",), width=(3, 4), examples=(2, 3)), st.integers(0, 2**31))
def test_remainder_in_a_linear_region(setting: Setting, seed: int) -> None:
    assume(float(GaussNewton.fit(*setting.arguments).trace()) > 0)  # else every unit is dead
    check = theory.remainder_in_a_linear_region(*setting.arguments, seed=seed, directions=2)
    assert check.passed, wrong(check)


@cases(30)
@given(random_settings(activations=("relu", *SMOOTH)), st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_distance_is_the_kl(setting: Setting, seed: int, size: float) -> None:
    assume(float(GaussNewton.fit(*setting.arguments).trace()) > 0)
    check = theory.bregman_is_kl(*setting.arguments, seed=seed, size=size)
    assert check.passed, wrong(check)


@cases(20)
@given(random_settings(activations=SMOOTH, width=(2, 4)), st.integers(0, 2**31))
def test_the_loss_difference_is_linear(setting: Setting, seed: int) -> None:
    check = theory.loss_difference_is_linear(*setting.arguments, seed=seed)
    assert check.passed, wrong(check)


def test_known_orders() -> None:
    """Outputs linear in W under squared error have no remainder; one tanh unit has a third-order one."""
    setting = theory.random_setting("mlp", "identity", "squared error", depth=1)
    assert theory.remainder_order(*setting.arguments).cases[0].name == "remainder, in units of its rounding"
    setting = theory.random_setting("mlp", "tanh", "squared error", depth=2)
    assert abs(theory.remainder_order(*setting.arguments).measured - 3) < 0.05


def test_positions_without_a_label_count_nowhere() -> None:
    setting = theory.random_setting("sequence", "tanh", "cross-entropy", examples=4)
    data = [(x, y.clone()) for x, y in setting.data]
    for _, y in data:
        y[:, 0] = -100
    setting = replace(setting, data=data)
    assert theory.remainder_order(*setting.arguments).passed
    assert theory.bregman_is_kl(*setting.arguments).passed


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "logistic"])
def test_the_empirical_fisher_fed_in_is_rejected(loss: str) -> None:
    setting = theory.random_setting("mlp", "tanh", loss)
    assert theory.remainder_order(*setting.arguments).passed
    assert not theory.remainder_order(*setting.arguments, labels="data").passed


def test_a_kink_on_the_way_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU claimed to be smooth is refused, and fails over steps that switch units."""
    for kind, activation, kinks in (("mlp", "relu", "relu"), ("conv", "tanh", "MaxPool2d"), ("conv", "relu", "ReLU")):
        setting = theory.random_setting(kind, activation, "squared error")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{kinks}.*remainder_in_a_linear_region"):
            theory.remainder_order(*setting.arguments)
    setting = theory.random_setting("mlp", "relu", "squared error", width=6, examples=40)
    with monkeypatch.context() as blind:
        blind.setattr(bregman, "_kinks", lambda model: set())
        assert not theory.remainder_order(*setting.arguments, largest=1.0).passed
    with pytest.raises(ValueError, match="compared nothing"):  # so many edges that the region is all rounding
        theory.remainder_in_a_linear_region(*setting.arguments)
    setting = theory.random_setting("mlp", "relu", "squared error", width=4, examples=4)
    assert theory.remainder_in_a_linear_region(*setting.arguments).passed


def test_no_region_around_a_kink() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)).double()
    nn.init.zeros_(model[0].weight)
    data = [(torch.ones(1, 1).double(), torch.zeros(1, 1).double())]
    with pytest.raises(ValueError, match="kink"):
        theory.remainder_in_a_linear_region(model, SquaredError(), data)


def test_conditions() -> None:
    single = theory.random_setting("mlp", "tanh", dtype=torch.float32)
    for check in (theory.remainder_order, theory.loss_difference_is_linear, theory.remainder_in_a_linear_region):
        with pytest.raises(ValueError, match="float64"):
            check(*single.arguments)  # type: ignore[operator]
    assert theory.bregman_is_kl(*single.arguments).passed
    dead = theory.random_setting("mlp", "relu")
    nn.init.constant_(dead.model.fc1.bias, -100.0)  # type: ignore[arg-type, union-attr]
    for check in (theory.remainder_in_a_linear_region, theory.loss_difference_is_linear, theory.bregman_is_kl):
        with pytest.raises(ValueError, match="compared nothing"):
            check(*dead.arguments[:3], "fc1")  # type: ignore[operator]


def test_at_a_minimum_the_linear_term_is_gone() -> None:
    setting = theory.random_setting("mlp", "tanh", "squared error")
    with torch.no_grad():
        data = [(x, setting.model(x)) for x, _ in setting.data]
    check = theory.loss_difference_is_linear(setting.model, setting.loss, data)
    assert not check.passed
    assert check.measured > 0.9  # quadratic


@pytest.mark.parametrize("broken", ["scale", "labels of the data", "a wrong output Hessian", "distance"])
def test_a_broken_library_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    setting = theory.random_setting("mlp", "tanh", "cross-entropy")
    honest, fit = GaussNewton.quadratic_form, GaussNewton.fit.__func__  # type: ignore[attr-defined]
    if broken == "scale":
        monkeypatch.setattr(GaussNewton, "quadratic_form", lambda self, delta: honest(self, delta) / 2)
    elif broken == "labels of the data":

        def empirical(cls: type, *args: Any, labels: str = "exact", **rest: Any) -> GaussNewton:
            return fit(cls, *args, labels="data", **rest)  # type: ignore[no-any-return]

        monkeypatch.setattr(GaussNewton, "fit", classmethod(empirical))
    elif broken == "a wrong output Hessian":  # diag(p) in place of diag(p) − ppᵀ
        monkeypatch.setattr(CrossEntropy, "hessian_factor", lambda self, o, t: o.softmax(-1).sqrt().diag_embed())
    else:  # the KL the other way round

        def reverse(self: CrossEntropy, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
            p = outputs.log_softmax(-1)
            return (p.exp() * (p - reference.log_softmax(-1))).sum(-1)

        monkeypatch.setattr(CrossEntropy, "bregman", reverse)
    checks = theory.remainder_order(*setting.arguments), theory.bregman_is_kl(*setting.arguments)
    assert not all(check.passed for check in checks)


def test_a_loss_that_is_no_likelihood_is_refused() -> None:
    class Other(BinaryCrossEntropy):
        pass

    class Unknown:
        terms = BinaryCrossEntropy.terms

    setting = theory.random_setting("mlp", "tanh", "logistic")
    assert theory.bregman_is_kl(setting.model, Other(), setting.data).passed
    with pytest.raises((TypeError, AttributeError)):
        theory.bregman_is_kl(setting.model, Unknown(), setting.data)  # type: ignore[arg-type]
