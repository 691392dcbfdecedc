"""Claim 14: cross-layer coupling, what layer-wise projection ignores."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, roundoff


def block_diagonal(C: Tensor, sizes: Sequence[int]) -> Tensor:
    """C (p, p) with zeros outside its diagonal blocks."""
    parts = [block[:, slice(*ends)] for block, ends in zip(C.split(list(sizes)), _ends(sizes), strict=True)]
    return torch.block_diag(*parts)


def share_outside(C: Tensor, sizes: Sequence[int]) -> float:
    """Share of ‖C‖_F² outside the diagonal blocks."""
    return float((C - block_diagonal(C, sizes)).double().square().sum() / C.double().square().sum())


@claim(14, "review, major comment on §3.3")
def layers_do_not_interact(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, negligible: float = 0.1,
    should: bool | None = None,
) -> Findings:  # fmt: skip
    """Interactions across layers are negligible: at most 10 % of ‖G‖_F² lie outside the joint GGN's diagonal blocks.

    What K-FAC and every layer-wise projection assume (the reviews find it untested). Nothing makes it so: a block
    is G_ij = E[J_iᵀ H_ŷ J_j], and where one output dominates all layers push along the same output. Among L layers
    whose gradients have equal norms and one common direction the share is 1 − 1/L.

    Control: layers that are coupled fully, G = v vᵀ with equal norms in all layers, share 1 − 1/L.

    Args:
        negligible: bound on the share.
        should: whether it is expected.
    """
    chosen = find_layers(model, layers)
    sizes = [layer.size for layer in chosen]
    G = joint_ggn(model, loss, data, chosen)
    if len(chosen) < 2 or float(G.abs().max()) == 0:
        return Findings([])
    share = share_outside(G, sizes)
    v = torch.cat([torch.full((n,), n**-0.5, dtype=torch.float64) for n in sizes])
    full = share_outside(torch.outer(v, v), sizes)
    return Findings(
        [
            Case("share of ‖G‖_F² outside the diagonal blocks", share, negligible, should),
            control("the same of layers coupled fully", full, negligible),
        ],
        {"layers": len(sizes), "squared share": share, "share": share**0.5},
    )


@claim(14, "ours: Cauchy and Schwarz")
def coupling_is_bounded(model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*") -> Findings:
    """Among L layers at most 1 − 1/L of ‖G‖_F² can lie outside the joint GGN's diagonal blocks.

    G is semi-definite, so ‖G_ij‖² ≤ ‖G_ii‖‖G_jj‖ (Frobenius), hence ‖G‖² ≤ (Σ ‖G_ii‖)² ≤ L Σ ‖G_ii‖². How much of
    it does lie there is in the series, for the figure.

    Control: a matrix that is not semi-definite, G without its diagonal blocks.
    """
    chosen = find_layers(model, layers)
    sizes = [layer.size for layer in chosen]
    G = joint_ggn(model, loss, data, chosen)
    norm = float(torch.linalg.matrix_norm(G))
    if norm == 0:
        return Findings([])
    slices = [slice(*ends) for ends in _ends(sizes)]
    blocks = torch.stack([torch.stack([torch.linalg.matrix_norm(G[a, b]) for b in slices]) for a in slices])
    limit = blocks.diagonal().outer(blocks.diagonal())
    share, bound = share_outside(G, sizes), roundoff(explicit.zero(chosen).dtype, len(G))
    cases = [
        Case("share of ‖G‖_F² outside the diagonal blocks", share, 1 - 1 / len(sizes) + bound),
        Case("largest ‖G_ij‖² − ‖G_ii‖‖G_jj‖, over ‖G‖²", float((blocks.square() - limit).max()) / norm**2, bound),
    ]
    outside = G - block_diagonal(G, sizes)
    if float(torch.linalg.matrix_norm(outside)) > 1e-3 * norm:
        cases.append(
            control("G without its diagonal blocks", share_outside(outside, sizes), 1 - 1 / len(sizes) + bound)
        )
    series = {
        "layers": len(sizes), "width": chosen[0].d_out, "parameters": sum(sizes), "squared share": share,
        "share": share**0.5, "norms of blocks": blocks.tolist(),
    }  # fmt: skip
    return Findings(cases, series)


def joint_ggn(model: nn.Module, loss: Loss, data: Any, chosen: Sequence[MatrixLayer]) -> Tensor:
    """The library's joint GGN, float64, layout "rows"."""
    return GaussNewton.fit(model, loss, data, [layer.name for layer in chosen]).dense("rows").double()


def _ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([sum(sizes[:i]) for i in range(len(sizes) + 1)]))
