"""Block Lanczos and stochastic quadrature against full decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from torch import Tensor

from curvlab.krylov import BlockLanczos, absolute_trace, clear, largest_cluster

pytestmark = pytest.mark.usefixtures("float64")


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=values.dtype))[0]
    return U * values @ U.T


def by_magnitude(values: Tensor) -> Tensor:
    return values[values.abs().argsort(descending=True, stable=True)]


def solve(C: Tensor, count: int, **options):  # type: ignore[no-untyped-def]
    lanczos = BlockLanczos(lambda rows: rows @ C, len(C), dtype=C.dtype, device="cpu", **options)
    return lanczos, lanczos.solve(lambda values: len(values) >= count)


SPECTRA = {
    "decaying": lambda: torch.exp(-0.1 * torch.arange(200.0)),
    "indefinite": lambda: torch.exp(-0.1 * torch.arange(200.0)) * (-1.0) ** torch.arange(200),
    "low rank": lambda: torch.cat([torch.arange(1.0, 31.0), torch.zeros(170)]),
    "flat": lambda: torch.linspace(1, 2, 200),
    "clusters": lambda: torch.repeat_interleave(torch.tensor([8.0, 4.0, 2.0, 1.0]), 50),
    "two pairs": lambda: torch.cat([torch.tensor([5.0, -5.0, 5.0, -5.0]), torch.exp(-0.1 * torch.arange(196.0))]),
    "far apart": lambda: torch.cat([torch.tensor([1e8]), torch.exp(-0.2 * torch.arange(199.0))]),
}


@pytest.mark.parametrize("count", [1, 10, 60])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_leading_eigenpairs(name: str, count: int) -> None:
    values = SPECTRA[name]()
    C = matrix(values)
    _, pairs = solve(C, count)
    n = len(pairs.values)
    assert n > count or n == 200
    assert_close(pairs.values.abs(), by_magnitude(values).abs()[:n], 1e-9)
    if name != "two pairs":  # +5 and −5 have no order
        assert_close(pairs.values, by_magnitude(values)[:n], 1e-9)
    assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(n))
    true = (C @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert float(true.max()) <= 2e-10 * float(values.abs().max())
    if n < 200:  # the residuals reported are those of the pairs
        assert float((pairs.residuals - true).abs().max()) <= 1e-12 * float(values.abs().max())


def test_easy_spectra_end_early_and_products_are_counted() -> None:
    products = []
    C = matrix(SPECTRA["decaying"]())

    def matmat(rows: Tensor) -> Tensor:
        products.append(len(rows))
        return rows @ C

    lanczos = BlockLanczos(matmat, 200, dtype=C.dtype, device="cpu")
    pairs = lanczos.solve(lambda values: len(values) >= 10)
    assert pairs.products == sum(products) == lanczos.size < 150
    more = lanczos.solve(lambda values: len(values) >= 30)
    assert more.products == sum(products)  # it grew on from where it was
    assert_close(more.values[:10], pairs.values[:10], 1e-9)


def test_the_pair_after_the_last_is_clear_of_it() -> None:
    """Where asked for 10 of 50 equal values, all 50 come, and one below them."""
    for count in (10, 49, 50):
        _, pairs = solve(matrix(SPECTRA["clusters"]()), count)
        assert int((pairs.values > 7.9).sum()) == 50
        assert len(pairs.values) > 50


def test_giving_up_at_a_limit() -> None:
    C = matrix(SPECTRA["flat"]())
    lanczos = BlockLanczos(lambda rows: rows @ C, 200, dtype=C.dtype, device="cpu")
    pairs = lanczos.solve(lambda values: len(values) >= 100, limit=60)
    assert 60 < lanczos.size < 100
    assert len(pairs.values) < 100
    assert pairs.vectors.shape == (200, len(pairs.values))


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17])
def test_small_dimensions(dim: int) -> None:
    values = torch.arange(1.0, dim + 1).flip(0)
    _, pairs = solve(matrix(values), dim)
    assert_close(pairs.values, values)


def test_zero() -> None:
    lanczos, pairs = solve(torch.zeros(40, 40), 3)
    assert lanczos.exhausted
    assert float(pairs.values.abs().max()) == 0.0


def test_single_precision() -> None:
    values = SPECTRA["decaying"]()
    lanczos, pairs = solve(matrix(values).float(), 10)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values.dtype == torch.float64
    assert lanczos.size < 150
    assert_close(pairs.values, values[: len(pairs.values)], 1e-5)


def test_seeds() -> None:
    C = matrix(SPECTRA["decaying"]())
    first, again, other = (solve(C, 5, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert_close(first.values[:5], other.values[:5], 1e-9)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 0.5]), min_size=3, max_size=40),
    st.integers(1, 10),
    st.integers(1, 6),
)
def test_any_repeated_spectrum(values: list[float], count: int, block: int) -> None:
    C = matrix(torch.tensor(values, dtype=torch.float64))
    _, pairs = solve(C, count, block=block)
    n = len(pairs.values)
    assert n > count or n == len(values)
    expected = by_magnitude(torch.linalg.eigvalsh(C)).abs()[:n]
    assert float((pairs.values.abs() - expected).abs().max()) < 1e-8


def test_clear_and_clusters() -> None:
    eps = torch.finfo(torch.float64).eps
    assert clear(torch.tensor([3.0, 2.0, 1.0]), eps) == 2
    assert clear(torch.tensor([3.0, -1.0, 1.0 + 1e-16]), eps) == 1
    assert clear(torch.tensor([1.0]), eps) == clear(torch.tensor([]), eps) == 0
    assert clear(torch.tensor([1.0, 1e-20, 0.0]), eps) == 2
    assert largest_cluster(torch.tensor([3.0, 3.0, 1.0, -1.0, 1.0, 1.0 + 1e-13]), 1e-10) == 3
    assert largest_cluster(torch.tensor([3.0, 0.0, 0.0, 0.0]), 1e-10) == 1
    assert largest_cluster(torch.zeros(3), 1e-10) == 0


# Σ|σ|


def test_absolute_traces_of_diagonal_matrices_are_exact() -> None:
    """Random signs have zᵀ|C|z = tr|C| there, and forty steps are exact for forty dimensions."""
    values = torch.linspace(-3, 5, 40)
    total, error = absolute_trace(lambda rows: rows * values, 40, dtype=torch.float64, device="cpu")
    assert total == pytest.approx(float(values.abs().sum()), rel=1e-9)
    assert error < 1e-8
    deflated = torch.eye(40)[:, -5:]
    rest, _ = absolute_trace(lambda rows: rows * values, 40, dtype=torch.float64, device="cpu", deflate=deflated)
    assert rest == pytest.approx(float(values[:-5].abs().sum()), rel=1e-9)


@pytest.mark.parametrize("name", ["decaying", "indefinite", "low rank", "flat", "clusters"])
def test_absolute_traces_lie_within_their_error(name: str) -> None:
    C = matrix(SPECTRA[name]())
    true = float(torch.linalg.eigvalsh(C).abs().sum())
    total, error = absolute_trace(lambda rows: rows @ C, 200, dtype=torch.float64, device="cpu", probes=32)
    assert abs(total - true) < 5 * error + 1e-9 * true
    assert error < 0.1 * true
    values, U = torch.linalg.eigh(C)
    lead = U[:, values.abs().argsort(descending=True)[:20]]
    rest, rest_error = absolute_trace(
        lambda rows: rows @ C, 200, dtype=torch.float64, device="cpu", deflate=lead, probes=32
    )
    true_rest = true - float(values.abs().sort(descending=True).values[:20].sum())
    assert abs(rest - true_rest) < 5 * rest_error + 1e-9 * true


def test_the_error_of_absolute_traces_is_a_standard_error() -> None:
    C = matrix(SPECTRA["indefinite"]())
    true = float(torch.linalg.eigvalsh(C).abs().sum())
    scores = []
    for seed in range(30):
        total, error = absolute_trace(lambda rows: rows @ C, 200, dtype=torch.float64, device="cpu", seed=seed)
        scores.append((total - true) / error)
    assert 0.6 < float(torch.tensor(scores).square().mean().sqrt()) < 1.7


def test_deflation_holds_where_eigenvectors_are_known_to_some_digits_only() -> None:
    values = SPECTRA["far apart"]()
    C = matrix(values)
    lead = torch.linalg.eigh(C)[1][:, -1:]
    lead = torch.nn.functional.normalize(lead + 1e-9 * torch.randn(200, 1, generator=torch.Generator()), dim=0)
    rest, error = absolute_trace(lambda rows: rows @ C, 200, dtype=torch.float64, device="cpu", deflate=lead, probes=32)
    true = float(values[1:].sum())
    assert abs(rest - true) < 5 * error + 1e-3 * true
    assert error < 0.2 * true


def test_absolute_traces_of_nothing() -> None:
    assert absolute_trace(lambda rows: 0 * rows, 10, dtype=torch.float64, device="cpu") == (0.0, 0.0)
    assert absolute_trace(lambda rows: rows, 10, dtype=torch.float64, device="cpu", deflate=torch.eye(10)) == (0.0, 0.0)


def test_more_copies_than_a_block_are_found_without_exhausting_the_space() -> None:
    values = torch.cat([torch.full((20,), 3.0), torch.exp(-0.2 * torch.arange(380.0))])
    lanczos, pairs = solve(matrix(values), 21)
    assert lanczos.size < 300
    assert int((pairs.values > 2.9).sum()) == 20
    assert_close(pairs.values, by_magnitude(values)[: len(pairs.values)], 1e-9)
