"""Claim 9: counterexamples to nesting, the case that nests, and overlaps against explicit projectors."""

import math

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import KFAC, Covariance, GaussNewton
from curvlab.losses import SquaredError
from curvlab.models import MLP
from curvlab.projector import NullSpace, overlap
from curvlab.spectrum import Block
from curvlab.theory import Setting, nesting

SOME = (0.5, 0.8, 0.95)


def _smallest() -> tuple[MLP, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A deep linear model under squared error: A = diag(0.7, 0.3), S = W₂ᵀW₂ = diag(0.9, 0.1), and G = A ⊗ S."""
    model = MLP([2, 2, 2], "identity").double()
    model.fc2.weight.data = torch.tensor([0.9, 0.1]).double().sqrt().diag()
    return model, [(torch.tensor([1.4, 0.6]).double().sqrt().diag(), torch.zeros(2, 2).double())]


def test_the_smallest_counterexample() -> None:
    model, data = _smallest()
    covariance = Covariance.fit(model, SquaredError(), data, "fc1").spectrum().null_space(0.65)
    kfac = KFAC.fit(model, SquaredError(), data, "fc1", labels="exact").spectrum().null_space(0.65)
    ggn = GaussNewton.fit(model, SquaredError(), data, "fc1").spectrum().null_space(0.65)
    assert (covariance.kept, kfac.kept) == (2, 2)
    assert overlap(covariance, kfac) == pytest.approx(0.5)
    assert overlap(kfac, ggn) == pytest.approx(1)
    check = theory.approximate_null_spaces_nest(model, SquaredError(), data, "fc1", gammas=(0.65,))
    assert (check.verdict, check.passed) == ("refuted", True)
    assert check.measured == pytest.approx(0.5)
    assert not theory.approximate_null_spaces_nest(
        model, SquaredError(), data, "fc1", gammas=(0.65,), should=True
    ).passed


def test_counterexamples_are_common() -> None:
    found = 0
    for seed in range(20):
        setting = theory.random_setting("mlp", "tanh", examples=8, width=4, seed=seed)
        arguments = (setting.model, setting.loss, setting.data, "fc1")
        found += theory.approximate_null_spaces_nest(*arguments).verdict == "refuted"
    assert found == 20


@cases(30)
@given(random_settings(examples=(2, 6), width=(2, 4), dtypes=(torch.float32, torch.float64)))
def test_one_curvature_nests(setting: Setting) -> None:
    arguments = (setting.model, setting.loss, setting.data, setting.layers[0])
    findings = theory.one_curvature_nests.function(*arguments, gammas=(0.9, 0.3, 0.99))
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(30)
@given(random_settings(examples=(1, 6), width=(2, 4)))
def test_overlaps(setting: Setting) -> None:
    arguments = (setting.model, setting.loss, setting.data, setting.layers[-1])
    findings = theory.overlap_is_the_share.function(*arguments, gammas=SOME)
    assert all(case.as_expected for case in findings.cases), findings.cases


def test_principal_angles() -> None:
    """Of K-FAC's null space at γ = 0.65 in the covariance's: one direction of two is orthogonal to it."""
    model, data = _smallest()
    check = theory.overlap_is_the_share(model, SquaredError(), data, "fc1", gammas=(0.65,))
    (row,) = (r for r in check.series["pairs"] if (r["first"], r["second"]) == ("kfac", "covariance"))
    assert row["largest angle"] == pytest.approx(90)
    assert (row["directions outside"], row["kept"]) == (1, 2)
    assert row["share"] == pytest.approx(0.5)


def test_broken_libraries_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = theory.random_setting("mlp", "tanh", examples=8, width=4, depth=3)
    arguments = (setting.model, setting.loss, setting.data, "fc1")
    assert theory.overlap_is_the_share(*arguments).passed
    with monkeypatch.context() as broken:  # a share of the second instead of the first
        broken.setattr(nesting, "overlap", lambda one, two: overlap(one, two) * one.kept / max(two.kept, 1))
        assert not theory.overlap_is_the_share(*arguments).passed
    with monkeypatch.context() as broken:  # a Hessian ranked by σ, not |σ|
        broken.setattr(Block, "magnitudes", property(lambda self: self.values.double()))
        assert not theory.overlap_is_the_share(*arguments).passed
    with monkeypatch.context() as broken:  # what is removed and what is kept exchanged
        honest = NullSpace.removed.fget
        broken.setattr(NullSpace, "removed", property(lambda self: self.dimensions - honest(self)))
        assert not theory.one_curvature_nests(*arguments).passed
    assert math.isclose(theory.one_curvature_nests(*arguments).measured, 0, abs_tol=1e-12)
