"""Claim 11: K-FAC's exact cases, EK-FAC as the best diagonal, and broken formulas that must be found out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import ekfac, kfac
from curvlab.curvature.kfac import Factors
from curvlab.layers import find_layers
from curvlab.theory import Setting, explicit, random_setting
from curvlab.theory.check import relative

DTYPES = (torch.float32, torch.float64)
SEEDS = st.integers(0, 2**31)


@cases(30)
@given(random_settings(kinds=("mlp", "conv"), dtypes=DTYPES))
def test_one_example(setting: Setting) -> None:
    check = theory.kfac_exact_one_example(*setting.arguments)
    assert (check.verdict, check.passed) == ("holds", True), check.cases


@cases(30)
@given(
    random_settings(
        kinds=("mlp",), activations=("identity",), losses=("squared error",), dtypes=DTYPES, examples=(2, 6)
    )
)
def test_shared_curvature(setting: Setting) -> None:
    check = theory.kfac_exact_shared_curvature(setting.model, setting.data)
    assert (check.verdict, check.passed) == ("holds", True), check.cases


@cases(30)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), SEEDS, st.sampled_from(DTYPES))
def test_independent(d_in: int, d_out: int, n: int, m: int, seed: int, dtype: torch.dtype) -> None:
    check = theory.kfac_exact_independent(d_in=d_in, d_out=d_out, inputs=n, curvatures=m, seed=seed, dtype=dtype)
    assert (check.verdict, check.passed) == ("holds", True), check.cases


@cases(20)
@given(st.integers(2, 4), st.integers(2, 5), SEEDS)
def test_shared_weights(positions: int, examples: int, seed: int) -> None:
    check = theory.kfac_with_shared_weights(positions=positions, examples=examples, seed=seed)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases


@cases(40)
@given(random_settings(dtypes=DTYPES), st.sampled_from(["exact", "data"]))
def test_best_diagonal(setting: Setting, labels: str) -> None:
    check = theory.ekfac_best_diagonal(*setting.arguments, labels=labels)  # type: ignore[arg-type]
    assert (check.verdict, check.passed) == ("holds", True), [c for c in check.cases if not c.as_expected]


def test_several_examples_are_not_one() -> None:
    """The claim of one example, fed with a batch in its place."""
    setting = random_setting("mlp", "tanh", examples=6)
    (x, y), *_ = setting.data
    check = theory.kfac_exact_one_example(setting.model, setting.loss, [(x[:1], y[:1])], "fc1")
    assert check.passed
    factors = kfac.KFAC.fit(setting.model, setting.loss, setting.data, "fc1", labels="exact").factors["fc1"]
    G = explicit.gauss_newton(setting.model, setting.loss, setting.data, find_layers(setting.model, "fc1"))
    assert relative(torch.kron(factors.S, factors.A), G) > 1e-3


def test_a_nonlinear_network_shares_no_curvature() -> None:
    setting = random_setting("mlp", "tanh", "squared error", examples=6, depth=2)
    check = theory.kfac_exact_shared_curvature(setting.model, setting.data, "fc1")
    assert (check.verdict, check.passed) == ("refuted", False)
    assert theory.kfac_exact_shared_curvature(setting.model, setting.data, "fc2").verdict == "holds"  # the last layer


def test_layers_with_shared_weights_are_left_out() -> None:
    with pytest.raises(ValueError, match="compared nothing"):
        theory.kfac_exact_one_example(*random_setting("sequence").arguments)


def test_a_wrong_scale_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A per loss term instead of per position, where they differ."""
    monkeypatch.setattr(Factors, "A", property(lambda self: self.a_sum / self.scale.terms))
    setting = random_setting("conv", examples=3)
    assert not theory.ekfac_best_diagonal(*setting.arguments).passed
    assert not theory.own_curvature_bound(*setting.arguments, curvatures=("kfac",)).passed


def test_swapped_factors_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = kfac.kronecker_block
    setting = random_setting("mlp", width=4, examples=5)  # fc2 is 3 × 4, fc1 4 × 5

    def swapped(layer, A, S, gamma, seed):  # type: ignore[no-untyped-def]
        if A.shape == S.shape:
            return honest(layer, S, A, gamma, seed)
        block = honest(layer, A, S, gamma, seed)
        return replace(block, values=block.values.flip(0))

    monkeypatch.setattr(kfac, "kronecker_block", swapped)
    assert not theory.own_curvature_bound(*setting.arguments, curvatures=("kfac",)).passed


def test_gradients_not_summed_over_positions_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """EK-FAC's eigenvalues from positions one by one, as if they were examples."""
    honest = ekfac.add_squares

    def each(total, g, a, u_out, u_in):  # type: ignore[no-untyped-def]
        for t in range(g.shape[-1]):
            honest(total, g[..., t : t + 1], a[:, t : t + 1], u_out, u_in)

    monkeypatch.setattr(ekfac, "add_squares", each)
    assert not theory.ekfac_best_diagonal(*random_setting("sequence").arguments).passed
    assert theory.ekfac_best_diagonal(*random_setting("mlp").arguments).passed  # one position: no difference
