"""Claim 7: effective ranks on spectra with known answers, the five spectra and Schur–Horn on random models."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings
from torch import nn

from curvlab import theory
from curvlab.curvature import EKFAC, KFAC, GaussNewton, ekfac, kfac
from curvlab.losses import SquaredError
from curvlab.models import MLP
from curvlab.theory import Setting, curvatures
from curvlab.theory.anisotropy import entropy_rank, participation, top_share


def test_isotropic_and_rank_one() -> None:
    one = torch.zeros(200)
    one[7] = 3.0
    assert top_share(torch.ones(200)) == pytest.approx(0.01)
    assert entropy_rank(torch.ones(200)) == pytest.approx(200)
    assert participation(torch.ones(200)) == pytest.approx(200)
    assert (top_share(one), entropy_rank(one), participation(one)) == (1.0, 1.0, 1.0)
    few = torch.cat([torch.full((5,), 2.0), torch.zeros(400)])
    assert entropy_rank(few) == pytest.approx(5)
    assert participation(few) == pytest.approx(5)


def test_power_law() -> None:
    i = torch.arange(1, 1001, dtype=torch.float64)
    harmonic = sum(1 / k for k in range(1, 1001))
    assert top_share(1 / i) == pytest.approx(sum(1 / k for k in range(1, 11)) / harmonic)
    assert participation(1 / i) == pytest.approx(harmonic**2 / sum(1 / k**2 for k in range(1, 1001)))
    entropy = math.log(harmonic) + sum(math.log(k) / k for k in range(1, 1001)) / harmonic
    assert entropy_rank(1 / i) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("q", [0.3, 0.9])
def test_geometric(q: float) -> None:
    sigma = q ** torch.arange(2000, dtype=torch.float64)
    assert participation(sigma) == pytest.approx((1 + q) / (1 - q))
    assert entropy_rank(sigma) == pytest.approx(math.exp(-math.log(1 - q) - q * math.log(q) / (1 - q)))


@cases(40)
@given(random_settings(dtypes=(torch.float32, torch.float64), depth=(1, 2), width=(2, 4)))
def test_spectra(setting: Setting) -> None:
    findings = theory.spectra_are_right.function(setting.model, setting.loss, setting.data, setting.layers[0])
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(40)
@given(random_settings(examples=(2, 6), width=(2, 4)))
def test_ekfac_is_never_sharper(setting: Setting) -> None:
    findings = theory.ekfac_is_never_sharper.function(setting.model, setting.loss, setting.data, setting.layers[-1])
    assert all(case.as_expected for case in findings.cases), findings.cases


def test_an_isotropic_curvature_is_refused() -> None:
    """A linear model with orthonormal inputs under squared error: G = I / d_in, and so are its approximations."""
    data = [(torch.eye(10).double(), torch.zeros(10, 12).double())]
    model = MLP([10, 12]).double()
    check = theory.few_directions_hold_the_energy(model, SquaredError(), data, "fc1")
    assert check.series["ggn"]["entropy rank"] == pytest.approx(120)
    assert (check.verdict, check.passed) == ("refuted", True)
    assert [case.holds for case in check.cases if ">=" in case.relation] == [False] * 6
    assert not theory.few_directions_hold_the_energy(model, SquaredError(), data, "fc1", should=True).passed


def test_one_example_is_sharp_in_all_but_the_covariance() -> None:
    setting = theory.random_setting(examples=1, width=20, classes=2, depth=2)
    arguments = (setting.model, setting.loss, setting.data, "fc1")
    check = theory.few_directions_hold_the_energy(*arguments)
    assert check.passed
    assert {case.name.split(":")[0] for case in check.cases if case.holds} == {"hessian", "ggn", "kfac", "ekfac"}
    assert check.series["ggn"]["participation"] == pytest.approx(1)
    covariance = check.series["covariance"]
    assert covariance["participation"] == pytest.approx(20)  # one eigenvalue, d_out times
    assert covariance["top share"] == pytest.approx(math.ceil(0.01 * covariance["parameters"]) / 20)


def test_a_tiny_layer_does_not_spoil_the_control() -> None:
    setting = theory.random_setting(width=1, classes=2)
    check = theory.few_directions_hold_the_energy(setting.model, setting.loss, setting.data, "fc1")
    assert check.passed, check.cases


def test_eigenvalues_equal_up_to_the_rounding_of_their_statistics_are_cut_together() -> None:
    """S = WᵀW = I of an orthogonal W, from float32 sums: each eigenvalue comes six times, not quite equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6))
    with torch.no_grad():
        model[1].weight.copy_(torch.linalg.qr(torch.randn(6, 6)).Q)
    data = [(torch.randn(30, 5), torch.randn(30, 6))]
    spectrum = KFAC.fit(model, SquaredError(), data, "0", labels="exact").spectrum()
    removed = spectrum.null_space(0.5).removed
    assert removed % 6 == 0
    assert 30 - float(curvatures.cut(spectrum, 0.5).trace()) == pytest.approx(removed)


def _swapped(honest: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, A, S, *rest: honest(layer, S, A, *rest)


def test_broken_libraries_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = theory.random_setting("mlp", "tanh", examples=6, width=4, depth=3)
    arguments = (setting.model, setting.loss, setting.data, "fc2")  # square: factors can be swapped unseen
    assert theory.spectra_are_right(*arguments).passed
    with monkeypatch.context() as broken:
        broken.setattr(kfac, "kronecker_block", _swapped(kfac.kronecker_block))
        assert not theory.spectra_are_right(*arguments).passed
    with monkeypatch.context() as broken:
        fit = KFAC.fit
        broken.setattr(KFAC, "fit", lambda *a, labels, **k: fit(*a, labels="data", **k))
        assert not theory.spectra_are_right(*arguments).passed
    with monkeypatch.context() as broken:
        dense = GaussNewton.dense
        broken.setattr(GaussNewton, "dense", lambda self, layout: dense(self, layout) * self.terms)
        assert not theory.spectra_are_right(*arguments).passed
    with monkeypatch.context() as broken:
        add = ekfac.add_squares
        broken.setattr(ekfac, "add_squares", lambda t, g, a, u_out, u_in: add(t, g, a, u_out, u_in.roll(1, 1)))
        assert not theory.spectra_are_right(*arguments).passed
    with monkeypatch.context() as broken:
        whole = EKFAC.fit
        broken.setattr(EKFAC, "fit", lambda *a, labels, **k: whole(*a, labels="data", **k))
        assert not theory.ekfac_is_never_sharper(*arguments).passed
