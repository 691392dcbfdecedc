"""The conventions of a factor as candidates, and how well each fits a stored one.

A candidate is a structure (labels × positions × weights × form × centring × bias), which decides the matrix up to a
number, and a formula for that number (per position, per loss term, …).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from curvlab.crosscheck.layout import ALL_REAL, POSITIONS
from curvlab.crosscheck.moments import A_WEIGHTS, FORMS, S_WEIGHTS, LayerMoments

Side = Literal["A", "S", "eigenvalues"]
NEAR = 1.5  # residuals within this factor of the best are alike: the plainest of them is taken
FORWARD = 64  # units of rounding, times √d, by which two implementations' passes may differ
SCALE = 1e-3  # relative distance at which a count still explains a scale
NO_FINER = 0.05  # whatever the model's dtype: beyond that nothing tells conventions apart

_POSITION_COST = {name: float(i) for i, name in enumerate(POSITIONS)}
_FORM_COST = {"position": 0.0, "example": 6.0, "batch": 12.0}
_FORMS = {"position": "a position at a time", "example": "summed over each example first", "batch": "of batch sums"}


@dataclass(frozen=True)
class Structure:
    """What decides a factor up to a number; the defaults are ours.

    Attributes:
        labels: "data", "model 0" (the draw with seed 0), "model" (the mean of all draws), "exact"; "" for A.
        form: of which the products are taken: each "position", sums over an "example" or over a "batch".
        weight: of each position in these sums.
        positions: which count.
        centred: whether the mean was taken off.
        bias: whether a one for the bias is joined: "none", "last", "first".
    """

    side: Side
    labels: str = ""
    form: str = "position"
    weight: str = "sum"
    positions: str = ALL_REAL
    centred: bool = False
    bias: str = "none"

    @property
    def cost(self) -> float:
        """How far from the plainest convention."""
        weights = A_WEIGHTS if self.side == "A" else S_WEIGHTS
        form = self.form
        if self.side == "eigenvalues":  # ours are of examples
            form = {"example": "position", "position": "example"}.get(form, form)
        weight = 0.0 if self.side == "A" and self.form != "position" else 5.0 * weights.index(self.weight)
        return _POSITION_COST[self.positions] + _FORM_COST[form] + weight + 10 * self.centred + (self.bias == "first")

    def __str__(self) -> str:
        words = [{"data": "the data's labels", "exact": "exact labels", "model": "labels drawn from the model"}.get(
            self.labels, f"labels drawn from the model (seed {self.labels.removeprefix('model ')})"
        )] if self.labels else []  # fmt: skip
        words += [self.positions, _FORMS[self.form]]
        words += [self.weight] if self.weight != "sum" else []
        words += ["centred"] if self.centred else []
        words += [f"bias joined in the {self.bias} place"] if self.bias != "none" else []
        return ", ".join(words)


@dataclass(frozen=True)
class Fit:
    """A structure held against a stored factor X.

    Attributes:
        factor: c of the best c·Y, Y the structure's un-normalised sum.
        residual: ‖X − cY‖_F / ‖X‖_F.
        formula: the name of c, None where none of the counts gives it.
        exact: whether the bound is one of round-off (else statistical: other draws of labels).
    """

    structure: Structure
    factor: float
    residual: float
    formula: str | None = None
    value: float = math.nan
    exact: bool = True

    @property
    def cost(self) -> float:
        return self.structure.cost + (100.0 if self.formula is None else _formula_cost(self.formula))

    def __str__(self) -> str:
        return f"{self.structure}; {self.formula or f'times {self.factor:.4g}, which no count explains'}"


def candidates(side: Side, moments: LayerMoments, width: int | None = None) -> Iterator[tuple[Structure, Tensor]]:
    """Every structure that these data tell apart, with its un-normalised sum Y (float64).

    `width`: of the stored A; one more than the layer's inputs where the bias is joined.
    """
    if side == "A":
        biases = ["none"] if width in (None, moments.layer.d_in) else ["last", "first"]
        for form in FORMS:
            weights = {"position": ("sum", "batches alike", "documents alike"), "example": ("mean", "sum")}
            for weight in weights.get(form, ("mean",)):
                for name in moments.sets:
                    gram = moments.gram("", form, weight, name)
                    if gram is None:
                        continue
                    for centred in (False, True) if (form, weight) != ("example", "sum") else (False,):
                        for bias in biases:
                            structure = Structure("A", "", form, weight, name, centred, bias)
                            yield structure, gram.view(centred=centred, bias=bias)
        return
    for labels in moments.labels:
        for form in FORMS:
            for weight in S_WEIGHTS:
                for name in moments.sets:
                    if side == "S":
                        gram = moments.gram(labels, form, weight, name)
                        if gram is not None:
                            for centred in (False, True):
                                yield Structure("S", labels, form, weight, name, centred), gram.view(centred=centred)
                    else:
                        squares = moments.squares_of(labels, form, weight, name)
                        if squares is not None:
                            yield Structure("eigenvalues", labels, form, weight, name), squares


def compare(X: Tensor, Y: Tensor) -> tuple[float, float]:
    """(c, ‖X − cY‖/‖X‖) with the best c, both float64; (0, 1) for a Y of zeros."""
    square = float(Y.square().sum())
    if not math.isfinite(square) or square == 0:
        return 0.0, 1.0
    c = float((X * Y).sum()) / square
    return c, float((X - c * Y).norm() / X.norm())


def fits(X: Tensor, side: Side, moments: LayerMoments, tolerance: float = SCALE) -> list[Fit]:
    """All structures against X (float64, finite, not zero), the best first; `tolerance` of their scales, relative."""
    width = X.shape[1] if side != "S" else None
    found = []
    for structure, Y in candidates(side, moments, width):
        if Y.shape == X.shape:
            c, residual = compare(X, Y)
            if c > 0:
                found.append(explained(Fit(structure, c, residual), moments, max(tolerance, SCALE)))
    return sorted(found, key=lambda fit: fit.residual)


def formulas(structure: Structure, moments: LayerMoments) -> list[tuple[str, float]]:
    """Names of numbers by which a sum may have been multiplied, the plainest first, no value twice."""
    counts = dict(moments.counts)
    own = "loss term" if structure.side != "A" else {"example": "document", "batch": "batch"}.get(
        structure.form, {"batches alike": "batch", "documents alike": "document"}.get(structure.weight, "position")
    )  # fmt: skip
    counts["position"] = moments.positions(structure.positions)
    ordered = [own, *(name for name in ("position", "loss term", *counts) if name != own)]
    out = [(f"per {name}", 1 / counts[name]) for name in ordered if counts.get(name)]
    out.insert(1, ("un-normalised sum", 1.0))
    for name in ordered:
        n = counts.get(name, 0)
        if n > 1:
            out.append((f"per {name}, less one", 1 / (n - 1)))
    for name in ordered:
        n = counts.get(name, 0)
        if n > 1:
            out += [(f"twice per {name}", 2 / n), (f"half per {name}", 0.5 / n)]
            out += [(f"per square root of {name}s", n**-0.5), (f"per square of {name}s", float(n) ** -2)]
    out += [("twice the sum", 2.0), ("half the sum", 0.5)]
    kept: dict[float, str] = {}
    for name, value in out:
        if not any(math.isclose(value, other, rel_tol=1e-12) for other in kept):
            kept[value] = name
    return [(name, value) for value, name in kept.items()]


def _formula_cost(name: str) -> float:
    plain = name == "un-normalised sum" or (name.startswith("per ") and "square" not in name)
    return 0.5 + 2 * ("less one" in name) if plain else 40.0


def explained(fit: Fit, moments: LayerMoments, tolerance: float) -> Fit:
    """With the formula whose value is c; of several that are equally near, the plainest."""
    named = [(abs(math.log(fit.factor / value)), name, value) for name, value in formulas(fit.structure, moments)]
    if not fit.exact:
        named = [entry for entry in named if _formula_cost(entry[1]) < 40]
    best = min(distance for distance, _, _ in named)
    if best > tolerance:
        return fit
    near = [entry for entry in named if entry[0] <= NEAR * best + 1e-10]
    _, name, value = min(near, key=lambda entry: _formula_cost(entry[1]))
    return replace(fit, formula=name, value=value)


def plainest(found: list[Fit], floor: float) -> Fit:
    """Of the fits that are as good as the best (`found[0]`), the plainest."""
    limit = max(NEAR * found[0].residual, floor)
    return min((fit for fit in found if fit.residual <= limit), key=lambda fit: fit.cost)


def stored_precision(X: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every number of X: bfloat16 numbers may lie in a float32 file."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if bool((X.to(dtype).double() == X.double()).all()):
            return dtype
    return torch.float64


def bound(X: Tensor, model: torch.dtype, terms: int, product: torch.dtype = torch.float64) -> float:
    """The residual that arithmetic alone may leave.

    Rounding on storage (half a unit), a sum of `terms` in the stored dtype but no coarser than float32 (eps·√terms),
    products of ours, and the forward and backward passes of two implementations (64·√d units of the model's dtype).
    """
    stored = stored_precision(X)
    summed = max(torch.finfo(stored).eps if stored == torch.float64 else 2.0**-23, torch.finfo(product).eps)
    d = max(X.shape)
    passes = min(FORWARD * d**0.5 * max(torch.finfo(model).eps, 2.0**-52), NO_FINER)
    return torch.finfo(stored).eps / 2 + summed * terms**0.5 + passes
