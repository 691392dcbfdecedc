"""Losses and Bregman distances along random directions of the weights, without cancellation however small the step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from curvlab.curvature import GaussNewton
from curvlab.layers import MatrixLayer, find_layers, flatten, unflatten
from curvlab.losses import Labels, Loss
from curvlab.theory import explicit

NODES = 12  # of Gauss–Legendre quadrature: rounding is reached while logits change by less than about ten
ROUNDINGS = 8  # units of rounding in an output


@dataclass(frozen=True)
class Point:
    """What is seen at θ0 + s d, one number a direction, means over loss terms.

    Attributes:
        distance: d(ŷ, ŷ0) as ∫(1 − t) uᵀH(ŷ0 + t u)u dt, u = ŷ − ŷ0: no difference of near-equal numbers but u.
        defined: the same by its definition, from three terms.
        library: the same by the loss' own formula.
        change: ℓ(ŷ) − ℓ(ŷ0).
        rounding: of `distance`, from the rounding of u; `cancelled`: of `defined`.
    """

    distance: Tensor
    defined: Tensor
    library: Tensor
    change: Tensor
    rounding: float
    cancelled: float


@dataclass(frozen=True)
class Rays:
    """Directions (R, p), layout "rows", each as long as the layers' weights."""

    model: nn.Module
    loss: Loss
    data: list[tuple[Tensor, Tensor]]
    layers: list[MatrixLayer]
    directions: Tensor
    norm: float

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str], count: int, seed: int) -> "Rays":
        """Random directions over all the layers jointly."""
        chosen = find_layers(model, layers)
        theta = flatten(chosen, {layer.name: layer.matrix() for layer in chosen})
        generator = torch.Generator().manual_seed(seed)
        d = torch.randn(count, len(theta), generator=generator, dtype=torch.float64).to(theta)
        norm = torch.linalg.vector_norm(theta)
        d = d * (norm / torch.linalg.vector_norm(d, dim=1, keepdim=True))
        return cls(model, loss, explicit.batches(data), chosen, d, float(norm))

    def curvature(self, labels: Labels = "exact") -> Tensor:
        """dᵀGd (R,) of the library's Gauss–Newton matrix."""
        names = [layer.name for layer in self.layers]
        G = GaussNewton.fit(self.model, self.loss, self._plain(), names, labels=labels)
        return G.quadratic_form(unflatten(self.layers, self.directions))

    @torch.no_grad()
    def at(self, s: float) -> Point:
        """θ0 + s d."""
        R, terms = len(self.directions), 0
        eps = torch.finfo(self.directions.dtype).eps
        sums = torch.zeros(6, R, dtype=torch.float64)
        for x, y in self.data:
            f = explicit.outputs(self.model, self.layers, x)
            start = f(torch.zeros_like(self.directions[0]))
            terms += int(self.loss.terms(start, y).sum())
            # directions as more examples
            after = vmap(f)(s * self.directions).flatten(0, 1)
            y, y0 = y.repeat(R, *[1] * (y.dim() - 1)), start.repeat(R, 1, 1)
            u, gradient = after - y0, self.loss.gradient(y0, y)
            new, value, linear = self.loss.value(after, y), self.loss.value(y0, y), (gradient * u).sum(-1)
            pull = torch.linalg.vector_norm(self.loss.gradient(after, y) - gradient, dim=-1)
            size = 1 + torch.linalg.vector_norm(y0, dim=-1)
            found = (
                self._integral(y0, u, y), new - value - linear, self.loss.bregman(after, y0, y), new - value,
                ROUNDINGS * eps * pull * size, ROUNDINGS * eps * (new.abs() + value.abs() + linear.abs() + size),
            )  # fmt: skip
            sums += torch.stack([t.double().view(R, -1).sum(1) for t in found])
        distance, defined, library, change, rounding, cancelled = sums / terms
        return Point(distance, defined, library, change, float(rounding.max()), float(cancelled.max()))

    def _integral(self, y0: Tensor, u: Tensor, targets: Tensor) -> Tensor:
        """∫(1 − t) ∂²/∂t² ℓ(ŷ0 + t u) dt of each term, the second derivative as uᵀ(∂²ℓ/∂ŷ²)u."""
        nodes, weights = (torch.from_numpy(n).to(y0) for n in np.polynomial.legendre.leggauss(NODES))
        t, weights = (nodes + 1) / 2, weights / 2
        step, y = u.repeat(NODES, 1, 1), targets.repeat(NODES, *[1] * (targets.dim() - 1))
        with torch.enable_grad():  # nodes as more examples
            on_path = (y0 + t[:, None, None, None] * u).flatten(0, 1).requires_grad_()
            (g,) = torch.autograd.grad(self.loss.value(on_path, y).sum(), on_path, create_graph=True)
            (along,) = torch.autograd.grad((g * step).sum(), on_path)
        second = (along * step).sum(-1)
        return ((weights * (1 - t))[:, None, None] * second.unflatten(0, (NODES, -1))).sum(0)

    def radius(self, largest: float = 0.1, points: int = 16) -> float:
        """The largest of `largest`, `largest`/2, … up to which no ReLU and no max-pool switches on any direction."""
        start = self._patterns(0.0, self.directions[0])
        for k in range(40):
            s = largest * 0.5**k
            steps = np.linspace(0, s, points + 1)[1:]
            if all(torch.equal(self._patterns(float(t), d), start) for d in self.directions for t in steps[::-1]):
                return s
        raise ValueError("an activation sits on its kink: no linear region around these weights was found")

    @torch.no_grad()
    def _patterns(self, s: float, d: Tensor) -> Tensor:
        """Signs before every activation and places of every maximum, over the data."""
        seen: list[Tensor] = []
        with _watch(self.model, seen):
            for x, _ in self.data:
                explicit.outputs(self.model, self.layers, x)(s * d)
        return torch.cat([t.flatten() for t in seen] or [torch.zeros(0, dtype=torch.long)])

    def _plain(self) -> list[tuple[Tensor, Tensor]]:
        """The data with targets as the model's outputs have them."""
        plain = []
        for x, y in self.data:
            with torch.no_grad():
                flat = self.model(x[:1]).dim() == 2
            plain.append((x, y.squeeze(1) if flat else y))
        return plain


@contextmanager
def _watch(model: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Record signs of all linear outputs but the last, and which entry each max-pool takes."""
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
    pools = [m for m in model.modules() if isinstance(m, nn.MaxPool2d)]

    def sign(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append((output > 0).long())

    def place(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.MaxPool2d)
        x = args[0]
        index = nn.functional.max_pool2d(
            x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, True
        )[1]
        value = x.flatten(-2).gather(-1, index.flatten(-2)).view_as(index)
        seen.append(index.where(value != 0, -1))  # zeros of a ReLU tie, and whichever is taken is flat

    handles = [m.register_forward_hook(sign) for m in linear] + [m.register_forward_hook(place) for m in pools]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
