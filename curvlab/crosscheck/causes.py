"""No convention fits: the likely causes, tried in order."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlab.crosscheck.altered import altered, resembles
from curvlab.crosscheck.drawn import drawn_fits
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.layout import ALL_REAL
from curvlab.crosscheck.locate import layers_of_shape, search, swapped, weights_of
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.outcome import Outcome
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.structures import Side, fits
from curvlab.crosscheck.subject import Subject
from curvlab.layers import find_layers
from curvlab.spectrum import eigh

ENERGY = 0.9  # share of ours that the leading eigenspace holds, and that theirs must hold to be called similar


def explain(
    part: Part, subject: Subject, name: str, moments: LayerMoments, outcomes: Mapping[Side, Outcome],
    all_layers: Sequence[str] | None, seed: int,
) -> list[Finding]:  # fmt: skip
    """Why nothing fits: swapped sides, another layer, other weights, a step with a name, other data."""
    failing = {side: outcome for side, outcome in outcomes.items() if outcome.fit is None}
    sides: list[Role] = list(failing)
    where = part.subject(*sides)
    said = "; ".join(_nearest(side, outcome) for side, outcome in failing.items())
    worst = max((o.nearest.residual if o.nearest else 1.0) for o in failing.values())
    limit = max(o.round_off for o in failing.values())

    def error(cause: str, remedy: str, fault: str | None) -> list[Finding]:
        return [Finding("convention", "error", where, worst, limit, f"{cause} ({said})", remedy, fault)]

    if _are_swapped(outcomes, moments):
        return [swapped(where, "A is the second moment of gradients and S that of inputs", worst)]
    elsewhere, closer = _elsewhere(part, subject, name, outcomes, failing, all_layers, seed)
    if elsewhere is not None:
        return error(*elsewhere)
    steps = {side: altered(outcome.X, side, moments, outcome.round_off) for side, outcome in failing.items()}
    if all(steps.values()):
        did = "; ".join(f"{side} is {step}" for side, step in steps.items())
        return error(did, "store the plain mean of outer products", "unexplained-factor")
    if set(failing) == {"A"} and any(o.certain and o.fit is not None for side, o in outcomes.items() if side != "A"):
        return error(
            "S fits to round-off, so that weights, data and labels are right: A alone is of something else. Inputs "
            f"taken at another place than {name} (before an activation or a product, or another module's), or altered "
            "afterwards; or padding or special tokens (a second begin of text) that enter A alone",
            f"capture what {name} is called with, at the positions of the loss or of the text", "unexplained-factor",
        )  # fmt: skip
    if "A" in outcomes and (outcomes["A"].fit is not None):
        if all(resembles(outcome.X, side, moments) for side, outcome in failing.items()):
            return error(
                "A fits, so that data and the weights below are these; the gradients do not: this layer's or later "
                "weights have changed since, or another loss was differentiated (padding in it, labels not shifted)",
                "compute the factors anew at the present weights, with this loss", "stale-factors",
            )  # fmt: skip
        return error(
            "A fits, so that data and the weights below are these; the other is like none of ours at any labels, no "
            "nearer than an unrelated matrix: another module's, or altered after it was summed",
            f"sum g gᵀ of gradients at the output of {name}", "unexplained-factor",
        )  # fmt: skip
    return _similar(part, name, moments, failing, said + closer)


def contradict(
    part: Part, subject: Subject, name: str, outcomes: Mapping[Side, Outcome], all_layers: Sequence[str] | None,
    seed: int,
) -> list[Finding]:  # fmt: skip
    """Where a factor fits by a statistical bound alone: another layer or other weights that it fits exactly."""
    doubtful = {side: outcome for side, outcome in outcomes.items() if not outcome.certain}
    elsewhere, _ = _elsewhere(part, subject, name, outcomes, doubtful, all_layers, seed)
    if elsewhere is None:
        return []
    sides: list[Role] = list(doubtful)
    worst = max(o.fit.residual for o in doubtful.values() if o.fit)
    cause, remedy, fault = elsewhere
    return [Finding("convention", "error", part.subject(*sides), worst, None, cause, remedy, fault)]


def _elsewhere(
    part: Part, subject: Subject, name: str, outcomes: Mapping[Side, Outcome], failing: Mapping[Side, Outcome],
    all_layers: Sequence[str] | None, seed: int,
) -> tuple[tuple[str, str, str] | None, str]:  # fmt: skip
    """(cause, remedy, fault) where another layer or the part's other weights fit exactly; and which layer is nearer."""
    stored: dict[Side, Tensor] = {side: outcome.X for side, outcome in outcomes.items() if side != "eigenvalues"}
    others = [n for n in layers_of_shape(subject.model, stored, all_layers) if n != name]
    wanted = [side for side in failing if side in stored]
    closer = ""
    if others and wanted:
        residuals = search(subject, stored, others, seed)
        for other, own in residuals.items():
            if all(own[side] <= failing[side].round_off for side in wanted if side == "A" or "A" not in wanted):
                fitting = {side: own[side] for side in wanted if own[side] <= failing[side].round_off}
                what = f"{' and '.join(fitting)} of" if set(fitting) != set(stored) else "the factors of"
                left = ", ".join(f"{side} {residual:.1g}" for side, residual in fitting.items())
                cause = f"these are {what} {other}, not of {name}: relative distances to that layer's are {left}"
                return (cause, f"use the factors of {name}", "other-layer"), ""
        if residuals:
            worst = max(o.nearest.residual if o.nearest else 1.0 for o in failing.values())
            best = min(residuals, key=lambda n: max(residuals[n][side] for side in wanted))
            nearest = max(residuals[best][side] for side in wanted)
            closer = f"; {best} is nearer ({nearest:.2g})" if nearest < 0.5 * worst else ""
    for role in ("edited", "base"):
        W = part.tensor(role)
        if W is not None and _fits_weights(subject, name, W, failing, seed):
            cause = f"these are the factors of the model with the {role} weights of {name}, not of the model given"
            return (cause, "compute the factors at the weights from which the edit starts", "stale-factors"), ""
    return None, closer


