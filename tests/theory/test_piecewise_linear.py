"""Claim 12: piecewise-linear heads of every kind, smooth ones, and a library with wrong second derivatives."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, random_settings
from torch import nn

from curvlab import theory
from curvlab.curvature import GaussNewton, Hessian, hessian
from curvlab.losses import CrossEntropy, Loss
from curvlab.theory import Check, Setting, random_setting
from curvlab.theory.piecewise_linear import smoothed


def wrong(check: Check) -> list[object]:
    return [case for case in check.cases if not case.as_expected]


@cases(70)
@given(random_settings(activations=("relu", "identity"), width=(2, 3), examples=(1, 4)))
def test_piecewise_linear(setting: Setting) -> None:
    findings = theory.piecewise_linear_head.function(*setting.arguments)  # no cases where all units are dead
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(30)
@given(st.sampled_from(["tanh", "gelu"]), st.sampled_from(list(theory.LOSSES)), st.integers(0, 2**31))
def test_smooth(activation: Any, loss: str, seed: int) -> None:
    setting = random_setting("mlp", activation, loss, examples=5, width=4, depth=3, seed=seed)
    check = theory.smooth_head({"random": setting})
    unexpected = [case for case in check.cases if not case.as_expected and "negative" not in case.name]
    assert not unexpected, unexpected


def test_pooling_and_leaky_units() -> None:
    """Piecewise linear too: overlapping max-pools, leaky and clipped units."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 2, 3, padding=1), act1=nn.LeakyReLU(), pool1=nn.MaxPool2d(3, stride=1),
            conv2=nn.Conv2d(2, 2, 2), act2=nn.ReLU6(), flatten=nn.Flatten(), fc=nn.Linear(18, 3),
        )
    ).double()  # fmt: skip
    data = [(torch.randn(3, 1, 6, 6).double(), torch.tensor([0, 1, 2]))]
    check = theory.piecewise_linear_head(model, CrossEntropy(), data)
    assert check.passed, wrong(check)
    assert check.verdict == "holds under conditions"  # one layer at a time


def test_one_layer_at_a_time_it_holds() -> None:
    setting = random_setting("mlp", "relu")
    check = theory.piecewise_linear_head(*setting.arguments[:3], "fc1")
    assert (check.verdict, check.passed) == ("holds", True)


@pytest.mark.parametrize("kind", ["mlp", "conv", "sequence"])
def test_a_smooth_network_fed_in_is_rejected(kind: Any) -> None:
    assert not theory.piecewise_linear_head(*random_setting(kind, "tanh").arguments).passed
    relu = random_setting(kind, "relu")
    assert not theory.smooth_head({"random": relu}).passed


def test_smooth_twins() -> None:
    setting = random_setting("conv", "relu")
    twin = smoothed(setting.model)
    assert twin is not None
    assert any(isinstance(m, nn.Tanh) for m in twin.modules())
    assert not any(isinstance(m, nn.Tanh) for m in setting.model.modules())
    assert smoothed(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("broken", ["the Hessian is the GGN", "no residual", "wrong labels", "between layers"])
def test_a_broken_library_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    settings_ = random_setting("mlp", "relu", examples=6), random_setting("mlp", "tanh", examples=6)
    fit = GaussNewton.fit.__func__  # type: ignore[attr-defined]
    second = hessian.output_hessians

    def empirical(cls: type, *args: Any, **rest: Any) -> GaussNewton:
        return fit(cls, *args, labels="data", **rest)  # type: ignore[no-any-return]

    def block_diagonal(self: Hessian, layout: str) -> torch.Tensor:
        C = dense(self, layout)  # type: ignore[arg-type]
        first = self.layers[0].size
        C[:first, first:], C[first:, :first] = 0.0, 0.0
        return C

    def scaled(pass_: Any, loss: Loss) -> torch.Tensor:
        return 1.01 * second(pass_, loss)

    dense = Hessian.dense
    if broken == "the Hessian is the GGN":
        monkeypatch.setattr(Hessian, "fit", classmethod(lambda cls, *args: GaussNewton.fit(*args)))
    elif broken == "no residual":
        monkeypatch.setattr(hessian, "output_hessians", scaled)
    elif broken == "wrong labels":
        monkeypatch.setattr(GaussNewton, "fit", classmethod(empirical))
    else:
        monkeypatch.setattr(Hessian, "dense", block_diagonal)
    checks = theory.piecewise_linear_head(*settings_[0].arguments), theory.smooth_head({"random": settings_[1]})
    assert not all(check.passed for check in checks)
