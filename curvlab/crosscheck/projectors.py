"""Is P an orthogonal projector on the layer's inputs, and does it keep the directions that it should keep?

AlphaEdit (arXiv 2410.02355): P = U Uᵀ over eigenvectors of the second moment with eigenvalue below 2e-2.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import (
    COARSE,
    asymmetry,
    coarse_dtype,
    idempotent_defect,
    precision,
    probes,
    square,
    usable,
)
from curvlab.crosscheck.extremes import guarded
from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.spectra import FULL_UNTIL, eigenvalues, symmetric

ALPHAEDIT = 2e-2  # AlphaEdit's nullspace_threshold


@guarded
def check(part: Part, gamma: float | None = None) -> list[Finding]:
    """The projector by itself, then against the second moment of the inputs."""
    P = part.tensor("projector")
    if P is None or not square(P) or not usable(P) or not P.is_floating_point():
        return []
    return list(_projector(part, P))


def _projector(part: Part, P: Tensor) -> Iterator[Finding]:
    subject, d = part.subject("projector"), len(P)
    unit = torch.finfo(torch.float32 if P.dtype in COARSE else P.dtype).eps
    bound = 64 * math.sqrt(d) * unit
    coarse = coarse_dtype(P)
    P = P.float() if P.dtype in COARSE else P
    skew, defect, trace = asymmetry(P), idempotent_defect(P), float(P.diagonal().double().sum())
    if coarse is not None and bound < defect <= 8 * math.sqrt(d) * COARSE[coarse]:
        name = str(coarse).removeprefix("torch.")
        cause = f"the projector carries only {name} digits: P² differs from P by {defect:.2g}"
        remedy = "store it in float32"
        yield Finding("projector", "deviation", subject, defect, bound, cause, remedy, f"{name}-projector")
        bound = 8 * math.sqrt(d) * COARSE[coarse]
    if skew > bound:
        cause = (
            f"P differs from its transpose by {skew:.2g}: an oblique projection, which mixes what it should keep apart"
        )
        remedy = "P = U Uᵀ with orthonormal columns U (not V Uᵀ, not one triangle)"
        yield Finding("projector-symmetry", "error", subject, skew, bound, cause, remedy, "projector-not-symmetric")
        return
    yield Finding("projector-symmetry", "ok", subject, skew, bound, "self-adjoint up to round-off")
    if defect > bound:
        severity: Severity = "error" if defect > 1e-2 else "deviation"
        cause = f"P² differs from P by {defect:.2g}: no projector (vectors not orthonormal, scaled, a mean of several)"
        remedy = "P = U[:, small] @ U[:, small].T from one decomposition in float32 or better"
        yield Finding(
            "projector-idempotency", severity, subject, defect, bound, cause, remedy, "projector-not-idempotent"
        )
        if severity == "error" or d > FULL_UNTIL:
            return
        P = _nearest(P)  # which directions it was meant to keep, without what spoiled P² = P
        trace = float(P.diagonal().double().sum())
    else:
        cause = f"idempotent up to round-off; trace {trace:.4f}, so {round(trace)} of {d} directions are kept"
        yield Finding("projector-idempotency", "ok", subject, defect, bound, cause)
    if round(trace) in (0, d):
        yield _trivial(part, round(trace), d)
        return
    yield from _against(part, P, round(trace))


def _nearest(P: Tensor) -> Tensor:
    """The orthogonal projector nearest to a symmetric P: its eigenvalues rounded to 0 and 1."""
    values, U = torch.linalg.eigh(symmetric(P.double()))
    U = U[:, values > 0.5]
    return (U @ U.mT).to(P.dtype)


def _trivial(part: Part, rank: int, d: int) -> Finding:
    """Nothing kept, or everything: by AlphaEdit's own rule, or by mistake."""
    A, name = part.tensor("A"), "mask-all-kept" if rank else "mask-all-removed"
    cause = f"the projector keeps {'all' if rank else 'none'} of {d} directions"
    cause += ": edits are not constrained at all" if rank else ": no edit can move the weight"
    remedy = "look at the threshold against the scale of the second moment (a mean, not a sum)"
    severity: Severity = "error"
    if A is not None and square(A) and usable(A) and len(A) == d:
        values = eigenvalues(A)
        if float(values[0]) >= ALPHAEDIT if rank == 0 else float(values[-1]) < ALPHAEDIT:
            severity = "deviation" if rank else "convention"
            cause += f"; eigenvalues from {float(values[0]):.2g} to {float(values[-1]):.2g} all lie on one side of 2e-2"
    return Finding("projector-rank", severity, part.subject("projector"), rank, None, cause, remedy, name)


def _commutes(P: Tensor, C: Tensor) -> float:
    """‖PC − CP‖ / ‖C‖ on a sample of columns."""
    columns = probes(len(C))
    C = symmetric(C.to(P.dtype)) / C.abs().max().clamp_min(1e-300).to(P.dtype)
    rest = P @ C[:, columns] - C @ P[:, columns]
    return float(rest.norm() / C[:, columns].norm().clamp_min(1e-300))


