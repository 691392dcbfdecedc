"""Edit paths: descent on an edit set, and what it costs on the capability set."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlab.descent import Constraint, attach, constrained_layers
from curvlab.layers import LayerShape, MatrixLayer, find_layers, unflatten
from curvlab.losses import Loss
from curvlab.theory import explicit


def mean_loss(model: Callable[[Tensor], Tensor], loss: Loss, data: Any) -> Tensor:
    """Mean over the loss terms, float64, differentiable."""
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for x, y in explicit.batches(data):
        out = model(x)
        out = out.unsqueeze(1) if out.dim() == 2 else out
        total = total + loss.value(out, y).sum()
        terms += int(loss.terms(out.detach(), y).sum())
    return total / terms


def flat(layers: Sequence[MatrixLayer]) -> Tensor:
    """The weights as they stand (p,), a copy."""
    return torch.cat([layer.matrix().flatten() for layer in layers])


def gradient(model: nn.Module, loss: Loss, data: Any, layers: Sequence[MatrixLayer]) -> Tensor:
    """∂L/∂θ of the mean loss (p,), of frozen weights too."""
    delta = explicit.zero(layers).requires_grad_()
    (g,) = torch.autograd.grad(mean_loss(lambda x: explicit.outputs(model, layers, x)(delta), loss, data), delta)
    return g.detach()


def edit_gradient(model: nn.Module, loss: Loss, edits: Any, layers: Sequence[MatrixLayer]) -> Tensor:
    """`gradient` on edits.

    Raises:
        ValueError: it is zero, because the edits are fitted already, say.
    """
    g = gradient(model, loss, edits, layers)
    if not bool(g.any()):
        raise ValueError("the edit loss has no gradient at θ0: nothing to descend")
    return g


def unfreeze(layers: Sequence[MatrixLayer]) -> None:
    """Let gradients flow into the layers' parameters (of a copy)."""
    for layer in layers:
        for p in layer.parameters():
            p.requires_grad_()


def descend(
    model: nn.Module, loss: Loss, edits: Any, names: Sequence[str], constraint: Constraint | None, rate: float,
    steps: int,
) -> Tensor:  # fmt: skip
    """δ after every step of gradient descent on the edits, updates obeying a constraint: (steps, p)."""
    model = copy.deepcopy(model)
    layers = constrained_layers(model, constraint) if constraint is not None else find_layers(model, names)
    unfreeze(layers)
    optimiser = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=rate)
    if constraint is not None:
        attach(model, optimiser, constraint, project="update")
    start, path = flat(layers), []
    for _ in range(steps):
        optimiser.zero_grad()
        mean_loss(model, loss, edits).backward()
        optimiser.step()
        path.append(flat(layers) - start)
    return torch.stack(path)


class Measures:
    """What displacements of a model's layers do on a data set: Bregman distance (KL), loss, accuracy.

    Attributes:
        start: the loss and the accuracy without a displacement.
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Any, layers: Sequence[MatrixLayer]) -> None:
        self.model, self.loss, self.layers = model, loss, list(layers)
        self.data = explicit.batches(data)
        self.weights = {layer.name: layer.matrix().clone() for layer in layers}
        with torch.no_grad():
            self.before = [self._outputs(x, None) for x, _ in self.data]
        self.terms = sum(int(loss.terms(out, y).sum()) for out, (_, y) in zip(self.before, self.data, strict=True))
        self.start = self(torch.zeros(sum(layer.size for layer in layers), dtype=torch.float64))

    @torch.no_grad()
    def __call__(self, delta: Tensor) -> dict[str, float]:
        """At δ (p,): "distance" (mean Bregman distance, KL for cross-entropy), "loss", "accuracy"."""
        distance = value = hits = 0.0
        for (x, y), before in zip(self.data, self.before, strict=True):
            after = self._outputs(x, delta)
            distance += float(self.loss.bregman(after, before, y).sum())
            value += float(self.loss.value(after, y).sum())
            hits += float((after.argmax(-1) == y).sum()) if not y.is_floating_point() else float("nan")
        return {"distance": distance / self.terms, "loss": value / self.terms, "accuracy": hits / self.terms}

    def _outputs(self, x: Tensor, delta: Tensor | None) -> Tensor:
        named: dict[str, Tensor] = {}
        if delta is not None:
            shapes: Sequence[LayerShape] = self.layers
            for layer, Q in zip(self.layers, unflatten(shapes, delta).values(), strict=True):
                W = self.weights[layer.name]
                named |= dict(zip(layer.parameter_names, layer.tensors(W + Q.to(W)), strict=True))
        out: Tensor = functional_call(self.model, named, (x,))
        return (out.unsqueeze(1) if out.dim() == 2 else out).double()
