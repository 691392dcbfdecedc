"""Many constrained runs at once: the same data and start, each run under its own constraint.

The runs' weights are one stacked parameter (R, d_out, d_in); the model is vmapped over it, so that R small matrix
products become one. Runs whose constraints share a basis (all γ of one curvature) are projected together; a run
whose drift asks for its own basis goes on in the stack with its own projector.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer

from curvlab.capture import shaped
from curvlab.descent import ConstrainedDescent, attach, relative_change
from curvlab.layers import LayerShape, Matrices, MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.progress import progress
from curvlab.projector import Constraint, Ellipsoid, stack
from curvlab.spectrum import Basis

Refit = Callable[[int, Tensor], Constraint]  # (run, its W (d_out, d_in)) → the constraint at these weights
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Project = Literal["gradient", "update", "eigenbasis"]


def one_minus_powers(first: float, last: float, count: int) -> tuple[float, ...]:
    """γ = 1 − 10^−k for k evenly spaced (the paper's grid is first=0.1, last=7, count=20)."""
    step = (last - first) / (count - 1)
    return tuple(1 - 10 ** -(first + i * step) for i in range(count))


@dataclass(frozen=True)
class SweepResult:
    """What R runs came to.

    Attributes:
        weights: (R, d_out, d_in) at the end.
        refits: how often the drift rule refitted each run.
        drift: relative Frobenius change of each run's weights since the start.
        losses: (epochs, R) mean training loss of each epoch.
        diverged: runs whose loss stopped being finite; their weights are those at that time.
    """

    weights: Tensor
    refits: list[int]
    drift: list[float]
    losses: Tensor
    diverged: list[bool]


class StackedWeights:
    """R copies of one layer's W as a single parameter, with the face of a layer (`descent.Weights`)."""

    def __init__(self, layer: MatrixLayer, runs: int) -> None:
        self.name, self.shape = layer.name, layer.shape
        self.parameter = nn.Parameter(layer.matrix().clone().expand(runs, -1, -1).contiguous())

    def parameters(self) -> list[nn.Parameter]:
        return [self.parameter]

    def matrix(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        return self.parameter.detach() if tensors is None else tensors[0]

    def tensors(self, W: Tensor) -> list[Tensor]:
        return [W]

    def write(self, W: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(W)


class Grouped:
    """Constraints on a stack of runs, grouped by the basis they share; None leaves a run unconstrained."""

    def __init__(self, layer: LayerShape, constraints: Sequence[Constraint | None]) -> None:
        self.layers = [layer]
        self.constraints = list(constraints)
        shared: dict[Any, list[int]] = {}
        for run, constraint in enumerate(constraints):
            key = None if constraint is None else (type(constraint), *(id(block.basis) for block in constraint.blocks))
            shared.setdefault(key, []).append(run)
        self.groups: list[tuple[list[int], Constraint | None]] = []
        for key, runs in shared.items():
            members = [c for run in runs if (c := constraints[run]) is not None]
            self.groups.append((runs, None if key is None else stack(members)))

    @property
    def linear(self) -> bool:
        return all(constraint is None or constraint.linear for _, constraint in self.groups)

    def _each(self, function: Callable[[Constraint, Matrices], Matrices], delta: Matrices) -> Matrices:
        (name,) = delta
        if len(self.groups) == 1:
            (_, constraint) = self.groups[0]
            return delta if constraint is None else function(constraint, delta)
        out = delta[name].clone()
        for runs, constraint in self.groups:
            if constraint is not None:
                out[runs] = function(constraint, {name: delta[name][runs]})[name]
        return {name: out}

    def project(self, delta: Matrices) -> Matrices:
        return self._each(lambda constraint, part: constraint.project(part), delta)

    def confine(self, delta: Matrices) -> Matrices:
        return self._each(lambda constraint, part: constraint.confine(part), delta)

    def admit(self, start: Matrices, before: Matrices, after: Matrices) -> Matrices:
        (name,) = after
        out = after[name].clone()
        for runs, constraint in self.groups:
            if constraint is not None:
                parts = ({name: matrices[name][runs]} for matrices in (start, before, after))
                out[runs] = constraint.admit(*parts)[name]
        return {name: out}

    def displacement(self, Z: Tensor) -> Tensor:
        """Coordinates of all runs (R, d_out, d_in), whatever their basis, as displacements (R, d_out, d_in)."""
        parts = []
        for runs, constraint in self.groups:
            part = Z[runs]
            if constraint is not None:
                (shape,) = constraint.coordinate_shapes
                (part,) = constraint.displacement([part.reshape(len(runs), *shape)]).values()
            parts.append(part)
        order = torch.tensor([run for runs, _ in self.groups for run in runs], device=Z.device)
        return torch.cat(parts)[order.argsort()]

    def confine_coordinates(self, Z: Tensor) -> Tensor:
        out = Z.clone()
        for runs, constraint in self.groups:
            if isinstance(constraint, Ellipsoid):
                (shape,) = constraint.coordinate_shapes
                (part,) = constraint.confine_coordinates([Z[runs].reshape(len(runs), *shape)])
                out[runs] = part.reshape(len(runs), *Z.shape[1:])
        return out

    def coordinates(self, delta: Tensor) -> Tensor:
        """The inverse of `displacement` on what the constraints allow."""
        out = delta.clone()
        for runs, constraint in self.groups:
            if constraint is not None:
                (part,) = constraint.coordinates({self.layers[0].name: delta[runs]})
                out[runs] = part.reshape(len(runs), *delta.shape[1:])
        return out

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Grouped":
        """In another dtype or on another device; one cast a basis, so that sharing survives."""
        bases: dict[int, Basis] = {}
        moved: list[Constraint | None] = []
        for constraint in self.constraints:
            if constraint is None:
                moved.append(None)
                continue
            for block in constraint.blocks:
                like = block.basis.like
                if id(block.basis) not in bases and (like.dtype, like.device) != (dtype, device):
                    bases[id(block.basis)] = block.basis.map(lambda t: t.to(dtype=dtype, device=device))
            moved.append(constraint.on(bases))
        return Grouped(self.layers[0], moved) if bases else self


class _StackedEigenbasis:
    """A stack of runs that descend in the eigenbases of their constraints: W = base + U (M ⊙ Z) Uᵀ."""

    def __init__(self, weights: StackedWeights, constraint: Grouped, make: MakeOptimizer) -> None:
        self.weights, self.constraint = weights, constraint
        self.start = weights.matrix().clone()
        self.base = self.start
        self.Z = nn.Parameter(torch.zeros_like(weights.parameter))
        self.spent = torch.zeros_like(self.start)  # coordinates of the displacement already in the base
        self.optimizer = make([self.Z])

    def current(self) -> Tensor:
        return self.base + self.constraint.displacement(self.Z)

    def confine(self) -> None:
        """After a step: back into the ellipsoids."""
        if not self.constraint.linear:
            with torch.no_grad():
                self.Z.copy_(self.constraint.confine_coordinates(self.Z + self.spent) - self.spent)

    def merge(self) -> None:
        """Let the stacked weights say where the runs stand."""
        with torch.no_grad():
            self.weights.write(self.current())

    def replace(self, constraint: Grouped) -> None:
        """Go on in other eigenbases, from the merged weights; SGD's momentum is rotated into them."""
        old, self.constraint = self.constraint, constraint
        self.base = self.weights.matrix().clone()
        self.Z.detach().zero_()
        self.spent = constraint.coordinates(self.base - self.start)
        if not isinstance(self.optimizer, torch.optim.SGD):
            self.optimizer.state.clear()
            return
        momentum = self.optimizer.state.get(self.Z, {}).get("momentum_buffer")
        if momentum is not None:
            momentum.copy_(constraint.coordinates(old.displacement(momentum)))


def sweep(
    head: nn.Module,
    layer: str,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    constraints: Sequence[Constraint | None],
    *,
    optimizer: MakeOptimizer,
    project: Project = "gradient",
    epochs: int,
    batch_size: int,
    seed: int,
    bias: bool = False,
    refit: Refit | None = None,
    threshold: float = 0.25,
    desc: str = "fine-tuning",
) -> SweepResult:
    """Fine-tune `layer` of `head` once for each constraint, all runs on the same minibatches.

    Args:
        head: the model from `layer` on (or any model that holds it); its own weights are the common start and
            are not changed.
        x, y: inputs of the head (N, …) and targets (N,), on the head's device.
        constraints: one a run, None for an unconstrained run.
        optimizer: makes a torch optimiser for given parameters. It must act elementwise (SGD, Adam, …), so that
            a stack of runs takes the steps that each would take alone.
        project: "gradient", "update", or "eigenbasis"; an ellipsoid takes the latter two.
        refit: with it, the drift rule is checked once an epoch: a run that moved by more than `threshold`
            (relative Frobenius, since its last fit) goes on under `refit(run, W)`.
        seed: of the minibatches' order.
    """
    (found,) = find_layers(head, layer, bias)
    runs = len(constraints)
    if runs == 0 or len(x) == 0 or len(x) != len(y):
        raise ValueError(f"need runs and data: {runs} constraints, {len(x)} inputs, {len(y)} targets")
    if project == "eigenbasis" and refit is not None and runs > 1:
        probe = optimizer([nn.Parameter(torch.zeros(1))])
        if not isinstance(probe, torch.optim.SGD):  # a new eigenbasis starts such an optimiser afresh, run by run

            def alone(i: int) -> SweepResult:
                return sweep(
                    head, layer, loss, x, y, [constraints[i]], optimizer=optimizer, project=project, epochs=epochs,
                    batch_size=batch_size, seed=seed, bias=bias, refit=lambda _, W: refit(i, W), threshold=threshold,
                    desc=f"{desc} {i + 1}/{runs}",
                )  # fmt: skip

            return _one_by_one(alone, runs)
    weights = StackedWeights(found, runs)
    grouped = Grouped(found.shape, constraints).to(found.matrix().dtype, found.matrix().device)
    eigen = _StackedEigenbasis(weights, grouped, optimizer) if project == "eigenbasis" else None
    if eigen is not None:
        descent: ConstrainedDescent | _StackedEigenbasis = eigen
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller chose, and measures the leak
            mode: Any = project
            descent = attach(None, optimizer(weights.parameters()), grouped, project=mode, weights=[weights])
    fixed = {name: p.detach() for name, p in head.named_parameters() if name not in found.parameter_names}
    fixed |= dict(head.named_buffers())

    def mean_loss(W: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        own = dict(zip(found.parameter_names, found.tensors(W), strict=True))
        return loss.value(*shaped(functional_call(head, fixed | own, (inputs,)), targets)).mean()

    stacked_loss = vmap(mean_loss, in_dims=(0, None, None))
    start = weights.matrix().clone()
    reference = start.clone()
    refits = [0] * runs
    alive = torch.ones(runs, dtype=torch.bool, device=start.device)
    by_epoch = []
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(range(epochs), desc):
        total = torch.zeros(runs, dtype=torch.float64, device=start.device)
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            descent.optimizer.zero_grad()
            each = stacked_loss(weights.parameter if eigen is None else eigen.current(), x[index], y[index])
            total += each.detach().double() * len(index)
            each.sum().backward()
            descent.optimizer.step()
            if eigen is not None:
                eigen.confine()
        if eigen is not None:
            eigen.merge()
        by_epoch.append(total / len(x))
        alive &= by_epoch[-1].isfinite()
        if refit is None:
            continue
        moved = relative_change({layer: weights.matrix()}, {layer: reference})
        kept = list(grouped.constraints)
        drifted = [run for run in range(runs) if moved[run] > threshold and alive[run] and kept[run] is not None]
        for run in drifted:
            reference[run] = weights.matrix()[run]
            kept[run] = refit(run, reference[run].clone()).to(start.dtype, start.device)
            refits[run] += 1
        if drifted:
            grouped = Grouped(found.shape, kept)
            descent.replace(grouped)
    drift = relative_change({layer: weights.matrix()}, {layer: start})
    return SweepResult(weights.matrix().clone(), refits, drift.tolist(), torch.stack(by_epoch), (~alive).tolist())


def _one_by_one(run: Callable[[int], SweepResult], runs: int) -> SweepResult:
    """Runs that cannot share an optimiser's state, each by itself."""
    each = [run(i) for i in range(runs)]
    return SweepResult(
        torch.cat([r.weights for r in each]),
        [n for r in each for n in r.refits],
        [d for r in each for d in r.drift],
        torch.cat([r.losses for r in each], dim=1),
        [d for r in each for d in r.diverged],
    )
