"""What the exact Hessian and the exact Gauss–Newton matrix share: products, dense form, eigenpairs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlab.curvature.products import Product
from curvlab.krylov import BlockLanczos, absolute_trace, clear
from curvlab.layers import Matrices, MatrixLayer, flatten
from curvlab.memory import announce, bytes_of
from curvlab.spectrum import Block, DenseBasis, Spectrum, dense_spectrum

Layout = Literal["parameters", "vec", "rows"]


@dataclass
class ExactCurvature:
    """A curvature matrix C of the mean loss over chosen layers jointly, cross-layer blocks included.

    Attributes:
        layers: the layers, in the model's order.
        product: the sum-level products behind it.
        terms: loss terms that were summed; C is the sum over them divided by `terms`.
        semidefinite: whether C ⪰ 0 by construction (the GGN is, the Hessian is not).
    """

    layers: list[MatrixLayer]
    product: Product
    terms: int
    semidefinite: bool

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return sum(layer.size for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].parameters()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].parameters()[0].device

    def matmat(self, vectors: Tensor) -> Tensor:
        """C v for each row v of (B, p), in the layout "rows"."""
        if vectors.shape[-1] != self.size:
            raise ValueError(f"vectors have {vectors.shape[-1]} entries, the curvature {self.size}")
        return self.product.matmat(vectors) / self.terms

    def quadratic_form(self, delta: Matrices) -> Tensor:
        """δᵀ C δ for matrices δ (d_out, d_in) or stacks (R, d_out, d_in) of them; float64."""
        v = flatten(self.layers, delta)
        rows = v.reshape(-1, v.shape[-1])
        return (rows.double() * self.matmat(rows).double()).sum(1).reshape(v.shape[:-1])

    def trace(self) -> float:
        """tr C."""
        return self.product.trace() / self.terms

    def dense(self, layout: Layout = "parameters") -> Tensor:
        """C (p, p).

        Args:
            layout: order of the parameters. "parameters": as torch flattens each layer's weight, then its bias
                (what `torch.func.hessian` gives); "vec": the paper's column-stacking vec of W = [weight bias],
                layer after layer, in which K-FAC reads A ⊗ S; "rows": W row-major, as `matmat` has it (S ⊗ A).

        Raises:
            MemoryError: it would not fit; the message names the matrix-free way.
        """
        C = self.product.dense().div_(self.terms)
        order = permutation(self.layers, layout, C.device)
        return C if order is None else C[order][:, order]

    def linear_operator(self) -> LinearOperator:
        """The curvature as a SciPy `LinearOperator` (layout "rows")."""
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype

        def matmat(x: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(np.ascontiguousarray(x.T).astype(dtype, copy=False)).to(self.device)
            return self.matmat(rows).cpu().numpy().T

        def matvec(x: np.ndarray) -> np.ndarray:
            return matmat(x.reshape(-1, 1))[:, 0]

        shape = (self.size, self.size)
        return LinearOperator(shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=dtype)

    def spectrum(self, gamma: float | None = None, k: int | None = None, seed: int = 0) -> Spectrum:
        """Eigenvalues and eigenvectors: all of them, or the leading ones from products alone.

        Args:
            gamma: as many as a null space at this energy share needs. For an indefinite curvature the total
                Σ|σ| is estimated by stochastic Lanczos quadrature (its standard error is kept).
            k: the k largest in magnitude.
            seed: of the Krylov start and the probes.
        """
        shapes = tuple(layer.shape for layer in self.layers)
        if gamma is None and k is None:
            return dense_spectrum(self.dense("rows"), shapes, self.semidefinite)
        if gamma is not None and not 0 < gamma < 1:
            raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma}")
        if k is not None and not 0 < k < self.size:
            raise ValueError(f"k must lie between 1 and {self.size - 1}, got {k}")
        announce(
            f"Krylov space of {self.size:,} parameters",
            bytes_of(self.size, 8 * (k or 32), dtype=self.dtype),
            "a smaller k or gamma, or fewer layers",
            self.device,
        )
        lanczos = BlockLanczos(self.matmat, self.size, dtype=self.dtype, device=self.device, seed=seed)
        total, error = (self.trace(), 0.0) if self.semidefinite else (0.0, 0.0)
        if not self.semidefinite:
            total, error = absolute_trace(self.matmat, self.size, dtype=self.dtype, device=self.device, seed=seed)
        while True:
            pairs = lanczos.solve(lambda values: _enough(values, total, gamma, k))  # noqa: B023
            if self.semidefinite or gamma is None or lanczos.exhausted:
                break
            # the estimate of the rest alone has a much smaller error than that of the whole
            rest, error = absolute_trace(
                self.matmat,
                self.size,
                dtype=self.dtype,
                device=self.device,
                deflate=pairs.vectors,
                seed=seed + 1,
            )
            refined = float(pairs.values.abs().sum()) + rest
            done = _enough(pairs.values[: clear(pairs.values, torch.finfo(self.dtype).eps)], refined, gamma, k)
            total = refined
            if done:
                break
        values = pairs.values.clamp_min(0) if self.semidefinite else pairs.values
        complete = len(values) == self.size
        block = Block(
            basis=DenseBasis(shapes, pairs.vectors),
            values=values,
            total=float(values.abs().sum()) if complete else max(total, float(values.abs().sum())),
            total_error=0.0 if complete else error,
            floor=0.0 if complete else float(values[-1].abs()),
        )
        return Spectrum((block,))


def _enough(values: Tensor, total: float, gamma: float | None, k: int | None) -> bool:
    by_count = k is None or len(values) >= k
    by_energy = gamma is None or float(values.abs().sum()) >= gamma * total
    return by_count and by_energy


def permutation(layers: list[MatrixLayer], layout: Layout, device: torch.device) -> Tensor | None:
    """Index that takes a vector in the layout "rows" to another one; None where they agree."""
    if layout == "rows":
        return None
    if layout not in ("parameters", "vec"):
        raise ValueError(f"layout must be 'parameters', 'vec' or 'rows', got {layout!r}")
    parts, start = [], 0
    for layer in layers:
        W = torch.arange(start, start + layer.size, device=device).view(layer.d_out, layer.d_in)
        parts += [W.mT.flatten()] if layout == "vec" else [t.flatten() for t in layer.tensors(W)]
        start += layer.size
    order = torch.cat(parts)
    return None if bool((order == torch.arange(start, device=device)).all()) else order
