"""Claim 4, where targets are fitted: the GGN vanishes linearly in the loss, the empirical Fisher quadratically."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.orders import order


@claim(4, "ours")
def on_fitted_targets(
    model: nn.Module, data: Any, layer: str, *, losses: Sequence[float] = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
) -> Findings:
    """As a softmax classifier fits its targets, the GGN vanishes linearly in the loss and the empirical Fisher
    quadratically.

    With probability 1 − q of the right label the loss is −log(1 − q) ≈ q, H_ŷ = diag(p) − ppᵀ is of order q and the
    gradient p − e_y of order q, its square of order q². The last layer is multiplied by t until the mean loss has
    the asked values; every target is the label that the model finds likeliest, so that all can be fitted. The bias
    is joined to the layer: an example whose units are all dead has a loss but no gradient in the weights alone. What
    counts are the examples whose margin t m is within a few units of the least; as t grows they become fewer, which
    moves the exponents by a few units over t m = ln(1/loss): the bound is 2/ln(1/loss) at the first loss. In float64,
    whatever the model's dtype: single precision has no such losses.

    Control: the empirical Fisher is claimed to vanish as the GGN does.

    Args:
        layer: the model's last.
        losses: mean losses to scale the logits to.
    """
    model = copy.deepcopy(model).double()
    (last,) = find_layers(model, layer)
    W = last.matrix().clone()
    module: Any = last.module
    b = module.bias.detach().clone() if module.bias is not None else None

    def scale(t: float) -> float:
        last.write(t * W)
        if b is not None:
            with torch.no_grad():
                module.bias.copy_(t * b)
        with torch.no_grad():
            values = torch.cat([CrossEntropy().value(*_terms(model(x), y)).flatten() for x, y in fitted])
        return float(values.mean())

    with torch.no_grad():
        fitted = [(x, model(x).argmax(-1)) for x, _ in _double(data)]
    reached, G, E = [], [], []
    for target in losses:
        t = _bisect(scale, target)
        reached.append(scale(t))
        G.append(GaussNewton.fit(model, CrossEntropy(), fitted, layer, bias=True).trace())
        E.append(GaussNewton.fit(model, CrossEntropy(), fitted, layer, bias=True, labels="data").trace())
    return _vanishing(reached, G, E)


@claim(4, "ours")
def while_fitting_targets(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    losses: Sequence[float] = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5),
    lr: float = 5e-2,
    steps: int = 4000,
) -> Findings:
    """While a network is trained until it has fitted its targets, the empirical Fisher becomes a vanishing share of the
    GGN, in proportion to the loss: the one vanishes quadratically, the other linearly, up to the Jacobian's growth.

    As for scaled logits, but the weights grow as well. In a network that is homogeneous of degree D the margin m =
    ln(1/loss) grows as ‖θ‖^D and JJᵀ as ‖θ‖^(2D − 2), that is as m^(2 − 2/D): it moves both exponents by less than
    2/m. The bound is 2/m at the first loss. In float64, whatever the model's dtype.

    Control: the empirical Fisher is claimed to vanish as the GGN does.

    Args:
        data: few examples, which the network can fit.
        losses: where on the way both matrices are looked at.
        lr, steps: of full-batch Adam.
    """
    model, data = copy.deepcopy(model).double().requires_grad_(), _double(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    todo, reached, G, E = sorted(losses, reverse=True), [], [], []
    count = sum(len(y) for _, y in data)
    for _ in range(steps):
        optimizer.zero_grad()
        total = torch.stack([CrossEntropy().value(*_terms(model(x), y)).sum() for x, y in data]).sum() / count
        if float(total.detach()) <= todo[0]:
            todo.pop(0)
            reached.append(float(total.detach()))
            G.append(GaussNewton.fit(model, CrossEntropy(), data, layers).trace())
            E.append(GaussNewton.fit(model, CrossEntropy(), data, layers, labels="data").trace())
            if not todo:
                break
        total.backward()
        optimizer.step()
    if len(reached) < 2:
        raise ValueError(f"training did not fit the targets: {len(reached)} of the losses {list(losses)} were reached")
    return _vanishing(reached, G, E)


def _vanishing(reached: list[float], G: list[float], E: list[float]) -> Findings:
    slack = 2 / math.log(1 / reached[0])
    loss, ggn, empirical = (torch.tensor(v, dtype=torch.float64) for v in (reached, G, E))
    linear, quadratic, share = order(loss, ggn), order(loss, empirical), order(loss, empirical / ggn)
    return Findings(
        [
            Case("|exponent of tr F_emp / tr G in the loss − 1|", abs(share - 1), slack),
            Case("|exponent of tr G − 1|", abs(linear - 1), slack),
            Case("|exponent of tr F_emp − 2|", abs(quadratic - 2), slack),
            control("|exponent of tr F_emp / tr G|", abs(share), slack),
        ],
        {"loss": reached, "tr G": G, "tr F_emp": E, "exponents": [linear, quadratic]},
    )


def _double(data: Any) -> list[tuple[Tensor, Tensor]]:
    return [(x.double() if x.is_floating_point() else x, y) for x, y in data]


def _terms(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs as (N, T, C), targets (N, T)."""
    return (outputs.unsqueeze(1), targets.unsqueeze(1)) if outputs.dim() == 2 else (outputs, targets)


def _bisect(loss: Callable[[float], float], target: float) -> float:
    """t with loss(t) = target, for a loss that falls in t."""
    low, high = 0.0, 1.0
    while loss(high) > target:
        low, high = high, 2 * high
        if high > 1e12:
            raise ValueError("two labels are equally likely: these targets cannot be fitted")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > target else (low, middle)
    return high
