"""Constrained descent for any torch optimiser: its gradients or its updates obey a constraint.

`attach` hooks an optimiser; `detach` undoes it. (Descent in the eigenbasis is `curvlab.eigenbasis`.)

* project="gradient" (the paper): the optimiser sees P∇L. SGD, momentum and LBFGS then never leave the null
  space; an optimiser that rescales elementwise (Adam) does, by `leak()`; weight decay would, and is refused.
* project="update": whatever the optimiser did in a step is replaced by the part that the constraint allows.
  Right for any optimiser whose next step does not rely on the last one having been taken in full (not LBFGS).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from curvlab.layers import LayerShape, Matrices, find_layers

Project = Literal["gradient", "update"]


class Weights(Protocol):
    """What descent asks of a layer: its parameters, read and written as a matrix (…, d_out, d_in)."""

    name: str

    def parameters(self) -> list[nn.Parameter]: ...
    def matrix(self, tensors: Sequence[Tensor] | None = None) -> Tensor: ...
    def tensors(self, W: Tensor) -> list[Tensor]: ...
    def write(self, W: Tensor) -> None: ...


class Constraint(Protocol):
    """What descent asks of a constraint (`NullSpace`, `Ellipsoid`, or a stack of them)."""

    @property
    def linear(self) -> bool: ...
    @property
    def layers(self) -> list[LayerShape]: ...
    def project(self, delta: Matrices) -> Matrices: ...
    def confine(self, delta: Matrices) -> Matrices: ...
    def admit(self, start: Matrices, before: Matrices, after: Matrices) -> Matrices: ...


@dataclass(frozen=True)
class DriftRule:
    """Refit the curvature once the weights have moved (paper: by more than 25 %, checked once an epoch).

    Attributes:
        refit: gives the constraint at the current weights, from the same capability set.
        threshold: relative Frobenius change of any layer since the last fit.
        every: check after every so many steps; None leaves it to calls of `check_drift` (once an epoch, say).
    """

    refit: Callable[[], Any]
    threshold: float = 0.25
    every: int | None = None

    def __post_init__(self) -> None:
        if not self.threshold > 0 or (self.every is not None and self.every < 1):
            raise ValueError(f"threshold must be positive and every at least 1, got {self.threshold}, {self.every}")


def relative_change(weights: Matrices, reference: Matrices) -> Tensor:
    """Largest over the layers of ‖W − W_ref‖_F / ‖W_ref‖_F; stacks (R, …) give (R,)."""
    changes = [
        torch.linalg.matrix_norm(W - reference[name]) / torch.linalg.matrix_norm(reference[name])
        for name, W in weights.items()
    ]
    return torch.stack(changes).amax(0)


def leakage(constraint: Constraint, displacement: Matrices) -> Tensor:
    """‖(I − P) δ‖ / ‖δ‖ of a displacement, 0 for δ = 0; stacks (R, …) give (R,)."""
    inside = constraint.confine(displacement)
    outside = sum((Q - inside[name]).double().square().sum((-2, -1)) for name, Q in displacement.items())
    whole = sum(Q.double().square().sum((-2, -1)) for Q in displacement.values())
    return (torch.as_tensor(outside) / torch.as_tensor(whole).clamp_min(1e-300)).sqrt()


def check_optimizer(optimizer: Optimizer, weights: Sequence[Weights]) -> None:
    """Refuse an optimiser that does not move the constrained weights, or moves others too."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    covered = {id(p): layer.name for layer in weights for p in layer.parameters()}
    missing = sorted({name for key, name in covered.items() if key not in moved})
    if missing:
        raise ValueError(f"the optimiser does not move the parameters of {missing}; give it all of them")
    if moved - set(covered):
        raise ValueError(
            f"the optimiser also moves {len(moved - set(covered))} parameters that the constraint does not cover; "
            "give those to an optimiser of their own"
        )


class Moving:
    """Constrained weights on their way: how far from θ0, how far since the last fit."""

    constraint: Any
    start: Matrices
    reference: Matrices

    def matrices(self) -> Matrices:
        """The weights as they stand."""
        raise NotImplementedError

    def displacement(self) -> Matrices:
        """θ − θ0."""
        return {name: W - self.start[name] for name, W in self.matrices().items()}

    def leak(self) -> float:
        """Share of the displacement since the last fit that lies outside the constraint (an ellipsoid: since θ0)."""
        since = self.reference if self.constraint.linear else self.start
        return float(leakage(self.constraint, {n: W - since[n] for n, W in self.matrices().items()}).max())

    def drift(self) -> float:
        """Relative Frobenius change since the last fit."""
        return float(relative_change(self.matrices(), self.reference).max())


