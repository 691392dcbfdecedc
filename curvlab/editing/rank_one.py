"""The gradient of a request's loss in one layer is a sum of rank-one terms, one a token: Σ δ uᵀ.

u is the layer's input and δ the gradient at its output. The loss is the *sum* over a request's target tokens
(−log p of the target), so that neither the batch nor the other requests of a set change a request's factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlab.capture import Batch, Pass, columns, passes
from curvlab.layers import MatrixLayer
from curvlab.losses import CrossEntropy


@dataclass(frozen=True)
class Factors:
    """Rank-one factors of one layer, in float32 or better; padding is left out.

    Attributes:
        u: (R, d_in), the layer's inputs at R positions.
        delta: (R, d_out), the gradients at its outputs there.
        request: (R,), whose position it is.
        target: (R,), whether the position predicts a token of the target.
    """

    u: Tensor
    delta: Tensor
    request: Tensor
    target: Tensor

    def where(self, chosen: Tensor) -> "Factors":
        """At the positions `chosen` (a mask or an index)."""
        return Factors(self.u[chosen], self.delta[chosen], self.request[chosen], self.target[chosen])

    @classmethod
    def cat(cls, parts: Sequence["Factors"]) -> "Factors":
        """Of all parts together."""
        fields = ("u", "delta", "request", "target")
        return cls(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))

    def gradient(self) -> Tensor:
        """Σ δ uᵀ (d_out, d_in)."""
        return self.delta.T @ self.u


def rank_one_factors(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[MatrixLayer], *, desc: str, targets_only: bool = False
) -> tuple[dict[str, Factors], float]:
    """Factors by layer name, from one forward and backward pass a batch, and the mean loss (nats a token).

    `targets_only` keeps those positions that predict a token of the target.
    """
    loss = CrossEntropy()
    parts: dict[str, list[Factors]] = {layer.name: [] for layer in layers}
    total, terms = 0.0, 0
    for pass_ in passes(model, loss, batches, layers, desc=desc):
        (gradients,) = pass_.gradients(columns(pass_, loss, "data"), packed=True)
        request, target = _positions(pass_)
        for layer in layers:
            u, delta = pass_.inputs(layer, packed=True).flatten(0, 1), gradients[layer.name].flatten(0, 1)
            wide = torch.promote_types(u.dtype, torch.float32)
            own = Factors(u.to(wide), delta.to(wide), request.to(u.device), target.to(u.device))
            parts[layer.name].append(own.where(own.target) if targets_only else own)
        outputs = pass_.outputs.detach()
        total += float(loss.value(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), pass_.targets).sum())
        terms += pass_.terms
    fields = ("u", "delta", "request", "target")
    joined = {
        n: Factors(*(torch.cat([getattr(f, field) for f in own]) for field in fields)) for n, own in parts.items()
    }
    return joined, total / terms


def _positions(pass_: Pass) -> tuple[Tensor, Tensor]:
    """(R,) of the real positions: the number of the example, and whether there is a loss."""
    request = pass_.examples.unsqueeze(1).expand(pass_.targets.shape)
    target = CrossEntropy().terms(pass_.outputs, pass_.targets)
    real = torch.ones_like(target) if pass_.mask is None else pass_.mask
    return request[real], target[real]
