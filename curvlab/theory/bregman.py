"""Claim 2 (Prop. 2): the Bregman distance is ½ δᵀGδ up to third order, anywhere."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.losses import Labels, Loss
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.orders import order
from curvlab.theory.rays import Rays

DECADES = 4.0


@claim(2, "paper, Prop. 2")
def remainder_order(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    seed: int = 0,
    directions: int = 4,
    largest: float = 3e-2,
    labels: Labels = "exact",
) -> Findings:
    """At any θ0 the Bregman distance is ½ δᵀGδ up to a remainder of third order in ‖δ‖, for C³ activations and losses:
    the exponent of the remainder over four decades of ‖δ‖ is at least 2.9.

    d(ŷ, ŷ0) has value and gradient zero at ŷ0, so the only second-order term is (Jδ)ᵀH_ŷ(Jδ)/2: ∇²ŷ is multiplied by a
    gradient that is zero, whether or not θ0 is a minimum. What comes next is of third order (of fourth, where the
    third derivatives cancel by symmetry). The remainder is a root mean square over random directions of all layers,
    so that no zero of a single one spoils the fit. Where it has kinks, `remainder_in_a_linear_region` applies.

    Control: a matrix wrong by a factor (1.1 G) and the empirical Fisher leave remainders of second order.

    Args:
        model: float64, with smooth activations; known kinks are refused.
        directions: random directions.
        largest: of ‖δ‖/‖θ‖; the smallest is four decades below.
        labels: of the matrix that is claimed to be G.
    """
    if kinks := sorted(_kinks(model)):
        raise ValueError(f"the model is not smooth: {', '.join(kinks)}; see remainder_in_a_linear_region")
    return _order(_rays(model, loss, data, layers, directions, seed), largest, DECADES, labels)


@claim(2, "paper, Prop. 2")
def remainder_in_a_linear_region(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    seed: int = 0,
    directions: int = 4,
    labels: Labels = "exact",
) -> Findings:
    """With ReLU and max-pooling the remainder is of third order too as long as no unit switches on the way: exponent at
    least 2.9 over the decades between rounding and the edge of the linear region.

    Inside the region the outputs are a polynomial in the weights and the loss is smooth. Every example and unit brings
    an edge, so that the region shrinks as both grow: its radius is found first. Where less than one and a half decades
    are left above rounding nothing can be said.

    Control: 1.1 G and the empirical Fisher.
    """
    rays = _rays(model, loss, data, layers, directions, seed)
    radius = rays.radius()
    found = _order(rays, radius, DECADES, labels, at_least=1.5)
    if not found.cases or any(case.name.startswith("decades") and not case.holds for case in found.cases):
        return Findings([])
    beyond = np.geomspace(10 * radius, 1000 * radius, 7).tolist()
    G, points = rays.curvature(), [rays.at(s) for s in beyond]
    outside = [float((p.distance - s**2 * G / 2).square().mean().sqrt()) for s, p in zip(beyond, points, strict=True)]
    more = {"radius": radius * rays.norm, "beyond": [s * rays.norm for s in beyond], "remainder beyond": outside}
    return Findings(found.cases, found.series | more)


@claim(2, "paper, section 2")
def loss_difference_is_linear(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    seed: int = 0,
    directions: int = 4,
    sizes: tuple[float, float] = (1e-7, 1e-5),
) -> Findings:
    """The plain loss difference L(θ0 + δ) − L(θ0) keeps its linear term wherever the gradient is not zero: its exponent
    in ‖δ‖ is one, and so is that of its distance from ½ δᵀGδ.

    L(θ0 + δ) − L(θ0) = ⟨∇L, δ⟩ + …; the Bregman distance subtracts just this. A network that training has left is not
    at a minimum either.

    Control: the Bregman distance itself is claimed to be linear.

    Args:
        sizes: smallest and largest ‖δ‖/‖θ‖; small, as the linear term wins only near θ0 once training has gone far.
    """
    rays = _rays(model, loss, data, layers, directions, seed)
    steps = np.geomspace(*sizes, 7).tolist()
    points, G = [rays.at(s) for s in steps], rays.curvature()
    if not any(bool(p.change.any()) for p in points):  # no output depends on the weights
        return Findings([])
    rest = [p.change - s**2 * G / 2 for s, p in zip(steps, points, strict=True)]
    slopes = {
        "L(θ0 + δ) − L(θ0)": _exponent(steps, [p.change for p in points]),
        "L(θ0 + δ) − L(θ0) − ½ δᵀGδ": _exponent(steps, rest),
    }
    cases = [Case(f"{name}: |exponent − 1|", abs(slope - 1), 0.1) for name, slope in slopes.items()]
    wrong = _exponent(steps, [p.distance for p in points])
    return Findings([*cases, control("Bregman distance: |exponent − 1|", abs(wrong - 1), 0.1)], {"exponents": slopes})


_KINKED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)


def _kinks(model: nn.Module) -> set[str]:
    """What is not differentiable in a model, as far as its modules tell."""
    kinked = {type(module).__name__ for module in model.modules() if isinstance(module, _KINKED)}
    return kinked | {"relu" for module in model.modules() if getattr(module, "activation", None) == "relu"}


def _rays(model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str], count: int, seed: int) -> Rays:
    """Random directions.

    Raises:
        ValueError: a model in less than double precision, in which four decades drown in rounding.
    """
    rays = Rays.of(model, loss, data, layers, count, seed)
    if rays.directions.dtype != torch.float64:
        raise ValueError(f"orders are seen in float64 only, the model has {rays.directions.dtype}; use model.double()")
    return rays


def _order(rays: Rays, largest: float, decades: float, labels: Labels, at_least: float | None = None) -> Findings:
    """The remainder's exponent between `decades` below `largest` and there, where it stands above rounding."""
    G = rays.curvature(labels)
    if not float(G.max()) > 0:  # no output depends on the weights
        return Findings([])
    sizes = np.geomspace(largest * 10.0**-decades, largest, round(2 * decades) + 1).tolist()
    points = [rays.at(s) for s in sizes]
    matrices = {"GGN": G, "1.1 GGN": 1.1 * G, "empirical Fisher": rays.curvature("data")}
    remainders = {
        name: [float((p.distance - s**2 * C / 2).square().mean().sqrt()) for s, p in zip(sizes, points, strict=True)]
        for name, C in matrices.items()
    }
    noise = [p.rounding for p in points]
    above = {name: max(r / n for r, n in zip(values, noise, strict=True)) for name, values in remainders.items()}
    end = points[-1]
    cases = [
        Case("integral form against the definition", float((end.distance - end.defined).abs().max()), end.cancelled),
        Case("integral form against the library's", float((end.distance - end.library).abs().max()), end.cancelled),
    ]
    wrong = []
    if above["GGN"] > 10:
        slope, span = _fit(sizes, remainders["GGN"], noise)
        # a remainder of fourth order sinks below rounding sooner
        needed = at_least if at_least is not None else (decades if slope < 3.5 else decades / 2) - 1e-6
        cases.insert(0, Case("exponent of the remainder", slope, 2.9, relation=">="))
        cases.append(Case("decades of ‖δ‖ above rounding", span, needed, relation=">="))
        for name in ("1.1 GGN", "empirical Fisher"):
            slope, _ = _fit(sizes, remainders[name], noise)
            wrong.append(control(f"{name}: exponent of the remainder", slope, 2.9, relation=">="))
    else:  # outputs linear in δ under squared error: no remainder at all
        cases.insert(0, Case("remainder, in units of its rounding", above["GGN"], 10.0))
        wrong.append(control("1.1 GGN: remainder, in units of its rounding", above["1.1 GGN"], 10.0))
    plain = [float((p.change - s**2 * G / 2).square().mean().sqrt()) for s, p in zip(sizes, points, strict=True)]
    return Findings(
        cases + wrong,
        {"size": [s * rays.norm for s in sizes], "remainder": remainders, "loss difference": plain, "rounding": noise},
    )


def _fit(sizes: Sequence[float], values: Sequence[float], noise: Sequence[float]) -> tuple[float, float]:
    """Slope in log–log and decades, over the points that stand ten times above rounding."""
    kept = [(s, v) for s, v, n in zip(sizes, values, noise, strict=True) if v > 10 * n]
    if len(kept) < 3:
        return math.nan, 0.0
    s, v = (torch.tensor(t, dtype=torch.float64) for t in zip(*kept, strict=True))
    return order(s, v), float((s[-1] / s[0]).log10())


def _exponent(sizes: Sequence[float], values: Sequence[Tensor]) -> float:
    rms = torch.stack([v.square().mean().sqrt() for v in values])
    return order(torch.tensor(sizes, dtype=torch.float64), rms)