class ConstrainedDescent(Moving):
    """An optimiser under a constraint; made by `attach`.

    Attributes:
        constraint: the one in force.
        refits: how often the drift rule replaced it.
        start: the weights at attachment, the centre θ0 of an ellipsoid. It stays the centre when the curvature is
            refitted: displacement made before a refit keeps counting against ε, in the new curvature.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Sequence[Weights],
        constraint: Constraint,
        project: Project,
        drift: DriftRule | None,
    ) -> None:
        self.optimizer, self.weights, self.project, self.drift_rule = optimizer, list(weights), project, drift
        self.constraint = constraint
        self.refits = 0
        self.steps = 0
        self.start = self.matrices()
        self.reference = self.matrices()
        self._before: Matrices = {}
        self._evaluations = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)
        ]  # fmt: skip

    def detach(self) -> None:
        """Leave the optimiser as it was."""
        for handle in self._handles:
            handle.remove()

    def check_drift(self) -> bool:
        """Refit if the weights have drifted; whether they had."""
        if self.drift_rule is None or self.drift() <= self.drift_rule.threshold:
            return False
        self.replace(self.drift_rule.refit())
        self.refits += 1
        return True

    def replace(self, constraint: Constraint) -> None:
        """Go on under another constraint; momentum gathered under the old one is projected or dropped."""
        self.constraint = _fitting(constraint, self.weights)
        self.reference = self.matrices()
        if self.project == "gradient":
            self._project_state()

    def matrices(self) -> Matrices:
        # a copy: where W is the parameter itself, the next step must not move it
        return {layer.name: layer.matrix().detach().clone() for layer in self.weights}

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch hands the optimiser as args[0]
        self._evaluations = 0
        if self.project == "update":
            self._before = self.matrices()
        elif closure is None:
            self._project_gradients()
        if closure is None:
            return None

        def constrained() -> Any:
            value = closure()
            self._evaluations += 1
            if self.project == "gradient":
                self._project_gradients()
            return value

        if len(args) > 1:
            return (args[0], constrained, *args[2:]), kwargs
        return args, kwargs | {"closure": constrained}

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.project == "update":
            if self._evaluations > 1:
                self._write(self._before)
                raise RuntimeError(
                    f"{type(optimizer).__name__} evaluated its closure {self._evaluations} times a step: projecting "
                    "its update would contradict what it learnt; use project='gradient' or the eigenbasis"
                )
            self._project_update()
        self.steps += 1
        if self.drift_rule is not None and self.drift_rule.every and self.steps % self.drift_rule.every == 0:
            self.check_drift()

    def _project_gradients(self) -> None:
        gradients: Matrices = {}
        for layer in self.weights:
            parameters = layer.parameters()
            if all(p.grad is None for p in parameters):
                continue
            tensors = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            gradients[layer.name] = layer.matrix(tensors)
        if not gradients:
            return
        filled = {
            layer.name: gradients[layer.name] if layer.name in gradients else torch.zeros_like(layer.matrix())
            for layer in self.weights
        }
        projected = _computed(self.constraint.project, filled)
        for layer in self.weights:
            for parameter, value in zip(layer.parameters(), layer.tensors(projected[layer.name]), strict=True):
                parameter.grad = value.to(parameter.dtype).contiguous()

    def _project_update(self) -> None:
        wide = [_widened(matrices) for matrices in (self.start, self._before, self.matrices())]
        self._write(self.constraint.admit(*wide))

    def _write(self, matrices: Matrices) -> None:
        for layer in self.weights:
            layer.write(matrices[layer.name])

    def _project_state(self) -> None:
        """Moments that are sums of gradients move into the new null space; histories of unknown kind are dropped."""
        project_state(self.optimizer, self.weights, lambda moments: _computed(self.constraint.project, moments))


# state that is linear in past gradients, and state whose directions carry no displacement
_LINEAR_STATE = {"momentum_buffer", "exp_avg", "grad_avg"}
_HARMLESS_STATE = {
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "sum",
    "acc_delta",
    "step",
    "eta",
    "mu",
    "mu_product",
}


def project_state(optimizer: Optimizer, weights: Sequence[Weights], project: Callable[[Matrices], Matrices]) -> None:
    """Apply `project` to the optimiser's linear moments; drop state that is neither linear nor harmless."""
    entries: dict[str, None] = {}
    for layer in weights:
        for parameter in layer.parameters():
            state = optimizer.state.get(parameter, {})
            if set(state) - _LINEAR_STATE - _HARMLESS_STATE:
                optimizer.state.pop(parameter)
                warnings.warn(
                    f"{type(optimizer).__name__} keeps a history that cannot be moved into the new subspace; "
                    "it starts afresh after a refit",
                    stacklevel=3,
                )
                continue
            entries |= dict.fromkeys(key for key in state if key in _LINEAR_STATE and state[key] is not None)
    for key in entries:
        moments = {}
        for layer in weights:
            tensors = [optimizer.state.get(p, {}).get(key) for p in layer.parameters()]
            filled = [torch.zeros_like(p) if t is None else t for p, t in zip(layer.parameters(), tensors, strict=True)]
            moments[layer.name] = layer.matrix(filled)
        projected = project(moments)
        for layer in weights:
            for parameter, value in zip(layer.parameters(), layer.tensors(projected[layer.name]), strict=True):
                held = optimizer.state.get(parameter, {}).get(key)
                if held is not None:
                    held.copy_(value)


