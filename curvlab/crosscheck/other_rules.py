"""Masks of a rule that is not the γ rule on products: sums λ_i + λ_j, γ on each factor alone, powers of products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.gamma_rule import Products, Range, gamma_range, threshold_room
from curvlab.crosscheck.spectra import Side

REMEDY = "threshold the products: M = outer(lambda_in, lambda_out) < threshold, γ of their sum (paper, section 2)"
POWERS = {0.5: "square roots of the products", 2.0: "squares of the products"}


def of_sides(
    products: Products, outer: Side, inner: Side, removed: Tensor, gamma: float | None, subject: str
) -> Finding | None:
    """A mask (d_out, d_in) that no threshold of products explains: is it a rule of the two sides' own eigenvalues?"""
    what = next(_rules(outer, inner, removed, gamma), None)
    if what is None:
        return None
    share, most = energy_of(products, removed)
    wanted = most if gamma is None else gamma
    bound = f"as many leading products hold {most:.2%}" if gamma is None else f"γ = {gamma:g} of it"
    cause = f"the mask {what}: not the γ rule on products; it removes {share:.2%} of the energy, where {bound}"
    return Finding(
        "mask-threshold", severity_of(share, wanted), subject, share, wanted, cause, REMEDY, "other-rule"
    )  # fmt: skip


def of_powers(products: Products, found: Range, removed: Tensor, gamma: float, subject: str) -> Finding | None:
    """A threshold of products whose place comes from sums of √σ or σ² instead of σ."""
    if _has_round(found) or int(removed.sum()) < 2:
        return None  # a γ that someone may have chosen explains it as well
    top = float(products.values.max())
    if top <= 0:
        return None
    values, error = products.values / top, products.error / top
    for power, name in POWERS.items():
        powered = values**power
        width = (values + error) ** power - powered
        if gamma_range(Products(powered, width, products.unit), removed).holds(gamma):
            cause = (
                f"the mask removes {int(removed.sum()):,} of {removed.numel():,} directions with {found.removed:.2%} "
                f"of the energy: where {name} reach γ = {gamma:g} of their sum, not the products themselves"
            )
            remedy = "sum the products of eigenvalues themselves: share = products.cumsum(0) / products.sum()"
            severity = severity_of(found.removed, gamma)
            return Finding("mask-gamma", severity, subject, found.removed, gamma, cause, remedy, "other-rule")
    return None


def severity_of(share: float, gamma: float) -> Severity:
    """An error where the energy removed misses γ by much: by a twentieth, or the rest by a factor of four."""
    ratio = max(1 - share, 1e-300) / max(1 - gamma, 1e-300)
    off = abs(share - gamma)
    return "error" if off > 0.05 or (off > 0.005 and not 0.25 <= ratio <= 4) else "deviation"


def _has_round(found: Range) -> bool:
    """Whether the interval holds a multiple of 0.05, which a mask of few directions mostly does."""
    return any(found.holds(i / 20) for i in range(1, 20))


def energy_of(products: Products, removed: Tensor) -> tuple[float, float]:
    """Share of the energy that is removed, and that as many leading directions hold."""
    total = max(products.total, 1e-300)
    leading = products.values.flatten().topk(int(removed.sum())).values
    return float(products.values[removed].sum()) / total, float(leading.sum()) / total


def _rules(outer: Side, inner: Side, removed: Tensor, gamma: float | None) -> Iterator[str]:
    rows, columns = _column(outer), _column(inner).mT
    sums = Products(rows.values + columns.values, rows.error + columns.error, rows.unit)
    if threshold_room(sums, removed) >= 0:
        yield "is a threshold of sums λ_i + λ_j of the two sides' eigenvalues"
    # an outer product of a set of rows and a set of columns, or the union of both
    for either, region in ((False, removed), (True, ~removed)):
        one, other = region.any(1), region.any(0)
        if not torch.equal(region, torch.outer(one, other)):
            continue
        one, other = (~one, ~other) if either else (one, other)
        yield from _per_factor(rows, columns.mT, one[:, None], other[:, None], either, gamma)


def _per_factor(
    rows: Products, columns: Products, one: Tensor, other: Tensor, either: bool, gamma: float | None
) -> Iterator[str]:
    """Rows and columns that are each a threshold of their own side's eigenvalues."""
    none = ~one.any() if either else one.all(), ~other.any() if either else other.all()
    for plain, products, chosen, side in ((none[0], columns, other, "input"), (none[1], rows, one, "output")):
        if bool(plain) and threshold_room(products, chosen) >= 0:
            found = gamma_range(products, chosen)
            yield f"is the γ rule on the {side} side's eigenvalues alone ({found.low:.4g} < γ <= {found.high:.4g})"
            return
    if threshold_room(rows, one) < 0 or threshold_room(columns, other) < 0:
        return
    ranges = [gamma_range(rows, one), gamma_range(columns, other)]
    low, high = max(found.low for found in ranges), min(found.high for found in ranges)
    asked = gamma is not None and low < gamma <= high
    if not asked and min(int(one.sum()), int(other.sum())) < 2:
        return  # a single row or column is soon the outer product of something
    where = (
        f"{low:.4g} < γ <= {high:.4g}" if low < high else f"γ about {ranges[0].removed:.4g} and {ranges[1].removed:.4g}"
    )
    how = "either" if either else "both"
    yield f"applies γ to each factor alone and removes what {how} of them removes ({where})"


def _column(side: Side) -> Products:
    """Eigenvalues of a side as a column, in units of its own rounding."""
    values = side.values.clamp_min(0)[:, None]
    unit = float((side.error / side.values.abs().max().clamp_min(1e-300)).max())
    return Products(values, side.error[:, None], unit)
