"""The share of an update outside its allowed subspace, and which way of descending leaves it there."""

import math
from typing import Any

import torch
from torch import Tensor

from curvlab.crosscheck.allowed import Allowed
from curvlab.crosscheck.changes import Change
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Part

SGD = 0.999  # cosine from which an update counts as proportional

SCATTER = 4.0  # standard deviations of the share of a random update, in a few removed directions
TELLING = 6  # removed directions from which on a chance direction in them is not that of the weights
SIGNS = 0.99  # share of equal signs (by magnitude) from which an update is an elementwise scaling


def inside(part: Part, change: Change, constraint: Allowed) -> list[Finding]:
    """The share of δ outside the allowed subspace, and what most likely led to it."""
    delta = change.delta
    size = float(delta.norm())
    share = float((delta - constraint.project(delta)).norm()) / size
    limit = change.rounding / size + _arithmetic(change, constraint)
    where = part.subject(*change.roles, *constraint.roles)
    by_chance = math.sqrt(max(constraint.removed, 0.0))
    removed = constraint.removed * delta.numel()

    def finding(severity: str, cause: str, remedy: str = "", fault: str | None = None) -> list[Finding]:
        return [Finding("update-subspace", severity, where, share, limit, cause, remedy, fault)]  # type: ignore[arg-type]

    said = f"{share:.2%} of the update lies outside what {constraint.name} allows"
    pair = _pair(part, delta, constraint)
    if limit >= 0.5 * by_chance and limit > 1e-2 and share <= limit:
        return finding(
            "convention",
            f"{said}, but the weights' own rounding explains {min(limit, 1):.2%}, and a random update had "
            f"{by_chance:.2%}: nothing can be told from a change so small",
            "store the update itself, or weights in float32",
        )  # fmt: skip
    if share <= limit:
        return finding("ok", f"{said}: round-off explains {limit:.2%}{pair.get('inside', '')}")
    if "outside" in pair:
        severity, cause, remedy, fault = pair["outside"]
        return finding(severity, f"{said}: {cause}", remedy, fault)
    decay = _decay(change, constraint, limit)
    if decay is not None:
        return finding(
            "deviation",
            f"{said}: it is {decay:.2%} of the base weights themselves, taken off by weight decay, which no mask holds",
            "set the weight decay of what is edited to 0, or project the decay too", "update-weight-decay",
        )  # fmt: skip
    if share < 0.9 * by_chance:
        return finding(
            "convention",
            f"{said}; a random update had {by_chance:.2%}, an unprojected gradient more: as Adam leaves the subspace "
            "when it rescales a projected gradient elementwise (the paper's own order)",
            "project the update (or descend in the eigenbasis) to stay inside", "update-adam-leak",
        )  # fmt: skip
    if _odds(share**2) < _odds(constraint.removed) * (1 + SCATTER / math.sqrt(2 * max(removed, 1))) ** 2:
        return finding(
            "deviation",
            f"{said}, as much as a random update's {by_chance:.2%}: Adam's rescaling of a projected gradient at its "
            "worst, or an update that another constraint was made for",
            "give the gradient too, to tell which; project the update to stay inside", "update-adam-leak",
        )  # fmt: skip
    return finding(
        "error",
        f"{said}, more than a random update's {by_chance:.2%}: it was not projected, or by another constraint",
        "project every gradient or update of this layer by this mask", "update-outside-subspace",
    )  # fmt: skip


def _decay(change: Change, constraint: Allowed, limit: float) -> float | None:
    """d > 0 where what lies outside is −d·W, to a tenth and to round-off: weight decay; None else.

    None, too, where so few directions are removed that anything outside has nearly the weights' direction in them.
    """
    if change.base is None or constraint.removed * change.delta.numel() < TELLING:
        return None
    outside, own = (t - constraint.project(t) for t in (change.delta, change.base))
    size = float(own.square().sum())
    if size == 0:
        return None
    d = -float((outside * own).sum()) / size
    rest = float((outside + d * own).norm())
    found = float(outside.norm())
    return d if d > 0 and rest <= max(0.1 * found, min(0.3 * found, limit * float(change.delta.norm()))) else None


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else math.inf


def _arithmetic(change: Change, constraint: Allowed) -> float:
    """What projecting leaves: 64·√d units of the run's dtype (float32 at coarsest), and bases rounded when stored."""
    single = torch.finfo(torch.float32).eps
    unit = min(max(constraint.precision, change.eps, 2.0**-52), single)
    rounded = 4 * constraint.precision if constraint.precision > single else 0.0
    return 64 * max(change.delta.shape) ** 0.5 * unit + rounded


def _pair(part: Part, delta: Tensor, constraint: Allowed) -> dict[str, Any]:
    """What a gradient says of its update: proportional to which, or of the same signs as which."""
    gradient = part.tensor("gradient")
    if gradient is None or gradient.shape != delta.shape or not bool(gradient.isfinite().all()):
        return {}
    g = gradient.double().cpu()
    Pg = constraint.project(g)
    if float(g.norm()) == 0:
        return {}
    along, raw = _cosine(delta, Pg), _cosine(delta, g)
    if along >= SGD and along >= raw:
        return {"inside": f"; it is the projected gradient (cosine {along:.4f}), as SGD steps"}
    if raw >= SGD:
        return {"outside": (
            "error", f"it is the gradient itself (cosine {raw:.4f}), never projected", "project the gradient",
            "update-outside-subspace",
        )}  # fmt: skip
    same, same_raw = _signs(delta, Pg), _signs(delta, g)
    if same >= SIGNS and same > same_raw:
        return {"outside": (
            "convention",
            f"{same:.0%} of its signs are the projected gradient's: Adam (or the like) rescaled it once projected, "
            "as the paper does too, and leaves the subspace so",
            "project the update after the optimiser (or descend in the eigenbasis)", "update-adam-leak",
        )}  # fmt: skip
    if same_raw >= SIGNS:
        return {"outside": (
            "error", f"{same_raw:.0%} of its signs are the unprojected gradient's: an Adam step without a projection",
            "project the gradient or the update", "update-outside-subspace",
        )}  # fmt: skip
    return {"inside": "; it is not proportional to the projected gradient: an update projected after the optimiser"}


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return abs(float((a * b).sum())) / norms if norms > 0 else 0.0


def _signs(delta: Tensor, g: Tensor) -> float:
    """Share of |δ| at which δ has g's sign, or the opposite one."""
    agree = float((delta.abs() * (delta.sign() == g.sign())).sum() / delta.abs().sum())
    oppose = float((delta.abs() * (delta.sign() == -g.sign())).sum() / delta.abs().sum())
    return max(agree, oppose)
