"""Claim 12: where the head is piecewise linear a layer's Hessian is its Gauss–Newton matrix, and how far it is not."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from curvlab.curvature import GaussNewton, Hessian
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.setting import Setting


@claim(12, "ours")
def piecewise_linear_head(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, smooth: nn.Module | None = None
) -> Findings:
    """Where everything after a layer is piecewise linear (ReLU, max-pooling), the layer's Hessian equals its GGN almost
    everywhere; over several layers jointly it does not.

    H = G + 1/M Σ ⟨∇ℓ, ∇²ŷ⟩. In one layer's W the outputs are piecewise linear, so ∇²ŷ = 0 away from the kinks. In two
    layers' W they are bilinear on each piece: the diagonal blocks of H and G agree, the blocks between layers do not.

    Control: the same weights with tanh for ReLU are claimed to have H = G too.

    Args:
        model: ReLU, identity and max-pooling only.
        smooth: the control; made from `model` where it is not given.
    """
    chosen = find_layers(model, layers)
    cases, wrong = [], []
    twin = smoothed(model) if smooth is None else smooth
    alive = [layer for layer in chosen if explicit.responds(model, layer, data)]
    for layer in alive:
        H, G = (C.fit(model, loss, data, layer.name).dense("rows") for C in (Hessian, GaussNewton))
        bound = roundoff(G.dtype, layer.size)
        truth = explicit.loss_hessian(model, loss, data, [layer]), explicit.gauss_newton(model, loss, data, [layer])
        cases += [
            Case(f"{layer.name}: library's H against G", relative(H, G), bound),
            Case(f"{layer.name}: explicit H against G", relative(*truth), bound),
            Case(f"{layer.name}: library's H against the explicit", relative(H, truth[0]), bound),
            Case(f"{layer.name}: library's G against the explicit", relative(G, truth[1]), bound),
        ]
    if twin is not None and len(alive) > 1:
        first = alive[0].name
        H, G = (C.fit(twin, loss, data, first).dense("rows") for C in (Hessian, GaussNewton))
        if float(G.diagonal().sum()) > 0:  # a tanh can be saturated
            wrong.append(control(f"{first}, tanh for ReLU", relative(H, G), roundoff(G.dtype, len(G))))
    if len(chosen) > 1 and len(alive) == len(chosen):
        H, G = (C.fit(model, loss, data, layers).dense("rows") for C in (Hessian, GaussNewton))
        blocks = _blocks(chosen)
        bound = roundoff(G.dtype, len(G))
        cases.append(Case("all layers jointly: H against G", relative(H, G), bound, should=False))
        for block in blocks:
            H[block, block] = G[block, block]
        truth = explicit.loss_hessian(model, loss, data, chosen), explicit.gauss_newton(model, loss, data, chosen)
        between = truth[0] - truth[1]
        cases.append(Case("H − G lies between layers", relative(H - G, between), bound / (relative(*truth) or 1.0)))
    return Findings(cases + wrong)


@claim(12, "ours")
def smooth_head(
    stages: Mapping[str, Setting], *, at_least: float = 0.01, explicit_below: int = 600, layers: Sequence[str] = ()
) -> Findings:
    """With smooth activations the Hessian of a hidden layer is not its GGN, at any stage of training that leaves output
    gradients: the two differ by at least a hundredth of the GGN's size, and the Hessian is indefinite somewhere; the
    last layer's still are equal.

    H − G = 1/M Σ ⟨∇ℓ, ∇²ŷ⟩ is as large as the residuals ∇ℓ and the curvature of the outputs. Under cross-entropy
    training shrinks the residuals, but with them H_ŷ and so G; under squared error H_ŷ stays, and where the targets
    are fitted H = G. For the last layer ŷ is linear in W. The gap ‖H − G‖/‖G‖ and the share of
    negative energy Σ|σ<0|/Σ|σ| are given for every stage and layer.

    Control: the gap of a hidden layer is claimed to be rounding.

    Args:
        stages: one model with smooth activations at stages of its training, on the same data.
        at_least: gap, and share of negative energy, that counts.
        explicit_below: layers with fewer parameters are also held to second derivatives of the outputs.
        layers: of which; all of the first stage's by default.
    """
    cases: list[Case] = []
    wrong: list[Case] = []
    series: dict[str, Any] = {}
    indefinite = 0.0
    for stage, setting in stages.items():
        chosen = find_layers(setting.model, layers or setting.layers)
        for layer in chosen:
            last = layer is chosen[-1] and not layers
            H, G = (C.fit(*setting.arguments[:3], layer.name).dense("rows") for C in (Hessian, GaussNewton))
            bound = roundoff(G.dtype, layer.size)
            gap, sigma = relative(H, G), torch.linalg.eigvalsh(H.double())
            negative = float(sigma.clamp_max(0).abs().sum() / sigma.abs().sum())
            series.setdefault(layer.name, {})[stage] = {"gap": gap, "negative energy": negative}
            name = f"{stage}, {layer.name}"
            if last:
                cases.append(Case(f"{name}: gap of the last layer", gap, bound))
                continue
            cases.append(Case(f"{name}: ‖H − G‖ / ‖G‖", gap, at_least, relation=">="))
            indefinite = max(indefinite, negative)
            wrong.append(control(f"{name}: H claimed to be G", gap, bound))
            if layer.size < explicit_below:
                residual = residual_term(setting.model, setting.loss, setting.data, [layer])
                cases.append(Case(f"{name}: G + ⟨∇ℓ, ∇²ŷ⟩ against H", relative(G + residual, H), bound))
    cases.append(Case("largest share of negative energy", indefinite, at_least, relation=">="))
    return Findings(cases + wrong, series)


def residual_term(model: nn.Module, loss: Loss, data: Any, layers: Sequence[MatrixLayer]) -> Tensor:
    """1/M Σ ⟨∇ℓ(ŷ), ∇²ŷ⟩ (p, p): second derivatives of the outputs alone, from torch.func."""
    total: Any = 0.0
    for x, targets in explicit.batches(data):
        f = explicit.outputs(model, layers, x)
        y0 = f(explicit.zero(layers)).detach().requires_grad_()
        (g,) = torch.autograd.grad(loss.value(y0, targets).sum(), y0)
        total = total + jacrev(jacrev(lambda delta, f=f, g=g: (g * f(delta)).sum()))(explicit.zero(layers)).detach()
    return total / explicit.terms(model, loss, data, layers)


def smoothed(model: nn.Module) -> nn.Module | None:
    """A copy with tanh in place of ReLU and the identity; None where it has neither."""
    twin = copy.deepcopy(model)
    changed = False
    for name, module in list(twin.named_modules()):
        if isinstance(module, (nn.ReLU, nn.Identity)) and name:
            twin.set_submodule(name, nn.Tanh())
            changed = True
        if getattr(module, "activation", None) in ("relu", "identity") and not isinstance(module, nn.Sequential):
            module.activation = "tanh"
            changed = True
    return twin if changed else None


def _blocks(layers: Sequence[MatrixLayer]) -> list[slice]:
    """Where each layer's parameters are in the layout "rows"."""
    ends = torch.tensor([layer.size for layer in layers]).cumsum(0).tolist()
    return [slice(end - layer.size, end) for layer, end in zip(layers, ends, strict=True)]
