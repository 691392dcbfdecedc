"""Bootstrap confidence intervals of means, of ratios and of paired differences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2**22  # resampled values held at once

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval; all NaN where nothing was measured."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The (weighted) mean of independent values with its percentile bootstrap interval (Efron 1979).

    Args:
        values: (n,) one value an item, such as 1 or 0 for a right or wrong answer; empty gives NaN.
        weights: (n,) positive, drawn together with the values: Σwv/Σw, such as a loss a token with the tokens of
            each document. The exponential of all three numbers is then the perplexity with its interval, since
            percentiles pass through increasing functions.
        seed: of the draws, which depend on nothing else.
        level: of the interval, two-sided.

    Items that all agree resample to themselves, which would claim certainty. Where all n values are 0, or all are
    1, and there are no weights, they are taken as shares, with the exact interval of Clopper and Pearson: from
    ((1 − level)/2)^(1/n) to 1 for ones. Other equal values, such as a single one, keep an interval of width 0.

    Raises:
        ValueError: a value that is not finite, weights that are not positive or not (n,), a level outside (0, 1),
            fewer than one draw.
    """
    x = _checked(values, draws, level)
    if not len(x):
        return Interval(np.nan, np.nan, np.nan)
    w = _weights(weights, len(x))
    if bool((x == x[0]).all()):
        value, slack = float(x[0]), _slack(len(x), level) if weights is None else 0.0
        return Interval(value, value - slack * (value == 1), value + slack * (value == 0))
    return _percentiles(x, w, seed, draws, level)


def paired_difference(
    values: Sequence[float],
    others: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The mean of values − others with its interval, items drawn in pairs; what items share cancels.

    Where all n differences agree, all values lie in [0, 1] and there are no weights (shares, then), the interval
    reaches 1 − ((1 − level)/2)^(1/n) to both sides: so many items of another kind could have been missed.

    Raises:
        ValueError: unequal numbers of items, and as in `bootstrap`.
    """
    x, y = _checked(values, draws, level), _checked(others, draws, level)
    if len(x) != len(y):
        raise ValueError(f"pairs need equally many items, got {len(x)} and {len(y)}")
    if not len(x):
        return Interval(np.nan, np.nan, np.nan)
    d, w = x - y, _weights(weights, len(x))
    if bool((d == d[0]).all()):
        shares = weights is None and min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= 1
        value, slack = float(d[0]), _slack(len(d), level) if shares else 0.0
        return Interval(value, max(value - slack, min(value, -1.0)), min(value + slack, max(value, 1.0)))
    return _percentiles(d, w, seed, draws, level)


def _slack(n: int, level: float) -> float:
    """The largest share of items that n draws may all have missed (Clopper and Pearson)."""
    return float(1 - ((1 - level) / 2) ** (1 / n))


def _percentiles(x: Floats, w: Floats, seed: int, draws: int, level: float) -> Interval:
    generator = np.random.default_rng(seed)
    n = len(x)
    rows = max(1, _CHUNK // n)
    means = []
    for start in range(0, draws, rows):
        index = generator.integers(0, n, size=(min(rows, draws - start), n))
        means.append((w * x)[index].sum(1) / w[index].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float((w * x).sum() / w.sum()), float(low), float(high))


def _weights(weights: Sequence[float] | None, n: int) -> Floats:
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not bool((w > 0).all()) or not bool(np.isfinite(w).all()):
        raise ValueError(f"weights must be {n} positive numbers, one a value")
    return w


def _checked(values: Sequence[float], draws: int, level: float) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not bool(np.isfinite(x).all()):
        raise ValueError("values must be a list of finite numbers")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws must be at least 1 and level in (0, 1), got {draws} and {level}")
    return x
