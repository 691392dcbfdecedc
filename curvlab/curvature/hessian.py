"""The exact Hessian H = ∂²L/∂W² of the mean loss over chosen layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, Pass, count_examples, passes, require_reiterable
from curvlab.curvature.exact import ExactCurvature
from curvlab.curvature.products import AutogradProduct, KroneckerSum
from curvlab.layers import Conv2dLayer, find_layers
from curvlab.losses import Loss, as_loss
from curvlab.memory import announce, bytes_of


class Hessian(ExactCurvature):
    """The Hessian of the mean loss over chosen layers jointly.

    Where one layer's weight is used once an example, H = 1/N Σ_n S_n ⊗ a_n a_nᵀ (row-major) with
    S_n = ∂²ℓ_n/∂s² from d_out double-backward passes, and everything else is linear algebra;
    otherwise products are passes over the data (forward over reverse).
    """

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: Any,
        data: Data,
        layers: str | Sequence[str],
        *,
        bias: bool = False,
        micro_batch: int | None = None,
    ) -> "Hessian":
        """One pass over `data`; arguments as in `GaussNewton.fit`."""
        loss = as_loss(loss)
        chosen = find_layers(model, layers, bias)
        examples, terms = count_examples(data), 0
        inputs: list[Tensor] = []
        seconds: list[Tensor] = []
        once = len(chosen) == 1
        for pass_ in passes(model, loss, data, chosen, desc="Hessian", micro_batch=micro_batch):
            a = pass_.inputs(chosen[0])
            once = once and a.shape[1] == 1
            terms += pass_.terms
            if not once:
                continue
            if not seconds and examples is not None:
                needed = bytes_of(examples, chosen[0].d_out, chosen[0].d_out, dtype=a.dtype)
                announce(f"output Hessians of {examples:,} examples", needed, "fewer examples", a.device)
            inputs.append(a[:, 0])
            seconds.append(output_hessians(pass_, loss))
        if once:
            s = torch.cat(seconds)
            return cls(chosen, KroneckerSum(chosen[0].shape, torch.cat(inputs), s), terms, semidefinite=False)
        require_reiterable(data)
        product = AutogradProduct(model, loss, data, chosen, hessian=True, micro_batch=micro_batch)
        return cls(chosen, product, terms, semidefinite=False)


COLUMNS = 64  # of S_n in one batched backward pass


def output_hessians(pass_: Pass, loss: Loss) -> Tensor:
    """S_n = ∂²ℓ_n/∂s² of the one captured layer: (N, d_out, d_out)."""
    (layer,) = pass_.layers
    s = pass_.raw_outputs[layer.name]
    channels = 1 if isinstance(layer, Conv2dLayer) else -1
    units = torch.eye(layer.d_out, dtype=s.dtype, device=s.device)
    with torch.enable_grad():
        total = loss.value(pass_.outputs, pass_.targets).sum()
        (g,) = torch.autograd.grad(total, s, create_graph=True)
        if not g.requires_grad:  # a loss linear in s has no second derivative
            return s.new_zeros(len(s), layer.d_out, layer.d_out)
        columns = []
        for part in units.split(COLUMNS):
            # one unit vector a column, at every example
            vectors = part.view(len(part), *[layer.d_out if d == channels % s.dim() else 1 for d in range(s.dim())])
            columns += _products(g, s, vectors.expand(-1, *s.shape))
    S = torch.stack([layer.outputs(c)[:, 0] for c in columns], dim=1).detach()
    return (S + S.mT) / 2


def _products(g: Tensor, s: Tensor, vectors: Tensor) -> list[Tensor]:
    """(∂g/∂s)ᵀ v for each v of `vectors` (K, *s.shape), in one batched pass where every operation allows it."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        (batch,) = torch.autograd.grad(g, s, vectors, is_grads_batched=True, **options)
    except RuntimeError:  # an operation that vmap cannot batch
        found = [torch.autograd.grad(g, s, v, **options)[0] for v in vectors]
        return [torch.zeros_like(s) if c is None else c for c in found]
    return list(torch.zeros_like(vectors) if batch is None else batch)
