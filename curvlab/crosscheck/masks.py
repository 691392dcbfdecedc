"""Is a mask the γ rule on its own factors, which γ is it, and if it is not: what was done instead."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.crosscheck import spectra
from curvlab.crosscheck.evidence import usable, zeros_and_ones
from curvlab.crosscheck.extremes import guarded
from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.gamma_rule import Products, Range, gamma_range, nested, threshold_room
from curvlab.crosscheck.no_rule import no_threshold
from curvlab.crosscheck.other_rules import of_sides
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.ranks import USUAL, rank_findings
from curvlab.crosscheck.sides import AUTHORS_MASK

LOOSE = 8  # times the error of a good eigenvalue solver: what a poor one may leave
SORT = "sort eigenvalues and eigenvectors together (torch.linalg.eigh gives both in ascending order), then form M"


@dataclass(frozen=True)
class Reading:
    """One way in which a mask may have come about: which eigenvalues, turned, resorted, or the wrong end kept."""

    name: str
    products: Products
    turned: bool = False
    inverted: bool = False
    resorted: bool = False

    def removed(self, kept: Tensor) -> Tensor:
        kept = kept.mT if self.turned else kept
        return kept if self.inverted else ~kept


@guarded
def check(part: Part, gamma: float | None = None) -> list[Finding]:
    """The mask of a layer against eigenvalues of its factors (or stored ones).

    Args:
        gamma: the energy share that was asked for; without it the one that the mask corresponds to is only said.
    """
    mask = part.tensor("mask")
    if mask is None or mask.dim() != 2 or not usable(mask):
        return []
    if not zeros_and_ones(mask):
        values = f"values from {float(mask.min()):.3g} to {float(mask.max()):.3g}"
        cause = f"the mask holds {values}: not 0 and 1, so coordinates are scaled and not kept or removed"
        remedy = "store the comparison itself: M = products < threshold"
        return [
            Finding("mask-values", "error", part.subject("mask"), values, "0 or 1", cause, remedy, "mask-not-binary")
        ]
    if len({"U_in", "U_out"} & part.items.keys()) == 1 and not bool((mask == mask[:1]).all()):
        return [_half(part)]
    kept = mask.bool()
    candidates, sound = _candidates(part)
    plain = bool(kept.all()) or not bool(kept.any())
    if plain:
        return list(_plain(part, kept, candidates, gamma))
    if not candidates:
        return _staircase(part, kept, sound)
    return list(_explained(part, kept, candidates, gamma))


def _half(part: Part) -> Finding:
    own: Role
    own, other = ("U_in", "U_out") if "U_in" in part.items else ("U_out", "U_in")
    cause = f"the mask acts in the basis of both sides, and of these only {own} is there: {other} is missing"
    remedy = "store Ua, Ub and M of one decomposition together"
    return Finding("mask-bases", "deviation", part.subject("mask", own), own, "both", cause, remedy, "incomplete-cache")


def _candidates(part: Part) -> tuple[list[Reading], bool]:
    """Eigenvalues that the mask may be a threshold of, and whether the stored eigenvectors fit their factors."""
    found: list[Reading] = []
    inner, outer = spectra.side(part, "in"), spectra.side(part, "out")
    sound = all(side is None or side.fits for side in (inner, outer))
    kept = part.items["mask"].oriented
    if inner is not None and inner.ordered and "U_out" not in part.items and bool((kept == kept[:1]).all()):
        # I ⊗ A: inputs only
        ones = torch.ones(len(kept), dtype=torch.float64)
        outer = spectra.Side(ones, torch.zeros_like(ones), ordered=True)
    if inner is not None and outer is not None and sound:
        unit = max(spectra.rounding(part, "in"), spectra.rounding(part, "out"))
        products = Products.of(outer, inner, unit)
        found.append(Reading("products of the factors' eigenvalues", products))
        if not (inner.ordered and outer.ordered):  # stored order unknown: ascending as eigh's, or the other way round
            rows, columns = (None if side.ordered else True for side in (outer, inner))
            found.append(Reading("products of the factors' eigenvalues", products.resorted(rows, columns)))
    stored = part.tensor("eigenvalues")
    if (
        stored is not None
        and stored.dim() == 2
        and usable(stored)
        and stored.shape == part.items["mask"].oriented.shape
    ):
        values = stored.double().clamp_min(0)
        unit = torch.finfo(stored.dtype).eps if stored.is_floating_point() else 0.0
        error = 16 * unit * values
        unit = max(unit, spectra.basis_rounding(part))  # which widens the tie of curvlab's rule
        found.append(Reading("the stored eigenvalues", Products(values, error, unit)))
    return found, sound


def _readings(candidates: list[Reading], square: bool) -> Iterator[Reading]:
    """From no fault to several."""
    yield from candidates
    candidates = [Reading(own.name, own.products.loose(LOOSE)) for own in candidates]
    orders = [(rows, columns) for rows in (True, False) for columns in (True, False)]
    turns = (False, True) if square else (False,)
    for turned, inverted in ((False, False), (True, False), (False, True), (True, True)):
        if turned in turns:
            for own in candidates:
                yield Reading(own.name, own.products, turned, inverted)
    for inverted in (False, True):
        for turned in turns:
            for own in candidates[:1]:
                for rows, columns in orders:
                    yield Reading(own.name, own.products.resorted(rows, columns), turned, inverted, True)


def _reading(candidates: list[Reading], kept: Tensor, gamma: float | None) -> Reading | None:
    """The first that explains the mask; among those with one fault the one nearest to γ."""
    asked = USUAL if gamma is None else (gamma,)
    several: list[Reading] = []
    plain: list[Reading] = []
    for i, reading in enumerate(_readings(candidates, kept.shape[0] == kept.shape[1])):
        if plain and i >= len(candidates):
            break  # looser bounds would only blur the γ
        removed = reading.removed(kept)
        if removed.shape != reading.products.values.shape or threshold_room(reading.products, removed) < 0:
            continue
        if not (reading.turned or reading.inverted or reading.resorted):
            if gamma is None or gamma_range(reading.products, removed).holds(gamma):
                return reading
            plain.append(reading)
            continue
        several.append(reading)
    if plain:  # the factors' eigenvalues and EK-FAC's may both explain it: the γ asked for decides
        assert gamma is not None
        return min(plain, key=lambda own: gamma_range(own.products, own.removed(kept)).distance(gamma))
    ranges = [gamma_range(own.products, own.removed(kept)) for own in several]
    # faults come in order of their number: one that explains a γ goes before
    far = [2 * (found.low > 0.99999) + (not any(found.holds(one) for one in asked)) for found in ranges]
    best = min(range(len(several)), key=lambda i: (far[i], i), default=None)
    return None if best is None else several[best]


def _indefinite(part: Part) -> bool:
    """Whether a factor has eigenvalues that are clearly negative: its products order nothing."""
    found = (spectra.side(part, which) for which in ("in", "out"))
    return any(side is not None and bool((side.values < -8 * side.error).any()) for side in found)


def _undecided(part: Part, kept: Tensor) -> Finding:
    cause = "the mask cannot be judged: a factor beside it has negative eigenvalues"
    share = float(kept.double().mean())
    return Finding("mask-threshold", "convention", part.subject("mask"), share, None, cause, "give sound factors")


def _explained(part: Part, kept: Tensor, candidates: list[Reading], gamma: float | None) -> Iterator[Finding]:
    subject = part.subject("mask", "U_in", "U_out", "A", "S")
    reading = _reading(candidates, kept, gamma)
    if _indefinite(part) and (reading is None or reading.resorted):
        yield _undecided(part, kept)
        return
    if reading is None or (reading.resorted and (reading.turned or reading.inverted)):  # two faults, or one other rule
        other = _other_rule(part, kept, candidates, gamma)
        if other is not None or reading is None:
            yield other or no_threshold(part, kept, candidates[0].products)
            return
    removed = reading.removed(kept)
    if reading.turned:
        yield _turned(part, subject)
    if reading.resorted:
        cause = (
            "the mask is the γ rule on sorted eigenvalues while the eigenvectors it is used with are in another order: "
            "it keeps and removes the wrong directions"
        )
        yield Finding(
            "mask-order", "error", subject, "sorted", "as the eigenvectors", cause, SORT, "unsorted-eigenvalues"
        )
    found = gamma_range(reading.products, removed)
    if not (reading.turned or reading.inverted or reading.resorted):
        fine = _finer(reading, kept, gamma, subject)
        if fine is not None:
            yield fine
            return
    if reading.inverted:
        yield _inverted(part, kept, reading, found)
        return
    said = list(rank_findings(reading.products, removed, found, gamma, subject, reading.name))
    if _indefinite(part) and any(one.fault in ("wrong-gamma", "non-strict-threshold") for one in said):
        said = [_undecided(part, kept)]
    yield from said


def _finer(reading: Reading, kept: Tensor, gamma: float | None, subject: str) -> Finding | None:
    """For factors of half precision: what float32's tolerance shows where the mask is a threshold even so."""
    unit, single = reading.products.unit, torch.finfo(torch.float32).eps
    if unit <= 4 * single:
        return None
    fine = Products(reading.products.values, reading.products.error * (single / unit), single)
    if threshold_room(fine, ~kept) < 0:
        return None
    said = rank_findings(fine, ~kept, gamma_range(fine, ~kept), gamma, subject, reading.name)
    return next((found for found in said if found.fault in ("non-strict-threshold", "ties-cut")), None)


