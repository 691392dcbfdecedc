"""Are stored eigenvectors orthonormal, do they diagonalise the factors beside them, and do eigenvalues agree?"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from curvlab.crosscheck import spectra
from curvlab.crosscheck.corrected import layer_values
from curvlab.crosscheck.evidence import COARSE, asymmetry, coarse_dtype, orthonormal_defect, precision, square, usable
from curvlab.crosscheck.extremes import guarded
from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.parts import Part
from curvlab.crosscheck.spectra import ROLES, Rotated, of_basis

BOTH: tuple[Literal["in", "out"], ...] = ("in", "out")


@guarded
def check(part: Part, gamma: float | None = None) -> list[Finding]:
    """Eigenvectors and eigenvalues of both sides, and eigenvalues of the layer."""
    found: list[Finding] = []
    for side in BOTH:
        found += _vectors(part, side)
        found += _values(part, side)
    return found + list(layer_values(part))


def _unit(U: Tensor) -> float:
    return torch.finfo(torch.float32 if U.dtype in COARSE else U.dtype).eps


def _coarse(U: Tensor, defect: float) -> str | None:
    """The half precision that eigenvectors went through, where their defect is what its rounding leaves."""
    dtype = coarse_dtype(U)
    if dtype is None:
        return None
    # rounding moves entry u by at most unit |u| / 2, so |UᵀU − I| by at most about unit
    return str(dtype).removeprefix("torch.") if defect <= 4 * COARSE[dtype] else None


def _vectors(part: Part, side: Literal["in", "out"]) -> Iterator[Finding]:
    basis = ROLES[side][1]
    U = part.tensor(basis)
    if U is None or U.dim() != 2 or not usable(U) or not U.is_floating_point():
        return
    subject, d = part.subject(basis), len(U)
    bound = 64 * math.sqrt(d) * _unit(U)
    defect = orthonormal_defect(U)
    coarse = _coarse(U, defect) if defect > bound or U.dtype in COARSE else None
    if defect <= bound and coarse is None:
        yield Finding("orthonormality", "ok", subject, defect, bound, "orthonormal up to round-off")
    elif coarse is not None:
        cause = (
            f"eigenvectors carry only {coarse} digits: orthonormal to {defect:.2g}; a projected step leaves the "
            f"allowed subspace by some {defect:.1g} of its size, every step"
        )
        remedy = "compute and store eigenvectors in float32; cast the projected step, not the basis"
        yield Finding("orthonormality", "deviation", subject, defect, bound, cause, remedy, f"{coarse}-eigenvectors")
    elif defect <= 2e-2:
        cause = f"orthonormal only to {defect:.2g}: half precision (or TF32) somewhere in the decomposition"
        remedy = "decompose in float32 or float64, with torch.backends.cuda.matmul.allow_tf32 = False"
        fault = "bfloat16-eigenvectors" if defect > 2e-4 else "low-precision-eigenvectors"
        yield Finding("orthonormality", "deviation", subject, defect, bound, cause, remedy, fault)
    else:
        cause = f"columns are not orthonormal (off by {defect:.2g}): rotating there and back changes every gradient"
        remedy = "store the eigenvectors of torch.linalg.eigh unchanged: no scaling, no truncated or mixed columns"
        yield Finding("orthonormality", "error", subject, defect, bound, cause, remedy, "not-orthonormal")
        return
    if U.shape[1] < d:
        cause = f"only {U.shape[1]} of {d} eigenvectors are stored"
        yield Finding("basis-size", "convention", subject, U.shape[1], d, cause)
    seen = of_basis(part, side)
    if seen is not None:
        yield from _diagonal(part, side, seen, max(defect, _unit(U)))


def _diagonal(part: Part, side: Literal["in", "out"], seen: Rotated, defect: float) -> Iterator[Finding]:
    factor, basis, _ = ROLES[side]
    subject, d = part.subject(basis, factor), len(seen.rayleigh)
    bound = (
        64 * math.sqrt(d) * max(precision(part.items[factor].tensor), torch.finfo(torch.float32).eps / 8) + 2 * defect
    )
    if part.items[basis].tensor.dtype != torch.float64:
        bound = max(bound, 64 * math.sqrt(d) * torch.finfo(torch.float32).eps)
    coarse = coarse_dtype(part.items[basis].tensor)
    bound += 0.0 if coarse is None else 4 * COARSE[coarse]
    bound += 4 * math.sqrt(d) * asymmetry(part.items[factor].tensor)  # named already, where there is any
    left = seen.off_diagonal
    if left <= bound:
        cause = f"diagonalise their factor; {_order(seen.rayleigh)}"
        yield Finding("diagonality", "ok", subject, left, bound, cause)
        return
    severity: Severity = "error" if seen.unrelated or left > 1e-2 else "deviation"
    cause = (
        f"{left:.2g} of the factor lies off the diagonal in this basis: these are the eigenvectors of another matrix "
        "(factors taken again since, another layer's, or another run's)"
    )
    if severity == "deviation":
        cause = f"{left:.2g} of the factor lies off the diagonal: the basis is of slightly different factors"
    remedy = "decompose the factors beside them, and store both in one go"
    yield Finding("diagonality", severity, subject, left, bound, cause, remedy, "stale-mask")


def _order(values: Tensor) -> str:
    slack = 1e-5 * float(values.abs().max())
    steps = values.diff()
    if bool((steps >= -slack).all()):
        return "eigenvalues ascend"
    return "eigenvalues descend" if bool((steps <= slack).all()) else "eigenvalues in no order"


def _values(part: Part, side: Literal["in", "out"]) -> Iterator[Finding]:
    factor, _, role = ROLES[side]
    values, C = part.tensor(role), part.tensor(factor)
    if values is None or values.dim() != 1 or not usable(values):
        return
    subject = part.subject(role, factor)
    values = values.double()
    seen = of_basis(part, side)
    if seen is not None and seen.unrelated:
        return  # named already: the basis is of another matrix, and so may be the eigenvalues
    top = max(float(values.abs().max()), 1e-300)
    skew = asymmetry(C) if C is not None and square(C) and usable(C) else 0.0  # named already, where there is any
    known = seen is not None or (C is not None and usable(C) and C.shape == (len(values),) * 2)
    own = seen.rayleigh if seen is not None else spectra.eigenvalues(C) if known else None  # type: ignore[arg-type]
    damaged = own is not None and float(own.min()) < -1e-3 * float(own.abs().max())  # named already
    if not damaged and float(values.min()) < -max(1e-3, 4 * math.sqrt(len(values)) * skew) * top:
        cause = f"stored eigenvalues go down to {float(values.min()):.2g}: no spectrum of a second moment"
        yield Finding("eigenvalues", "error", subject, float(values.min()), 0.0, cause, "", "eigenvalues-disagree")
        return
    if own is None or len(own) != len(values):
        return
    if seen is None:
        values = values.sort().values
    size = max(float(own.abs().max()), 1e-300)
    bound = 64 * math.sqrt(len(own)) * spectra.rounding(part, side)
    bound += 4 * math.sqrt(len(own)) * skew
    if seen is not None:
        bound += 2 * float(seen.left_over.max()) / size
    if float(own.min()) < -bound * size:
        return  # the factor is no second moment, which is named already
    off = float((values - own).abs().max()) / size
    if off <= bound:
        yield Finding("eigenvalues", "ok", subject, off, bound, "stored eigenvalues are those of the factor")
        return
    if float((values.sort().values - own.sort().values).abs().max()) / size <= bound:
        cause = (
            f"stored eigenvalues are right but in another order than the eigenvectors (off by {off:.2g} as they lie)"
        )
        remedy = "sort eigenvalues and eigenvectors together, or neither"
        yield Finding("eigenvalues", "error", subject, off, bound, cause, remedy, "unsorted-eigenvalues")
        return
    scale = float(values @ own / (own @ own).clamp_min(1e-300))
    if scale > 0 and float((values / scale - own).abs().max()) / size <= bound:
        cause = f"stored eigenvalues are {scale:.6g} times the factor's: one of the two was divided by a count"
        remedy, count = "divide both by N, or neither", part.count or 1.0
        if min(abs(scale / count - 1), abs(scale * count - 1)) < 1e-2:
            yield Finding("eigenvalues", "convention", subject, scale, 1.0, cause, remedy)
        else:
            cause = f"stored eigenvalues are {scale:.6g} times the factor's, which is neither N nor 1/N"
            yield Finding("eigenvalues", "deviation", subject, scale, 1.0, cause, remedy, "eigenvalues-disagree")
        return
    cause = f"stored eigenvalues differ from the factor's by {off:.2g} of the largest: they are of another factor"
    remedy = "store factor, eigenvalues and eigenvectors of one decomposition"
    yield Finding("eigenvalues", "error", subject, off, bound, cause, remedy, "eigenvalues-disagree")
