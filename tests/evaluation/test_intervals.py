"""Bootstrap intervals against scipy's, their coverage, and the cases in which resampling says nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from curvlab.evaluation.intervals import Interval, bootstrap, paired_difference


def test_agrees_with_scipy() -> None:
    values = np.random.default_rng(5).lognormal(size=60)
    ours = bootstrap(values.tolist(), draws=20_000)
    peer = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), rel=1e-12)
    spread = peer.high - peer.low
    assert ours.low == pytest.approx(peer.low, abs=0.03 * spread)
    assert ours.high == pytest.approx(peer.high, abs=0.03 * spread)


def test_weights_are_drawn_with_their_values() -> None:
    """Repeating an item w times is another bootstrap; Σwv/Σw with items drawn whole is what scipy does on pairs."""
    generator = np.random.default_rng(2)
    values, weights = generator.normal(3.0, size=40), generator.integers(1, 30, size=40).astype(float)

    def ratio(v: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return (v * w).sum(axis) / w.sum(axis)

    peer = stats.bootstrap(
        (values, weights), ratio, paired=True, n_resamples=20_000, method="percentile", rng=3
    ).confidence_interval
    ours = bootstrap(values.tolist(), weights=weights.tolist(), draws=20_000)
    assert ours.mean == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert ours.low == pytest.approx(peer.low, abs=0.03 * (peer.high - peer.low))
    assert ours.high == pytest.approx(peer.high, abs=0.03 * (peer.high - peer.low))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_coverage(level: float) -> None:
    """The interval holds the true mean about as often as it says."""
    generator = np.random.default_rng(0)
    trials, held = 400, 0
    for trial in range(trials):
        found = bootstrap((generator.random(100) < 0.7).tolist(), seed=trial, draws=500, level=level)
        held += found.low <= 0.7 <= found.high
    assert abs(held / trials - level) < 3.5 * math.sqrt(level * (1 - level) / trials) + 0.02


def test_seed_decides_and_nothing_else() -> None:
    values = [0.0, 1.0, 1.0, 0.3, 0.7]
    np.random.seed(1)  # noqa: NPY002
    first = bootstrap(values, seed=4)
    np.random.seed(2)  # noqa: NPY002
    assert bootstrap(values, seed=4) == first != bootstrap(values, seed=5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    whole = bootstrap(values, draws=64)
    monkeypatch.setattr("curvlab.evaluation.intervals._CHUNK", 50 * 7)
    assert bootstrap(values, draws=64) == whole


@pytest.mark.parametrize("n", [1, 20, 300])
def test_all_right_is_not_certain(n: int) -> None:
    ones, zeros = bootstrap([1.0] * n), bootstrap([0.0] * n)
    exact = stats.binomtest(n, n).proportion_ci(0.95, method="exact")
    assert ones == (1.0, pytest.approx(exact.low, rel=1e-12), 1.0)
    assert zeros == (0.0, 0.0, pytest.approx(1 - exact.low, rel=1e-12))


def test_equal_values_that_are_no_shares() -> None:
    assert bootstrap([2.5] * 9) == (2.5, 2.5, 2.5)
    assert bootstrap([0.0] * 9, weights=[3.0] * 9) == (0.0, 0.0, 0.0)


def test_pairs_cancel_what_they_share() -> None:
    generator = np.random.default_rng(1)
    difficulty = generator.normal(size=200)
    better, worse = difficulty + 0.1, difficulty + 0.02 * generator.normal(size=200)
    found = paired_difference(better.tolist(), worse.tolist())
    assert 0.09 < found.low < found.mean < found.high < 0.11
    assert found.mean == pytest.approx((better - worse).mean(), rel=1e-12)
    assert found.high - found.low < 0.1 * (bootstrap(better.tolist()).high - bootstrap(better.tolist()).low)


def test_paired_is_the_bootstrap_of_differences() -> None:
    x, y, w = [1.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.25], [1.0, 2.0, 3.0, 4.0]
    differences = [a - b for a, b in zip(x, y, strict=True)]
    assert paired_difference(x, y, weights=w, seed=3) == bootstrap(differences, weights=w, seed=3)


def test_pairs_that_never_differ() -> None:
    slack = 1 - 0.025 ** (1 / 40)
    assert paired_difference([1.0, 0.0] * 20, [1.0, 0.0] * 20) == (0.0, pytest.approx(-slack), pytest.approx(slack))
    assert paired_difference([1.0] * 40, [0.0] * 40) == (1.0, pytest.approx(1 - slack), 1.0)
    assert paired_difference([3.0, 4.0], [2.0, 3.0]) == (1.0, 1.0, 1.0)


def test_nothing_measured() -> None:
    assert all(math.isnan(x) for x in (*bootstrap([]), *paired_difference([], [])))
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="2 positive"):
        bootstrap([1.0, 2.0], weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="2 positive"):
        bootstrap([1.0, 2.0], weights=[1.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0], level=1.0)
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
