"""Reading a trade-off curve: how much is learnt where a given share is kept."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_at(
    kept: Sequence[float] | NDArray[np.float64], learnt: Sequence[float] | NDArray[np.float64], target: float
) -> float:
    """What is learnt where a curve keeps `target`, in the units of `learnt`; NaN where it never keeps as much.

    `kept` and `learnt` (points,) are in the order of the curve's knob (γ, ε, a learning rate). Linear between
    neighbouring points; where the curve crosses the target several times the best crossing counts, and where it stays
    above, its best point. Raises ValueError for sequences of different lengths.
    """
    x, y = np.asarray(kept, dtype=np.float64), np.asarray(learnt, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"kept and learnt must be two sequences of one length, got shapes {x.shape} and {y.shape}")
    found = [
        y[i] + (target - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i])
        for i in range(len(x) - 1)
        if (x[i] - target) * (x[i + 1] - target) <= 0 and x[i] != x[i + 1]
    ]
    return float(max([*found, *y[x >= target]], default=math.nan))
