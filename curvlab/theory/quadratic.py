"""Claim 18 on quadratic problems: who reaches the optimum, and what cut, budget and penalty learn."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from curvlab.descent import attach
from curvlab.layers import LayerShape
from curvlab.projector import Ellipsoid, NullSpace
from curvlab.spectrum import dense_spectrum
from curvlab.theory import curvatures
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.constrained import constrained_optimum

TOLERANCE = 1e-6  # of iterations that converge linearly


@claim(18, "ours")
def projected_descent_on_a_quadratic(Q: Tensor, C: Tensor, target: Tensor, epsilon: float) -> Findings:
    """Projected SGD reaches the optimum of min ½ (δ − t)ᵀQ(δ − t) subject to ½ δᵀCδ ≤ ε, projected Adam does not,
    unless the projection is in Adam's own metric.

    A projected step is δ ← Π(δ − η D⁻¹∇). Its fixed points satisfy δ − η D⁻¹∇ − δ ∝ M⁻¹ C δ, M the projection's metric;
    the optimum satisfies ∇ + μCδ = 0: the same only if D = M. SGD has D = M = I and converges linearly. Adam has
    D = √v̂, and the nearest point in ‖·‖_D restores it. The optimum is found by root finding in float64, and both
    its first-order condition and where the descents end are measured as ‖∇ + μCδ‖ / ‖Qt‖ with the best μ ≥ 0.

    Control: SGD that is only scaled back onto the boundary ends elsewhere.

    Args:
        Q, C: positive definite, positive semi-definite (p, p), p ≥ 4; target: t (p,); epsilon: less than ½ tᵀCt.

    Raises:
        ValueError: fewer than four parameters: among so few Adam's fixed point may come near the optimum.
    """
    if len(C) < 4:
        raise ValueError(f"at least four parameters are needed to tell Adam's end from the optimum, got {len(C)}")
    best, _ = constrained_optimum(Q, C, target, epsilon)
    values = torch.linalg.eigvalsh(Q)
    steps = math.ceil(float(values[-1] / values[0]) * math.log(1 / TOLERANCE) * 1.5)
    rate, spectrum = 1 / float(values[-1]), dense_spectrum(C, [LayerShape("0", 1, len(C), False)], True)
    ellipsoid = spectrum.ellipsoid(epsilon)

    def scaled(delta: Tensor) -> Tensor:
        return delta * min(1.0, (2 * epsilon / float(delta @ C @ delta)) ** 0.5)

    sgd = _descend(Q, target, _sgd(rate), steps, constraint=ellipsoid)
    rough = _descend(Q, target, _sgd(rate), steps, after=lambda _, delta: scaled(delta))
    scale = float((Q @ target).norm())
    adam_steps, length = max(250, 3 * steps), 0.1 * float(best.norm()) / len(C) ** 0.5

    def own(optimiser: torch.optim.Optimizer, delta: Tensor) -> Tensor:
        (state,) = optimiser.state.values()
        D = (state["exp_avg_sq"] / (1 - 0.99 ** float(state["step"]))).sqrt().flatten() + 1e-8
        return constrained_optimum(torch.diag(D), C, delta, epsilon)[0]

    adam = _descend(Q, target, _adam(length), adam_steps, constraint=ellipsoid, decay=True)
    metric = _descend(Q, target, _adam(length), adam_steps, after=own, decay=True)

    def moved(constraint: Ellipsoid | None, make: Any, after: Any = None) -> float:
        """How far one step from the optimum goes, over the length of the step before the projection."""
        free = _descend(Q, target, make, 1, start=best) - best
        end = _descend(Q, target, make, 1, start=best, constraint=constraint, after=after)
        return float((end - best).norm() / free.norm())

    residual = {
        name: _kkt(Q, C, target, delta, epsilon) / scale
        for name, delta in (("optimum", best), ("SGD", sgd), ("scaled", rough), ("Adam", adam), ("metric", metric))
    }
    cases = [
        Case("SGD: first-order residual at the end", residual["SGD"], TOLERANCE),
        Case("SGD: end against the optimum", relative(sgd, best), 10 * TOLERANCE),
        Case("reference: its own first-order residual", residual["optimum"], roundoff(torch.float64, len(C)) * 100),
        Case("SGD: stays at the optimum", moved(ellipsoid, _sgd(rate)), TOLERANCE),
        Case("Adam: stays at the optimum", moved(ellipsoid, _adam(length)), TOLERANCE, should=False),
        Case("Adam in its own metric: stays at the optimum", moved(None, _adam(length), own), TOLERANCE),
        Case("Adam in its own metric: first-order residual at the end", residual["metric"], 1e-2),
        Case("Adam: first-order residual at the end", residual["Adam"], 1e-2, should=False),
        control("SGD scaled back: first-order residual at the end", residual["scaled"], TOLERANCE),
    ]
    losses = {name: _value(Q, target, d) for name, d in (("optimum", best), ("Adam", adam), ("metric", metric))}
    return Findings(cases, {"size": len(C), "residual": residual, "loss": losses, "steps": steps})


@claim(18, "ours")
def budget_beats_cut_in_its_own_model(
    Q: Tensor, C: Tensor, target: Tensor, *, gammas: Sequence[float] = (0.3, 0.6, 0.9)
) -> Findings:
    """On a quadratic problem the ellipsoid learns at least as much as the null space at equal ½ δᵀCδ, the soft penalty
    λ δᵀCδ with the right λ is the ellipsoid, and the null space wins where C overestimates the flat directions.

    The null space's optimum is one of the points that the ellipsoid of its cost allows. The ellipsoid's optimum
    solves (Q + μC) δ = Qt, which is the penalty's optimum for λ = μ/2. If in truth the kept directions cost nothing,
    the null space spends nothing; an ellipsoid that learns as much spends on the removed ones.

    Control: the soft penalty with twice the multiplier is another point.
    """
    spectrum = dense_spectrum(C, [LayerShape("0", 1, len(C), False)], True)
    values = torch.linalg.eigvalsh(Q)
    steps = math.ceil(float(values[-1] / values[0]) * math.log(1 / TOLERANCE) * 1.5)
    start = _value(Q, target, torch.zeros_like(target))
    gains, soft, wrong, floors, series = [], [], [], [], {}
    for gamma in gammas:
        cut = _descend(Q, target, _sgd(1 / float(values[-1])), steps, constraint=spectrum.null_space(gamma))
        spent = float(cut @ C @ cut) / 2
        if spent <= 1e-9 * float(target @ C @ target):
            continue
        budget = _descend(Q, target, _sgd(1 / float(values[-1])), steps, constraint=spectrum.ellipsoid(spent))
        _, mu = constrained_optimum(Q, C, target, spent)
        if mu * float(torch.linalg.eigvalsh(C)[-1]) < 1e-3 * float(values[0]):
            continue  # the cut spends what is free: the budget binds nobody
        gains.append((_value(Q, target, budget) - _value(Q, target, cut)) / start)
        soft.append(relative(torch.linalg.solve(Q + mu * C, Q @ target), budget))
        wrong.append(relative(torch.linalg.solve(Q + 2 * mu * C, Q @ target), budget))
        truth = C - curvatures.cut(spectrum, gamma) @ C  # the kept directions cost nothing
        equal = _at_loss(Q, C, target, _value(Q, target, cut))
        floors.append(float(cut @ truth @ cut) / float(equal @ truth @ equal))
        series[str(gamma)] = {"null space": _value(Q, target, cut), "ellipsoid": _value(Q, target, budget)}
    if not gains:
        return Findings([])
    return Findings(
        [
            Case("ellipsoid − null space at equal cost, loss over the loss at 0", max(gains), TOLERANCE),
            Case("soft penalty with λ = μ/2 against the ellipsoid", max(soft), 10 * TOLERANCE),
            Case("flat directions overestimated: null space's true cost over the ellipsoid's", max(floors), 1.0),
            control("soft penalty with λ = μ", max(wrong), 10 * TOLERANCE),
        ],
        series,
    )


def _weights(size: int) -> nn.Module:
    """A layer "0" whose weight is δ."""
    return nn.Sequential(nn.Linear(size, 1, bias=False).double())


def _sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def _adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99), eps=1e-8)


def _descend(
    Q: Tensor, target: Tensor, make: Callable[[Any], torch.optim.Optimizer], steps: int, *,
    start: Tensor | None = None, constraint: Ellipsoid | NullSpace | None = None,
    after: Callable[[torch.optim.Optimizer, Tensor], Tensor] | None = None, decay: bool = False,
) -> Tensor:  # fmt: skip
    """δ at the end, from 0 (or `start`), under the library's constraint or what `after` makes of each step."""
    model = _weights(len(target))
    (weight,) = model.parameters()
    nn.init.zeros_(weight)
    optimiser = make([weight])
    if constraint is not None:
        attach(model, optimiser, constraint, project="update")  # the centre is 0, wherever the descent starts
    if start is not None:
        with torch.no_grad():
            weight.copy_(start)
    rate = optimiser.param_groups[0]["lr"]
    for i in range(steps):
        if decay:
            optimiser.param_groups[0]["lr"] = rate * (1 - i / steps) ** 2
        weight.grad = (Q @ (weight.detach().flatten() - target)).view_as(weight)
        optimiser.step()
        if after is not None:
            with torch.no_grad():
                weight.copy_(after(optimiser, weight.detach().flatten()))
    return weight.detach().flatten().clone()


