"""Where a mask's threshold lies against the γ that was asked for, and what moves it: ties, strictness, summation."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.gamma_rule import Products, Range, rank_of, sequential_ranks, threshold_of
from curvlab.crosscheck.other_rules import of_powers

USUAL = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999)  # γ that people choose


def rank_findings(
    products: Products, removed: Tensor, found: Range, gamma: float | None, subject: str, name: str
) -> Iterator[Finding]:
    """What is to say of a mask that removes all that lies above some threshold.

    Args:
        products: eigenvalues (d_out, d_in) the mask was held against.
        removed: true where a direction is removed.
        found: the γ for which the rule gives this mask.
        gamma: the one asked for, or None.
        name: of the eigenvalues.
    """
    tie = _tie(products, removed, subject)
    if tie is not None:
        yield tie
    size, count = removed.numel(), int(removed.sum())
    what = f"removes {count:,} of {size:,} directions with {found.removed:.6%} of the energy ({name})"
    interval = f"{found.low:.8g} < γ <= {found.high:.8g}"
    if gamma is None:
        if found.high < 0.2:
            cause = f"the mask {what}: far less than any γ in use; was the energy summed from the small end?"
            remedy = "sort descending before cumsum"
            yield Finding("mask-gamma", "deviation", subject, found.removed, 0.2, cause, remedy, "wrong-end-threshold")
            return
        yield Finding("mask-gamma", "ok", subject, found.removed, interval, f"the mask {what}: the rule at {interval}")
        return
    if found.holds(gamma):
        cause = f"the mask {what}: the rule at γ = {gamma:g}, and at any {interval}"
        yield Finding("mask-gamma", "ok", subject, found.removed, gamma, cause)
        return
    reach = tie_reach(products, gamma)
    beyond = removed & (products.values + products.error < reach.threshold - reach.error - reach.tie)
    if found.low >= gamma and not bool(beyond.any()):
        extra = int((removed & (products.values < reach.threshold)).sum())
        cause = (
            f"the mask {what}: the rule at γ = {gamma:g} and {extra:,} more within {reach.tie:.2g} of its threshold "
            f"σ_k = {reach.threshold:.4g}, one eigenspace up to round-off (curvlab removes it whole)"
        )
        yield Finding("mask-gamma", "ok", subject, found.removed, gamma, cause)
        return
    yield _off(products, removed, found, gamma, subject, what, interval)


@dataclass(frozen=True)
class Reach:
    """σ_k of the rule at a γ, its uncertainty, and how far below it eigenvalues still count as equal to it."""

    threshold: float
    error: float
    tie: float


def tie_reach(products: Products, gamma: float) -> Reach:
    """The tie of `curvlab.projector.null_space`: 16 units of rounding of σ_1, at most a thousandth of σ_k."""
    # a sum that misses γ by round-off goes on to the next eigenvalue
    threshold, error = threshold_of(products, min(gamma + 16 * products.unit, 1.0))
    tie = min(16 * products.unit * float(products.values.max()), 1e-3 * threshold)
    return Reach(threshold, error, tie * (1 + 1e-6))


def _off(
    products: Products, removed: Tensor, found: Range, gamma: float, subject: str, what: str, interval: str
) -> Finding:
    """Not the γ that was asked for: the likeliest reason."""
    threshold, error = threshold_of(products, gamma)
    above, count = int((products.values > threshold + 2 * error).sum()), int(removed.sum())
    if count == above:
        cause = f"the mask {what}: γ = {gamma:g} needs the eigenspace of σ_k too, which a non-strict comparison kept"
        remedy = "M = product < threshold (strictly), so that σ_k itself is removed"
        return Finding(
            "mask-strictness", "deviation", subject, found.removed, gamma, cause, remedy, "non-strict-threshold"
        )
    if Range(found.low - 1e-12, found.high, 0).holds(1 - gamma) or _kept_reaches(products, removed, found, gamma):
        cause = f"the mask {what}: γ = {gamma:g} is what it keeps; the energy was summed from the small end"
        remedy = "sort descending before cumsum"
        return Finding("mask-gamma", "error", subject, found.removed, gamma, cause, remedy, "wrong-end-threshold")
    exact = int((products.values >= threshold - 2 * error).sum())
    ranks = [rank for rank in sequential_ranks(products, gamma) if rank != exact] if gamma > 0.5 else []
    single = (
        f"the mask {what}; exact sums need {exact:,}: a running sum in float32 lost the small products",
        "sum in float64: torch.cumsum(products, 0, dtype=torch.float64)",
        "float32-energy",
    )
    if count in ranks:
        return Finding("mask-gamma", "deviation", subject, found.removed, gamma, *single)
    if not any(found.holds(usual) for usual in USUAL) and _unsorted_sum(products, count, gamma):
        cause = f"the mask {what}: the cumulative share was taken over unsorted products"
        remedy = "sort descending before cumsum"
        return Finding("mask-gamma", "error", subject, found.removed, gamma, cause, remedy, "unsorted-eigenvalues")
    if any(abs(rank - count) <= max(2.0, 0.02 * abs(rank - exact)) for rank in ranks):
        return Finding("mask-gamma", "deviation", subject, found.removed, gamma, *single)
    power = of_powers(products, found, removed, gamma, subject)
    if power is not None:
        return power
    ratio = max(1 - found.removed, 1e-300) / (1 - gamma)
    far = found.distance(gamma) > 0.05 or (found.distance(gamma) > 0.005 and not 0.25 <= ratio <= 4)
    severity: Severity = "error" if far else "deviation"
    cause = f"the mask {what}: the rule at {interval}, where γ = {gamma:g} was asked for (that removes {exact:,})"
    remedy = "make the mask again with the γ that is meant, rank = searchsorted(share, γ) + 1"
    return Finding("mask-gamma", severity, subject, found.removed, gamma, cause, remedy, "wrong-gamma")


def _kept_reaches(products: Products, removed: Tensor, found: Range, gamma: float) -> bool:
    """Whether the energy kept is what first reaches γ when it is summed from the small end."""
    if gamma <= 0.5:
        return False
    kept = 1 - found.removed
    values = products.values[removed]
    step = float(values.min()) / max(products.total, 1e-300) if len(values) else 0.0
    lowest = (
        float(products.values[~removed].max()) / max(products.total, 1e-300) if len(values) < removed.numel() else 0.0
    )
    return kept - lowest < gamma <= kept + step


def _unsorted_sum(products: Products, count: int, gamma: float) -> bool:
    """Whether the threshold is the product at which an unsorted running sum passes γ, in either layout."""
    for values in (products.values, products.values.mT):
        flat = values.flatten()
        threshold = flat[rank_of(flat, gamma)]
        if int((flat >= threshold).sum()) == count and float(threshold) > 0:
            return True
    return False


def _tie(products: Products, removed: Tensor, subject: str) -> Finding | None:
    """A cut inside an eigenspace: equal eigenvalues on both sides of the threshold, and none near it."""
    values, error = products.values, products.error
    if not bool(removed.any()) or bool(removed.all()):
        return None
    edge = float(values[removed].min())
    near = (values - edge).abs() <= 4 * error
    both = int((near & removed).sum()), int((near & ~removed).sum())
    if min(both) == 0 or edge <= 4 * float(error[near].max()):
        return None
    around = int(((values - edge).abs() <= 40 * error).sum())
    if around > 1.1 * sum(both):  # a dense spectrum, where round-off decides over neighbours
        return None
    exact = bool((values[near] == edge).all())
    severity: Severity = "deviation" if exact else "convention"
    how = "equal" if exact else "equal up to round-off"
    cause = (
        f"the mask cuts through an eigenspace: of {sum(both)} {how} products it removes {both[0]} and keeps {both[1]}; "
        "which ones depends on the basis that eigh happened to return"
    )
    remedy = "remove the whole eigenspace of σ_k: compare with a tolerance, M = product < threshold * (1 - 1e-5)"
    return Finding("mask-ties", severity, subject, both[1], 0, cause, remedy, "ties-cut")