def _nearest(side: Side, outcome: Outcome) -> str:
    if outcome.nearest is None:
        return f"{side}: nothing comes near"
    return f"{side}: nearest {outcome.nearest}, residual {outcome.nearest.residual:.2g}, bound {outcome.round_off:.2g}"


def _are_swapped(outcomes: Mapping[Side, Outcome], moments: LayerMoments) -> bool:
    """Each of those that are there fits the other side."""
    tried = []
    for side, other in (("A", "S"), ("S", "A")):
        if side in outcomes and outcomes[side].fit is None:  # type: ignore[index]
            outcome = outcomes[side]  # type: ignore[index]
            found = fits(outcome.X, other, moments)  # type: ignore[arg-type]
            good = bool(found) and found[0].residual <= outcome.round_off
            if not good and other == "S":
                good = any(drawn.told for drawn in drawn_fits(outcome.X, "S", moments))
            tried.append(good)
    return bool(tried) and (all(tried) if len(tried) == 1 else tried[1] and any(tried))


def _fits_weights(subject: Subject, name: str, W: Tensor, failing: Mapping[Side, Outcome], seed: int) -> bool:
    """Whether all that fails fits the model with these weights in the layer."""
    (layer,) = find_layers(subject.model, [name])
    if W.shape != (layer.d_out, layer.d_in) or bool((W.to(layer.matrix()) == layer.matrix()).all()):
        return False
    if "eigenvalues" in failing:
        return False
    with weights_of(layer, W):
        moments = gather(subject.model, subject.loss, subject.data, name, seed=seed)[name]
    for side, outcome in failing.items():
        found = fits(outcome.X, side, moments)
        if not found or found[0].residual > outcome.round_off:
            return False
    return True


def _similar(part: Part, name: str, moments: LayerMoments, failing: Mapping[Side, Outcome], said: str) -> list[Finding]:
    """Nothing explains it: how far the leading eigenspaces and the energy in them agree, and what that speaks for."""
    measured: dict[Side, tuple[float, float]] = {}
    for side, outcome in failing.items():
        gram = (
            moments.gram("" if side == "A" else "data", "position", "sum", ALL_REAL) if side != "eigenvalues" else None
        )
        if gram is not None:
            Y = gram.view(bias="last" if len(outcome.X) == len(gram.matrix) else "none")
            if Y.shape == outcome.X.shape and bool(Y.isfinite().all()):
                measured[side] = agreement(outcome.X, Y)
    counts = {moments.positions(n) for n in moments.sets} | set(moments.counts.values())
    other_data = part.count is not None and part.count not in counts
    similar = bool(measured) and all(captured >= ENERGY for _, captured in measured.values())
    told = "; ".join(
        f"{side}: the eigenspace of {ENERGY:.0%} of its energy here is shared to {shared:.0%}, "
        f"theirs holds {captured:.0%} of what ours does" for side, (shared, captured) in measured.items()
    )  # fmt: skip
    roles: list[Role] = list(failing)
    where = part.subject(*roles)
    worst = max((o.nearest.residual if o.nearest else 1.0) for o in failing.values())
    limit = max(o.round_off for o in failing.values())
    if other_data:
        cause = (
            f"no convention fits, and N = {part.count:g} is no count of these data: other data than the factors' own"
        )
        cause += ", but similar" if similar else ", and not similar: or another model"
        severity = "deviation" if similar else "error"
        remedy = "give the data of the production run to compare exactly"
        return [Finding("convention", severity, where, worst, limit, f"{cause} ({told}; {said})", remedy)]  # type: ignore[arg-type]
    cause = f"no convention fits {name} on these data: weights that have moved since (stale factors), or other data"
    cause += "; the leading directions are alike" if similar else ""
    return [
        Finding(
            "convention", "error", where, worst, limit, f"{cause} ({told}; {said})",
            "compute the factors anew at the weights that are edited, or give the data and weights they were made of",
            "stale-factors",
        )
    ]  # fmt: skip


def agreement(X: Tensor, Y: Tensor) -> tuple[float, float]:
    """Overlap of the leading eigenspaces, ‖U_kᵀV_k‖²/k, and the share of Y's energy in its own that X's holds.

    k is the number of Y's eigenvalues that hold `ENERGY` of its trace.
    """
    values, U = eigh(Y, semidefinite=True)
    k = int(torch.searchsorted(values.cumsum(0), ENERGY * values.sum())) + 1
    V = eigh(X, semidefinite=True)[1][:, : min(k, len(values))]
    U, own = U[:, : V.shape[1]], float(values[: V.shape[1]].sum())
    shared = float((U.mT @ V).square().sum()) / V.shape[1]
    return shared, float((V * (Y @ V)).sum()) / own