def _against(part: Part, P: Tensor, rank: int) -> Iterator[Finding]:
    """Which side it was made from, which end it keeps, which cutoff it is."""
    shares: dict[Role, float] = {}
    for role in ("A", "S"):
        C = part.tensor(role)
        if C is not None and square(C) and usable(C) and len(C) == len(P) and float(C.abs().max()) > 0:
            shares[role] = _commutes(P, C)
    d_out, d_in = part.shape or (None, None)
    A = part.tensor("A")
    by_shape = (d_out != d_in and len(P) == d_out) or (A is not None and usable(A) and len(A) != len(P))
    if by_shape or (shares.get("S", 1.0) < 1e-2 and shares.get("A", 0.0) > 5e-2):
        inputs = d_in if A is None else len(A)
        cause = (
            f"P acts on {len(P)} dimensions that are not the layer's {inputs} inputs: it was made for the output side"
        )
        remedy = "project on the inputs: ΔW P with P from the second moment of the layer's inputs (d_in x d_in)"
        yield Finding(
            "projector-side", "error", part.subject("projector", "A", "S"), len(P), inputs, cause, remedy,
            "projector-output-side",
        )  # fmt: skip
        return
    if "A" not in shares or A is None:
        return
    subject = part.subject("projector", "A")
    C = symmetric(A.double())
    values = eigenvalues(A)
    round_off = 64 * math.sqrt(len(P)) * precision(A)
    if float(values[0]) < -round_off * float(values.abs().max()) or asymmetry(A) > round_off:
        return  # no second moment to hold it against, which is named already
    values = values.clamp_min(0)
    total = max(float(values.sum()), 1e-300)
    kept = float((P.double() * C).sum()) / total
    low, high = float(values[:rank].sum()) / total, float(values[-rank:].sum()) / total
    slack = 64 * math.sqrt(len(P)) * max(precision(A), precision(P))
    bound = max(round_off, 1e-3)
    if shares["A"] > bound and abs(kept - low) > max(slack, 1e-2 * max(low, 1e-3)):
        cause = (
            f"P does not commute with the second moment given ({shares['A']:.2g}): "
            "it is of another layer or run, or of the output side"
        )
        remedy = "make the projector from the second moment beside it"
        yield Finding("projector-factor", "error", subject, shares["A"], bound, cause, remedy, "stale-mask")
        return
    if abs(kept - low) <= slack + 1e-3 * (high - low):
        yield _cutoff(part, values, rank, kept, subject)
        return
    if abs(kept - high) <= slack + 1e-3 * (high - low) or kept > 0.5 * (high + low):
        cause = (
            f"P keeps {kept:.1%} of the inputs' energy in {rank} directions, the steep ones ({low:.2g} lies in "
            "the flat ones): the wrong end of the spectrum"
        )
        remedy = "keep eigenvectors with eigenvalue below the threshold (svd sorts descending, eigh ascending)"
        yield Finding("projector-energy", "error", subject, kept, low, cause, remedy, "projector-wrong-end")
        return
    cause = f"P keeps {rank} directions with {kept:.2%} of the energy, the flattest {rank} hold {low:.2%}: no cutoff"
    remedy = "choose by eigenvalue, and sort eigenvalues and eigenvectors together"
    yield Finding("projector-energy", "error", subject, kept, low, cause, remedy, "unsorted-eigenvalues")


def _cutoff(part: Part, values: Tensor, rank: int, kept: float, subject: str) -> Finding:
    below, above = float(values[rank - 1]), float(values[rank])
    error = 8 * math.sqrt(len(values)) * precision(part.items["A"].tensor) * float(values[-1])
    interval = f"{below:.4g} < cutoff <= {above:.4g}"
    cause = f"P keeps the {rank} flattest directions, {kept:.2%} of the energy; {interval}"
    if below - error <= ALPHAEDIT <= above + error:
        return Finding("projector-cutoff", "ok", subject, below, ALPHAEDIT, f"{cause}: AlphaEdit's 2e-2 among them")
    count = part.count
    for name, factor in (("the sum over all samples", count), ("a sum divided twice", 1 / count if count else None)):
        if factor is not None and factor != 1 and below * factor <= ALPHAEDIT <= above * factor:
            cause = f"{cause}: 2e-2 was compared with {name} (N = {count:.0f})"
            remedy = "divide the second moment by its count before the comparison"
            return Finding(
                "projector-cutoff", "convention", subject, below, ALPHAEDIT, cause, remedy, "unnormalised-sums"
            )
    return Finding("projector-cutoff", "convention", subject, below, ALPHAEDIT, f"{cause} (AlphaEdit's is 2e-2)")
