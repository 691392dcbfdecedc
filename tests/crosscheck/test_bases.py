"""Eigenvectors and eigenvalues: orthonormal, of the factors beside them, in one order."""

from pathlib import Path

import pytest
import torch
from made import LAYER, Made, alarms, faults, findings, made

from curvlab.crosscheck import bases, spectra
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Stored

SHAPES = [(10, 16), (12, 12), (3, 2), (40, 64)]


def values_file(m: Made, la: torch.Tensor, lb: torch.Tensor) -> list[Stored]:
    return [*m.files(), Stored(Path(f"{LAYER}.pt"), "torch zip", {"lambda_in": la, "lambda_out": lb})]


@pytest.mark.parametrize("kind", ["power", "flat", "steep", "dominant", "repeated"])
@pytest.mark.parametrize("shape", SHAPES)
def test_correct_bases(shape: tuple[int, int], kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        m = made(shape, kind=kind, dtype=dtype)
        found = findings(values_file(m, m.la, m.lb))
        assert not alarms(found)
        checks = [finding.check for finding in found if finding.severity == "ok"]
        assert checks.count("orthonormality") == checks.count("eigenvalues") == 2


@pytest.mark.parametrize("shape", [(10, 16), (12, 12), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_eigenvectors(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    name = str(dtype).removeprefix("torch.")
    for kind in ("power", "flat", "steep"):
        for stored_as in (dtype, torch.float32):
            m = made(shape, kind=kind)
            m.Ua, m.Ub = m.Ua.to(dtype).to(stored_as), m.Ub.to(dtype).to(stored_as)
            found = findings(m.files(), 0.9)
            assert faults(found) == [f"{name}-eigenvectors"] * 2
            defect = float((m.Ua.double().mT @ m.Ua.double() - torch.eye(shape[1])).abs().max())
            measured = [f.measured for f in alarms(found)]
            assert any(isinstance(x, float) and x == pytest.approx(defect, rel=1e-2) for x in measured)


def test_axes_are_no_half_precision() -> None:
    """The identity is made of bfloat16 numbers, and is right."""
    m = made((10, 16))
    m.A, m.B = m.A.diagonal().diag(), m.B.diagonal().diag()
    (m.la, m.Ua), (m.lb, m.Ub) = torch.linalg.eigh(m.A), torch.linalg.eigh(m.B)
    assert not alarms(bases.check(identify(m.files()[:1] + m.files()[1:])[0]))


def test_not_orthonormal() -> None:
    m = made((10, 16))
    m.Ua = m.Ua * torch.linspace(0.5, 2, 16)
    assert faults(findings(m.files(), 0.9)) == ["not-orthonormal"]


@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
def test_eigenvectors_of_other_factors(shape: tuple[int, int]) -> None:
    for kind in ("power", "flat", "steep"):
        m, other = made(shape, 0, kind), made(shape, 9, kind)
        m.Ua, m.Ub, m.M = other.Ua, other.Ub, other.M
        found = alarms(findings(m.files(), 0.9))
        assert [(f.fault, f.severity, f.check) for f in found] == [("stale-mask", "error", "diagonality")] * 2


def test_off_diagonal_share_against_the_definition() -> None:
    m, other = made((10, 16), dtype=torch.float64), made((10, 16), 9, dtype=torch.float64)
    rotated = other.Ua.mT @ m.A @ other.Ua
    share = float((rotated - rotated.diagonal().diag()).norm() / m.A.norm())
    assert spectra.rotated(m.A, other.Ua).off_diagonal == pytest.approx(share, rel=1e-10)
    torch.testing.assert_close(spectra.rotated(m.A, other.Ua).rayleigh, rotated.diagonal())


def test_slightly_stale() -> None:
    m = made((10, 16), dtype=torch.float64)
    drift = made((10, 16), 9, dtype=torch.float64)
    m.A = m.A + 1e-3 * drift.A
    found = alarms(bases.check(identify(m.files())[0]))
    assert [(f.fault, f.severity) for f in found] == [("stale-mask", "deviation")]


def test_eigenvalues_of_the_factor() -> None:
    m = made((10, 16))
    assert faults(findings(values_file(m, m.la.flip(0), m.lb))) == ["unsorted-eigenvalues"]
    assert faults(findings(values_file(m, m.la**1.3, m.lb))) == ["eigenvalues-disagree"]
    found = findings(values_file(m, m.la * 100, m.lb))
    assert not alarms(found)
    assert [f.measured for f in found if f.check == "eigenvalues" and f.severity == "convention"] == [
        pytest.approx(100, rel=1e-4)
    ]
    assert "eigenvalues-disagree" in faults(findings(values_file(m, m.la - 1, m.lb)))


def test_eigenvalues_of_the_layer() -> None:
    for shape in ((10, 16), (12, 12)):
        m = made(shape)
        right, wrong = torch.outer(m.lb, m.la).clamp_min(0), torch.outer(m.la, m.lb).clamp_min(0)
        file = Path(f"{LAYER}_lambda_matrix.pt")
        assert not alarms(findings([*m.files()[:1], Stored(file, "torch zip", {"": right})]))
        cache = Stored(Path(f"{LAYER}.pt"), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "lambda_matrix": wrong})
        expected = ["transposed-eigenvalues"] if shape == (12, 12) else []
        assert faults(findings([m.files()[0], cache])) == expected
        cache = Stored(Path(f"{LAYER}.pt"), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "lambda_matrix": right - 0.1})
        assert "eigenvalues-disagree" in faults(findings([m.files()[0], cache]))


def test_asymmetric_factors_are_judged_by_the_triangle_that_eigh_read() -> None:
    m = made((10, 16))
    m.A = m.A.tril()
    assert faults(findings(m.files(), 0.9)) == ["asymmetric-factor"]


def test_large_layers_take_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "FULL_UNTIL", 8)
    for kind in ("power", "flat", "steep", "dominant"):
        m = made((10, 16), kind=kind)
        assert not alarms(findings(m.files(), 0.9))
        m.M = ~m.M
        assert faults(findings(m.files(), 0.9)) == ["wrong-end-threshold"]


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
def test_eigenvalues_of_the_layer_in_another_order(shape: tuple[int, int], dims: tuple[int, ...]) -> None:
    m = made(shape)
    noise = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for turned, expected in (((), []), (dims, ["unsorted-eigenvalues"])):
        values = (torch.outer(m.lb, m.la).clamp_min(0) * noise).flip(turned)
        cache = Stored(Path(f"cache_{LAYER}.pt"), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "lambda": values})
        assert faults(findings([m.files()[0], cache])) == expected
