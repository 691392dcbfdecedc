"""Factors as second moments: symmetric, positive, of a rank their samples allow; low rank and odd scales are fine."""

import pytest
import torch
from made import alarms, faults, findings, made, of_part, second_moment

from curvlab.crosscheck import factors
from curvlab.crosscheck.parts import Item, Part


def part(A: torch.Tensor, count: float | None = None, S: torch.Tensor | None = None) -> Part:
    items = {"A": Item("A", A, "f.npz: A", "key")}
    if S is not None:
        items["S"] = Item("S", S, "f.npz: B", "key")
    return Part("fc", items, count)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 3, 40, 400])
@pytest.mark.parametrize("d", [1, 2, 17, 40])
def test_second_moments_of_few_and_many_samples(d: int, samples: int, dtype: torch.dtype) -> None:
    for seed, kind in enumerate(("power", "flat", "steep", "dominant")):
        for scale in (1e-12, 1e12):
            A = second_moment(d, kind, samples, seed, dtype) * scale
            found = factors.check(part(A, samples))
            assert not alarms(found)
            assert {"factor-symmetry", "factor-definiteness", "factor-rank", "factor-scale"} == {f.check for f in found}


def test_one_large_sum_of_many_batches() -> None:
    """Round-off of a sum in float32, batch by batch."""
    x = torch.randn(4000, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, 30)
    A = torch.zeros(30, 30)
    for batch in x.split(16):
        A += batch.mT @ batch
    assert not alarms(factors.check(part(A / 4000, 4000)))


def test_asymmetric() -> None:
    A = second_moment(12, "power", 100, 0, torch.float32)
    small, large = A.clone(), A.clone()
    small[3, 7] += 1e-3 * A.abs().max()
    large[3, 7] += 0.5 * A.abs().max()
    for C, severity in ((small, "deviation"), (large, "error"), (A.triu(), "error")):
        (found,) = alarms(factors.check(part(C, 100)))
        assert (found.fault, found.severity) == ("asymmetric-factor", severity)
    (found,) = alarms(factors.check(part(large, 100)))
    assert found.measured == pytest.approx(0.5 * float(A.abs().max()) / float(large.abs().max()), rel=0.3)


def test_indefinite() -> None:
    A = second_moment(12, "power", 100, 0, torch.float64)
    values, U = torch.linalg.eigh(A)
    for share, severity in ((-0.2, "error"), (-1e-5, "deviation")):
        values[0] = share * values[-1]
        (found,) = alarms(factors.check(part((U * values) @ U.mT)))
        assert (found.fault, found.severity) == ("indefinite-factor", severity)
        assert found.measured == pytest.approx(share, rel=1e-6)


def test_rank_above_samples() -> None:
    A = second_moment(12, "flat", 100, 0, torch.float32)
    (found,) = alarms(factors.check(part(A, 5)))
    assert (found.fault, found.measured, found.bound) == ("rank-above-samples", 12, 5)
    assert faults(factors.check(part(A, 11))) == ["rank-above-samples"]
    assert not alarms(factors.check(part(A, 12)))
    damped = second_moment(12, "flat", 5, 0, torch.float32) + 1e-3 * torch.eye(12)
    assert faults(factors.check(part(damped, 5))) == ["rank-above-samples"]
    # exact labels give several gradients a sample
    S = Item("S", A, "kfac.safetensors: fc/S", "key")
    assert not alarms(factors.check(Part("fc", {"S": S}, 5)))


def test_nothing_and_twice_the_same() -> None:
    A = second_moment(6, "flat", 100, 0, torch.float32)
    assert faults(factors.check(part(torch.zeros(6, 6)))) == ["zero-factor"]
    assert faults(factors.check(part(A, 100, A.clone()))) == ["duplicated-factor"]
    assert faults(factors.check(part(A[:, :4]))) == ["mismatched-shapes"]
    assert faults(factors.check(part(A * 1e-20, 100, second_moment(6, "flat", 100, 1, torch.float32) * 1e-20))) == [
        "float32-range"
    ]


def test_large_factors_by_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "FULL_UNTIL", 8)
    A = second_moment(20, "power", 100, 0, torch.float32)
    assert not alarms(factors.check(part(A, 100)))
    low = second_moment(20, "power", 3, 0, torch.float32)
    assert not alarms(factors.check(part(low, 3)))
    assert faults(factors.check(part(A - 0.1 * torch.eye(20), 100))) == ["indefinite-factor"]


def test_an_indefinite_factor_leaves_its_mask_alone() -> None:
    m = made((10, 16))
    m.A = m.A - 6 * m.la[-1] * torch.outer(m.Ua[:, -1], m.Ua[:, -1])
    found = findings(m.files(), 0.9)
    assert faults(found) == ["indefinite-factor"]


def test_numbers_that_are_none_are_left_to_the_report() -> None:
    A = torch.full((4, 4), float("nan"))
    assert of_part(part(A, 3)) == []
