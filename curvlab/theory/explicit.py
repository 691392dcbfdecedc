"""Plain computations that the claims are held to: `torch.func` on the whole model, matrices in full.

Nothing here goes through `curvlab.capture` or `curvlab.curvature`. Vectors and matrices over parameters are in
the layout "rows": each layer's W row-major, the layers in the model's order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvlab.layers import MatrixLayer, unflatten
from curvlab.losses import Loss


def batches(data: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """The data as (inputs, targets), targets (N, T) or (N, T, C)."""
    return [(x, y.unsqueeze(1) if y.dim() == 1 or (y.is_floating_point() and y.dim() == 2) else y) for x, y in data]


def outputs(model: nn.Module, layers: Sequence[MatrixLayer], x: Tensor) -> Callable[[Tensor], Tensor]:
    """ŷ as a function of a displacement δ (p,) of the layers' weights: (p,) → (N, T, C)."""
    start = {layer.name: layer.matrix() for layer in layers}

    def call(delta: Tensor) -> Tensor:
        named: dict[str, Tensor] = {}
        for name, Q in unflatten(layers, delta).items():
            layer = next(layer for layer in layers if layer.name == name)
            named |= dict(zip(layer.parameter_names, layer.tensors(start[name] + Q), strict=True))
        y = functional_call(model, named, (x,))
        return y.unsqueeze(1) if y.dim() == 2 else y

    return call


def zero(layers: Sequence[MatrixLayer]) -> Tensor:
    """The displacement 0 (p,)."""
    return layers[0].matrix().new_zeros(sum(layer.size for layer in layers))


def jacobian(model: nn.Module, layers: Sequence[MatrixLayer], x: Tensor) -> Tensor:
    """∂ŷ/∂θ (N, T, C, p)."""
    return jacrev(outputs(model, layers, x))(zero(layers)).detach()


def responds(model: nn.Module, layer: MatrixLayer, data: Iterable[Any]) -> bool:
    """Whether any output depends on the layer's weight: not where all inputs are zero or all units below are dead."""
    return any(bool(jacobian(model, [layer], x).any()) for x, _ in data)


def output_hessian(loss: Loss, y: Tensor, targets: Tensor) -> Tensor:
    """∂²ℓ/∂ŷ² of each term (N, T, C, C), by differentiating the loss itself twice; a term has an output of its own."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss.value(y, targets).sum(), y, create_graph=True)
        rows = [torch.autograd.grad(entry.sum(), y, retain_graph=True)[0] for entry in g.unbind(-1)]
    return torch.stack(rows, -2)


def terms(model: nn.Module, loss: Loss, data: Iterable[Any], layers: Sequence[MatrixLayer]) -> int:
    """Loss terms in the data."""
    return sum(int(loss.terms(outputs(model, layers, x)(zero(layers)), y).sum()) for x, y in batches(data))


def gauss_newton(model: nn.Module, loss: Loss, data: Iterable[Any], layers: Sequence[MatrixLayer]) -> Tensor:
    """1/M Σ Jᵀ H_ŷ J (p, p)."""
    G: Any = 0.0
    for x, y in batches(data):
        J = jacobian(model, layers, x)
        H = output_hessian(loss, outputs(model, layers, x)(zero(layers)), y)
        G = G + torch.einsum("ntcp,ntcd,ntdq->pq", J, H, J)
    return G / terms(model, loss, data, layers)


def loss_gradients(model: nn.Module, loss: Loss, data: Iterable[Any], layers: Sequence[MatrixLayer]) -> Tensor:
    """∂/∂θ of each example's summed loss, at the data's labels: (N, p)."""
    rows = []
    for x, y in batches(data):

        def each(delta: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss.value(outputs(model, layers, x)(delta), y).sum(1)

        rows.append(jacrev(each)(zero(layers)).detach())
    return torch.cat(rows)


def loss_hessian(model: nn.Module, loss: Loss, data: Iterable[Any], layers: Sequence[MatrixLayer]) -> Tensor:
    """∂²L/∂θ² of the mean loss (p, p)."""

    def total(delta: Tensor) -> Tensor:
        parts = [loss.value(outputs(model, layers, x)(delta), y).sum() for x, y in batches(data)]
        return torch.stack(parts).sum()

    return jacrev(jacrev(total))(zero(layers)).detach() / terms(model, loss, data, layers)


def layer_inputs(model: nn.Module, layer: MatrixLayer, data: Iterable[Any]) -> Tensor:
    """Every input a of one layer, over examples and positions: (M, d_in)."""
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            for x, _ in data:
                model(x)
    finally:
        handle.remove()
    return torch.cat([layer.inputs(x).flatten(0, 1) for x in seen])


def vec(Q: Tensor) -> Tensor:
    """Columns of Q (m, n) stacked: (m n,)."""
    return Q.mT.reshape(-1)


def range_and_null(C: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (columns) of the range and the null space of a symmetric matrix, float64.

    Eigenvalues of magnitude at most `tolerance` times the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(C.double())
    small = values.abs() <= tolerance * float(values.abs().max())
    return vectors[:, ~small], vectors[:, small]
