"""The five curvatures by name, and what a spectrum means as plain matrices: explicit Kronecker products, no `Basis`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton, Hessian
from curvlab.losses import Loss
from curvlab.spectrum import Block, KroneckerBasis, Spectrum
from curvlab.theory.curvatures import FIVE

CURVATURES = FIVE


def fitted(name: str, model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str]) -> Spectrum:
    """All eigenpairs of one of the `CURVATURES`, exact labels; the covariance is scaled by tr(S)/d_out."""
    if name in ("hessian", "ggn"):
        exact = Hessian if name == "hessian" else GaussNewton
        return exact.fit(model, loss, data, layers).spectrum()
    approximate: dict[str, Any] = {"kfac": KFAC, "ekfac": EKFAC, "covariance": Covariance}
    spectrum: Spectrum = approximate[name].fit(model, loss, data, layers, labels="exact").spectrum()
    return spectrum


def eigenvectors(block: Block) -> Tensor:
    """All eigenvectors of a block as columns (p, p), float64, layout "rows", in the order of `values.flatten()`."""
    basis = block.basis
    if not isinstance(basis, KroneckerBasis):
        return basis.vectors.double()
    u_in = basis.u_in.double()
    u_out = torch.eye(basis.layer.d_out, dtype=u_in.dtype) if basis.u_out is None else basis.u_out.double()
    return torch.kron(u_out, u_in)


def matrix(spectrum: Spectrum) -> Tensor:
    """C (p, p) in full, float64, layout "rows", block after block."""
    parts = [(eigenvectors(block), block.values.double().flatten()) for block in spectrum.blocks]
    return torch.block_diag(*[(U * values) @ U.mT for U, values in parts])


def projector(spectrum: Spectrum, gamma: float) -> Tensor:
    """P_γ (p, p) in full, from the definition: I − Σ uuᵀ over the fewest leading eigenvectors with γ of each Σ|σ|.

    Eigenvalues that differ from the last of them by rounding are removed with it.
    """
    parts = []
    for block in spectrum.blocks:
        U, sizes = eigenvectors(block), block.values.double().flatten().abs()
        ordered = sizes.sort(descending=True).values
        k = int((ordered.cumsum(0) < gamma * ordered.sum()).sum())  # so many do not suffice
        tie = min(16 * torch.finfo(block.basis.like.dtype).eps * float(ordered[0]), 1e-3 * float(ordered[k]))
        gone = U[:, (sizes >= ordered[k] - tie) & (sizes > 0)]
        parts.append(torch.eye(len(U), dtype=U.dtype) - gone @ gone.mT)
    return torch.block_diag(*parts)
