"""One stored factor held against every convention: which fits, within which bound, and how that is said."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlab.crosscheck.adding import LARGE_LAYER
from curvlab.crosscheck.altered import damping
from curvlab.crosscheck.drawn import Drawn, drawn_fits
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.layout import ALL_REAL
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.parts import Part
from curvlab.crosscheck.structures import (
    SCALE,
    Fit,
    Side,
    Structure,
    bound,
    candidates,
    compare,
    explained,
    fits,
    plainest,
    stored_precision,
)
from curvlab.crosscheck.subject import Subject
from curvlab.crosscheck.wording import remarks

NEARLY = 0.01  # a residual below which one convention may still be meant, computed with less precision

WORST = 0.1  # that a long float32 sum is granted; beyond, nothing is recognised
EXACTLY = 1e-10  # residuals below are all round-off of float64
NEGLIGIBLE = 1e-3  # of the mean eigenvalue: damping below it changes no direction that a γ mask asks about


@dataclass(frozen=True)
class Outcome:
    """What the comparison of one stored factor came to."""

    X: Tensor
    bound: float
    fit: Fit | None  # None where nothing fits
    findings: list[Finding]
    nearest: Fit | None
    round_off: float
    explained: bool = False  # by something else than a convention

    @property
    def certain(self) -> bool:
        """Whether it does not rest on a statistical bound."""
        return self.fit is None or self.fit.exact


def outcome(part: Part, side: Side, X: Tensor, moments: LayerMoments, subject: Subject) -> Outcome:
    """The best convention for one factor."""
    X = X.to(next(iter(moments.grams.values())).matrix.device)
    limit = _limit(X, moments, subject)
    own = _held(part, side, X, moments, limit)
    if own.explained or (own.nearest is not None and own.nearest.residual <= limit):
        return own
    delta = damping(X, side, moments, limit)
    if delta is None:
        return own
    undamped = X - delta * torch.eye(len(X), dtype=X.dtype, device=X.device)
    again = _held(part, side, undamped, moments, limit * float(X.norm() / undamped.norm()))
    return again if again.fit is None else replace(again, findings=[_damped(part, side, X, delta), *again.findings])


def _damped(part: Part, side: Side, X: Tensor, delta: float) -> Finding:
    share = delta / (float(X.trace()) / len(X) - delta)
    return Finding(
        f"convention-{side}-damped-factor", "deviation" if share >= NEGLIGIBLE else "convention", part.subject(side),
        share, NEGLIGIBLE,
        f"{side} fits with a multiple of the identity added (damping): {side} + {delta:.3g} · I, {share:.2g} of the "
        "mean eigenvalue; flat directions hold energy that the data do not give them",
        "keep damping out of stored factors; add it where they are inverted", "damped-factor",
    )  # fmt: skip


def _held(part: Part, side: Side, X: Tensor, moments: LayerMoments, limit: float) -> Outcome:
    """X as it is, held against every convention."""
    if side == "eigenvalues":
        products = _products(part, X, limit)
        if products is not None:
            return Outcome(X, limit, None, [products], None, limit, explained=True)
    found = fits(X, side, moments, limit)
    nearest = found[0] if found else None
    if nearest is not None and nearest.residual <= limit:
        plain = plainest(found, EXACTLY)
        return Outcome(X, limit, plain, _named(part, plain, found, limit, X, moments), nearest, limit)
    drawn = drawn_fits(X, side, moments) if side != "A" else []
    if drawn and (nearest is None or nearest.residual > max(NEARLY, _naive(part, X, moments))):
        best = drawn[0]
        if not best.told:
            return Outcome(X, best.limit, best.fit, [_undecided(part, best, moments)], nearest, limit)
        said = _named(part, best.fit, found, best.limit, X, moments)
        if best.lifted is not None:
            said.append(_damped(part, side, X, best.lifted / (1 + best.lifted) * float(X.trace()) / len(X)))
        return Outcome(X, best.limit, best.fit, said, nearest, limit)
    if nearest is not None and nearest.residual <= max(NEARLY, _naive(part, X, moments)):
        # what lost digits lost some of its scale, too
        found = [explained(fit, moments, max(SCALE, 2 * fit.residual)) for fit in found if fit.residual <= 0.5]
        plain = plainest(found, EXACTLY)
        return Outcome(X, limit, plain, _nearly(part, plain, found, limit, X, moments), nearest, limit)
    return Outcome(X, limit, None, [], nearest, limit)


def _naive(part: Part, X: Tensor, moments: LayerMoments) -> float:
    """What a sum in float32, a number at a time, may lose: half a unit of rounding for each of its terms."""
    terms = max(part.count or 0, moments.counts["real position"])
    return min(2.0**-24 * terms, WORST) if stored_precision(X) != torch.float64 else 0.0


def _limit(X: Tensor, moments: LayerMoments, subject: Subject) -> float:
    layer = moments.layer
    terms = max(moments.counts["real position"], 1)
    coarse = max(
        (p.dtype for p in subject.model.parameters() if p.is_floating_point()), key=lambda t: torch.finfo(t).eps
    )
    wide = max(layer.d_in, layer.d_out) > LARGE_LAYER
    return bound(X, coarse, terms, torch.float32 if wide else torch.float64)


def _products(part: Part, X: Tensor, limit: float) -> Finding | None:
    """Where the eigenvalues are products λ_out λ_inᵀ of the stored factors': K-FAC's, not EK-FAC's."""
    values = []
    for factor, vectors, own in (("S", "U_out", "values_out"), ("A", "U_in", "values_in")):
        found, C, U = part.tensor(own), part.tensor(factor), part.tensor(vectors)  # type: ignore[arg-type]
        if found is None and C is not None and U is not None and len(C) == len(U):
            found = (U.double() * (C.double() @ U.double())).sum(0)
        if found is None:
            return None
        values.append(found.double().to(X.device))
    Y = torch.outer(*values)
    if Y.shape != X.shape or compare(X, Y)[1] > limit:
        return None
    return Finding(
        "convention-eigenvalues", "ok", part.subject("eigenvalues"), compare(X, Y)[1], limit,
        "products of the stored factors' eigenvalues (K-FAC), not corrected ones (EK-FAC)",
    )  # fmt: skip


