"""Claim 16: eigenvalues below zero from round-off, and eigenvectors stored in bfloat16."""

import math

import torch
from torch import Tensor

from curvlab.curvature.kfac import kronecker_block
from curvlab.layers import LayerShape
from curvlab.spectrum import Spectrum, eigh
from curvlab.theory.check import Case, Findings, claim, control, roundoff
from curvlab.theory.curvatures import projector


@claim(16, "ours")
def eigenvalues_below_zero(*, size: int = 64, rank: int = 16, seed: int = 0, device: str = "cpu") -> Findings:
    """The eigenvalues of a positive semi-definite factor are not negative (in float32 they are, by round-off).

    Zero eigenvalues come out as ± a few units of rounding of the largest one. The library decomposes factors in
    float64 and sets what is negative to zero, so that no product of two negative ones counts as energy.

    Control: eigenvalues above zero counted as the rank.

    Args:
        size, rank: of the factor A = Xᵀ X; at least sixteen eigenvalues are zero.
    """
    if size - rank < 16:
        raise ValueError("at least sixteen eigenvalues must be zero, else it is chance whether one comes out negative")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, size, generator=generator).to(device)
    A = x.mT @ x / rank
    raw = torch.linalg.eigvalsh(A)
    largest, bound = float(raw.max()), roundoff(torch.float32, size)
    clamped, _ = eigh(A, semidefinite=True)
    block = kronecker_block(LayerShape("layer", size, size, False), A, A, None, 0)
    noise = block.values.flatten().sort(descending=True).values[rank * rank :].sum() / block.total
    return Findings(
        [
            Case("library: smallest product of eigenvalues", float(block.values.min()), 0.0, relation=">="),
            Case("library: energy beyond rank², of the total", float(noise), bound),
            Case("library's eigh in float32: smallest eigenvalue", float(clamped.min()), 0.0, relation=">="),
            Case("float32: −smallest / largest eigenvalue", -float(raw.min()) / largest, bound),
            Case("float32: smallest / largest eigenvalue", float(raw.min()) / largest, 0.0, False, ">="),
            control("eigenvalues above zero, less the rank", abs(int((raw > 0).sum()) - rank), 0.0),
        ],
        {"device": device, "negative": int((raw < 0).sum()), "zero": size - rank},
    )


@claim(16, "ours")
def bfloat16_bases(*, d_out: int = 12, d_in: int = 20, gamma: float = 0.9, seed: int = 0) -> Findings:
    """Eigenvectors stored in bfloat16 still project to round-off (refuted: to about 2⁻⁸ only; in float32 they do).

    Each entry of U moves by at most u = 2⁻⁸ of itself, ‖ΔU‖ ≤ u √r, so that the projector moves by at most 2f + f²
    with f = ‖Δ(U_in ⊗ U_out)‖, and P² − P by as much at first order. Hence the library computes in float32 or better.

    Control: the eigenvectors in another order.
    """
    generator = torch.Generator().manual_seed(seed)
    A, S = (_factor(d, generator) for d in (d_in, d_out))
    layer = LayerShape("layer", d_out, d_in, False)
    spectrum = Spectrum((kronecker_block(layer, A, S, None, 0),))
    space = spectrum.null_space(gamma)
    P = projector(space)
    stored = {dtype: projector(space.to(dtype)) for dtype in (torch.bfloat16, torch.float32)}
    bounds = {}
    for dtype in stored:
        u = torch.finfo(dtype).eps / 2
        outer, inner = u * math.sqrt(d_out), u * math.sqrt(d_in)
        f = outer + inner + outer * inner
        bounds[dtype] = 2 * f + f * f
    away = {dtype: float(torch.linalg.matrix_norm(Q - P, 2)) for dtype, Q in stored.items()}
    twice = {dtype: float(torch.linalg.matrix_norm(Q @ Q - Q, 2)) for dtype, Q in stored.items()}
    (block,) = spectrum.blocks
    turned = Spectrum((kronecker_block(layer, A.flip(0, 1), S.flip(0, 1), None, 0),))
    other = float(torch.linalg.matrix_norm(projector(turned.null_space(gamma)) - P, 2))
    # what the stored projector lets through of the removed directions, as curvature
    (cut,) = space.blocks
    C = torch.kron(S, A)
    kept = float(block.magnitudes[~cut.removed].max())
    through = {str(d): float(torch.linalg.eigvalsh(Q.mT @ C @ Q)[-1]) / kept for d, Q in stored.items()}
    half, single = torch.bfloat16, torch.float32
    exact = roundoff(single, layer.size)
    return Findings(
        [
            Case("bfloat16: ‖P − P₀‖", away[half], bounds[half]),
            Case("bfloat16: ‖P² − P‖", twice[half], bounds[half] * (1 + bounds[half])),
            Case("float32: ‖P − P₀‖", away[single], bounds[single]),
            Case("float32: ‖P² − P‖, against round-off of float32", twice[single], exact),
            Case("bfloat16: ‖P² − P‖, against round-off of float32", twice[half], exact, should=False),
            control("eigenvectors in another order", other, bounds[half]),
        ],
        {"largest curvature let through, of |σ_k+1|": through},
    )


def _factor(d: int, generator: torch.Generator) -> Tensor:
    """A factor with eigenvalues i^−1.5 in a random basis."""
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q @ torch.arange(1, d + 1, dtype=torch.float64).pow(-1.5).diag() @ q.mT
