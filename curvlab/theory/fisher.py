"""Claim 4: the Fisher information is the Gauss–Newton matrix; with labels from the data it is not."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from curvlab.curvature import GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.orders import order


@claim(4, "paper, section 2")
def fisher_is_gauss_newton(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, noise: float = 1.0
) -> Findings:
    """The Fisher information E_x Σ_y p(y|x) ∇log p(y|x) ∇log p(y|x)ᵀ equals the GGN: for softmax cross-entropy, for the
    logistic loss, and for squared error with Gaussian noise of variance 1/scale.

    ∇θ log p = −Jᵀ ∇ℓ, and for an exponential family in its natural parameter ŷ the covariance of ∇ℓ under the model
    is the second derivative of the log-partition function, which is H_ŷ. The sum runs over every label there is (for
    C logistic outputs 2^C; for Gaussian noise the 2^C points ŷ ± 1/√scale, whose second moments are exact because
    the gradient is linear in y), each with its own gradient from torch.func.

    Control: every label alike in place of p(y|x); for squared error, noise of twice the variance.

    Args:
        noise: variance of the Gaussian noise in units of 1/scale (squared error).
    """
    chosen = find_layers(model, layers)
    G = GaussNewton.fit(model, loss, data, layers).dense("rows")
    F = fisher(model, loss, data, chosen, noise=noise)
    bound = roundoff(G.dtype, len(G))
    cases = [
        Case("library's GGN against the Fisher", relative(G, F), bound),
        Case("explicit GGN against the Fisher", relative(explicit.gauss_newton(model, loss, data, chosen), F), bound),
    ]
    products = GaussNewton.fit(model, loss, data, layers, store=False).matmat(torch.eye(len(G)).to(G))
    cases.append(Case("products recomputed by autograd, against the Fisher", relative(products, F), bound))
    if float(G.diagonal().sum()) > 0:
        wrong = fisher(model, loss, data, chosen, noise=2 * noise, uniform=True)
        name = "noise of twice the variance" if isinstance(loss, SquaredError) else "every label alike"
        cases.append(control(name, relative(G, wrong), bound))
    return Findings(cases, {"trace": float(G.diagonal().sum())})


@claim(4, "ours")
def sampled_fisher_converges(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    draws: Sequence[int] = (1, 4, 16),
    seeds: int = 16,
    labels: str = "model",
) -> Findings:
    """With labels drawn from the model the Fisher approaches the GGN as 1/√draws.

    Each draw is an unbiased estimate of the Fisher, draws are independent, and so the mean square error falls as
    1/draws. The exponent is fitted to the error's root mean square over seeds; the bound is three standard errors of
    that fit, for an error of one degree of freedom.

    Control: the empirical Fisher, which no number of draws improves, is claimed to be as near as the most draws.
    """
    G = GaussNewton.fit(model, loss, data, layers).dense("rows")
    errors: list[float] = []
    if not float(G.diagonal().sum()) > 0:  # no output depends on the weights
        return Findings([])
    for n in draws:
        found = [
            relative(GaussNewton.fit(model, loss, data, layers, labels=labels, draws=n, seed=seed).dense("rows"), G)  # type: ignore[arg-type]
            for seed in range(seeds)
        ]
        errors.append(math.sqrt(sum(e**2 for e in found) / seeds))
    counts = torch.tensor(draws, dtype=torch.float64)
    slope, spread = order(counts, torch.tensor(errors, dtype=torch.float64)), float(_spread(counts.log()))
    empirical = relative(GaussNewton.fit(model, loss, data, layers, labels="data").dense("rows"), G)
    return Findings(
        [
            Case("|exponent of the error in draws + ½|", abs(slope + 0.5), 3 / math.sqrt(2 * seeds * spread)),
            control(f"empirical Fisher against {draws[-1]} draws", empirical, errors[-1]),
        ],
        {"draws": list(draws), "error": errors, "empirical Fisher": empirical},
    )


@claim(4, "ours")
def sampled_fisher_is_unbiased(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, draws: int = 16, seeds: int = 12,
) -> Findings:  # fmt: skip
    """With labels drawn from the model the mean over draws is the GGN, and examples draw independently, in one batch
    and in different ones.

    The mean over seeds is held to five of its standard errors, estimated from the spread over seeds. Independence: the
    estimate from an example (a batch) and its copy is F₁/2 + F₂/2, which differs from F₁ alone by 1/√2 of the error
    of F₁ in the root mean square; draws alike would differ by nothing. Half of that is asked for.

    Control: the Fisher with every label alike (squared error: with noise of twice the variance) in place of the GGN,
    where that is ten standard errors away (on few examples, or near-uniform predictions, it is not); an example or
    batch without a copy.
    """
    G = GaussNewton.fit(model, loss, data, layers).dense("rows")
    if not float(G.diagonal().sum()) > 0:
        return Findings([])

    def sampled(data: Any, draws: int, seed: int) -> Tensor:
        return GaussNewton.fit(model, loss, data, layers, labels="model", draws=draws, seed=seed).dense("rows")

    found = torch.stack([sampled(data, draws, seed) for seed in range(seeds)])
    mean = found.mean(0)
    spread = float((found - mean).square().sum()) / (seeds * (seeds - 1))
    wrong = fisher(model, loss, data, find_layers(model, layers), noise=2.0, uniform=True)
    away, far = (float((mean - C).norm()) / math.sqrt(spread) if spread else math.inf for C in (G, wrong))
    cases = [Case("‖mean − G‖ in standard errors", away, 5.0)]
    told = float((wrong - G).norm()) > 10 * math.sqrt(spread)
    wrongs = [control("every label alike, or twice the noise", far, 5.0)] if told else []
    x, y = data[0]
    one = (x[:1], y[:1])
    pairs = {"example": ([one], [(torch.cat([x[:1]] * 2), torch.cat([y[:1]] * 2))]), "batch": ([(x, y)], [(x, y)] * 2)}
    for name, (single, double) in pairs.items():
        C = GaussNewton.fit(model, loss, single, layers).dense("rows")
        first, both = (torch.stack([sampled(d, 1, seed) for seed in range(seeds)]) for d in (single, double))
        error = float((first - C).norm())
        if error > roundoff(C.dtype, len(C)) * float(C.norm()):
            name = f"{name} and its copy: difference from the {name} alone, in errors of that"
            cases.append(Case(name, float((both - first).norm()) / error, math.sqrt(0.5) / 2, relation=">="))
            wrongs.append(control(f"{name}, without a copy", float((first - first).norm()) / error, 0.35, ">="))
    return Findings(cases + wrongs)


@claim(4, "paper, section 2; ours")
def empirical_fisher_differs(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, at_least: float = 0.1
) -> Findings:
    """The empirical Fisher, with the labels of the data in place of the model's, is not the GGN: it is more than a
    tenth of the GGN's size away, however many examples there are, unless the model predicts how labels are distributed.

    Its expectation is the Fisher only if the labels are drawn as from the model. They are not where the model is
    wrong nor where it has fitted its labels. Part of the distance is the accident of one label an example,
    as for one draw of the model's own labels, and shrinks with more examples; what remains is estimated without it,
    as √⟨D₁, D₂⟩ with D = F_emp − G on two halves of the data (from 500 examples on).

    Control: the empirical Fisher is claimed to be the GGN.

    Args:
        data: independent examples.
        at_least: relative distance (Frobenius) that counts as different.
    """
    chosen = find_layers(model, layers)
    G, E = _pair(model, loss, data, layers)
    if not float(G.diagonal().sum()) > 0:  # no output depends on the weights
        return Findings([])
    g = explicit.loss_gradients(model, loss, data, chosen)
    truth = g.mT @ g / explicit.terms(model, loss, data, chosen)
    bound, distance, size = roundoff(G.dtype, len(G)), relative(E, G), float(torch.linalg.vector_norm(G))
    draws = [
        relative(GaussNewton.fit(model, loss, data, layers, labels="model", seed=seed).dense("rows"), G)
        for seed in range(4)
    ]
    cases = [
        Case("‖F_emp − G‖ / ‖G‖", distance, at_least, relation=">="),
        Case("library's empirical Fisher: mean of g gᵀ", relative(E, truth), bound),
        control("F_emp claimed to be G", distance, bound),
    ]
    series = {
        "distance": distance, "one draw": math.sqrt(sum(d**2 for d in draws) / len(draws)),
        "ratio of traces": float(E.diagonal().sum() / G.diagonal().sum()),
    }  # fmt: skip
    if sum(len(y) for _, y in data) >= 500:
        first, second = (_pair(model, loss, [(x[i::2], y[i::2]) for x, y in data], layers) for i in (0, 1))
        inner = float(((first[1] - first[0]) * (second[1] - second[0])).sum())
        series["without sampling error"] = math.sqrt(max(inner, 0.0)) / size
        cases.insert(0, Case("‖E F_emp − E G‖ / ‖G‖", series["without sampling error"], at_least, relation=">="))
    return Findings(cases, series)


def fisher(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: Sequence[MatrixLayer],
    *,
    noise: float = 1.0,
    uniform: bool = False,
) -> Tensor:
    """1/M Σ_terms Σ_y p(y|x) g_y g_yᵀ (p, p), layout "rows": g_y from torch.func at every label y.

    Args:
        noise: variance of Gaussian labels (squared error) in units of 1/scale.
        uniform: weigh every label alike.
    """
    F: Any = 0.0
    for x, targets in explicit.batches(data):
        f = explicit.outputs(model, layers, x)
        y0 = f(explicit.zero(layers)).detach()
        real = loss.terms(y0, targets)
        options = list(every_label(loss, y0, noise))
        for y, p in options:
            if isinstance(loss, CrossEntropy):
                y = y.where(real, loss.ignore_index)
            g = jacrev(lambda delta, f=f, y=y: loss.value(f(delta), y))(explicit.zero(layers)).detach()
            weight = torch.full_like(p, 1 / len(options)) if uniform else p
            F = F + torch.einsum("ntp,nt,ntq->pq", g, weight * real, g)
    return F / explicit.terms(model, loss, data, layers)


def every_label(loss: Loss, outputs: Tensor, noise: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Every label of each term and its probability (N, T) under the model; for Gaussian noise, points with its moments.

    Raises:
        TypeError: a loss that is no −log p of these families.
    """
    C = outputs.shape[-1]
    if isinstance(loss, CrossEntropy):
        for c, p in enumerate(outputs.softmax(-1).unbind(-1)):
            yield torch.full(outputs.shape[:2], c), p
    elif isinstance(loss, BinaryCrossEntropy):
        for bits in itertools.product((0.0, 1.0), repeat=C):
            y = outputs.new_tensor(bits).expand_as(outputs)
            yield y, (outputs * (2 * y - 1)).sigmoid().prod(-1)
    elif isinstance(loss, SquaredError):
        for signs in itertools.product((-1.0, 1.0), repeat=C):
            step = math.sqrt(noise / loss.scale) * outputs.new_tensor(signs)
            yield outputs + step, torch.full(outputs.shape[:2], 0.5**C, dtype=outputs.dtype)
    else:
        raise TypeError(f"{type(loss).__name__}: whose log-likelihood it is, is not known")


def _spread(u: Tensor) -> Tensor:
    """Σ (u − mean)²."""
    return (u - u.mean()).square().sum()


def _pair(model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """The library's GGN and empirical Fisher."""
    found = [GaussNewton.fit(model, loss, data, layers, labels=labels).dense("rows") for labels in ("exact", "data")]
    return found[0], found[1]
