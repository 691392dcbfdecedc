"""Claim 5: formulas of storage and cost on objects of random shapes, and the published figures."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from curvlab import theory
from curvlab.spectrum import KroneckerBasis
from curvlab.theory.published import figures, llama_parameters
from curvlab.theory.storage import LLAMA, entries, products

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
GAMMAS = st.floats(0.05, 0.95)


@cases(60)
@given(SHAPES, GAMMAS, st.integers(0, 2**31))
def test_storage(shape: tuple[int, int], gamma: float, seed: int) -> None:
    check = theory.storage_of_a_projection(shapes=[shape], gamma=gamma, seed=seed)
    assert (check.verdict, check.passed) == ("holds", True), check.cases


@cases(40)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), GAMMAS, st.integers(0, 2**31))
def test_operations(shape: tuple[int, int], gamma: float, seed: int) -> None:
    check = theory.operations_of_a_projection(shapes=[shape], gamma=gamma, seed=seed)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases


def test_known_numbers() -> None:
    """By hand: 4096² = 16,777,216; 14336² = 205,520,896; 4096 · 14336 = 58,720,256."""
    found = entries(LLAMA)
    assert (found["bases"], found["mask"]) == (16_777_216 + 205_520_896, 58_720_256)
    assert found["explicit projector"] * 4 == pytest.approx(13.8e15, rel=1e-3)  # bytes of float32
    assert products((2, 3))["multiply–adds"] == 2 * 2 * 3 + 2 * 3 * 3 + 2 * 3 * 3 + 2 * 2 * 3
    assert llama_parameters() == 8_030_261_248  # as the model's card has it


def test_published_figures() -> None:
    check = theory.published_storage_figures()
    assert (check.verdict, check.passed) == ("holds under conditions", True)
    wrong = [case.name for case in check.cases if not case.holds and not case.control]
    assert len(wrong) == 9
    assert sum("3.4TB" in name for name in wrong) == 5


def test_false_figures_are_found_out() -> None:
    """Each figure ten times larger, claimed right."""
    tenfold = [replace(f, stated=10 * f.stated, unit=10 * f.unit, right=True) for f in figures() if f.right]
    check = theory.published_storage_figures(published=tenfold)
    own = [case for case in check.cases if not case.control]
    assert not any(case.holds for case in own)
    assert (check.verdict, check.passed) == ("refuted", False)


def test_rounding_is_allowed_on_both_sides() -> None:
    (figure,) = (f for f in figures() if "entries" in f.quote)
    for true, right in ((3.449e15, True), (3.351e15, True), (3.451e15, False), (3.349e15, False)):
        check = theory.published_storage_figures(published=[replace(figure, true=true)])
        assert check.cases[0].holds == right


def test_a_basis_stored_twice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KroneckerBasis.tensors
    monkeypatch.setattr(KroneckerBasis, "tensors", lambda self: honest(self) | {"again": self.u_in})
    assert not theory.storage_of_a_projection().passed


def test_a_mask_of_eight_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab import projector

    honest = projector._null_block

    def wide(block, gamma, k):  # type: ignore[no-untyped-def]
        found = honest(block, gamma, k)
        return replace(found, removed=found.removed.to(torch.int64))

    monkeypatch.setattr(projector, "_null_block", wide)
    monkeypatch.setattr(projector.NullBlock, "project", lambda self, delta: delta)
    assert not theory.storage_of_a_projection().passed


def test_a_wasteful_projection_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KroneckerBasis.filter

    def twice(self, delta, mask, plan):  # type: ignore[no-untyped-def]
        for _ in range(9):
            found = honest(self, delta, mask, plan)
        return found

    monkeypatch.setattr(KroneckerBasis, "filter", twice)
    assert not theory.operations_of_a_projection().passed
