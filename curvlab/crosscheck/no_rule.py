"""Masks that no rule explains: rounded, of other factors, or near enough to be of EK-FAC's corrected eigenvalues."""

from torch import Tensor

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gamma_rule import Products, nested
from curvlab.crosscheck.other_rules import energy_of
from curvlab.crosscheck.parts import Part

NEAR = 0.2  # of the entries on the wrong side of the best threshold, as EK-FAC's eigenvalues may put them
SHARPER = 0.5  # see `_sharper`: what an EK-FAC mask at least has


def no_threshold(part: Part, kept: Tensor, products: Products) -> Finding:
    """A mask that no threshold of the eigenvalues given explains."""
    subject = part.subject("mask", "U_in", "U_out", "A", "S")
    wrong, energy = _misplaced(products, ~kept)
    if wrong <= 1e-3 and energy <= 1e-3 and wrong * kept.numel() <= max(2.0, 1e-3 * kept.numel()):
        cause = f"{wrong:.2%} of the entries ({energy:.2g} of the energy) are on the wrong side of any threshold"
        remedy = "compute eigenvalues in float32 or better (no TF32, no half precision)"
        return Finding("mask-threshold", "deviation", subject, wrong, 0.0, cause, remedy, "stale-mask")
    measured = f"{wrong:.1%} of the entries, {energy:.1%} of the energy"
    if nested(kept):
        cause = f"the mask is a staircase, but of other eigenvalues: {measured} on the wrong side of the best threshold"
        remedy = "the factors were taken again after the mask was made (or before): make both in one go"
        return Finding("mask-threshold", "error", subject, wrong, 0.0, cause, remedy, "stale-mask")
    if "eigenvalues" not in part.items and wrong <= NEAR and _sharper(products, ~kept) >= SHARPER:
        cause = (
            f"the mask is no threshold of products of eigenvalues ({measured} on the wrong side of the best one) but "
            "close to one: most likely of EK-FAC's corrected eigenvalues, which are not among the files"
        )
        remedy = "give the corrected eigenvalues as well; if K-FAC was meant, the mask is of other factors"
        return Finding("mask-threshold", "convention", subject, wrong, 0.0, cause, remedy)
    cause = f"the mask is no threshold of the eigenvalues given: {measured} on the wrong side of the best one"
    remedy = "make the mask again from the factors beside it"
    return Finding("mask-threshold", "error", subject, wrong, 0.0, cause, remedy, "stale-mask")


def _sharper(products: Products, removed: Tensor) -> float:
    """How much more energy it removes than as many random directions, over the most that these could: 1 for the γ
    rule, about 0 for directions that have nothing to do with these eigenvalues."""
    share, most = energy_of(products, removed)
    by_chance = float(removed.double().mean())
    return (share - by_chance) / (most - by_chance) if most > by_chance else 1.0


def _misplaced(products: Products, removed: Tensor) -> tuple[float, float]:
    """Share of entries, and of energy, on the wrong side of the best threshold."""
    order = products.values.flatten().argsort(descending=True)
    taken = removed.flatten()[order]
    wrong = (~taken).cumsum(0) + (taken.sum() - taken.cumsum(0))  # kept above, removed below
    at = int(wrong.argmin())
    values = products.values.flatten()[order]
    energy = float(values[: at + 1][~taken[: at + 1]].sum() + values[at + 1 :][taken[at + 1 :]].sum())
    return float(wrong[at]) / len(order), energy / max(products.total, 1e-300)
