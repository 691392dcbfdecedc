"""Digits that storage lost: half precision in factors, saturated float32 counts, and what they do to γ."""

from collections.abc import Iterator

import numpy as np
import torch

from curvlab.crosscheck import spectra
from curvlab.crosscheck.evidence import COARSE, EIGHT_BITS, coarse_dtype, eight_bits, usable
from curvlab.crosscheck.extremes import guarded
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gamma_rule import Products, sequential_ranks, threshold_of
from curvlab.crosscheck.parts import Part, Role

STORED: tuple[Role, ...] = ("A", "S", "values_in", "values_out", "eigenvalues")


@guarded
def check(part: Part, gamma: float | None = None) -> list[Finding]:
    """Precision of stored statistics, and whether it matters at γ."""
    return [*_stored(part), *_summed(part), *_at_gamma(part, gamma)]


def _stored(part: Part) -> Iterator[Finding]:
    coarse: dict[str, list[Role]] = {}
    fine: dict[str, list[Role]] = {}
    for role in STORED:
        tensor = part.items[role].tensor if role in part.items else None
        if tensor is None or not usable(tensor) or not tensor.is_floating_point():
            continue
        short = eight_bits(tensor)
        if short is not None:
            yield _of_eight_bits(part, role, short)
            continue
        dtype = coarse_dtype(tensor)
        if dtype is not None:
            coarse.setdefault(str(dtype).removeprefix("torch."), []).append(role)
        else:
            fine.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(role)
    for name, roles in coarse.items():
        unit = COARSE[getattr(torch, name)]
        cause = (
            f"{', '.join(roles)} carry only {name} digits (relative {unit:.2g}): eigenvalues below about that share "
            "of the largest are noise, and a γ that needs them is not kept"
        )
        remedy = "accumulate and store factors in float32 or better whatever the model's dtype"
        fault = f"{name}-factors"
        yield Finding("precision", "deviation", part.subject(*roles), unit, 1.2e-7, cause, remedy, fault)
    for name, roles in fine.items():
        unit = torch.finfo(getattr(torch, name)).eps
        yield Finding("precision", "ok", part.subject(*roles), unit, None, f"{', '.join(roles)} in {name}")


def _of_eight_bits(part: Part, role: Role, name: str) -> Finding:
    unit = EIGHT_BITS[name]
    cause = (
        f"{role} carries only the digits of {name} (8 bits, relative {unit:.2g}): eigenvalues below about that share "
        "of the largest are noise, and a γ that needs them is not kept"
    )
    remedy = "accumulate and store factors in float32 or better; quantise weights, not statistics"
    return Finding("precision", "deviation", part.subject(role), unit, 1.2e-7, cause, remedy, "float8-factors")


def _summed(part: Part) -> Iterator[Finding]:
    """A float32 sum of ones stops at 2^24: seen where a joined bias makes an entry of A a pure count."""
    A = part.items.get("A")
    if A is None or A.tensor.dtype != torch.float32 or part.count is None or part.count <= 2**24:
        return
    last = float(A.tensor[-1, -1])
    for total in (last, last * part.count):
        if abs(total - 2**24) <= 1 and total < part.count:
            cause = (
                f"the bias entry of A stands at 2^24 while N = {part.count:.0f}: a float32 sum stopped growing there"
            )
            remedy = "accumulate a batch at a time (one product), or in float64"
            yield Finding(
                "precision", "error", part.subject("A"), total, part.count, cause, remedy, "float32-accumulation"
            )
            return


def _at_gamma(part: Part, gamma: float | None) -> Iterator[Finding]:
    """Whether sums in float32 would move the mask at this γ."""
    if gamma is None or "mask" not in part.items:
        return
    inner, outer = spectra.side(part, "in"), spectra.side(part, "out")
    if inner is None or outer is None or not (inner.fits and outer.fits):
        return
    unit = max(spectra.rounding(part, "in"), spectra.rounding(part, "out"))
    products = Products.of(outer, inner, unit)
    if products.total <= 0:
        return
    threshold, _ = threshold_of(products, gamma)
    exact = int((products.values >= threshold).sum())
    worst = max((abs(rank - exact) for rank in sequential_ranks(products, gamma)), default=0)
    floor = unit * float(products.values.max())
    subject = part.subject("A", "S", "values_in", "values_out")
    if threshold <= floor:
        cause = (
            f"γ = {gamma:g} cuts at σ_k = {threshold:.2g}, below what storage resolves ({floor:.2g}): "
            "which directions are kept there is decided by round-off"
        )
        yield Finding(
            "precision-gamma", "convention", subject, threshold, floor, cause, "a smaller γ, or float64 factors"
        )
        return
    share = worst / max(exact, 1)
    cause = f"in float64 γ = {gamma:g} removes {exact:,} directions; a float32 running sum would be off by {worst:,}"
    yield Finding("precision-gamma", "ok", subject, float(np.round(share, 6)), None, cause)
