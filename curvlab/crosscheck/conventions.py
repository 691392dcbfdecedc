"""Stored factors against those of a model and data: which convention they follow, named with its residual."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from curvlab.crosscheck import causes
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.layout import IGNORED, PADDING
from curvlab.crosscheck.locate import locate
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.outcome import Outcome
from curvlab.crosscheck.outcome import outcome as outcome_of
from curvlab.crosscheck.parts import Part
from curvlab.crosscheck.structures import Fit, Side
from curvlab.crosscheck.subject import Subject
from curvlab.crosscheck.tally import count, scale

__all__ = ["Subject", "check"]

SIDES: tuple[Side, ...] = ("A", "S", "eigenvalues")


def check(
    part: Part,
    subject: Subject,
    *,
    all_layers: Sequence[str] | None = None,
    seed: int = 0,
    moments: Mapping[str, LayerMoments] | None = None,
) -> list[Finding]:
    """The convention of each stored factor and of EK-FAC eigenvalues; N against the counts; the scale of A ⊗ S.

    Args:
        all_layers: layers that the factors may belong to instead; None tries all of the same shape. They are gathered
            only where the layer named does not fit.
        seed: of our draws of the model's labels.
        moments: of the part's layer, where they were gathered already (for EK-FAC, in the part's basis).

    Raises:
        ValueError: what `curvlab.capture.passes` refuses of the model and data.
    """
    stored = {side: X for side in SIDES if (X := part.tensor(side)) is not None}
    bases = _bases(part)
    if bases is None:
        stored.pop("eigenvalues", None)
    if not stored:
        return []
    findings: list[Finding] = []
    for side, X in list(stored.items()):
        if not bool(X.isfinite().all()) or not float(X.double().norm()) > 0:
            del stored[side]
            findings.append(_not_comparable(part, side, X))
    name, named = locate(part, subject, stored, all_layers, seed)
    findings += named
    if name is None or not stored:
        return findings
    layer_moments = (moments or {}).get(name)
    if layer_moments is None:
        given = {name: bases} if bases is not None and "eigenvalues" in stored else None
        layer_moments = gather(subject.model, subject.loss, subject.data, name, bases=given, seed=seed)[name]
    if not layer_moments.thorough:
        findings.append(
            Finding(
                "convention-breadth", "convention", part.subject(*stored), None, None,
                "memory sufficed for sums over single positions alone: conventions of examples, of batches and of mean-"
                "reduced losses were not tried", "run it where more memory is free",
            )
        )  # fmt: skip
    outcomes = {side: outcome_of(part, side, X.double(), layer_moments, subject) for side, X in stored.items()}
    if "A" in outcomes and outcomes["A"].fit is None:  # other data or weights: that draws may be theirs says nothing
        outcomes = {side: own if own.certain else replace(own, fit=None, findings=[]) for side, own in outcomes.items()}
    outcomes = _of_like_positions(outcomes, layer_moments)
    contradicted: list[Finding] = []
    if not all(own.certain for own in outcomes.values()):
        contradicted = causes.contradict(part, subject, name, outcomes, all_layers, seed)
    findings += contradicted
    unexplained = {side: own for side, own in outcomes.items() if not own.explained}
    if not contradicted and any(own.fit is None for own in unexplained.values()):
        findings += causes.explain(part, subject, name, layer_moments, unexplained, all_layers, seed)
    for own in outcomes.values():
        findings += own.findings if own.certain or not contradicted else []
    if not contradicted:
        findings += scale(part, outcomes, layer_moments)
    return findings + count(part, layer_moments, any(own.fit is not None for own in outcomes.values()))


def _of_like_positions(outcomes: Mapping[Side, Outcome], moments: LayerMoments) -> dict[Side, Outcome]:
    """Draws of labels count the positions with a loss that A is known to count; another choice only looks alike."""
    A = outcomes.get("A")
    if A is None or A.fit is None or not A.certain or not moments.flagged:
        return dict(outcomes)

    def with_loss(fit: Fit) -> set[int]:
        return {c for c in moments.sets[fit.structure.positions] if not c & (IGNORED | PADDING)}

    own = with_loss(A.fit)
    return {
        side: one if one.certain or (one.fit is not None and with_loss(one.fit) == own)
        else replace(one, fit=None, findings=[])
        for side, one in outcomes.items()
    }  # fmt: skip


def _bases(part: Part) -> tuple[Tensor, Tensor] | None:
    u_out, u_in = part.tensor("U_out"), part.tensor("U_in")
    if u_out is None or u_in is None or not bool(u_out.isfinite().all() and u_in.isfinite().all()):
        return None
    return u_out, u_in


def _not_comparable(part: Part, side: Side, X: Tensor) -> Finding:
    finite = bool(X.isfinite().all())
    return Finding(
        f"convention-{side}", "error", part.subject(side), None, None,
        f"{side} has entries that are not finite" if not finite else f"{side} is zero everywhere",
        "compute it anew", "not-finite" if not finite else None,
    )  # fmt: skip
