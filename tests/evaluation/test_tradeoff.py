"""Reading a trade-off curve at a target."""

import math

import pytest

from curvlab.evaluation.tradeoff import best_at


def test_linear_between_neighbours() -> None:
    # from (0.99, 0.2) to (0.95, 0.6): a quarter of the way down lies 0.98
    assert best_at([0.99, 0.95], [0.2, 0.6], 0.98) == pytest.approx(0.3)


def test_the_best_of_several_crossings() -> None:
    kept, learnt = [1.0, 0.9, 1.0, 0.8], [0.0, 0.4, 0.1, 0.7]
    assert best_at(kept, learnt, 0.95) == pytest.approx(0.1 + 0.25 * 0.6)


def test_a_curve_that_stays_above_counts_with_its_best_point() -> None:
    assert best_at([0.99, 0.97], [0.5, 0.3], 0.95) == 0.5


def test_never_reached_is_nan() -> None:
    assert math.isnan(best_at([0.5, 0.4], [1.0, 1.0], 0.95))
    assert math.isnan(best_at([], [], 0.95))


def test_a_diverged_point_is_passed_over() -> None:
    kept, learnt = [0.99, math.nan, 0.9], [0.2, math.nan, 0.6]
    assert best_at(kept, learnt, 0.95) == 0.2  # no line leads through it


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        best_at([0.9], [0.1, 0.2], 0.9)
