"""Claim 14, null spaces of layers put together: what holds exactly, up to a factor, and what it costs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.coupling import block_diagonal, joint_ggn
from curvlab.theory.curvatures import projector


@claim(14, "ours")
def exact_null_spaces_combine(model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*") -> Findings:
    """A displacement put together from the layers' exact null spaces is in the joint GGN's: no coupling is missed.

    G is positive semi-definite, so δ_lᵀ G δ_l = 0 implies G δ_l = 0 for each layer's part, and G Σ δ_l = 0.
    An eigenvalue of a layer up to t ‖G‖ that counts as zero leaves at most L t ‖G‖ over L layers. The joint matrix
    is the library's, the layers' null spaces are cut from its matrices for each layer alone.

    Control: a matrix that is not semi-definite, G without its diagonal blocks: every direction of a layer is null
    for the layer, but not for the layers together.
    """
    chosen = find_layers(model, layers)
    G, single = joint_ggn(model, loss, data, chosen), _single(model, loss, data, chosen)
    norm = float(torch.linalg.matrix_norm(G, 2))
    if norm == 0:
        return Findings([])
    tolerance = roundoff(explicit.zero(chosen).dtype, len(G))
    nulls = [_null(C, tolerance * norm) for C in single]
    cases = []
    plain = explicit.gauss_newton(model, loss, data, chosen)
    if any(N.shape[1] for N in nulls):
        N = torch.block_diag(*nulls)
        left = float(torch.linalg.eigvalsh(N.mT @ G @ N).max())
        cases.append(Case("largest δᵀGδ / ‖G‖‖δ‖² over layer-wise null spaces", left / norm, len(chosen) * tolerance))
        size = float(torch.linalg.matrix_norm(G @ N, 2))
        cases.append(Case("largest ‖Gδ‖ / ‖G‖‖δ‖", size / norm, (2 * len(chosen) * tolerance) ** 0.5))
    cases.append(Case("the joint matrix against the whole model's Jacobian", relative(G, plain), tolerance))
    outside = G - block_diagonal(G, [layer.size for layer in chosen])
    if float(torch.linalg.matrix_norm(outside)) > 1e-3 * norm:
        left = float(torch.linalg.eigvalsh(outside).max())
        cases.append(control("G without its diagonal blocks", left / norm, len(chosen) * tolerance))
    return Findings(cases, {layer.name: N.shape[1] for layer, N in zip(chosen, nulls, strict=True)})


@claim(14, "ours: Cauchy and Schwarz")
def curvatures_add_up_to_a_factor(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, gamma: float = 0.9
) -> Findings:
    """Over L layers δᵀGδ is at most L times the sum of the layers' own δ_lᵀG_lδ_l.

    ‖Σ G^½ δ_l‖² ≤ L Σ ‖G^½ δ_l‖²: L D − G is positive semi-definite, D the diagonal blocks. So a displacement in
    all layers' γ-null spaces meets a curvature of at most L max σ_{l,k+1}. The joint matrix is that of the whole
    model's Jacobian, D the library's matrices for each layer alone.

    Control: the same without the factor L, as if layers did not interact. G − D has trace zero: unless G is block
    diagonal, some direction meets more than the sum.
    """
    chosen = find_layers(model, layers)
    G = explicit.gauss_newton(model, loss, data, chosen).double()
    norm, L = float(torch.linalg.matrix_norm(G, 2)), len(chosen)
    if norm == 0:
        return Findings([])
    D = torch.block_diag(*_single(model, loss, data, chosen))
    bound = roundoff(explicit.zero(chosen).dtype, len(G))
    cases = [Case("largest eigenvalue of G − L D, over ‖G‖", _top(G - L * D) / norm, bound)]
    P, allowed, _ = _layerwise(model, loss, data, chosen, gamma)
    left = _top(P @ G @ P) / norm
    cases.append(Case("largest curvature in the layers' γ-null spaces − L max σ", left - L * allowed / norm, bound))
    if float(torch.linalg.matrix_norm(G - block_diagonal(G, [layer.size for layer in chosen]))) > 1e-3 * norm:
        cases.append(control("without the factor L", _top(G - D) / norm, bound))
    return Findings(cases, {"layers": L, "largest left": left, "largest of a layer": allowed / norm})


@claim(14, "ours: Courant and Fischer, Ky Fan")
def layerwise_projection_keeps_more(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, gamma: float = 0.9, seed: int = 0
) -> Findings:
    """The layers' γ-null spaces together keep at least the curvature that the joint null space of that dimension keeps.

    No subspace has a smaller largest curvature (Courant and Fischer) or less energy tr(PG) (Ky Fan) than the span
    of the trailing eigenvectors. What layer-wise projection costs is the difference, and has two parts, which the
    series tells apart: that each layer is cut at its own γ, and that coupling is ignored. For the second alone, one
    cut over all layers' eigenvalues together ("one cut": the trailing eigenvectors of the diagonal blocks).

    Control: a random subspace of the same dimension claimed to be as good.
    """
    chosen = find_layers(model, layers)
    G = joint_ggn(model, loss, data, chosen)
    values = torch.linalg.eigvalsh(G).flip(0).clamp_min(0)
    norm, trace = float(values[0]), float(values.sum())
    P, _, removed = _layerwise(model, loss, data, chosen, gamma)
    if trace == 0 or removed == len(G):
        return Findings([])
    bound = roundoff(explicit.zero(chosen).dtype, len(G))
    joint = {"largest": float(values[removed]) / norm, "energy": float(values[removed:].sum()) / trace}
    D = torch.linalg.eigh(block_diagonal(G, [layer.size for layer in chosen])).eigenvectors[:, : len(G) - removed]
    kept = {"layer by layer": P @ G @ P, "one cut": D.mT @ G @ D}
    found = {n: {"largest": _top(K) / norm, "energy": float(K.trace()) / trace} for n, K in kept.items()}
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(len(G), removed, generator=generator, dtype=torch.float64)).Q
    wrong = (trace - float((R * (G @ R)).sum())) / trace
    return Findings(
        [
            *(
                Case(f"{n}: {k} − jointly", own[n] - joint[n], -bound, True, ">=")
                for k, own in found.items()
                for n in own
            ),
            control("energy: a random subspace − jointly", wrong - joint["energy"], bound),
        ],
        {"removed": removed, "parameters": len(G), "gamma": gamma, "joint": joint, **found},
    )


def _single(model: nn.Module, loss: Loss, data: Any, chosen: Sequence[MatrixLayer]) -> list[Tensor]:
    return [GaussNewton.fit(model, loss, data, layer.name).dense("rows").double() for layer in chosen]


def _layerwise(
    model: nn.Module, loss: Loss, data: Any, chosen: Sequence[MatrixLayer], gamma: float
) -> tuple[Tensor, float, int]:
    """P of all layers' γ-null spaces, the largest eigenvalue that one of them keeps, and the dimensions removed."""
    parts, kept, removed = [], 0.0, 0
    for layer in chosen:
        spectrum = GaussNewton.fit(model, loss, data, layer.name).spectrum()
        null = spectrum.null_space(gamma)
        parts.append(projector(null))
        left = spectrum.blocks[0].magnitudes[~null.blocks[0].removed]
        kept, removed = max(kept, float(left.max()) if len(left) else 0.0), removed + null.removed
    return torch.block_diag(*parts), kept, removed


def _null(C: Tensor, threshold: float) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return vectors[:, values <= threshold]


def _top(C: Tensor) -> float:
    return float(torch.linalg.eigvalsh((C + C.mT) / 2)[-1])
