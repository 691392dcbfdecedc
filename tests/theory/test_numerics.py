"""Claim 16: round-off; sums that lose the tail, and sums broken on purpose."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

from curvlab import projector, theory
from curvlab.curvature import kfac
from curvlab.spectrum import Block
from curvlab.theory.summation import sorted_products

WHOLE = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@cases(40)
@given(WHOLE, WHOLE)
def test_library_against_integers(outer: list[int], inner: list[int]) -> None:
    if not (any(outer) and any(inner)):
        with pytest.raises(ValueError, match="not all be zero"):
            theory.library_energy_is_exact(outer=outer, inner=inner)
        return
    check = theory.library_energy_is_exact(outer=outer, inner=inner)
    assert (check.verdict, check.passed) == ("holds", True), check.cases


@cases(20)
@given(st.integers(24, 80), st.integers(1, 8), st.integers(0, 2**31))
def test_below_zero(size: int, rank: int, seed: int) -> None:
    check = theory.eigenvalues_below_zero(size=size, rank=rank, seed=seed)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases


@cases(20)
@given(st.integers(2, 12), st.integers(2, 12), st.floats(0.3, 0.97), st.integers(0, 2**31))
def test_bfloat16(d_out: int, d_in: int, gamma: float, seed: int) -> None:
    check = theory.bfloat16_bases(d_out=d_out, d_in=d_in, gamma=gamma, seed=seed)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases


@pytest.mark.parametrize("shape", [(512, 2048), (1100, 1000)])
def test_sums(shape: tuple[int, int]) -> None:
    check = theory.float32_energy(shape=shape)
    assert (check.verdict, check.passed) == ("holds under conditions", True), check.cases


def test_a_small_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2\\^20"):
        theory.float32_energy(shape=(10, 10))


def test_the_spike_s_tail_is_lost() -> None:
    """In order and in float32, the sum stands still once the tail begins: its 1.5 % are not there."""
    x = sorted_products("spike and tail", (512, 2048))
    sums = np.cumsum(x)
    assert sums.dtype == np.float32
    assert sums[-1] == sums[512 + 2048]
    assert sums[-1] / x.sum(dtype=np.float64) == pytest.approx(1 - 0.02 / (1 + 0.02**0.5) ** 2, abs=1e-3)


def test_sums_in_float32_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's energy added in order in float32, where what comes after 2³⁰ is lost."""

    def sequential(self, dim):  # type: ignore[no-untyped-def]
        return torch.from_numpy(np.cumsum(self.numpy().astype(np.float32)).astype(np.float64))

    spike = [2**30, *range(30, 0, -1)]
    assert theory.library_energy_is_exact(outer=[1], inner=spike, digits=[22]).passed
    monkeypatch.setattr(torch.Tensor, "cumsum", sequential)
    assert not theory.library_energy_is_exact(outer=[1], inner=spike, digits=[22]).passed


def test_a_total_without_its_tail_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = projector._null_block

    def short(block: Block, gamma, k):  # type: ignore[no-untyped-def]
        return honest(replace(block, total=0.9 * block.total), gamma, k)

    monkeypatch.setattr(projector, "_null_block", short)
    assert not theory.library_energy_is_exact(outer=[5, 3, 2], inner=[7, 4, 1, 1]).passed


def test_eigenvalues_left_negative_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors decomposed in their own float32, without the clamp."""

    def raw(C, semidefinite=False):  # type: ignore[no-untyped-def]
        values, vectors = torch.linalg.eigh(C.float())
        return values.flip(0).double(), vectors.flip(1).double()

    monkeypatch.setattr(kfac, "eigh", raw)
    assert not theory.eigenvalues_below_zero().passed


def test_projectors_in_bfloat16_throughout_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = projector.NullSpace.to
    monkeypatch.setattr(projector.NullSpace, "to", lambda self, dtype: honest(honest(self, torch.bfloat16), dtype))
    assert not theory.bfloat16_bases().passed
