"""Claim 13: which optimisers stay in the null space, and how a constraint is put on the others."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.descent import attach, constrained_layers, leakage
from curvlab.eigenbasis import parametrize
from curvlab.layers import MatrixLayer, find_layers, flatten, unflatten
from curvlab.losses import Loss
from curvlab.projector import NullSpace
from curvlab.spectrum import Spectrum
from curvlab.theory import curvatures, explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.paths import flat, gradient, mean_loss, unfreeze

OPTIMISERS = ("SGD", "momentum", "Adam", "SGD, weight decay")
WAYS = ("gradient", "update", "eigenbasis")


@claim(13, "paper, Alg. 1; ours")
def descent_in_the_null_space(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str] = "*", *,
    gamma: float = 0.9, curvature: str = "kfac", steps: int = 4, step: float = 0.02, bias: bool = False,
) -> Findings:  # fmt: skip
    """With projected gradients SGD and momentum stay in the γ-null space while Adam and weight decay leave it; a
    projected update, or descent in the eigenbasis, keeps all of them inside, a change of projector included.

    What SGD and momentum do is linear in the gradients they have seen, and a subspace is closed under sums. Adam
    divides every entry by a number of its own, weight decay adds W: neither commutes with P. An update is projected
    after whatever the optimiser did; in the eigenbasis Δ = U (M ⊙ Z) whatever Z is. For SGD and momentum eigenbasis
    and projected gradients are the same path, because the gradient in Z is M ⊙ UᵀgU. When P is replaced, momentum
    is a sum of gradients of the old space: it has to be projected too. The leakage ‖(I − P)Δ‖ / ‖Δ‖ is measured
    with P in full from the eigenvectors; ‖Δ‖ is about step · ‖W‖ or more, so rounding W leaks roundoff / step.

    Control: SGD without a projection; momentum that is carried over a change of projector as it is.

    Conditions: the edit gradient has a part in the null space and one outside, and P mixes entries of it (where P is
    diagonal, Adam commutes with it).

    Args:
        data: the capability set; edits: what is descended on, of the same kind.
        step: length of the first step over ‖W‖.
        bias: join the biases to W.
    """
    run = _prepare(model, loss, data, edits, layers, gamma, curvature, step, bias)
    if run is None:
        return Findings([])
    bound = roundoff(run.dtype, len(run.P)) / step
    paths = {(optimiser, way): run.path(optimiser, way, steps) for optimiser in OPTIMISERS for way in WAYS}
    leaks = {key: _leak(run.P, path[-1]) for key, path in paths.items()}
    cases = []
    for (optimiser, way), leak in leaks.items():
        leaves = way == "gradient" and optimiser in ("Adam", "SGD, weight decay")
        name = f"{optimiser}, projected {way}" if way != "eigenbasis" else f"{optimiser} in the eigenbasis"
        cases.append(Case(f"{name}: leakage", leak, bound, relation=">=" if leaves else "<="))
    for optimiser in ("SGD", "momentum"):
        gap = relative(paths[optimiser, "eigenbasis"], paths[optimiser, "gradient"])
        cases.append(Case(f"{optimiser}: eigenbasis against projected gradients, whole path", gap, bound))
    paths |= {(optimiser, "free"): run.path(optimiser, "free", steps) for optimiser in OPTIMISERS}
    free = paths["SGD", "free"][-1]
    library = float(leakage(run.null.to(free.dtype), unflatten(run.null.layers, free)))
    cases.append(Case("curvlab.descent.leakage against P in full, free SGD", abs(library - _leak(run.P, free)), bound))
    cases += _changed_projector(run, edits, steps, bound)
    cases.append(control("SGD without a projection", _leak(run.P, free), bound))
    G = explicit.gauss_newton(model, loss, data, run.found).double()
    series = {
        "gamma": gamma, "curvature": curvature, "kept": run.null.kept, "parameters": len(run.P), "bound": bound,
        "leakage": {_key(key): _leak(run.P, path[-1]) for key, path in paths.items()},
        "length": {_key(key): path.norm(dim=1).tolist() for key, path in paths.items()},
        "energy": {_key(key): torch.einsum("sp,pq,sq->s", path, G, path).tolist() for key, path in paths.items()},
    }  # fmt: skip
    return Findings(cases, series)


@claim(13, "ours")
def leaking_costs_curvature(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str] = "*", *,
    gamma: float = 0.9, curvature: str = "ggn", steps: int = 20, step: float = 0.02, factor: float = 2.0,
) -> Findings:  # fmt: skip
    """What Adam leaks is paid in curvature: δᵀGδ / ‖δ‖² at the end of its path is at least `factor` times what it is
    when the update is projected or Adam descends in the eigenbasis, which is at most the largest eigenvalue of PGP.

    Elementwise rescaling mixes coordinates without regard to curvature, so the leaked part meets the removed, sharp
    directions as well as any other: how much that costs is measured, a result either way. What stays in the null
    space has no more than λ_max(PGP), for the exact GGN σ_{k+1}; a leak by rounding adds its share of ‖G‖.

    Control: the same is claimed of SGD, which leaks nothing.
    """
    run = _prepare(model, loss, data, edits, layers, gamma, curvature, step)
    if run is None:
        return Findings([])
    G = explicit.gauss_newton(model, loss, data, run.found).double()
    leak, norm = roundoff(run.dtype, len(G)) / step, float(torch.linalg.matrix_norm(G, 2))
    limit = float(torch.linalg.eigvalsh(run.P @ G @ run.P)[-1]) + 2 * leak * norm

    def sharpness(optimiser: str, way: str) -> float:
        delta = run.path(optimiser, way, steps)[-1]
        return max(float(delta @ G @ delta / delta.square().sum()), leak * step * norm)  # no less is resolved

    found = {way: sharpness("Adam", way) for way in WAYS}
    sgd = sharpness("SGD", "gradient") / sharpness("SGD", "update")
    return Findings(
        [
            Case(
                "Adam: projected gradient / projected update", found["gradient"] / found["update"], factor, None, ">="
            ),
            Case("Adam: projected gradient / eigenbasis", found["gradient"] / found["eigenbasis"], factor, None, ">="),
            Case("Adam, projected update: δᵀGδ / ‖δ‖²", found["update"], limit),
            Case("Adam in the eigenbasis: δᵀGδ / ‖δ‖²", found["eigenbasis"], limit),
            control("SGD: projected gradient / projected update", sgd, factor, ">="),
        ],
        {"gamma": gamma, "curvature": curvature, "δᵀGδ / ‖δ‖²": found},
    )


@dataclass(frozen=True)
class _Run:
    """Descent on the edits from one start; rates such that first steps have the length step · ‖W‖."""

    model: nn.Module
    loss: Loss
    data: list[tuple[Tensor, Tensor]]
    found: list[MatrixLayer]
    spectrum: Spectrum
    null: NullSpace
    P: Tensor
    gradient: Tensor
    length: float
    rate: float
    adam_rate: float
    decay: float

    @property
    def dtype(self) -> torch.dtype:
        return self.found[0].matrix().dtype

    def optimiser(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if name == "Adam":
            return torch.optim.Adam(parameters, lr=self.adam_rate)
        momentum = 0.9 if name == "momentum" else 0.0
        decay = self.decay if "decay" in name else 0.0
        return torch.optim.SGD(parameters, lr=self.rate, momentum=momentum, weight_decay=decay)

    def path(self, name: str, way: str, steps: int, after: Callable[[Any], None] | None = None) -> Tensor:
        """δ after every step (steps, p), float64; `after` is handed the descent half-way."""
        model = copy.deepcopy(self.model)
        layers = constrained_layers(model, self.null)
        unfreeze(layers)
        start = flat(layers)
        eigen = parametrize(model, self.null) if way == "eigenbasis" else None
        parameters = eigen.parameters() if eigen else [p for layer in layers for p in layer.parameters()]
        optimiser = self.optimiser(name, parameters)
        if eigen:
            eigen.attach(optimiser)
        by_hand = way == "gradient" and "decay" in name  # which `attach` refuses
        descent = eigen
        if eigen is None and not by_hand and way != "free":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*elementwise")
                descent = attach(model, optimiser, self.null, project=way)  # type: ignore[arg-type,assignment]
        path = []
        for i in range(steps):
            if after is not None and i == steps // 2:
                after(descent)
            optimiser.zero_grad()
            mean_loss(model, self.loss, self.data).backward()
            if by_hand:
                g = torch.cat([layer.matrix([_grad(p) for p in layer.parameters()]).flatten() for layer in layers])
                allowed = unflatten(layers, self.P.to(g) @ g)
                for layer in layers:
                    for p, value in zip(layer.parameters(), layer.tensors(allowed[layer.name]), strict=True):
                        p.grad = value.clone()
            optimiser.step()
            path.append((flatten(layers, eigen.matrices()) if eigen else flat(layers)).double() - start.double())
        return torch.stack(path)


def _prepare(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str], gamma: float, curvature: str,
    step: float, bias: bool = False,
) -> _Run | None:  # fmt: skip
    """None where there is nothing to tell: all of the edit gradient kept or removed, or a P that mixes no entries."""
    found = find_layers(model, layers, bias)
    spectrum = curvatures.fitted(curvature, model, loss, data, layers, bias=bias)
    null, P = spectrum.null_space(gamma), curvatures.cut(spectrum, gamma)
    g = gradient(model, loss, edits, found).double()
    inside, outside, W = float((P @ g).norm()), float((g - P @ g).norm()), float(flat(found).double().norm())
    moved = P[(P @ g).abs() > 1e-9 * inside][:, (P @ g).abs() > 1e-9 * inside]
    mixing = float((moved - moved.diag().diag()).norm())  # a diagonal P commutes with what Adam does
    if min(inside, outside) <= 1e-2 * float(g.norm()) or mixing <= 1e-2:
        return None
    rates = step * W, step * W / inside, step * W / len(P) ** 0.5, 0.1 * inside / W
    return _Run(model, loss, edits, found, spectrum, null, P, g, *rates)


def _changed_projector(run: _Run, edits: Any, steps: int, bound: float) -> list[Case]:
    """Half-way the projector becomes that of the curvature on the edits; Δ from there on lies in the new space."""
    names, bias = [layer.name for layer in run.found], run.found[0].bias
    other = curvatures.fitted("kfac", run.model, run.loss, edits, names, bias=bias)
    gamma = run.null.gamma or 0.9
    new, P = other.null_space(gamma), curvatures.cut(other, gamma)
    old = run.P @ run.gradient
    if not 0 < new.kept < len(P) or float((old - P @ old).norm()) <= 1e-2 * float(old.norm()):
        return []  # nothing of the old momentum is removed

    def since(name: str, way: str, after: Callable[[Any], None]) -> float:
        path = run.path(name, way, 2 * (steps // 2) + 2, after)
        half = len(path) // 2
        delta = path[-1] - path[half - 1]  # maybe hardly any: the new space may hold nothing of the gradient
        return float((delta - P @ delta).norm()) / max(float(delta.norm()), run.length)

    def kept(descent: Any) -> None:
        descent.constraint = new.to(run.dtype)  # what `replace` does, without the momentum

    cases = [
        Case(f"{name}, {way}: leakage after a change of projector", since(name, way, lambda d: d.replace(new)), bound)
        for name, way in (("momentum", "gradient"), ("Adam", "update"))
    ]
    if new.coordinate_shapes == run.null.coordinate_shapes:
        one, two = (
            run.path("momentum", way, 2 * (steps // 2) + 2, lambda d: d.replace(new))
            for way in ("eigenbasis", "gradient")
        )
        cases.append(Case("momentum: eigenbasis against projected gradients, P changed", relative(one, two), bound))
    return [
        *cases,
        control("momentum as it is after a change of projector", since("momentum", "gradient", kept), bound),
    ]


def _leak(P: Tensor, delta: Tensor) -> float:
    """‖(I − P)δ‖ / ‖δ‖."""
    return float((delta - P @ delta).norm() / delta.norm())


def _grad(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _key(key: tuple[str, str]) -> str:
    return " | ".join(key)
