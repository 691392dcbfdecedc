"""MEMIT (Meng et al. 2023, arXiv 2210.07229): values of all requests written together, spread over several layers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.editing.job import Job, editor
from curvlab.editing.locating import cholesky, damped, edit_in_rounds, trained_layers, usable_layers
from curvlab.editing.values import Locating
from curvlab.layers import MatrixLayer


@dataclass(frozen=True)
class MEMIT(Locating):
    """Least squares over all keys of a round.

    Attributes:
        weight: λ of λC + KKᵀ, C the mean of k kᵀ over the capability set's positions: how many old keys count.
        chunk: requests a round, each round forgetting the last; None takes all requests at once.
    """

    weight: float = 15000.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, or None, got {self.chunk}")


@editor("memit", MEMIT)
def memit(job: Job, options: MEMIT) -> None:
    """MEMIT: W += R Kᵀ(λC + KKᵀ)⁻¹, layer after layer, each taking its share of what is still lacking."""
    names = usable_layers(job, options)
    job.matrix_layers(names)
    capability = job.needs_capability()
    covariance = job.timed(capability.statistics, job.model, job.tokenizer, names, "covariance")
    layers = trained_layers(job, names)

    def update(layer: MatrixLayer, K: Tensor, R: Tensor) -> Tensor:
        return least_squares(
            damped(covariance.moments[layer.name].A.to(K.device), options.damping), K, R, options.weight
        )

    edit_in_rounds(job, options, layers, options.chunk, update)


def least_squares(C: Tensor, K: Tensor, R: Tensor, weight: float) -> Tensor:
    """The ΔW (d_out, d_in) that minimises weight · tr(ΔW C ΔWᵀ) + ‖ΔW K − R‖²; K (d_in, n), R (d_out, n)."""
    L = cholesky(weight * C + K @ K.mT)
    return torch.cholesky_solve(K @ R.mT, L).mT
