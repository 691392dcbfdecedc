"""Claim 3: Prop. 3 on random factors, false versions of it, and a library that does it wrongly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases
from torch import Tensor

from curvlab import projector, theory
from curvlab.curvature import kfac
from curvlab.layers import LayerShape
from curvlab.spectrum import Block, KroneckerBasis
from curvlab.theory.kronecker import keeping, projector_matrix, random_factor

# few different values, so that zeros, repeated eigenvalues and coinciding products all occur
VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 1e-3]), min_size=1, max_size=6)


@cases(150)
@given(VALUES, VALUES, st.integers(0, 2**31))
def test_projection(inner: list[float], outer: list[float], seed: int) -> None:
    assume(any(inner) and any(outer))
    check = theory.kronecker_projection(random_factor(inner, seed), random_factor(outer, seed + 1))
    assert check.passed, [case for case in check.cases if not case.as_expected]
    assert check.verdict == "holds"


@cases(30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_projection_of_sample_factors(d_in: int, d_out: int, examples: int, seed: int) -> None:
    """Factors as they come: rank-deficient second moments of few examples, in single precision too."""
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(examples, d_in, generator=generator), torch.randn(examples, d_out, generator=generator)
    check = theory.kronecker_projection(a.mT @ a / examples, g.mT @ g / examples)
    assert check.passed, [case for case in check.cases if not case.as_expected]


@cases(40)
@given(VALUES, VALUES, st.integers(0, 2**31), st.floats(0.1, 1.5))
def test_cut_inside(inner: list[float], outer: list[float], seed: int, angle: float) -> None:
    check = theory.cut_inside_an_eigenspace(
        random_factor([2.0, 2.0, *inner], seed), random_factor([1.0, *outer], seed + 1), angle=angle
    )
    assert check.passed, [case for case in check.cases if not case.as_expected]


def test_without_a_repeated_eigenvalue_there_is_nothing_to_cut() -> None:
    with pytest.raises(ValueError, match="compared nothing"):
        theory.cut_inside_an_eigenspace(random_factor([3.0, 1.0]), random_factor([1.0]))


def test_known_projector() -> None:
    """A = diag(2, 1), S = diag(3, 0, 1): the products are laid out like W, and only their own entries are removed."""
    basis = KroneckerBasis(LayerShape("w", 3, 2, False), torch.eye(3).double(), torch.eye(2).double())
    keep = torch.tensor([[6.0, 3.0], [0.0, 0.0], [2.0, 1.0]]) <= 2
    rows = projector_matrix(keeping(basis, keep), basis.layer, "row-major")
    assert rows.diagonal().tolist() == [0, 0, 1, 1, 1, 1]
    columns = projector_matrix(keeping(basis, keep), basis.layer)
    assert columns.diagonal().tolist() == [0, 1, 1, 0, 1, 1]


def test_predicates_that_part_equal_eigenvalues_are_left_out() -> None:
    """ψ on eigenvalues that differ by rounding only cannot be decided; nothing is then compared with it."""
    A, S = random_factor([2.0, 1.0 + 1e-11, 1.0]), random_factor([1.0])
    between = {"between": lambda share: share > 0.5 + 2e-12}
    check = theory.kronecker_projection(A, S, predicates=between, gammas=(0.4,), ranks=())
    assert [case.name for case in check.cases] == ["γ = 0.4"]


def test_factors_that_are_no_second_moments_are_refused() -> None:
    good = random_factor([2.0, 1.0])
    for A, S, name in ((random_factor([2.0, -1.0]), good, "A"), (good, 0 * good, "S")):
        with pytest.raises(ValueError, match=f"{name} must be positive semi-definite and not zero"):
            theory.kronecker_projection(A, S)


def test_false_claims_are_rejected() -> None:
    """A factor that is not symmetric is outside the claim; two bases that are one show no dependence."""
    oblique = random_factor([2.0, 1.0]) + torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert not theory.kronecker_projection(oblique, random_factor([3.0, 1.0], 1)).passed
    A, S = random_factor([2.0, 2.0, 1.0]), random_factor([3.0, 1.0], 1)
    assert not theory.cut_inside_an_eigenspace(A, S, angle=0.0).passed


@pytest.mark.parametrize("broken", ["factors swapped", "eigenvectors in the wrong order", "ties cut by rank"])
def test_a_broken_library_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    A, S = random_factor([4.0, 2.0, 2.0, 1.0]), random_factor([3.0, 1.5, 1.0, 0.0], 1)
    assert theory.kronecker_projection(A, S).passed
    assert theory.cut_inside_an_eigenspace(A, S).passed
    honest, honest_null = kfac.kronecker_block, projector._null_block

    def swapped(layer: LayerShape, A: Tensor, S: Tensor, *rest: Any) -> Block:
        return honest(layer, S, A, *rest)

    def flipped(*args: Any) -> Block:
        block = honest(*args)
        return Block(replace(block.basis, u_in=block.basis.u_in.flip(1)), block.values, block.total)

    def by_rank(block: Block, gamma: float | None, k: int | None) -> projector.NullBlock:
        null = honest_null(block, gamma, k)
        if gamma is None:
            return null
        order = block.magnitudes.flatten().argsort(descending=True, stable=True)
        shares = block.magnitudes.flatten()[order].cumsum(0) / block.total
        removed = torch.zeros(len(order), dtype=torch.bool)
        removed[order[: int((shares < gamma).sum()) + 1]] = True
        return replace(null, removed=removed.view_as(block.magnitudes))

    if broken == "ties cut by rank":
        monkeypatch.setattr(projector, "_null_block", by_rank)
    else:
        monkeypatch.setattr(kfac, "kronecker_block", swapped if broken == "factors swapped" else flipped)
    assert not theory.kronecker_projection(A, S).passed


def test_a_missing_strip_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    A, S = (random_factor((1 / torch.arange(1.0, n + 1)).tolist(), n) for n in (200, 300))
    assert theory.kronecker_projection_of_large_layers(A, S).passed
    honest = KroneckerBasis.filter

    def short(self: KroneckerBasis, delta: Any, mask: Tensor, plan: Any) -> Any:
        rows, columns = plan.strips[-1]
        if len(plan.strips) > 1:
            mask = mask.clone()
            mask[..., rows, columns] = 0
        return honest(self, delta, mask, plan)

    monkeypatch.setattr(KroneckerBasis, "filter", short)
    assert not theory.kronecker_projection_of_large_layers(A, S).passed
