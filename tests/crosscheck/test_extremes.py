"""The ends of floating point: no check fails there, nothing is alarmed at, and what counts nothing is said."""

import json
import math

import pytest
import torch
from made import LAYER, alarms, faults, findings, made, of_part

from curvlab.crosscheck.extremes import finite, is_count, moderate
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Item, Part


@pytest.mark.parametrize("scale", [1e-290, 1e-200, 1e-120, 1e120, 1e200, 1e290])
def test_factors_near_the_ends_of_float64(scale: float) -> None:
    m = made(dtype=torch.float64)
    m.A, m.B = m.A * scale, m.B * scale
    assert faults(findings(m.files(), 0.9)) == ["float32-range"]  # which they are beyond, and nothing else
    m.M = ~m.M
    assert "wrong-end-threshold" in faults(findings(m.files(), 0.9))


def test_moderate_parts_are_left_alone() -> None:
    (part,) = identify(made().files())
    assert moderate(part) is part
    A = 1e200 * torch.eye(3, dtype=torch.float64)
    part = Part(LAYER, {"A": Item("A", A, "f", ""), "values_in": Item("values_in", A.diagonal(), "f", "")})
    scaled = moderate(part)
    assert float(scaled.items["A"].tensor.max()) <= 2
    assert torch.equal(scaled.items["A"].tensor.diagonal(), scaled.items["values_in"].tensor)


@pytest.mark.parametrize(
    ("n", "counts"),
    [
        (1, True),
        (2.5, True),
        (10**9, True),
        (0, False),
        (-3, False),
        (0.5, False),
        (math.inf, False),
        (math.nan, False),
    ],
)
def test_what_counts_samples(n: float, counts: bool) -> None:
    assert is_count(n) == counts
    m = made()
    m.N = n  # type: ignore[assignment]
    said = [f for f in findings(m.files(), 0.9) if f.check == "factor-count"]
    assert bool(said) != counts
    assert all(f.fault == "no-count" for f in said)


@pytest.mark.parametrize(("n", "severity"), [("many", "convention"), (10**400, "error"), ("4000", None)])
def test_counts_in_other_words(n: str | int, severity: str | None) -> None:
    m = made()
    m.N = n  # type: ignore[assignment]
    assert [f.severity for f in findings(m.files()) if f.check == "factor-count"] == ([severity] if severity else [])


def test_findings_are_json() -> None:
    found = finite(Finding("x", "ok", "y", math.nan, math.inf, "z"))
    assert (found.measured, found.bound) == ("nan", "inf")
    json.dumps(found.as_json(), allow_nan=False)
    (part,) = identify(made(dtype=torch.float64).files())
    for own in of_part(part, 0.9):
        json.dumps(own.as_json(), allow_nan=False)
    assert not alarms([found])
