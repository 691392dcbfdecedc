"""Are A and S second moments: square, symmetric, positive semi-definite, of a rank that their samples allow?"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import COARSE, asymmetry, precision, square, usable
from curvlab.crosscheck.extremes import guarded
from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.spectra import FULL_UNTIL, eigenvalues, symmetric
from curvlab.memory import human

FACTORS: tuple[Role, ...] = ("A", "S")
SIDES = {"A": "input side", "S": "output side"}


def check(part: Part, gamma: float | None = None) -> list[Finding]:
    """Each factor by itself, then the two together."""
    return [*_factors(part, gamma), *_range(part)]


@guarded
def _factors(part: Part, gamma: float | None) -> list[Finding]:
    found: list[Finding] = []
    for role in FACTORS:
        C = part.tensor(role)
        if C is None or not usable(C):
            continue
        if not square(C) or not C.is_floating_point():
            cause = f"{SIDES[role]}: {tuple(C.shape)} of {C.dtype} is no square matrix of real numbers"
            remedy = "store the second moment E[x xᵀ]"
            shape = str(tuple(C.shape))
            found.append(
                Finding(
                    "factor-shape", "error", part.subject(role), shape, "(d, d)", cause, remedy, "mismatched-shapes"
                )
            )
            continue
        found += _factor(part, role, C)
    return found + list(_together(part))


def _factor(part: Part, role: Role, C: Tensor) -> Iterator[Finding]:
    subject, d, unit = part.subject(role), len(C), precision(C)
    bound = (64 if unit < COARSE[torch.float16] else 2) * math.sqrt(d) * unit  # many sums, or one rounding
    if float(C.abs().max()) == 0:
        cause = f"the factor of the {SIDES[role]} is zero: nothing is known of this layer, and nothing would be removed"
        remedy = "the hook saw no data, or gradients did not reach the layer: take the statistics again"
        yield Finding("factor-scale", "error", subject, 0.0, None, cause, remedy, "zero-factor")
        return
    skew = asymmetry(C)
    if skew > bound:
        severity: Severity = "error" if skew > 1e-2 else "deviation"
        cause = (
            f"the factor differs from its transpose by {skew:.2g} of its largest entry: not a sum of x xᵀ "
            "(one triangle only, an entry overwritten, or a product of two different batches); eigh reads one triangle"
        )
        remedy = "accumulate both triangles, or mirror one before use; take the statistics again if it was damaged"
        yield Finding("factor-symmetry", severity, subject, skew, bound, cause, remedy, "asymmetric-factor")
    else:
        yield Finding("factor-symmetry", "ok", subject, skew, bound, "symmetric up to round-off")
    yield from _spectrum(part, role, C, bound, skew <= bound)
    trace = float(C.diagonal().double().sum())
    effective = trace**2 / max(float((C.double() if d <= FULL_UNTIL else C).square().sum()), 1e-300)
    cause = (
        f"trace {trace:.4g}, mean eigenvalue {trace / d:.4g}; effective rank {effective:.1f} of {d} (tr² / ‖·‖²), "
        f"{human(C.numel() * C.element_size())} in {str(C.dtype).removeprefix('torch.')}"
    )
    yield Finding("factor-scale", "ok", subject, trace, None, cause)


def _spectrum(part: Part, role: Role, C: Tensor, bound: float, is_symmetric: bool) -> Iterator[Finding]:
    subject, d = part.subject(role), len(C)
    if d > FULL_UNTIL:
        yield _by_cholesky(subject, C, bound)
        if part.count is None or part.count >= d:
            return
    values = eigenvalues(C)
    top = float(values.abs().max())
    lowest = float(values[0]) / top
    if lowest < -bound and is_symmetric:
        negative = int((values < -bound * top).sum())
        severity: Severity = "error" if lowest < -1e-3 else "deviation"
        cause = (
            f"{negative} of {d} eigenvalues are negative, down to {lowest:.2g} of the largest: no second moment "
            "(a damaged or centred-and-subtracted sum, a difference of factors, or digits lost)"
        )
        remedy = "take the statistics again; a merge must add sums with positive weights"
        yield Finding("factor-definiteness", severity, subject, lowest, -bound, cause, remedy, "indefinite-factor")
    elif is_symmetric:
        yield Finding("factor-definiteness", "ok", subject, lowest, -bound, "positive semi-definite up to round-off")
    if is_symmetric:  # what spoiled the symmetry added to the rank
        yield from _rank(part, role, values, bound)


def _by_cholesky(subject: str, C: Tensor, bound: float) -> Finding:
    """For large factors: whether C plus round-off has a Cholesky factor, a thirtieth of the work of eigenvalues."""
    C = symmetric(C.float())
    top = float(C.abs().sum(1).max())  # at least the largest eigenvalue
    C.diagonal().add_(bound * top)
    if int(torch.linalg.cholesky_ex(C).info) == 0:
        return Finding("factor-definiteness", "ok", subject, 0.0, -bound, "positive semi-definite up to round-off")
    cause = "some eigenvalues are more negative than round-off explains: no second moment"
    remedy = "take the statistics again; a merge must add sums with positive weights"
    return Finding("factor-definiteness", "error", subject, "negative", -bound, cause, remedy, "indefinite-factor")


def _rank(part: Part, role: Role, values: Tensor, bound: float) -> Iterator[Finding]:
    d, count = len(values), part.count
    rank = int((values > bound * float(values.abs().max())).sum())
    if count is None:
        return
    subject = part.subject(role)
    if rank <= count:
        yield Finding("factor-rank", "ok", subject, rank, min(count, d), f"rank {rank} from {count:.0f} samples")
        return
    if role == "S" and not part.items[role].source.endswith(": B"):
        cause = f"rank {rank} from {count:.0f} samples: several gradients a sample (exact labels), or damping was added"
        yield Finding("factor-rank", "convention", subject, rank, count, cause)
        return
    cause = (
        f"rank {rank} is more than {count:.0f} samples can give: N counts something else (documents, batches), "
        "damping was added to the factor, or it belongs to another run"
    )
    remedy = "store the number of vectors summed in N, and factors without damping"
    yield Finding("factor-rank", "error", subject, rank, count, cause, remedy, "rank-above-samples")


def _together(part: Part) -> Iterator[Finding]:
    A, S = part.tensor("A"), part.tensor("S")
    if A is None or S is None or not (usable(A) and usable(S)) or not (square(A) and square(S)):
        return
    subject = part.subject("A", "S")
    if A.shape == S.shape and torch.equal(A, S) and not torch.equal(A, A[0, 0] * torch.eye(len(A)).to(A)):
        cause = "both sides hold the same matrix"
        remedy = "save the input side's second moment as A and the output gradients' as B"
        yield Finding("sides", "error", subject, "identical", "different", cause, remedy, "duplicated-factor")


def _range(part: Part) -> Iterator[Finding]:
    """Whether products of eigenvalues stay within float32; in logarithms, which hold what float64 does not."""
    A, S = part.tensor("A"), part.tensor("S")
    if A is None or S is None or not (usable(A) and usable(S)) or not (square(A) and square(S)):
        return
    tops = [float(C.diagonal().double().max()) for C in (A, S)]
    if min(tops) <= 0:
        return
    single = torch.finfo(torch.float32)
    largest, smallest = sum(math.log10(top) for top in tops), math.log10(single.tiny / single.eps)
    if smallest <= largest <= math.log10(single.max):
        return
    reached = f"1e{largest:+.1f}"
    cause = f"products of eigenvalues reach {reached}: below or above what float32 can hold with all its digits"
    remedy = "scale the factors, or form products and their sums in float64"
    bound = f"1e{smallest:+.1f} to 1e{math.log10(single.max):+.1f}"
    yield Finding("factor-scale", "deviation", part.subject("A", "S"), reached, bound, cause, remedy, "float32-range")
