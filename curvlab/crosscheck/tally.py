"""What concerns a part's factors together: the scale of A ⊗ S, and N against what was counted."""

import math
from collections.abc import Mapping

from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.layout import ALL_REAL
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.outcome import Outcome
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.structures import Fit, Side


def scale(part: Part, outcomes: Mapping[Side, Outcome], moments: LayerMoments) -> list[Finding]:
    """The scale of A ⊗ S as a whole, which alone matters for ε."""
    pair = [outcomes[side] for side in ("A", "S") if side in outcomes]
    if len(pair) < 2 or any(outcome.fit is None for outcome in pair):
        return []
    ratio = 1.0
    for outcome in pair:
        assert outcome.fit is not None
        own = _ours(outcome.fit, moments)
        if own is None:
            return []
        ratio *= float(outcome.X.trace()) / own
    tolerance = max(0.02, *(outcome.bound for outcome in pair if outcome.fit and not outcome.fit.exact), 0.02)
    same = abs(math.log(ratio)) <= tolerance
    severity: Severity = "ok" if same else "convention"
    said = "is ours" if same else f"is {ratio:.4g} times ours (A per position, S per loss term)"
    return [
        Finding(
            "factor-scale", severity, part.subject("A", "S"), ratio, f"1 ± {tolerance:.2g}",
            f"tr(A)·tr(S) {said}: only their product matters, for ε and predicted KL; a common scale changes no γ mask",
            "" if same else f"divide ε (or multiply predictions) accordingly: ½ δᵀCδ comes out {ratio:.4g} times ours",
        )
    ]  # fmt: skip


def _ours(fit: Fit, moments: LayerMoments) -> float | None:
    """The trace of our own factor at the same labels."""
    s = fit.structure
    labels = [label for label in moments.labels if label.startswith("model")] if s.labels == "model" else [s.labels]
    grams = [moments.gram(label, "position", "sum", ALL_REAL) for label in labels]
    traces = [float(gram.view(bias=s.bias).trace()) for gram in grams if gram is not None]
    n = moments.positions(ALL_REAL) if s.side == "A" else moments.counts["loss term"]
    return sum(traces) / len(traces) / n if traces and n and sum(traces) > 0 else None


def count(part: Part, moments: LayerMoments, same: bool) -> list[Finding]:
    """The stored N against what was counted here; `same`: a factor fits, so that the data are the same."""
    if part.count is None:
        return []
    named = [
        ("tokens (real positions)" if moments.flagged else "positions", moments.positions(ALL_REAL)),
        ("loss terms" if moments.flagged else "examples with a loss", moments.counts["loss term"]),
        *((f"tokens, {name}", moments.positions(name)) for name in moments.sets if name != ALL_REAL),
        ("documents" if moments.flagged else "examples", moments.counts["document"]),
        ("batches", moments.counts["batch"]),
    ]  # fmt: skip
    subject = part.subject(*_statistics(part)) + f" · N = {part.count:g}"
    for name, n in named:
        if n == part.count:
            return [Finding("sample-count", "ok", subject, part.count, n, f"N is the number of {name} in these data")]
    for name, n in named[:-2]:
        if same and n and part.count > n and part.count % n == 0:
            cause = (
                f"N is {part.count / n:.0f} times the number of {name} in these data: they were counted over and over"
            )
            return [Finding("sample-count", "convention", subject, part.count, n, cause)]
    said = ", ".join(f"{n} {name}" for name, n in named[:2] + named[-2:])
    return [
        Finding(
            "sample-count", "deviation", subject, part.count, said,
            f"N fits no count of these data ({said}): other or more data, or another way of cutting them",
            "give the data of the production run, cut and batched as it did",
        )
    ]  # fmt: skip


def _statistics(part: Part) -> list[Role]:
    return [role for role in ("A", "S", "eigenvalues") if role in part.items]