def _value(Q: Tensor, target: Tensor, delta: Tensor) -> float:
    return float((delta - target) @ Q @ (delta - target)) / 2


def _kkt(Q: Tensor, C: Tensor, target: Tensor, delta: Tensor, epsilon: float) -> float:
    """‖∇ + μCδ‖ with the best μ ≥ 0; μ = 0 inside; infinite where δ is not allowed."""
    gradient, normal = Q @ (delta - target), C @ delta
    spent = float(delta @ normal) / 2
    if spent > epsilon * (1 + 1e-9):
        return math.inf
    active = spent >= epsilon * (1 - TOLERANCE)
    mu = max(0.0, -float(gradient @ normal) / float(normal @ normal)) if active else 0.0
    return float((gradient + mu * normal).norm())


def _at_loss(Q: Tensor, C: Tensor, target: Tensor, value: float) -> Tensor:
    """The ellipsoid's optimum that has this loss."""
    low, high = 0.0, 1.0

    def at(mu: float) -> Tensor:
        return torch.linalg.solve(Q + mu * C, Q @ target)

    while _value(Q, target, at(high)) < value and high < 1e12:
        high *= 4
    return at(float(brentq(lambda mu: _value(Q, target, at(mu)) - value, low, high))) if high < 1e12 else at(high)