def _computed(function: Callable[[Matrices], Matrices], matrices: Matrices) -> Matrices:
    """Low-precision matrices go through `function` in the constraint's (float32 or better) arithmetic."""
    dtypes = {name: Q.dtype for name, Q in matrices.items()}
    return {name: Q.to(dtypes[name]) for name, Q in function(_widened(matrices)).items()}


def _widened(matrices: Matrices) -> Matrices:
    return {name: Q.to(torch.promote_types(Q.dtype, torch.float32)) for name, Q in matrices.items()}


def _fitting(constraint: Any, weights: Sequence[Weights]) -> Any:
    """The constraint in the weights' dtype and device, checked to cover the same layers."""
    names, known = sorted(layer.name for layer in weights), sorted(layer.name for layer in constraint.layers)
    if names != known:
        raise ValueError(f"the constraint covers {known}, the weights are {names}")
    first = weights[0].parameters()[0]
    return constraint.to(torch.promote_types(first.dtype, torch.float32), first.device)


def constrained_layers(model: nn.Module, constraint: Constraint) -> list[Any]:
    """The model's layers that a constraint covers.

    Raises:
        ValueError: a layer that the model has not, or with another shape or bias.
    """
    found = []
    for shape in constraint.layers:
        (layer,) = find_layers(model, [shape.name], bias=shape.bias)
        if layer.shape != shape:
            raise ValueError(
                f"layer {shape.name!r} is {layer.d_out} × {layer.d_in}, the constraint's {shape.d_out} × {shape.d_in}"
            )
        found.append(layer)
    return found


def attach(
    model: nn.Module | None,
    optimizer: Optimizer,
    constraint: Any,
    *,
    project: Project = "gradient",
    drift: DriftRule | None = None,
    weights: Sequence[Weights] | None = None,
) -> ConstrainedDescent:
    """Put an optimiser under a constraint.

    Args:
        model: the model whose layers the constraint names (or `weights` instead).
        optimizer: moves exactly the constrained parameters.
        project: "gradient" (the paper's) or "update"; see the module. An ellipsoid takes "update" only.
        drift: when to refit; None never.

    Raises:
        ValueError: a combination that would be wrong: an ellipsoid on gradients, LBFGS on updates, weight decay
            with projected gradients, an optimiser over other parameters.
    """
    if weights is None:
        if model is None:
            raise ValueError("give a model, or weights")
        weights = constrained_layers(model, constraint)
    if project not in ("gradient", "update"):
        raise ValueError(
            f"project must be 'gradient' or 'update', got {project!r} (the eigenbasis: curvlab.eigenbasis)"
        )
    check_optimizer(optimizer, weights)
    name = type(optimizer).__name__
    if project == "gradient":
        if not constraint.linear:
            raise ValueError(
                "an ellipsoid bounds the whole displacement, a gradient alone cannot be projected onto it; "
                "use project='update' or the eigenbasis"
            )
        if any(group.get("weight_decay", 0) for group in optimizer.param_groups):
            raise ValueError(f"{name}'s weight decay leaves the null space after the projection; use project='update'")
        if not isinstance(optimizer, (SGD, LBFGS)):
            warnings.warn(
                f"{name} rescales the projected gradient elementwise and so leaves the null space (see .leak()); "
                "project='update' does not",
                stacklevel=2,
            )
    elif isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS relies on its step having been taken in full; use project='gradient' or the eigenbasis")
    return ConstrainedDescent(optimizer, weights, _fitting(constraint, weights), project, drift)
