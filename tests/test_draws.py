"""Keyed random numbers: the generator, its distribution, and that every part of the key counts."""

import numpy as np
import pytest
import torch
from scipy import stats

from curvlab import draws
from curvlab.draws import BLOCK, categorical, normals, uniforms

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    """The finaliser of splitmix64, in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected(seed: int, draw: int, example: int, position: int, column: int) -> float:
    state = splitmix((seed * GOLDEN + 1) & MASK)
    for part in (draw, example, position + 1, column + 1):
        state = splitmix((state + part * GOLDEN) & MASK)
    return ((state >> 12) + 0.5) * 2.0**-52


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (1, 1), (7, 2), (2**40 + 3, 5), (-4, 1000)])
def test_the_generator_is_splitmix(seed: int, draw: int) -> None:
    examples = torch.tensor([0, 3, 10**6, 2**40])
    u = uniforms(seed, draw, examples, 2, 3)
    assert u.shape == (4, 2, 3)
    assert u.dtype == torch.float64
    for n, example in enumerate(examples.tolist()):
        for t in range(2):
            for c in range(3):
                assert float(u[n, t, c]) == expected(seed, draw, example, t, c)


def test_a_number_depends_on_nothing_but_its_key() -> None:
    whole = uniforms(1, 2, torch.arange(20), 7, 4)
    assert torch.equal(uniforms(1, 2, torch.tensor([5, 3]), 7, 4), whole[[5, 3]])
    assert torch.equal(uniforms(1, 2, torch.arange(20), 3, 2), whole[:, :3, :2])
    assert torch.equal(uniforms(1, 2, torch.arange(20, dtype=torch.int32), 7, 4), whole)


def test_uniform_on_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    u = uniforms(0, 0, torch.arange(4000), 5, 5).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    for bits, bound in ((-1, 1.0), (0, 0.0)):
        monkeypatch.setattr(draws, "_mix", lambda x, bits=bits: torch.full_like(x, bits))
        extreme = float(uniforms(0, 0, torch.arange(1), 1))
        assert 0.0 < extreme < 1.0
        assert abs(extreme - bound) < 1e-15
        assert bool(normals(0, 0, torch.arange(1), 1, 1).isfinite().all())


def test_every_part_of_the_key_gives_new_independent_numbers() -> None:
    n = torch.arange(3000)
    base = uniforms(0, 0, n, 2, 2)
    streams = [
        base[:, 0, 0],
        base[:, 1, 0],  # position
        base[:, 0, 1],  # column
        uniforms(1, 0, n, 1)[:, 0, 0],  # seed
        uniforms(0, 1, n, 1)[:, 0, 0],  # draw
        uniforms(0, 0, n + 1, 1)[:, 0, 0],  # example: the neighbour's
        uniforms(1, 1, n, 1)[:, 0, 0],
        uniforms(0, 0, n + 3000, 1)[:, 0, 0],
    ]
    table = torch.stack(streams).numpy()
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 5 / np.sqrt(3000)
    assert len(np.unique(table)) == 7 * 3000  # the neighbour's are the first and the last shifted by one
    # nor do pairs fall on few lines
    pairs = np.histogram2d(table[0], table[4], bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_normals() -> None:
    z = normals(3, 1, torch.arange(4000), 3, 4)
    assert z.shape == (4000, 3, 4)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    u = uniforms(3, 1, torch.arange(4000), 3, 4)
    np.testing.assert_allclose(z, stats.norm.ppf(u), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000, 30_011])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_categories_are_those_of_the_running_sum(
    classes: int, dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "CHUNK", 7 * classes)  # several chunks
    torch.manual_seed(classes)
    logits = (spread * torch.randn(5, 8, classes, dtype=torch.float64)).to(dtype)
    before = logits.clone()
    u = uniforms(0, 0, torch.arange(5), 8)
    cdf = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cdf, u * cdf[..., -1:]).squeeze(-1)
    assert torch.equal(categorical(logits, u.squeeze(-1)), expected)
    assert torch.equal(logits, before)


def test_categories_without_probability_are_never_drawn() -> None:
    n = 20_000
    logits = torch.full((n, 5 * BLOCK + 3), -torch.inf)
    alive = [3, BLOCK - 1, 2 * BLOCK, 4 * BLOCK + 5]
    logits[:, alive] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    u = uniforms(0, 0, torch.arange(n), 1).flatten()
    u[:4] = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.1, 0.3], dtype=torch.float64)
    drawn = categorical(logits, u)
    share = torch.bincount(drawn, minlength=logits.shape[1]) / n
    assert share.nonzero().flatten().tolist() == alive
    torch.testing.assert_close(share[alive], torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.012)