def _proportional(structure: Structure, moments: LayerMoments) -> bool:
    return structure.weight in moments.scales


def _named(part: Part, fit: Fit, found: Sequence[Fit], limit: float, X: Tensor, moments: LayerMoments) -> list[Finding]:
    """The convention that fits, its runner-up, and one finding for each choice that is not ours."""
    side = fit.structure.side
    alike = [f for f in found if f.residual <= max(fit.residual * 1.5, limit) and f.structure != fit.structure]
    runner = next((f for f in found if f.residual > max(fit.residual * 1.5, limit)), None)
    kind = "round-off" if fit.exact else "between our own draws and unrelated matrices, a statistical bound"
    cause = f"fits: {fit} (residual {fit.residual:.2g}; bound {limit:.2g}: {kind})"
    if runner is not None:
        cause += f"; next best: {runner} ({runner.residual:.2g})"
    others = _others(fit, alike)
    if others:
        cause += f"; these data do not tell it from: {others}"
    precision = stored_precision(X)
    if precision in (torch.bfloat16, torch.float16):
        cause += f"; its numbers are {str(precision).removeprefix('torch.')} numbers"
    out = [Finding(f"convention-{side}", "ok", part.subject(side), fit.residual, limit, cause)]
    change = _change(X, fit, moments)
    of_labels, said = _effect_of_labels(fit, moments)
    for remark in remarks(fit, _proportional(fit.structure, moments)):
        structural = remark.fault not in ("unnormalised-sums", None)
        size = of_labels if remark.fault == "empirical-labels" else change
        effect = f" (it changes the factor by {size:.2g} of its norm)" if structural and size is not None else ""
        if remark.fault == "empirical-labels":
            effect = said
        out.append(
            Finding(
                f"convention-{side}-{remark.fault or 'choice'}", remark.severity, part.subject(side),
                size if structural else fit.factor, None, f"{side}: {remark.cause}{effect}", remark.remedy,
                remark.fault,
            )
        )  # fmt: skip
    return out


