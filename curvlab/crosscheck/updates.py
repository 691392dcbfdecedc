"""An edit held to its constraint: share outside the allowed subspace, curvature spent, drift, capability change."""

import math
from collections.abc import Sequence

from torch import Tensor

from curvlab.crosscheck.allowed import allowed
from curvlab.crosscheck.capability import measured
from curvlab.crosscheck.changes import Change, change_of
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.leaks import inside
from curvlab.crosscheck.parts import Part
from curvlab.crosscheck.subject import Subject
from curvlab.layers import MatrixLayer, find_layers

LISTED = 5  # changes named one by one
DRIFT = 0.25  # relative change of the weights beyond which the paper computes its projector anew


def check(part: Part, gamma: float | None, subject: Subject | None) -> list[Finding]:
    """An update, or edited weights against base weights, held to the constraint that the part has.

    Args:
        gamma: the energy share of the null space, where only factors are there to make it of.
        subject: the model at its base weights and capability data, for what the edit really costs.

    Raises:
        ValueError: what the model refuses of the data.
    """
    layer = _layer(part, subject)
    change = change_of(part, layer)
    if isinstance(change, Finding):
        return [change]
    if change is None or change.delta.dim() != 2:
        return []
    where = part.subject(*change.roles)
    if not bool(change.delta.isfinite().all()):
        return [
            Finding("update", "error", where, None, None, "the update has entries that are not finite",
                    "look for a diverged run, and discard these weights", "not-finite")
        ]  # fmt: skip
    constraints = allowed(part, (change.delta.shape[0], change.delta.shape[1]), gamma)
    if not bool(change.delta.any()):
        return [_unchanged(part, where, bool(constraints) or any(role in part.items for role in ("A", "S")))]
    findings: list[Finding] = []
    for constraint in constraints:
        findings += inside(part, change, constraint)
    if change.base is not None:
        findings.append(_drift(where, change))
    spent = _spent(part, change.delta)
    if spent is not None:
        findings.append(_curvature(part, change, *spent))
    if subject is not None and layer is not None:
        findings += measured(part, change, layer, subject, None if spent is None else spent[0])
    return findings


def others(parts: Sequence[Part]) -> list[Finding]:
    """Tensors that changed though no constraint is known for them: an error where another layer's is, else a list."""
    constrained = [p for p in parts if any(role in p.items for role in ("mask", "projector", "A", "S"))]
    changes: dict[str, float] = {}
    for part in parts:
        base, edited = part.tensor("base"), part.tensor("edited")
        if base is None or edited is None or base.shape != edited.shape or any(part is own for own in constrained):
            continue
        change, size = float((edited.double() - base.double()).norm()), float(base.double().norm())
        if change > 0:
            changes[part.layer or part.subject("edited")] = change / size if size > 0 else math.inf
    if not changes:
        return []
    worst = sorted(changes.items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{name} by {drift:.2g}" for name, drift in worst[:LISTED])
    more = f" and {len(worst) - LISTED} more" if len(worst) > LISTED else ""
    where = ", ".join(name for name, _ in worst[:LISTED])
    said = f"{listed}{more}, relative to their norms"
    if not constrained:
        return [
            Finding("update-changes", "convention", where, worst[0][1], None,
                    f"what changed ({len(worst)} tensors): {said}; no factors, mask or projector to hold it to",
                    "give the factors and the cache that the edit was made with")
        ]  # fmt: skip
    return [
        Finding("update-elsewhere", "error", where, worst[0][1], 0.0,
                f"{len(worst)} {'tensor' if len(worst) == 1 else 'tensors'} changed though only "
                f"{', '.join(p.layer or 'a nameless layer' for p in constrained[:LISTED])} is constrained: {said}",
                "freeze what is not edited, or give its constraint", "update-elsewhere")
    ]  # fmt: skip


def _layer(part: Part, subject: Subject | None) -> MatrixLayer | None:
    if subject is None:
        return None
    names = dict(subject.model.named_modules())
    found = [n for n in (part.layer, part.layer.removesuffix(".weight")) if n and n in names]
    if not found:
        return None
    try:
        return find_layers(subject.model, [found[0]])[0]
    except ValueError:  # a norm or an embedding, whose change has no curvature here
        return None


def _unchanged(part: Part, where: str, constrained: bool) -> Finding:
    if not constrained:
        return Finding("update", "ok", where, 0.0, 0.0, "this layer did not change")
    return Finding(
        "update", "error", where, 0.0, None,
        "the weights did not change at all: the edit did nothing, without a word (a mask that removes everything, a "
        "gradient that never arrived, or steps below the weights' rounding)",
        "look at the mask's kept share and at requires_grad; keep a float32 copy of low-precision weights", "no-change",
    )  # fmt: skip


def _drift(where: str, change: Change) -> Finding:
    assert change.base is not None
    size = float(change.base.norm())
    drift = float(change.delta.norm()) / size if size > 0 else math.inf
    if drift <= DRIFT:
        return Finding("update-drift", "ok", where, drift, DRIFT, f"the weights moved by {drift:.2%} of their norm")
    return Finding(
        "update-drift", "deviation", where, drift, DRIFT,
        f"the weights moved by {drift:.0%} of their norm: curvature taken at the start no longer describes them",
        "compute the factors anew whenever the weights have moved by a quarter, as the paper does on LeNet",
    )  # fmt: skip


def _spent(part: Part, delta: Tensor) -> tuple[float, float] | None:
    """½ δᵀCδ, and that of a random displacement of the same norm; from A ⊗ S, else from eigenvalues in their basis."""
    A, S = part.tensor("A"), part.tensor("S")
    size = float(delta.square().sum())
    if A is not None and S is not None and len(S) == len(delta) and len(A) in (delta.shape[1], delta.shape[1] + 1):
        A, S = A.double().cpu(), S.double().cpu()
        inner = A[: delta.shape[1], : delta.shape[1]]
        if bool(A.isfinite().all() and S.isfinite().all()):
            total = float(inner.trace() * S.trace())
            return 0.5 * float(((S @ delta @ inner) * delta).sum()), 0.5 * size * total / delta.numel()
    values, u_out, u_in = part.tensor("eigenvalues"), part.tensor("U_out"), part.tensor("U_in")
    if values is None or u_out is None or u_in is None:
        return None
    if values.shape != delta.shape or u_out.shape != (len(delta),) * 2 or u_in.shape != (delta.shape[1],) * 2:
        return None
    Z = u_out.double().cpu().mT @ delta @ u_in.double().cpu()
    own = values.double().cpu()
    return 0.5 * float((own * Z.square()).sum()), 0.5 * size * float(own.mean())


def _curvature(part: Part, change: Change, spent: float, random: float) -> Finding:
    """For information: a projected gradient lies along the sharpest that is allowed, and may spend more than chance."""
    where = part.subject(*change.roles, "A", "S")
    ratio = spent / random if random > 0 else 0.0
    cause = (
        f"½ δᵀCδ = {spent:.3g} (nats a loss term for cross-entropy, where A ⊗ S is on the scale of the mean loss), "
        f"{ratio:.2g} times that of a random displacement of its size"
    )
    return Finding("update-curvature", "ok", where, ratio, None, cause)
