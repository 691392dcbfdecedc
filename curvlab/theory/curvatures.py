"""The five curvatures twice: as the library has them, and as matrices in full from plain computations.

The matrices are in the layout "rows", in which K-FAC reads S ⊗ A.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton, Hessian
from curvlab.layers import LayerShape, MatrixLayer, flatten, unflatten
from curvlab.losses import Loss
from curvlab.projector import NullSpace
from curvlab.spectrum import Block, KroneckerBasis, Spectrum
from curvlab.theory import explicit
from curvlab.theory.factors import kfac_factors

Curvature = Literal["hessian", "ggn", "kfac", "ekfac", "covariance"]
FIVE: tuple[Curvature, ...] = ("hessian", "ggn", "kfac", "ekfac", "covariance")


def fitted(
    name: str, model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str], leading: int | None = None,
    bias: bool = False,
) -> Spectrum:  # fmt: skip
    """One of the `FIVE`, labels in full; the covariance is scaled by tr(S)/d_out.

    Args:
        leading: only so many eigenpairs of the Hessian and the GGN, from products.
        bias: join the biases to W.
    """
    if name in ("hessian", "ggn"):
        exact = Hessian if name == "hessian" else GaussNewton
        return exact.fit(model, loss, data, layers, bias=bias).spectrum(k=leading)
    approximate: dict[str, Any] = {"kfac": KFAC, "ekfac": EKFAC, "covariance": Covariance}
    spectrum: Spectrum = approximate[name].fit(model, loss, data, layers, labels="exact", bias=bias).spectrum()
    return spectrum


def estimate(name: str, model: nn.Module, loss: Loss, data: Any, layer: str) -> Spectrum:
    """As `fitted`, but the covariance as it is, I ⊗ A: its scale depends on the data, too."""
    if name == "covariance":
        return Covariance.fit(model, loss, data, layer).spectrum()
    return fitted(name, model, loss, data, layer)


def plain(model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer) -> dict[str, Tensor]:
    """GGN, S ⊗ A and I ⊗ A of one layer (p, p) from the Jacobian of the whole model, float64."""
    A, S = (factor.double() for factor in kfac_factors(model, loss, data, layer))
    return {
        "ggn": explicit.gauss_newton(model, loss, data, [layer]).double(),
        "kfac": torch.kron(S, A),
        "covariance": torch.kron(torch.eye(len(S)).to(A), A),
    }


def five_spectra(
    model: nn.Module, loss: Loss, data: Any, layer: str, leading: int | None = None
) -> dict[str, Spectrum]:
    """All of the `FIVE` of one layer, as `fitted` has them."""
    return {name: fitted(name, model, loss, data, layer, leading) for name in FIVE}


def both(
    model: nn.Module, loss: Loss, data: Any, layers: Sequence[MatrixLayer], names: Sequence[Curvature] = FIVE
) -> Iterator[tuple[Curvature, Spectrum, Tensor]]:
    """Each curvature twice: the library's spectrum, and C (p, p) from the Jacobian of the whole model, float64.

    Several layers jointly for the exact ones, one layer for the others. Of the spectrum only EK-FAC's C takes
    anything, the eigenvectors: those of equal eigenvalues are free.
    """

    @cache
    def ggn() -> Tensor:
        return explicit.gauss_newton(model, loss, data, layers).double()

    @cache
    def factors() -> tuple[Tensor, Tensor]:
        (layer,) = layers
        A, S = kfac_factors(model, loss, data, layer)
        return A.double(), S.double()

    for name in names:
        spectrum = fitted(name, model, loss, data, [layer.name for layer in layers])
        if name == "hessian":
            C = explicit.loss_hessian(model, loss, data, layers).double()
        elif name == "ggn":
            C = ggn()
        elif name == "ekfac":
            (block,) = spectrum.blocks
            U = eigenvectors(block)
            C = (U * (U.mT @ ggn() @ U).diagonal()) @ U.mT
        else:
            A, S = factors()
            C = torch.kron(S if name == "kfac" else torch.eye(len(S)).to(S) * (S.trace() / len(S)), A)
        yield name, spectrum, C


def eigenvectors(block: Block) -> Tensor:
    """All eigenvectors of a block as columns (p, p), float64, in the order of `values.flatten()`."""
    basis = block.basis
    if not isinstance(basis, KroneckerBasis):
        return basis.vectors.double()
    u_in = basis.u_in.double()
    u_out = torch.eye(basis.layer.d_out, dtype=u_in.dtype) if basis.u_out is None else basis.u_out.double()
    return torch.kron(u_out.contiguous(), u_in.contiguous())


def matrix(spectrum: Spectrum) -> Tensor:
    """U diag(σ) Uᵀ of a spectrum whose eigenvectors are all known (p, p), float64, block after block."""
    parts = [(eigenvectors(block), block.values.double().flatten()) for block in spectrum.blocks]
    return torch.block_diag(*[(U * values) @ U.mT for U, values in parts])


def cut(spectrum: Spectrum, gamma: float) -> Tensor:
    """P_γ (p, p) in full, from the definition: I − Σ uuᵀ over the fewest leading eigenvectors with γ of each Σ|σ|.

    Eigenvalues that differ from the last of them by rounding are removed with it.
    """
    parts = []
    for block in spectrum.blocks:
        U, sizes = eigenvectors(block), block.values.double().flatten().abs()
        ordered = sizes.sort(descending=True).values
        k = int((ordered.cumsum(0) < gamma * ordered.sum()).sum())  # so many do not suffice
        eps = max(torch.finfo(block.basis.like.dtype).eps, block.precision)
        tie = min(16 * eps * float(ordered[0]), 1e-3 * float(ordered[k]))
        gone = U[:, (sizes >= ordered[k] - tie) & (sizes > 0)]
        parts.append(torch.eye(len(U), dtype=U.dtype) - gone @ gone.mT)
    return torch.block_diag(*parts)


def projector(null: NullSpace) -> Tensor:
    """P of the library's null space (p, p), float64, from its projections of all unit vectors."""
    layers: list[LayerShape] = null.layers
    eye = torch.eye(null.dimensions, dtype=torch.float64)
    return flatten(layers, null.to(torch.float64).project(unflatten(layers, eye)))
