"""Claim 18: the ellipsoid's projection, the quadratic problem, budgets in nats; and solvers that are wrong."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from strategies import cases, random_settings

from curvlab import theory
from curvlab.losses import CrossEntropy
from curvlab.models import MLP, pretrain
from curvlab.projector import Ellipsoid
from curvlab.spectrum import KroneckerBasis
from curvlab.theory import Check, Setting, random_problem, random_setting
from curvlab.theory.budget import _mean_gain, at_kl, correct_epsilon
from curvlab.theory.constrained import constrained_optimum

CURVATURES = ("hessian", "ggn", "kfac", "ekfac", "covariance")


@cases(50)
@given(
    random_settings(examples=(2, 6), width=(2, 4), depth=(1, 2)), st.sampled_from(CURVATURES),
    st.sampled_from((0.9, 0.1, 1e-3)), st.integers(0, 99),
)  # fmt: skip
def test_confine(setting: Setting, curvature: str, share: float, seed: int) -> None:
    check = theory.confining_is_nearest(*setting.arguments, curvature=curvature, share=share, seed=seed)
    assert check.passed, check.cases


@cases(10)
@given(st.integers(4, 9), st.integers(0, 2**31), st.booleans())
def test_quadratic_problem(size: int, seed: int, deficient: bool) -> None:
    check = theory.projected_descent_on_a_quadratic(*random_problem(size, seed, size - 1 if deficient else None))
    assert check.passed, check.cases
    assert check.verdict == "holds under conditions"


@cases(20)
@given(st.integers(3, 9), st.integers(0, 2**31), st.booleans())
def test_budget_against_cut(size: int, seed: int, deficient: bool) -> None:
    Q, C, target, _ = random_problem(size, seed, size - 1 if deficient else None)
    try:
        check = theory.budget_beats_cut_in_its_own_model(Q, C, target, gammas=(0.6,))
    except ValueError:
        assume(False)
    assert check.passed, check.cases


def test_the_reference_against_a_general_solver() -> None:
    """SLSQP knows nothing of multipliers in eigenbases."""
    Q, C, target, epsilon = random_problem(5, 3)
    q, c, t = Q.numpy(), C.numpy(), target.numpy()
    found = minimize(
        lambda d: 0.5 * (d - t) @ q @ (d - t), np.zeros(5), jac=lambda d: q @ (d - t), method="SLSQP",
        constraints={"type": "ineq", "fun": lambda d: epsilon - 0.5 * d @ c @ d, "jac": lambda d: -c @ d},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    delta, mu = constrained_optimum(Q, C, target, epsilon)
    assert mu > 0
    assert np.abs(found.x - delta.numpy()).max() < 1e-5


def test_a_budget_that_does_not_bind_changes_nothing() -> None:
    Q, C, target, epsilon = random_problem(5, 3)
    delta, mu = constrained_optimum(Q, C, target, 100 * epsilon)
    assert mu == 0
    torch.testing.assert_close(delta, target)


def test_correcting_epsilon() -> None:
    """KL(ε) = 2.5 ε^1.3 reaches 1e-2 at a known ε; a KL that stays below is refused."""
    epsilon, kl, calls = correct_epsilon(lambda e: 2.5 * e**1.3, 1e-2)
    assert 0.95e-2 <= kl <= 1e-2
    assert epsilon == pytest.approx((kl / 2.5) ** (1 / 1.3))
    assert calls <= 4
    _, kl, _ = correct_epsilon(lambda e: e / 10 if e < 2e-3 else 5 * e**0.3, 1.0)  # a jump on the way
    assert 0.95 <= kl <= 1.0
    with pytest.raises(ValueError, match="no ε found"):
        correct_epsilon(lambda e: min(e, 1e-3), 1e-2)


def test_interpolation_between_knobs() -> None:
    curve = [(0.0, 1e-4, 4.0), (1.0, 1e-2, 2.0)]
    assert at_kl(curve, 1e-3) == pytest.approx(3.0)


@pytest.fixture(scope="module")
def edited() -> tuple[Any, ...]:
    """A small classifier of clusters, trained, and edits with other labels."""
    torch.manual_seed(1)
    centres = torch.randn(4, 6, dtype=torch.float64)
    y = torch.arange(80) % 4
    x = centres[y] + 0.7 * torch.randn(80, 6, dtype=torch.float64)
    model = MLP([6, 7, 5, 4], "tanh").double()
    pretrain(model, x, y, epochs=60, lr=1e-2)
    return model.eval(), CrossEntropy(), [(x, y)], [(x[:20].roll(1, 1), y[:20].roll(1))], ["fc1", "fc2"]


@pytest.mark.parametrize("curvature", ["kfac", "ggn"])
def test_budget_in_nats(curvature: str, edited: tuple[Any, ...]) -> None:
    check = theory.budget_in_measured_nats(*edited, curvature=curvature, steps=25)
    names = {case.name: case for case in check.cases}
    assert names["corrected ε: measured KL / budget"].holds
    assert names["corrected ε: measured KL / budget, used"].holds
    assert names["half of the corrected ε: used"].as_expected


def test_equal_kl(edited: tuple[Any, ...]) -> None:
    model, loss, data, edits, layers = edited
    check = theory.learning_at_equal_kl(model, loss, data, [edits], layers, knobs=5, steps=25)
    assert set(check.series["curves"]) == set(check.series["gain"])
    for case in check.cases:
        assert np.isfinite(case.measured)
    ends = check.series["curves"]["ellipsoid"][0]
    assert [kl for _, kl, _ in ends] == sorted(kl for _, kl, _ in ends)  # a larger ε costs more
    assert [value for *_, value in ends] == sorted((value for *_, value in ends), reverse=True)  # and learns more


def test_slice(edited: tuple[Any, ...]) -> None:
    model, loss, data, edits, layers = edited
    before = [p.detach().clone() for p in model.parameters()]
    check = theory.two_parameter_slice(model, loss, data, edits, layers, grid=5, steps=4)
    assert check.passed, check.cases
    surface, axis = check.series["surface"]["KL"], check.series["sharp axis"]
    assert (len(surface), len(surface[0]), len(axis)) == (5, 5, 5)
    flat, sharp = surface[2][3] - surface[2][2], surface[4][1] - surface[2][1]
    assert sharp > flat  # rows move along the sharp direction
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(at[0] == 0 for at in check.series["descent"]["projected"])
    assert min(check.series["gradient"]) > 0  # both axes point downhill


def test_few_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least four parameters"):
        theory.projected_descent_on_a_quadratic(*random_problem(3, 0))


def _on_edits(model: Any, loss: Any, data: Any, edits: Any) -> list[Any]:
    """All claims that descend on edits, as calls."""
    few: dict[str, Any] = {"steps": 3}
    return [
        lambda: theory.prediction_along_edits(model, loss, data, edits, **few, directions=1),
        lambda: theory.two_parameter_slice(model, loss, data, edits, grid=3, **few),
        lambda: theory.budget_in_measured_nats(model, loss, data, edits, **few),
        lambda: theory.learning_at_equal_kl(model, loss, data, [edits], knobs=3, **few),
    ]


def test_fitted_edits_are_refused() -> None:
    setting = random_setting("mlp", "tanh", "squared error")
    with torch.no_grad():
        fitted = [(x, setting.model(x)) for x, _ in setting.data]
    for call in _on_edits(setting.model, setting.loss, setting.data, fitted):
        with pytest.raises(ValueError, match="no gradient at θ0"):
            call()


def test_frozen_weights_are_descended_on_in_copies() -> None:
    setting, edits = random_setting("mlp", "tanh"), random_setting("mlp", "tanh", seed=1).data
    free = [call().row()["cases"] for call in _on_edits(setting.model, setting.loss, setting.data, edits)]
    setting.model.requires_grad_(False)
    frozen = [call().row()["cases"] for call in _on_edits(setting.model, setting.loss, setting.data, edits)]
    assert frozen == free
    assert theory.descent_in_the_null_space(setting.model, setting.loss, setting.data, edits).passed
    assert not any(p.requires_grad for p in setting.model.parameters())


def test_curves_without_a_common_kl_are_not_compared() -> None:
    curves = {"one": [[(1.0, 1e-3, 2.0), (2.0, 1e-2, 1.0)]], "other": [[(1.0, 0.1, 2.0), (2.0, 0.5, 1.0)]]}
    assert _mean_gain(curves, "one", "other") is None
    assert _mean_gain(curves, "one", "one") == 0


def failed(check: Check) -> set[str]:
    return {case.name for case in check.cases if not case.as_expected}


def test_a_root_found_too_early_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Ellipsoid._multiplier
    monkeypatch.setattr(Ellipsoid, "_multiplier", lambda self, parts: 0.99 * honest(self, parts))
    setting = random_setting("mlp", "tanh")
    assert "confine against the reference" in failed(theory.confining_is_nearest(*setting.arguments))
    assert "SGD: first-order residual at the end" in failed(
        theory.projected_descent_on_a_quadratic(*random_problem(4, 0))
    )


def test_swapped_factors_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinates U_outᵀ Q U_in with a transpose dropped."""

    def wrong(self: KroneckerBasis, delta: Any) -> torch.Tensor:
        assert self.u_out is not None
        out: torch.Tensor = self.u_out @ delta[self.layer.name] @ self.u_in
        return out

    monkeypatch.setattr(KroneckerBasis, "rotate", wrong)
    setting = random_setting("mlp", "tanh")
    assert {"confine against the reference", "`spent` against ½ tᵀCt"} <= failed(
        theory.confining_is_nearest(*setting.arguments)
    )


def test_a_budget_without_its_half_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Ellipsoid.spent
    monkeypatch.setattr(Ellipsoid, "spent", lambda self, delta: 2 * honest(self, delta))
    setting = random_setting("mlp", "tanh")
    assert "`spent` against ½ tᵀCt" in failed(theory.confining_is_nearest(*setting.arguments))


def test_scaling_back_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole displacement shrunk by one factor: feasible, but not nearest."""

    def scaled(self: Ellipsoid, delta: Any) -> Any:
        factor = min(1.0, float(self.epsilon / self.spent(delta)) ** 0.5)
        return {name: factor * Q for name, Q in delta.items()}

    monkeypatch.setattr(Ellipsoid, "confine", scaled)
    problem = random_problem(6, 1)
    assert "SGD: end against the optimum" in failed(theory.projected_descent_on_a_quadratic(*problem))
    assert "soft penalty with λ = μ/2 against the ellipsoid" in failed(
        theory.budget_beats_cut_in_its_own_model(*problem[:3])
    )
