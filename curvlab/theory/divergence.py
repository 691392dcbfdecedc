"""Claim 2 (Prop. 2): for a likelihood the Bregman distance is a KL divergence, whatever the labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributions, nn

from curvlab.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.rays import Rays


@claim(2, "paper, section 2; ours")
def bregman_is_kl(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    seed: int = 0,
    size: float = 0.3,
) -> Findings:
    """For cross-entropy in the logits the Bregman distance is exactly KL(p_θ0 ‖ p_θ), whatever the labels; for the
    logistic loss it is the sum of the outputs' KLs, for squared error that of Gaussians with variance 1/scale.

    ℓ = −log p(y|ŷ) is ψ(ŷ) − ⟨y, ŷ⟩ with ψ the log-partition function: the label enters linearly and a Bregman distance
    ignores linear terms; that of ψ is the KL of the exponential family. Exact, hence checked at a large δ.

    Control: the loss difference depends on the labels; KL(p_θ ‖ p_θ0) is another number.

    Args:
        size: ‖δ‖/‖θ‖.
    """
    base = Rays.of(model, loss, data, layers, 1, seed)
    found = {}
    for name, batches in _labelings(base, seed).items():
        rays = Rays(base.model, loss, batches, base.layers, base.directions, base.norm)
        found[name] = rays.at(size)
    kl, reverse = _kl(base, size)
    if kl == 0:  # no output depends on the weights
        return Findings([])
    bound = max(p.cancelled for p in found.values())
    cases = [Case(f"{name}: |definition − KL|", abs(float(p.defined) - kl), bound) for name, p in found.items()]
    cases += [Case(f"{name}: |library's formula − KL|", abs(float(p.library) - kl), bound) for name, p in found.items()]
    changes = [float(p.change) for p in found.values()]
    wrong = [control("loss difference, over labels", max(changes) - min(changes), bound)]
    if abs(reverse - kl) > 10 * bound:  # squared error is symmetric, and small KLs nearly are
        wrong.append(control("KL(p_θ ‖ p_θ0)", abs(float(next(iter(found.values())).defined) - reverse), bound))
    return Findings(cases + wrong, {"KL": kl, "KL reversed": reverse, "loss differences": changes})


def _labelings(rays: Rays, seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The data's labels, others in place of every one of them, and those that the model finds least likely."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list[tuple[Tensor, Tensor]]] = {"other labels": [], "unlikely labels": []}
    for x, y in rays.data:
        with torch.no_grad():
            y0 = rays.model(x).view(*y.shape[:2], -1)
        if isinstance(rays.loss, CrossEntropy):
            kept = rays.loss.terms(y0, y)
            other, unlikely = ((y + 1) % y0.shape[-1]).where(kept, y), y0.argmin(-1).where(kept, y)
        elif isinstance(rays.loss, BinaryCrossEntropy):
            other, unlikely = 1 - y, (y0 < 0).to(y0)
        else:
            other, unlikely = y + torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y), -y0
        out["other labels"].append((x, other))
        out["unlikely labels"].append((x, unlikely))
    return {"the data's labels": rays.data} | out


def _kl(rays: Rays, size: float) -> tuple[float, float]:
    """KL(p_θ0 ‖ p_θ) and the reverse by torch.distributions, means over loss terms.

    Raises:
        TypeError: a loss that is no −log p of these families.
    """
    both, terms = torch.zeros(2, dtype=torch.float64), 0
    for x, y in rays.data:
        f = explicit.outputs(rays.model, rays.layers, x)
        with torch.no_grad():
            pair = f(torch.zeros_like(rays.directions[0])), f(size * rays.directions[0])
        p: list[Any]
        if isinstance(rays.loss, CrossEntropy):
            p = [distributions.Categorical(logits=o) for o in pair]
        elif isinstance(rays.loss, BinaryCrossEntropy):
            p = [distributions.Independent(distributions.Bernoulli(logits=o), 1) for o in pair]
        elif isinstance(rays.loss, SquaredError):
            sigma = torch.full_like(pair[0], rays.loss.scale**-0.5)
            p = [distributions.Independent(distributions.Normal(o, sigma), 1) for o in pair]
        else:
            raise TypeError(f"{type(rays.loss).__name__}: whose log-likelihood it is, is not known")
        real = rays.loss.terms(pair[0], y)
        terms += int(real.sum())
        for i, (a, b) in enumerate(((p[0], p[1]), (p[1], p[0]))):
            both[i] += float((distributions.kl_divergence(a, b) * real).sum())
    kl, reverse = (both / terms).tolist()
    return kl, reverse