def _others(fit: Fit, alike: Sequence[Fit]) -> str:
    kinds = {str(f.structure) for f in alike if f.structure.labels != fit.structure.labels}
    if fit.structure.labels and kinds:
        labels = sorted({f.structure.labels.split()[0] for f in alike} - {fit.structure.labels.split()[0]})
        return "other labels (" + ", ".join(labels) + ")" if labels else ""
    names = [str(f.structure) for f in alike if f.structure.labels == fit.structure.labels]
    return " | ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _change(X: Tensor, fit: Fit, moments: LayerMoments) -> float | None:
    """‖X − cY‖/‖X‖ for our structure Y at the same labels (and bias), c the best."""
    bias = fit.structure.bias
    examples = (
        fit.structure.side == "eigenvalues" and moments.squares_of("data", "example", "sum", ALL_REAL) is not None
    )
    form = "example" if examples else "position"
    labels = moments.labels[-1] if fit.structure.labels == "model" else fit.structure.labels
    for structure, Y in candidates(fit.structure.side, moments, X.shape[1]):
        if structure == Structure(fit.structure.side, labels, form, bias=bias):
            return compare(X, Y)[1]
    return None


def _effect_of_labels(fit: Fit, moments: LayerMoments) -> tuple[float | None, str]:
    """‖S_data − S_model‖/‖S_model‖ at the fit's other choices, and how it is said.

    S_model is at exact labels where there are some, else the mean of our draws: their own noise, their spread divided
    by the root of their number, is part of the distance.
    """
    by_label = {
        structure.labels: Y for structure, Y in candidates(fit.structure.side, moments, moments.layer.d_in)
        if replace(structure, labels="data") == replace(fit.structure, labels="data", bias="none")
    }  # fmt: skip
    draws = [Y for label, Y in by_label.items() if label.startswith("model")]
    if fit.structure.labels != "data" or "data" not in by_label or not draws:
        return None, ""
    name = f"‖{fit.structure.side} − at the model's labels‖ is"
    if "exact" in by_label:
        ours, noise = by_label["exact"], ""
    else:
        ours = torch.stack(draws).mean(0)
        spread = sum(float((Y - ours).square().sum()) for Y in draws) / max(len(draws) - 1, 1) / len(draws)
        noise = f"; the mean of {len(draws)} draws, uncertain by {spread**0.5 / float(ours.norm()):.2g}"
    size = float((by_label["data"] - ours).norm() / ours.norm())
    return size, f" ({name} {size:.2g} of the latter's norm{noise})"


def _undecided(part: Part, drawn: Drawn, moments: LayerMoments) -> Finding:
    side = drawn.fit.structure.side
    more = math.ceil((drawn.spread / 0.3) ** 2)
    return Finding(
        f"convention-{side}-undecided", "convention", part.subject(side), drawn.fit.residual, drawn.limit,
        f"{side} may be labels drawn from the model, but these data do not tell: our own draws are {drawn.spread:.2g} "
        "of their norm apart, as unrelated matrices are",
        f"give about {max(more, 2)} times as many documents, or labels drawn with one of our seeds (0 to 3)",
    )  # fmt: skip


def _nearly(
    part: Part, fit: Fit, found: Sequence[Fit], limit: float, X: Tensor, moments: LayerMoments
) -> list[Finding]:
    """One convention is nearest, but not within round-off."""
    side = fit.structure.side
    naive = _naive(part, X, moments)
    summed = fit.residual <= max(naive, 1e-3) and stored_precision(X) != torch.float64
    likely = (
        "a long sum kept in float32, number by number" if summed
        else "a pass in lower precision (bfloat16, TF32), weights that moved a little since, or a few other documents"
    )  # fmt: skip
    first = Finding(
        f"convention-{side}", "deviation", part.subject(side), fit.residual, limit,
        f"nearest: {fit}, but {fit.residual:.2g} away where arithmetic explains {limit:.2g}: {likely}",
        "accumulate in float32 or better by matrix products (float64 for long sums), from the weights that are edited",
        "float32-accumulation" if summed else None,
    )  # fmt: skip
    return [first, *_named(part, fit, found, limit, X, moments)[1:]]
