"""The five curvatures of one layer, twice: as the library has them, and as matrices in full from plain computations.

The matrices are in the layout "rows", in which K-FAC reads S ⊗ A.
"""

from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton, Hessian
from curvlab.layers import LayerShape, find_layers, flatten, unflatten
from curvlab.losses import Loss
from curvlab.projector import NullSpace
from curvlab.spectrum import KroneckerBasis, Spectrum
from curvlab.theory import explicit
from curvlab.theory.factors import kfac_factors

FIVE = ("hessian", "ggn", "kfac", "ekfac", "covariance")


def five_spectra(
    model: nn.Module, loss: Loss, data: Any, layer: str, leading: int | None = None
) -> dict[str, Spectrum]:
    """The library's spectra of one layer, with labels in full, by the names of `FIVE`.

    Args:
        leading: only so many eigenpairs of the Hessian and the GGN, from products.
    """
    kfac = KFAC.fit(model, loss, data, layer, labels="exact")
    return {
        "hessian": Hessian.fit(model, loss, data, layer).spectrum(k=leading),
        "ggn": GaussNewton.fit(model, loss, data, layer).spectrum(k=leading),
        "kfac": kfac.spectrum(),
        "ekfac": EKFAC.fit(model, loss, data, layer, labels="exact", kfac=kfac).spectrum(),
        "covariance": Covariance.fit(model, loss, data, layer).spectrum(),
    }


def five_matrices(model: nn.Module, loss: Loss, data: Any, layer: str, basis: KroneckerBasis) -> dict[str, Tensor]:
    """The same curvatures from the whole model's Jacobian and explicit Kronecker products.

    Args:
        basis: K-FAC's eigenvectors, for EK-FAC (in exact arithmetic any eigenvectors of K-FAC would do, but where
            eigenvalues nearly repeat those of two computations differ).
    """
    (chosen,) = find_layers(model, layer)
    G = explicit.gauss_newton(model, loss, data, [chosen])
    A, S = kfac_factors(model, loss, data, chosen)
    assert basis.u_out is not None
    U = torch.kron(basis.u_out.contiguous(), basis.u_in.contiguous()).to(G)
    return {
        "hessian": explicit.loss_hessian(model, loss, data, [chosen]),
        "ggn": G,
        "kfac": torch.kron(S, A),
        "ekfac": (U * (U.mT @ G @ U).diagonal()) @ U.mT,
        "covariance": torch.kron(torch.eye(chosen.d_out).to(A), A),
    }


def dense(spectrum: Spectrum) -> Tensor:
    """U diag(σ) Uᵀ of a spectrum of one block whose eigenvectors are all known (p, p)."""
    (block,) = spectrum.blocks
    eye = torch.eye(block.basis.size).to(block.basis.like)
    Z = block.basis.rotate(unflatten(block.basis.layers, eye))
    return flatten(block.basis.layers, block.basis.rotate_back(Z * block.values.to(Z)))


def projector(null: NullSpace) -> Tensor:
    """P of a null space (p, p), float64, from its projections of all unit vectors."""
    layers: list[LayerShape] = null.layers
    eye = torch.eye(null.dimensions, dtype=torch.float64)
    return flatten(layers, null.to(torch.float64).project(unflatten(layers, eye)))
