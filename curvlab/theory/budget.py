"""Claim 18 on networks: null space, ellipsoid and soft penalty at equal measured KL, and a budget in measured nats."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.layers import LayerShape, Matrices, find_layers, unflatten
from curvlab.losses import Loss
from curvlab.spectrum import KroneckerBasis, Spectrum
from curvlab.theory import curvatures
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.paths import Measures, descend, edit_gradient, flat

Curve = list[tuple[float, float, float]]  # knob, measured KL, edit loss


def correct_epsilon(
    measure: Callable[[float], float], nats: float, *, tolerance: float = 0.05, rounds: int = 20
) -> tuple[float, float, int]:
    """The ε whose *measured* KL is at most `nats` and at least (1 − tolerance) of it: ε, that KL, measurements made.

    A secant in logarithms, in which KL(ε) is nearly a line of slope one; once ε is bracketed, bisection where the
    secant would leave the bracket. `measure` descends under ε and measures.

    Raises:
        ValueError: no such ε found, because the KL stays below `nats` for any ε, say.
    """
    low, high = -math.inf, math.inf
    aim = math.log(nats * (1 - tolerance / 2))
    seen: list[tuple[float, float]] = []
    x = math.log(nats)
    for i in range(rounds):
        kl = measure(math.exp(x))
        if (1 - tolerance) * nats <= kl <= nats:
            return math.exp(x), kl, i + 1
        seen.append((x, math.log(kl) - aim))
        low, high = (max(low, x), high) if seen[-1][1] < 0 else (low, min(high, x))
        slope = 1.0
        if len(seen) > 1 and seen[-1][0] != seen[-2][0]:
            slope = (seen[-1][1] - seen[-2][1]) / (seen[-1][0] - seen[-2][0])
        x = seen[-1][0] - seen[-1][1] / (slope if slope > 0.1 else 1.0)
        if not low < x < high:
            x = (low + high) / 2 if math.isfinite(low + high) else seen[-1][0] - 2 * seen[-1][1]
    raise ValueError(f"no ε found whose measured KL is {nats:.3g} nats: the last was {math.exp(seen[-1][1] + aim):.3g}")


@claim(18, "ours")
def budget_in_measured_nats(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str] = "*", *,
    curvature: str = "kfac", share: float = 0.3, steps: int = 40, step: float = 0.02,
) -> Findings:  # fmt: skip
    """With an outer correction of ε the measured KL after an edit stays under a given number of nats and uses at least
    95 % of it; without, with ε set to that number, nothing keeps it there.

    ε bounds the quadratic model, which underestimates along edits (claim 15). The measured KL grows continuously with
    ε, so that a root finder over whole edits gets it where it should be, in a few descents.

    Condition: the budget is twice what is measured as ε → 0, an edit in the exact null space of C, which at finite
    steps, over several layers, is not nothing.

    Control: half of the corrected ε misses the budget.

    Args:
        share: the budget over the KL of the unconstrained edit.
        step: length of the first step over ‖W‖.
    """
    measures, names, rate = _start(model, loss, data, edits, layers, step)
    spectrum = curvatures.fitted(curvature, model, loss, data, layers)

    def measure(epsilon: float) -> float:
        return measures(descend(model, loss, edits, names, spectrum.ellipsoid(epsilon), rate, steps)[-1])["distance"]

    nats = share * measures(descend(model, loss, edits, names, None, rate, steps)[-1])["distance"]
    if not nats > 0 or measure(1e-9 * nats) >= nats / 2:  # no output changes, or too many without spending
        return Findings([])
    uncorrected = measure(nats)
    epsilon, kl, calls = correct_epsilon(measure, nats)
    return Findings(
        [
            Case("corrected ε: measured KL / budget", measure(epsilon) / nats, 1.0),
            Case("corrected ε: measured KL / budget, used", kl / nats, 0.95, relation=">="),
            Case("ε = budget: measured KL / budget", uncorrected / nats, 1.0, None),
            control("half of the corrected ε: used", measure(epsilon / 2) / nats, 0.95, ">="),
        ],
        {"nats": nats, "epsilon": epsilon, "measured": kl, "uncorrected": uncorrected, "descents": calls},
    )


@claim(18, "ours")
def learning_at_equal_kl(
    model: nn.Module, loss: Loss, data: Any, edits: Sequence[Any], layers: str | Sequence[str] = "*", *,
    curvature: str = "kfac", regime: str = "", steps: int = 40, step: float = 0.02, knobs: int = 8,
    damping: float | None = 0.3,
) -> Findings:  # fmt: skip
    """At equal measured KL the ellipsoid and the soft penalty λ δᵀCδ learn more than the null space of the same
    curvature (the edit loss is lower), damped or not.

    Empirical. Each knob (γ, ε, λ) is swept over edits of equally many steps; the edit loss is interpolated between
    neighbouring values at three KL that both reach, if there are such. In the quadratic model the null space is
    never better (`budget_beats_cut_in_its_own_model`): a cut forbids a little of a sharp direction and allows all of
    one below it. Damping adds one number to all eigenvalues: the cut, which only ranks them, does not see it, but the
    ellipsoid becomes a ball. The penalty's step is implicit, Z / (1 + 2ηλσ), so that no λ is unstable.

    Control: the null space itself, its KL counted twice, does not learn more. (A cut along random eigenvectors is in
    the series.)

    Args:
        edits: edit sets; the mean over them is compared.
        regime: a name for the size of the edits.
        damping: added to all eigenvalues, as a multiple of the largest; None leaves those cases out.
    """
    spectrum = curvatures.fitted(curvature, model, loss, data, layers)
    top = max(float(block.magnitudes.max()) for block in spectrum.blocks)
    if top == 0:  # no output depends on the weights
        return Findings([])
    used = {"": spectrum}
    if damping is not None:
        blocks = tuple(replace(b, values=b.magnitudes + damping * top) for b in spectrum.blocks)
        used[", damped"] = replace(spectrum, blocks=blocks)
    curves: dict[str, list[Curve]] = {}
    for i, own in enumerate(edits):
        measures, names, rate = _start(model, loss, data, own, layers, step)
        learnt = Measures(model, loss, own, measures.layers)
        free = descend(model, loss, own, names, None, rate, steps)[-1]
        gammas = [1 - 10**-k for k in np.linspace(0.05, 3.0, knobs)]
        scrambled = _scrambled(spectrum, i)
        constraints: dict[str, list[tuple[float, Any]]] = {
            "null space": [(gamma, spectrum.null_space(gamma)) for gamma in gammas],
            "random cut": [(gamma, scrambled.null_space(gamma)) for gamma in gammas],
        }
        for name, C in used.items():
            spent = float(C.quadratic_form(unflatten(measures.layers, free))) / 2
            constraints["ellipsoid" + name] = [(e, C.ellipsoid(e)) for e in spent * np.logspace(-4, 0, knobs)]
            weights = np.logspace(-3, 2, knobs) / (rate * top)
            constraints["soft penalty" + name] = [(w, Penalty(C, 2 * rate * w)) for w in weights]
        for kind, settings in constraints.items():
            ends = [(knob, descend(model, loss, own, names, c, rate, steps)[-1]) for knob, c in settings]
            curve = [(float(knob), measures(d)["distance"], learnt(d)["loss"]) for knob, d in ends]
            curves.setdefault(kind, []).append(curve)
    gain = {kind: found for kind in curves if (found := _mean_gain(curves, kind, "null space")) is not None}
    name = "{} − null space: edit loss at equal measured KL"
    kinds = [kind for kind in gain if kind.startswith(("ellipsoid", "soft penalty"))]
    cases = [Case(name.format(kind), gain[kind], 0.0, None) for kind in sorted(kinds, key=lambda k: "damped" in k)]
    twice = [[(knob, 2 * kl, value) for knob, kl, value in curve] for curve in curves["null space"]]
    wrong = _mean_gain(curves | {"twice": twice}, "twice", "null space")
    if cases and wrong is not None:
        cases.append(control(name.format("null space, its KL counted twice"), wrong, 0.0))
    return Findings(cases, {"curvature": curvature, "regime": regime, "curves": curves, "gain": gain})


class Penalty:
    """The soft penalty λ δᵀCδ as a constraint of `attach`: each step is followed by Z ← Z / (1 + strength · |σ|).

    That is the implicit gradient step of the penalty, strength = 2 · rate · λ, stable for any λ.
    """

    linear = False

    def __init__(self, spectrum: Spectrum, strength: float) -> None:
        self.spectrum, self.strength = spectrum, strength

    @property
    def layers(self) -> list[LayerShape]:
        return self.spectrum.layers

    def to(self, dtype: torch.dtype, device: Any = None) -> "Penalty":
        return self

    def project(self, delta: Matrices) -> Matrices:
        raise ValueError("a penalty acts on the displacement, not on a gradient")

    def confine(self, delta: Matrices) -> Matrices:
        out: Matrices = {}
        for block in self.spectrum.blocks:
            Z = block.basis.rotate({name: Q.to(block.basis.like) for name, Q in delta.items()})
            out |= block.basis.rotate_back(Z / (1 + self.strength * block.magnitudes).to(Z))
        return out

    def admit(self, start: Matrices, before: Matrices, after: Matrices) -> Matrices:
        allowed = self.confine({name: W - start[name] for name, W in after.items()})
        return {name: start[name] + Q.to(start[name]) for name, Q in allowed.items()}


def _start(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str], step: float
) -> tuple[Measures, list[str], float]:
    """Measures on the capability set, layer names, and the rate whose first step has the length step · ‖W‖."""
    found = find_layers(model, layers)
    rate = step * float(flat(found).norm()) / float(edit_gradient(model, loss, edits, found).norm())
    return Measures(model, loss, data, found), [layer.name for layer in found], rate


def _scrambled(spectrum: Spectrum, seed: int) -> Spectrum:
    """The same eigenvalues on random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)

    def rotation(n: int, like: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].to(like)

    blocks = []
    for block in spectrum.blocks:
        basis = block.basis.map(lambda U: rotation(len(U), U))
        if isinstance(basis, KroneckerBasis) and basis.u_out is None:
            basis = replace(basis, u_out=rotation(basis.layer.d_out, basis.u_in))
        blocks.append(replace(block, basis=basis))
    return replace(spectrum, blocks=tuple(blocks))


def at_kl(curve: Curve, kl: float) -> float:
    """The edit loss at a measured KL, between neighbouring knobs (linear in log KL)."""
    points = sorted((math.log(max(k, 1e-300)), value) for _, k, value in curve)
    x, y = zip(*points, strict=True)
    return float(np.interp(math.log(kl), np.array(x), np.array(y)))


def _mean_gain(curves: dict[str, list[Curve]], kind: str, against: str) -> float | None:
    """Mean over edit sets and KL of the edit loss of `kind` less that of `against`, at three KL that both reach.

    None where they have no KL in common.
    """
    gains = []
    for one, other in zip(curves[kind], curves[against], strict=True):
        low = max(min(kl for _, kl, _ in curve) for curve in (one, other))
        high = min(max(kl for _, kl, _ in curve) for curve in (one, other))
        if low < high:
            gains += [at_kl(one, kl) - at_kl(other, kl) for kl in np.geomspace(max(low, high / 1000), high, 5)[1:4]]
    return float(np.mean(gains)) if gains and np.isfinite(gains).all() else None
