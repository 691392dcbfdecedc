"""Claim 18 as linear algebra: the optimum of a constrained quadratic problem, and the ellipsoid's projection."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from curvlab.layers import find_layers, flatten, unflatten
from curvlab.losses import Loss
from curvlab.spectrum import Spectrum
from curvlab.theory import curvatures
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff


def constrained_optimum(Q: Tensor, C: Tensor, target: Tensor, epsilon: float) -> tuple[Tensor, float]:
    """The δ that minimises ½ (δ − t)ᵀQ(δ − t) subject to ½ δᵀCδ ≤ ε, and its multiplier: (Q + μC) δ = Q t, float64.

    In the generalised eigenvectors of (C, Q) only μ is unknown, the root of a decreasing function.
    """
    w, V = scipy.linalg.eigh(C.double().numpy(), Q.double().numpy())
    w, z = np.maximum(w, 0.0), V.T @ Q.double().numpy() @ target.double().numpy()

    def excess(mu: float) -> float:
        return float(0.5 * (w * (z / (1 + mu * w)) ** 2).sum()) / epsilon - 1

    mu = 0.0
    if excess(0.0) > 0:
        high = 1.0 / max(w.max(), 1e-300)
        while excess(high) > 0:
            high *= 4
        mu = float(brentq(excess, 0.0, high, xtol=1e-300, rtol=1e-15, maxiter=500))
    return torch.from_numpy(V @ (z / (1 + mu * w))), mu


def random_problem(size: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Q with eigenvalues in [1, 8], C with eigenvalues over three decades (`rank` of them), t, and ε a tenth of t's."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(values: Tensor) -> Tensor:
        U, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        C = (U * values) @ U.mT
        return (C + C.mT) / 2

    uniform = torch.rand(2, size, generator=generator, dtype=torch.float64)
    Q, values = matrix(1 + 7 * uniform[0]), 10 ** (-3 * uniform[1])
    values[size if rank is None else rank :] = 0.0
    C, target = matrix(values), torch.randn(size, generator=generator, dtype=torch.float64)
    return Q, C, target, 0.05 * float(target @ C @ target)


@claim(18, "ours")
def confining_is_nearest(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, curvature: str = "kfac",
    share: float = 0.1, seed: int = 0,
) -> Findings:  # fmt: skip
    """The ellipsoid's confined displacement is the nearest δ with ½ δᵀCδ ≤ ε, by matrices and by coordinates, and what
    is inside already stays as it is.

    The Lagrangian ½‖δ − t‖² + μ (½ δᵀCδ − ε) is stationary at (I + μC) δ = t, which is diagonal in the eigenbasis:
    Z / (1 + μλ). The reference solves the same problem with C in full (explicit Kronecker products) and a bracketing
    root finder. |σ| stands for an indefinite Hessian. Newton's iteration for μ ends at 1e-12 of √ε.

    Control: shrinking all of δ by one factor onto the boundary.

    Args:
        share: ε over ½ tᵀCt of the random displacement t that is confined.
    """
    found = find_layers(model, layers)
    spectrum = curvatures.fitted(curvature, model, loss, data, layers)
    magnitudes = Spectrum(tuple(replace(block, values=block.magnitudes) for block in spectrum.blocks))
    C = curvatures.matrix(magnitudes)
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(len(C), generator=generator, dtype=torch.float64)
    whole = float(t @ C @ t) / 2
    if whole == 0:
        return Findings([])
    epsilon = share * whole
    expected, _ = constrained_optimum(torch.eye(len(C), dtype=C.dtype), C, t, epsilon)
    ellipsoid = spectrum.ellipsoid(epsilon).to(torch.float64)
    delta = flatten(found, ellipsoid.confine(unflatten(found, t)))
    coordinates = ellipsoid.confine_coordinates(ellipsoid.coordinates(unflatten(found, t)))
    inside = t * 0.9 * share**0.5
    bound = roundoff(found[0].matrix().dtype, len(C)) + 1e-11
    # δ is long in flat directions: rounding in the sharp ones counts as much as ‖C‖‖δ‖² is larger than 2ε
    condition = float(torch.linalg.matrix_norm(C, 2)) * float(expected.square().sum()) / (2 * epsilon)
    return Findings(
        [
            Case("confine against the reference", relative(delta, expected), bound),
            Case(
                "confined coordinates against the reference",
                relative(flatten(found, ellipsoid.displacement(coordinates)), expected), bound,
            ),
            Case("|½ δᵀCδ / ε − 1|, confined", abs(float(delta @ C @ delta) / 2 / epsilon - 1), bound * condition),
            Case("`spent` against ½ tᵀCt", abs(float(ellipsoid.spent(unflatten(found, t))) / whole - 1), bound),
            Case(
                "inside: unchanged", relative(flatten(found, ellipsoid.confine(unflatten(found, inside))), inside),
                bound,
            ),
            control("one factor for all directions", relative(t * share**0.5, expected), bound),
        ]
    )  # fmt: skip
