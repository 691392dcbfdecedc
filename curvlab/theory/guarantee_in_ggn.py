"""Claim 10: what is left of the guarantee of a curvature's null space when it is measured in the exact GGN."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import BinaryCrossEntropy, Loss
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, roundoff
from curvlab.theory.curvatures import Curvature, both, projector
from curvlab.theory.setting import Setting, random_setting


@claim(10, "ours")
def bound_in_the_ggn(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    gammas: Sequence[float] = (0.5, 0.7, 0.9, 0.99),
    curvatures: Sequence[Curvature] = ("ggn", "kfac", "ekfac", "covariance"),
) -> Findings:
    """In the exact GGN a step from the null space of another curvature C meets at most |σ_{k+1}(C)| + ‖P(G − C)P‖.

    PGP = PCP + P(G − C)P, and norms of sums add at most. Only for C = G does the second term vanish; otherwise the
    bound that the spectrum of C shows can be exceeded. EK-FAC's is never too large: its eigenvalues are δᵀGδ of its
    own eigenvectors. The series has the factor, max δᵀGδ / (|σ_{k+1}(C)| ‖δ‖²).

    Control: in the null space of G itself, steps that are not projected.

    Args:
        curvatures: of which the null spaces are taken; a covariance is scaled by tr(S)/d_out.
    """
    cases: list[Case] = []
    series: dict[str, Any] = {}
    for layer in find_layers(model, layers):
        G = explicit.gauss_newton(model, loss, data, [layer])
        bound = roundoff(G.dtype, layer.size)
        G = G.double()
        size = float(torch.linalg.matrix_norm(G, 2))
        if size == 0:
            continue
        for curvature, spectrum, C in both(model, loss, data, [layer], curvatures):
            sigma = torch.linalg.eigvalsh(C).abs().sort(descending=True).values
            for gamma in gammas:
                space = spectrum.null_space(gamma)
                kept = float(sigma[space.removed]) if space.removed < len(sigma) else 0.0
                P = projector(space)
                worst = float(torch.linalg.eigvalsh(P @ G @ P.mT)[-1])
                apart = float(torch.linalg.matrix_norm(P @ (G - C) @ P.mT, 2))
                name = f"{curvature}, {layer.name}, γ = {gamma:g}"
                case = Case(
                    f"{name}: (max δᵀGδ / ‖δ‖² − |σ_k+1| − ‖P(G−C)P‖) / ‖G‖", (worst - kept - apart) / size, bound
                )
                cases.append(case)
                clear = kept > 100 * bound * float(sigma[0])
                found = {
                    "gamma": gamma, "worst in G": worst / size, "bound": kept / size, "k": space.removed,
                    "factor": worst / kept if clear else None, "of": layer.size,
                }  # fmt: skip
                series.setdefault(layer.name, {}).setdefault(curvature, []).append(found)
                if curvature == "ekfac":  # its eigenvalues are δᵀGδ of its own eigenvectors
                    cases.append(Case(f"{name}: (|σ_k+1| − max) / ‖G‖", (kept - worst) / size, bound))
                if curvature == "ggn":
                    cases.insert(0, Case(f"{name}: (max − |σ_k+1|) / ‖G‖", (worst - kept) / size, bound))
                    if size - kept > 100 * bound * size:
                        cases.append(control(f"{name}: not projected", (size - kept) / size, bound))
    return Findings(cases, series)


@claim(10, "ours")
def bound_exceeded_in_the_ggn(
    *,
    clusters: int = 3,
    settings: Sequence[Setting] | None = None,
    gammas: Sequence[float] = (0.5, 0.7, 0.9, 0.99),
) -> Findings:
    """A step in the null space of K-FAC or EK-FAC meets no more of the exact GGN than its |σ_{k+1}| (refuted).

    m clusters of inputs, each an axis, each with curvature at one output of its own: G has 1/m on m pairs (a_i, s_i),
    K-FAC spreads it, 1/m² over all m² pairs. Cut after the first pairs, and what is kept holds m times what
    K-FAC's bound says. EK-FAC keeps the diagonal here; what is off it in its basis exceeds its bound on random models.

    Control: the factor m taken for m + 1.

    Args:
        clusters: m ≥ 2.
        settings: random models to look for counterexamples on; three of each kind by default.
    """
    model, loss, data = _clusters(clusters)
    (layer,) = find_layers(model, "*")
    # the last cluster is kept: γ just below the share of the others' columns
    sizes = _scales(clusters)
    gamma = float(sizes[:-1].sum() / sizes.sum()) - 1e-3
    ((_, worst, kept),) = _in_ggn(model, loss, data, layer, ("kfac",), (gamma,))
    cases = [
        Case("K-FAC, clusters: max δᵀGδ / (|σ_k+1| ‖δ‖²)", worst / kept, 1 + 1e-6, should=False),
        Case("K-FAC, clusters: distance of that factor from m", abs(worst / kept - clusters), 1e-3),
        control("that factor for m + 1", abs(worst / kept - clusters - 1), 1e-3),
    ]
    if settings is None:
        kinds: tuple[Literal["mlp", "conv", "sequence"], ...] = ("mlp", "conv", "sequence")
        settings = [random_setting(kind, examples=8, width=4, seed=seed) for kind in kinds for seed in range(3)]
    factors: dict[Curvature, list[float]] = {"kfac": [], "ekfac": [], "covariance": []}
    for own in settings:
        for found in find_layers(own.model, own.layers):
            for curvature, worst, kept in _in_ggn(own.model, own.loss, own.data, found, list(factors), gammas):
                if kept > 1e-6 * worst:
                    factors[curvature].append(worst / kept)
    for curvature, every in factors.items():
        cases.append(Case(f"{curvature}, random models: largest factor", max(every), 1 + 1e-6, should=False))
    exceeded = {name: sum(f > 1 + 1e-6 for f in every) / len(every) for name, every in factors.items()}
    return Findings(cases, {"share of cuts that exceed": exceeded, "factors": factors})


def _in_ggn(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layer: MatrixLayer,
    curvatures: Sequence[Curvature],
    gammas: Sequence[float],
) -> Iterator[tuple[Curvature, float, float]]:
    """The largest δᵀGδ / ‖δ‖² in each null space, and |σ_{k+1}|."""
    G = explicit.gauss_newton(model, loss, data, [layer]).double()
    for curvature, spectrum, _ in both(model, loss, data, [layer], curvatures):
        for gamma in gammas:
            space = spectrum.null_space(gamma)
            P = projector(space)
            left = spectrum.blocks[0].magnitudes[~space.blocks[0].removed]
            yield curvature, float(torch.linalg.eigvalsh(P @ G @ P.mT)[-1]), float(left.max()) if len(left) else 0.0


def _scales(m: int) -> Tensor:
    """‖a_i‖² of the clusters: the last a little shorter, so that its column is the one that is kept."""
    return torch.tensor([1.0] * (m - 1) + [0.9], dtype=torch.float64)


def _clusters(m: int) -> tuple[nn.Module, Loss, list[tuple[Tensor, Tensor]]]:
    """Inputs √s_i e_i; output i is undecided (p = ½) on input i, every other output certain."""
    a = _scales(m).sqrt().diag()
    last = nn.Linear(m, m, bias=False).double()
    with torch.no_grad():
        last.weight.copy_(40.0 * (1 - torch.eye(m)))
    return nn.Sequential(last), BinaryCrossEntropy(), [(a, torch.zeros(m, m, dtype=torch.float64))]
