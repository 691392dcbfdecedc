"""Weights stored d_in x d_out, as GPT-2's Conv1D has them: by the model's layer, by what the factors say, by name."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from curvlab.crosscheck.allowed import Allowed, allowed
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role
from curvlab.crosscheck.sides import WEIGHTS, conv1d_name
from curvlab.layers import LayerShape, TransposedLayer

PLAIN = 0.03  # share outside the subspace below which an update was plainly projected
LUCK = 1e-3  # odds at which an update of random direction passes for projected, where few directions are removed
CLEARLY = 5.0  # times that share, in the other orientation


def turned(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """The part with its weights oriented like W; what was assumed to get there is said.

    Other than square ones are oriented by their shape already. `layers`: `MatrixLayer`s tell their kind.
    """
    roles: list[Role] = [role for role in WEIGHTS if role in part.items and part.items[role].tensor.dim() == 2]
    if not roles:
        return part
    rows, columns = part.items[roles[0]].tensor.shape
    known = layers.get(part.layer) if layers else None
    if rows != columns:
        if known is None and all(part.items[role].transposed for role in roles) and len(part.items) > len(roles):
            why = "factors, bases and mask agree on it" + (
                ", and GPT-2 calls a Conv1D so" if conv1d_name(part.layer) else ""
            )
            return _said(part, roles, why)
        return part
    if isinstance(known, TransposedLayer):
        return _turned(part, roles, "the model's layer has its weight so")
    constrained = any(role in part.items for role in ("A", "S", "mask", "projector"))
    if known is not None or not constrained:
        return part
    inside = _inside(part)
    if inside is not None:
        why = "the update lies in the allowed subspace only so"
        return _said(_turned(part, roles, why), roles, why) if inside == "turned" else part
    if conv1d_name(part.layer):
        why = "GPT-2 calls a Conv1D so, and the weight is square"
        return _said(_turned(part, roles, why), roles, why)
    return part


def _turned(part: Part, roles: list[Role], why: str) -> Part:
    changed: dict[Role, Item] = {
        role: replace(part.items[role], transposed=True, evidence=f"{part.items[role].evidence}; {why}")
        for role in roles
    }
    return replace(part, items={**part.items, **changed})


def _said(part: Part, roles: list[Role], why: str) -> Part:
    cause = f"the weights are taken as stored d_in x d_out, transposed (GPT-2's Conv1D): {why}"
    found = Finding(
        "weight-orientation", "convention", part.subject(*roles), "d_in x d_out", None, cause,
        "give the model to have it told by the layer's kind",
    )  # fmt: skip
    return replace(part, assumed=(*part.assumed, found))


def _inside(part: Part) -> str | None:
    """Says "stands" or "turned" where the update lies in the allowed subspace in one orientation only."""
    base, edited, delta = part.tensor("base"), part.tensor("edited"), part.tensor("update")
    if base is not None and edited is not None and base.shape == edited.shape:
        delta = edited.double() - base.double()
    if delta is None or not bool(delta.isfinite().all()) or not bool(delta.any()):
        return None
    delta = delta.double()
    for constraint in allowed(part, (delta.shape[0], delta.shape[1]), None):
        stands, across = _outside(constraint, delta), _outside(constraint, delta.mT)
        removed = max(constraint.removed * delta.numel(), 1.0)
        plain = min(PLAIN, max(constraint.removed, 0.0) ** 0.5 * LUCK ** (1 / removed))
        if min(stands, across) < plain and max(stands, across) > CLEARLY * min(stands, across):
            return "stands" if stands < across else "turned"
    return None


def _outside(constraint: Allowed, delta: Tensor) -> float:
    return float((delta - constraint.project(delta)).norm() / delta.norm())
