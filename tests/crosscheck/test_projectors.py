"""AlphaEdit's projectors: self-adjoint, idempotent, on the flat end of the inputs' second moment."""

from pathlib import Path

import pytest
import torch
from made import LAYER, alarms, faults, findings, second_moment
from torch import Tensor

from curvlab.crosscheck.parts import Stored


def files(P: Tensor, A: Tensor, count: int = 70, scale: float = 1.0) -> list[Stored]:
    moments = {"mom2.mom2": A * count * scale}
    return [
        Stored(Path(f"{LAYER}_float32_mom2_1000.npz"), "NumPy archive", moments, {"mom2.count": count}),
        Stored(Path(f"{LAYER}_projector.pt"), "torch zip", {"P": P}),
    ]


def moment(d: int = 24, kind: str = "power", seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return second_moment(d, kind, 500, seed, dtype)


def projector(A: Tensor, cutoff: float = 2e-2) -> Tensor:
    """As AlphaEdit makes it."""
    U, values, _ = torch.linalg.svd(A, full_matrices=False)
    few = U[:, values < cutoff]
    return few @ few.mT


def half(A: Tensor) -> Tensor:
    U = torch.linalg.eigh(A)[1][:, : len(A) // 2]
    return U @ U.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["power", "steep", "dominant"])
@pytest.mark.parametrize("d", [7, 24, 60])
def test_correct_projectors(d: int, kind: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        A = moment(d, kind, seed, dtype)
        values = torch.linalg.eigvalsh(A)
        A = A * (2e-2 / float(values[d // 2]) * 0.999)  # so that about half lie below
        found = findings(files(projector(A), A))
        assert not alarms(found)
        assert [f.severity for f in found if f.check == "projector-cutoff"] == ["ok"]
        few = torch.linalg.eigvalsh(A)[d // 4 - 1 : d // 4 + 1].mean()
        other = findings(files(projector(A, float(few)), A))
        assert not alarms(other)
        if kind != "dominant":  # 2e-2 is within round-off of one direction's 1e4 there
            assert [f.severity for f in other if f.check == "projector-cutoff"] == ["convention"]


@pytest.mark.parametrize("kind", ["power", "steep"])
def test_faults_of_projectors(kind: str) -> None:
    A = moment(24, kind)
    A = A * (2e-2 / float(torch.linalg.eigvalsh(A)[12]) * 0.999)
    P = projector(A)
    skewed = P + 0.1 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) @ (torch.eye(24) - P)
    U = torch.linalg.eigh(A)[1]
    random = U[:, torch.randperm(24, generator=torch.Generator().manual_seed(1))[:12]]
    expected = {
        "projector-wrong-end": torch.eye(24) - P,
        "projector-not-idempotent": 0.5 * P,
        "projector-not-symmetric": skewed,
        "stale-mask": half(moment(24, kind, 7)),
        "mask-all-kept": torch.eye(24),
        "mask-all-removed": torch.zeros(24, 24),
        "bfloat16-projector": P.bfloat16().float(),
    }
    for fault, wrong in expected.items():
        assert faults(findings(files(wrong, A))) == [fault], fault
    assert faults(findings(files(random @ random.mT, A)))[0] in ("unsorted-eigenvalues", "projector-wrong-end")


def test_threshold_against_the_sum() -> None:
    A = moment(24, "steep")
    A = A * (2e-2 / float(torch.linalg.eigvalsh(A)[20]))
    (found,) = [f for f in findings(files(projector(A * 70), A)) if f.fault]
    assert (found.fault, found.severity) == ("unnormalised-sums", "convention")


@pytest.mark.parametrize("d_out", [10, 16])
def test_output_side(d_out: int) -> None:
    A, S = moment(16, seed=0), moment(d_out, "power", seed=5)
    S_moment = Stored(Path(f"{LAYER}_float32_kfac_10.npz"), "torch zip", {"A": A, "B": S}, {"N": 1000})
    P = Stored(Path(f"{LAYER}_projector.pt"), "torch zip", {"P": projector(S, 0.1)})
    assert faults(findings([S_moment, P])) == ["projector-output-side"]


def test_a_projector_alone() -> None:
    P = projector(moment(24), 0.05)
    found = findings([Stored(Path("P.pt"), "torch zip", {"": P})])
    assert not alarms(found)
    (said,) = [f for f in found if f.check == "projector-idempotency"]
    assert f"{round(float(P.trace()))} of 24" in said.cause
