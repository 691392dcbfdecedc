"""Ratios of scales are named by counts, the simplest formula first, and nothing is named by chance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvlab.crosscheck.scales import explain

COUNTS = {"examples": 37, "positions": 16, "batches": 5, "classes": 10}


@pytest.mark.parametrize(
    ("ratio", "starts"),
    [
        (1.0, "1: the same scale"),
        (37, "× examples = 37: a sum over examples where ours is a mean"),
        (1 / 16, "÷ positions = 0.0625"),
        (1 / 25, "÷ batches² = 0.04: gradients of a loss that is a mean over batches"),
        (9**0.5, "× √(classes − 1) = 3"),
        (37 / 36, "× examples ÷ (examples − 1)"),
        (37 * 16, "× examples × positions = 592"),
        (16 / 37, "÷ examples × positions"),
    ],
)
def test_known_conventions(ratio: float, starts: str) -> None:
    found = explain(ratio, COUNTS)
    assert found is not None
    assert found.startswith(starts), found


def test_formulas_that_fit_equally_well_are_all_named() -> None:
    assert explain(37, {"examples": 37, "loss terms": 37}).count(" or ") == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("ratio", [1.0001, 36.9, 3.1416, 1e-9])
def test_what_no_count_explains_stays_unexplained(ratio: float) -> None:
    assert explain(ratio, COUNTS) is None


def test_counts_of_one_explain_nothing() -> None:
    assert explain(2.0, {"batches": 1}) is None


@given(st.integers(2, 10**6), st.sampled_from([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]))
def test_any_count_to_any_power_is_found_within_the_tolerance(n: int, power: float) -> None:
    value = float(n) ** power
    counts = {"tokens": n}
    text = explain(value * (1 + 5e-7), counts)
    assert text is not None
    assert "tokens" in text or value == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        explain(ratio, COUNTS)


def test_bad_counts_and_tolerances() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        explain(1.0, {"tokens": 0})
    with pytest.raises(ValueError, match="by chance"):
        explain(1.0, COUNTS, rtol=0.1)