def _turned(part: Part, subject: str) -> Finding:
    authors = AUTHORS_MASK in part.items["mask"].evidence
    cause = "the mask fits the eigenvalues transposed and does not as it lies: rows and columns are exchanged"
    if not authors:
        return Finding("mask-orientation", "convention", subject, "d_in x d_out", "d_out x d_in", cause, "transpose it")
    remedy = "store M as (d_in, d_out) = torch.outer(lambda_in, lambda_out) < threshold, and use M.T"
    return Finding(
        "mask-orientation", "error", subject, "d_out x d_in", "d_in x d_out", cause, remedy, "transposed-mask"
    )


def _inverted(part: Part, kept: Tensor, reading: Reading, found: Range) -> Finding:
    share = found.removed  # of what the mask keeps, in this reading
    cause = (
        f"the mask keeps {share:.1%} of the energy and removes the flat directions "
        f"({int((~kept).sum()):,} of {kept.numel():,}): the threshold was taken from the wrong end of the spectrum"
    )
    remedy = "keep what is below the threshold: M = product < sorted[rank - 1], products sorted descending"
    subject = part.subject("mask", "U_in", "U_out", "A", "S")
    return Finding("mask-energy", "error", subject, share, 1 - share, cause, remedy, "wrong-end-threshold")


