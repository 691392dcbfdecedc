"""Claim 10: the bound in a curvature's own null space, and what is left of it in the GGN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from strategies import cases, random_settings

from curvlab import projector, theory
from curvlab.projector import NullBlock
from curvlab.theory import Setting, random_setting
from curvlab.theory.curvatures import FIVE, Curvature

GAMMAS = st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.99, 0.9999])


SETTINGS = random_settings(dtypes=(torch.float32, torch.float64), width=(2, 4), depth=(1, 2))


@cases(80)
@given(SETTINGS, GAMMAS, st.sampled_from(FIVE))
def test_own_curvature(setting: Setting, gamma: float, curvature: Curvature) -> None:
    try:
        check = theory.own_curvature_bound(*setting.arguments, gammas=[gamma], curvatures=[curvature])
    except ValueError:  # no curvature at all: dead units
        reject()
    assert (check.verdict, check.passed) == ("holds", True), [c for c in check.cases if not c.as_expected]


@cases(40)
@given(SETTINGS, GAMMAS, st.sampled_from(FIVE))
def test_in_the_ggn(setting: Setting, gamma: float, curvature: Curvature) -> None:
    try:
        check = theory.bound_in_the_ggn(*setting.arguments, gammas=[gamma], curvatures=[curvature])
    except ValueError:
        reject()
    assert (check.verdict, check.passed) == ("holds", True), [c for c in check.cases if not c.as_expected]


@pytest.mark.parametrize("clusters", [2, 5])
def test_the_factor_of_clusters_is_their_number(clusters: int) -> None:
    found = [random_setting("mlp", examples=8, width=4, seed=seed) for seed in range(3)]
    check = theory.bound_exceeded_in_the_ggn(clusters=clusters, settings=found)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases
    assert check.measured == pytest.approx(clusters, abs=1e-6)


def test_one_example_keeps_the_bound() -> None:
    """K-FAC is exact on one example: fed to the search for counterexamples, it finds none."""
    setting = random_setting("mlp", examples=1)
    check = theory.bound_in_the_ggn(*setting.arguments, curvatures=("kfac",))
    factors = [found["factor"] for layer in check.series.values() for found in layer["kfac"] if found["factor"]]
    assert max(factors) == pytest.approx(1)
    assert not theory.bound_exceeded_in_the_ggn(settings=[setting]).passed


@pytest.mark.parametrize("curvature", FIVE)
def test_a_direction_too_many_is_found_out(curvature: Curvature, monkeypatch: pytest.MonkeyPatch) -> None:
    """A null space that gives the largest eigenvalue's directions back."""
    honest = projector._null_block

    def leaky(block, gamma, k):  # type: ignore[no-untyped-def]
        found: NullBlock = honest(block, gamma, k)
        return replace(found, removed=found.removed & (block.magnitudes < block.magnitudes.max()))

    monkeypatch.setattr(projector, "_null_block", leaky)
    setting = random_setting("mlp", examples=6)
    check = theory.own_curvature_bound(*setting.arguments, curvatures=(curvature,))
    assert not check.passed


def test_more_than_needed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """k one eigenspace too large: the bound still holds, but k is not the least."""
    honest = projector._null_block
    monkeypatch.setattr(projector, "_null_block", lambda block, gamma, k: honest(block, (1 + gamma) / 2, k))
    assert not theory.own_curvature_bound(*random_setting("mlp", examples=6).arguments, gammas=[0.5]).passed


def test_a_dropped_transpose_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.spectrum import KroneckerBasis

    honest = KroneckerBasis.filter

    def turned(self, delta, mask, plan):  # type: ignore[no-untyped-def]
        return honest(replace(self, u_in=self.u_in.mT.contiguous()), delta, mask, plan)

    monkeypatch.setattr(KroneckerBasis, "filter", turned)
    monkeypatch.setattr(NullBlock, "_cheapest", property(_whole))
    check = theory.own_curvature_bound(*random_setting("mlp", examples=6).arguments, curvatures=("kfac",))
    assert not check.passed


def _whole(self):  # type: ignore[no-untyped-def]
    return self.basis, self.removed.to(self.basis.like.dtype), self.basis.plan(self.removed), True
