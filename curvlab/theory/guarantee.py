"""Claim 10: what the γ-approximate null space of a curvature guarantees in its own curvature."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.spectrum import Spectrum
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.curvatures import FIVE, Curvature, both, projector


@claim(10, "ours; paper, section 3.1")
def own_curvature_bound(
    model: nn.Module,
    loss: Loss,
    data: Any,
    layers: str | Sequence[str] = "*",
    *,
    gammas: Sequence[float] = (0.5, 0.9, 0.99),
    curvatures: Sequence[Curvature] = FIVE,
) -> Findings:
    """In the γ-approximate null space of a curvature C no step meets more of C than |δᵀCδ| ≤ |σ_{k+1}| ‖δ‖².

    P commutes with C and leaves the eigenvalues after the k-th, so the largest of |δᵀCδ| / ‖δ‖² over δ = Pδ is the
    largest of these, attained at its eigenvector. C is built here from its definition, in full, the projector is the
    library's; k is the least number of eigenvalues that carry γ of Σ|σ|, whole eigenspaces.

    Control: steps that are not projected; the bound with σ from the wrong end of the spectrum.

    Args:
        layers: the exact curvatures take each alone, and several of them jointly as well.
        gammas: energy shares.
    """
    chosen = find_layers(model, layers)
    groups = [[layer] for layer in chosen] + ([chosen] if len(chosen) > 1 else [])
    found: dict[str, list[Case]] = {}
    for group in groups:
        where = " + ".join(layer.name for layer in group)
        possible = [c for c in curvatures if len(group) == 1 or c in ("hessian", "ggn")]
        for curvature, spectrum, C in both(model, loss, data, group, possible):
            for name, case in _own(C, spectrum, gammas, group, f"{curvature}, {where}"):
                found.setdefault(name, []).append(case)
    order = ("bound", "attained", "values", "energy", "least", "unprojected", "wrong end")
    return Findings([case for name in order for case in found.get(name, [])])


def _own(
    C: Tensor, spectrum: Spectrum, gammas: Sequence[float], group: Sequence[MatrixLayer], where: str
) -> list[tuple[str, Case]]:
    bound = roundoff(group[0].parameters()[0].dtype, len(C))
    sigma = torch.linalg.eigvalsh(C).abs().sort(descending=True).values
    if float(sigma[0]) == 0:
        return []
    known = torch.cat([block.magnitudes.flatten() for block in spectrum.blocks]).sort(descending=True).values
    values = Case(f"{where}: eigenvalues, library against C", relative(known, sigma), bound)
    share = torch.cat([sigma.new_zeros(1), sigma.cumsum(0) / sigma.sum()])
    out = [("values", values)]
    for gamma in gammas:
        space = spectrum.null_space(gamma)
        k = space.removed
        kept = float(sigma[k]) if k < len(sigma) else 0.0
        P = projector(space)
        worst = float(torch.linalg.eigvalsh(P @ C @ P.mT).abs().max())
        # what the k-th eigenspace leaves behind, ties by rounding counted into it
        before = int((sigma > float(sigma[k - 1]) + bound * float(sigma[0])).sum())
        here = f"{where}, γ = {gamma:g}"
        without = float(share[before])  # the last eigenspace
        out += [
            ("bound", Case(f"{here}: (max |δᵀCδ| / ‖δ‖² − |σ_k+1|) / |σ_1|", (worst - kept) / float(sigma[0]), bound)),
            ("attained", Case(f"{here}: (|σ_k+1| − max) / |σ_1|", (kept - worst) / float(sigma[0]), bound)),
            ("energy", Case(f"{here}: γ − share of the k removed", gamma - float(share[k]), bound * len(C))),
            ("least", Case(f"{here}: share without the last eigenspace − γ", without - gamma, bound * len(C))),
        ]
        dropped = float((sigma[0] - kept) / sigma[0])
        if dropped > 100 * bound:  # else the spectrum is flat at the cut: eigenvalues apart by rounding only
            out.append(("unprojected", control(f"{here}: not projected", dropped, bound)))
        if kept - float(sigma[-1]) > 100 * bound * float(sigma[0]):
            gap = (worst - float(sigma[-1])) / float(sigma[0])
            out.append(("wrong end", control(f"{here}: against the smallest |σ|", gap, bound)))
    return out