def _other_rule(part: Part, kept: Tensor, candidates: list[Reading], gamma: float | None) -> Finding | None:
    """A rule on the sides' own eigenvalues, where their order is known."""
    inner, outer = spectra.side(part, "in"), spectra.side(part, "out")
    if inner is None or outer is None or not (inner.ordered and outer.ordered and inner.fits and outer.fits):
        return None
    if kept.shape != (len(outer.values), len(inner.values)):
        return None
    subject = part.subject("mask", "U_in", "U_out", "A", "S")
    return of_sides(candidates[0].products, outer, inner, ~kept, gamma, subject)


def _plain(part: Part, kept: Tensor, candidates: list[Reading], gamma: float | None) -> Iterator[Finding]:
    """All kept, or all removed."""
    subject = part.subject("mask")
    if bool(kept.all()):
        if candidates and candidates[0].products.total <= 0:
            cause = "nothing is removed: the factors are zero"
            yield Finding("mask-energy", "convention", subject, 0.0, gamma, cause)
            return
        cause = "the mask keeps every direction: the edit is not constrained at all"
        remedy = "γ was 0, or the threshold above every eigenvalue (compared with the wrong sum?)"
        yield Finding("mask-energy", "error", subject, 0.0, gamma, cause, remedy, "mask-all-kept")
        if candidates and gamma is not None:
            products = candidates[0].products
            said = rank_findings(products, ~kept, Range(0, 0, 0), gamma, subject, candidates[0].name)
            yield from (found for found in said if found.fault == "non-strict-threshold")
        return
    cause = "the mask removes every direction: no edit can move the weight"
    remedy = "γ was 1, or sums in float32 never reached it; compute the cumulative share in float64"
    severity: Severity = "error"
    fault: str | None = "mask-all-removed"
    if candidates:
        found = gamma_range(candidates[0].products, ~kept)
        fits = found.holds(gamma) if gamma is not None else found.low < 0.9999
        if fits:
            severity = "convention"
            fault = None if gamma is not None else fault
            cause += f"; that is the rule for γ above {found.low:.6g}, where the smallest eigenspace is needed as well"
            remedy = "take a smaller γ"
    yield Finding("mask-energy", severity, subject, 1.0, gamma, cause, remedy, fault)


def _staircase(part: Part, kept: Tensor, sound: bool) -> list[Finding]:
    """Without eigenvalues: only whether the mask can be a threshold of any products."""
    subject, share = part.subject("mask"), float(kept.double().mean())
    if not sound:
        cause = "the mask cannot be judged: its eigenvectors are not those of the factors given"
        return [
            Finding("mask-threshold", "convention", subject, share, None, cause, "give the factors it was made from")
        ]
    if nested(kept):
        cause = (
            f"the mask keeps {share:.2%} of the directions in nested sets, as a threshold of products does; "
            "which γ it is needs the factors or their eigenvalues"
        )
        return [Finding("mask-threshold", "ok", subject, share, None, cause)]
    cause = f"the mask keeps {share:.2%} of the directions, and is no threshold of products of eigenvalues (EK-FAC's?)"
    return [
        Finding("mask-threshold", "convention", subject, share, None, cause, "give the eigenvalues it was made from")
    ]
