"""K-FAC's factors from their definition, by `torch.func` on the whole model; nothing of `curvlab.capture`."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from curvlab.layers import MatrixLayer
from curvlab.losses import Loss
from curvlab.theory import explicit


def output_jacobian(model: nn.Module, layer: MatrixLayer, x: Tensor) -> Tensor:
    """∂ŷ/∂s at every position of the layer's output s: (N, T, C, positions, d_out). Examples must not interact."""
    with torch.no_grad():
        shape = explicit.outputs(model, [layer], x)(explicit.zero([layer])).shape

    def shifted(shift: Tensor) -> Tensor:
        handle = layer.module.register_forward_hook(lambda _, __, s: s + shift)
        try:
            return model(x).reshape(shape).sum(0)
        finally:
            handle.remove()

    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda _, __, s: seen.append(s.detach()))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    J = jacrev(shifted)(torch.zeros_like(seen[0])).detach()  # (T, C, N, …): the sum over n keeps examples apart
    return vmap(vmap(layer.outputs))(J).movedim(2, 0)


def kfac_factors(
    model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer, sharing: Literal["expand", "reduce"] = "expand"
) -> tuple[Tensor, Tensor]:
    """A = E[a aᵀ] over positions and S = Σ Jᵀ H_ŷ J per loss term, J to one position of s at a time.

    With "reduce" a is an example's mean over positions and J the sum over them.
    """
    A: Any = 0.0
    S: Any = 0.0
    positions = terms = 0
    for x, y in explicit.batches(data):
        a = explicit.layer_inputs(model, layer, [(x, y)]).reshape(len(x), -1, layer.d_in)
        J = output_jacobian(model, layer, x)
        if sharing == "reduce":
            a, J = a.mean(1, keepdim=True), J.sum(3, keepdim=True)
        outputs = explicit.outputs(model, [layer], x)(explicit.zero([layer]))
        H = explicit.output_hessian(loss, outputs, y)
        A = A + torch.einsum("npi,npj->ij", a, a)
        S = S + torch.einsum("ntcpo,ntcd,ntdpq->oq", J, H, J)
        positions += a.shape[0] * a.shape[1]
        terms += int(loss.terms(outputs, y).sum())
    return (A / positions).contiguous(), (S / terms).contiguous()
