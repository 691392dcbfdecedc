"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): MEMIT's values, written in the null space of the capability keys."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.editing.job import Job, editor
from curvlab.editing.locating import edit_in_rounds, trained_layers, usable_layers
from curvlab.editing.values import Locating
from curvlab.layers import MatrixLayer
from curvlab.spectrum import KroneckerBasis, Spectrum


@dataclass(frozen=True)
class AlphaEdit(Locating):
    """Rounds in the null space of C, the mean of k kᵀ over the capability set's positions.

    Attributes:
        threshold: an eigenvector of C is free if its eigenvalue is below it. It has the units of k²: what the authors
            found for Llama-3 says little about other models.
        gamma: instead, the leading eigenvectors with this share of C's trace are not free, all others are.
        l2: L2 of P(KKᵀ + K_pK_pᵀ) + L2·I, in units of k² too.
        chunk: requests a round; later rounds leave the outputs at earlier rounds' keys K_p as they are, too.
        cumulative: False forgets K_p. (`damping` is not used: nothing is inverted but with L2.)
    """

    threshold: float = 2e-2
    gamma: float | None = None
    l2: float = 10.0
    chunk: int = 100
    cumulative: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.threshold < math.inf and 0 < self.l2 < math.inf):
            raise ValueError(f"threshold and l2 must be positive and finite, got {self.threshold}, {self.l2}")
        if self.gamma is not None and not 0 < self.gamma < 1:
            raise ValueError(f"gamma must lie strictly between 0 and 1, or be None, got {self.gamma}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")


@editor("alphaedit", AlphaEdit)
def alphaedit(job: Job, options: AlphaEdit) -> None:
    """AlphaEdit: ΔWᵀ = (P(KKᵀ + K_pK_pᵀ) + L2·I)⁻¹ P K Rᵀ, P onto the null space of C, round after round.

    Counts: kept_dimensions, of all null spaces together.
    """
    names = usable_layers(job, options)
    job.matrix_layers(names)
    spectrum = job.timed(job.needs_capability().spectrum, job.model, job.tokenizer, names, "covariance")
    V = free_directions(spectrum, options)
    layers = trained_layers(job, names)
    V = {layer.name: V[layer.name].to(layer.device) for layer in layers}
    earlier = {name: v.new_zeros(v.shape[1], v.shape[1]) for name, v in V.items()}

    def update(layer: MatrixLayer, K: Tensor, R: Tensor) -> Tensor:
        return null_space_update(V[layer.name], K, R, earlier[layer.name], options.l2)

    def remember(layer: MatrixLayer, K: Tensor) -> None:
        seen = V[layer.name].mT @ K
        earlier[layer.name] += seen @ seen.mT

    edit_in_rounds(job, options, layers, options.chunk, update, remember if options.cumulative else None)
    job.counts["kept_dimensions"] = sum(layer.d_out * V[layer.name].shape[1] for layer in layers)


def free_directions(spectrum: Spectrum, options: AlphaEdit) -> dict[str, Tensor]:
    """V (d_in, r) by layer, orthonormal: P = V Vᵀ.

    Raises:
        ValueError: no eigenvector is free; the error says what the eigenvalues are.
    """
    found = {}
    for block in spectrum.blocks:
        assert isinstance(block.basis, KroneckerBasis)
        values = block.values[0]
        if options.gamma is not None:
            (part,) = Spectrum((block,)).null_space(options.gamma).blocks
            free = ~part.removed[0]
        else:
            free = values < options.threshold
        name = block.basis.layer.name
        _check_free(name, values, free, options)
        found[name] = block.basis.u_in[:, free.to(block.basis.u_in.device)].double()
    return found


def _check_free(name: str, values: Tensor, free: Tensor, options: AlphaEdit) -> None:
    low, high = float(values.min()), float(values.max())
    spread = f"the eigenvalues of its inputs' covariance range from {low:.2g} to {high:.2g}"
    if not bool(free.any()):
        how = f"threshold={options.threshold:g}" if options.gamma is None else f"gamma={options.gamma:g}"
        raise ValueError(
            f"{name}: {how} leaves no free direction ({spread}); raise the threshold, or give the share of energy to "
            "protect, such as gamma=0.9"
        )
    if bool(free.all()):
        warnings.warn(
            f"{name}: threshold={options.threshold:g} protects nothing ({spread}); lower it, or give the share of "
            "energy to protect, such as gamma=0.9",
            stacklevel=2,
        )


def null_space_update(V: Tensor, K: Tensor, R: Tensor, earlier: Tensor, l2: float) -> Tensor:
    """ΔW (d_out, d_in) of the authors' normal equations (P(KKᵀ + K_pK_pᵀ) + L2·I) ΔWᵀ = P K Rᵀ, P = V Vᵀ.

    They are solved in the coordinates of V, where they are symmetric and positive: ΔW lies in the null space exactly.

    Args:
        V: (d_in, r), orthonormal.
        K, R: keys (d_in, n) and residuals (d_out, n).
        earlier: VᵀK_pK_pᵀV (r, r).
    """
    seen = V.mT @ K
    M = seen @ seen.mT + earlier
    M.diagonal().add_(l2)
    return (V @ torch.cholesky_solve(seen @ R.mT, torch.linalg.cholesky(M))).mT
