"""EWC (Kirkpatrick et al. 2017): the edit loss plus λ/2 Σ F_i δ_i², F the diagonal of the capability set's Fisher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.curvature import EKFAC
from curvlab.editing.job import Job, editor
from curvlab.editing.methods.kfac_penalty import penalty
from curvlab.editing.training import Weighted
from curvlab.layers import Matrices, find_layers
from curvlab.losses import CrossEntropy
from curvlab.spectrum import KroneckerBasis


@dataclass(frozen=True)
class EWC(Weighted):
    """Training with a diagonal penalty.

    Attributes:
        strength: λ of λ/2 Σ F_i δ_i²; λ = 1 weighs a nat a capability token like a nat a target token.
    """

    strength: float = 100.0


@dataclass(frozen=True)
class Diagonal:
    """F (d_out, d_in) by layer name: the diagonal of the Gauss–Newton matrix of the mean capability loss."""

    values: Matrices

    def quadratic_form(self, delta: Matrices) -> Tensor:
        """Σ F δ², float64."""
        return torch.stack(
            [(Q.square() * self.values[name]).sum(dtype=torch.float64).cpu() for name, Q in delta.items()]
        ).sum()


@editor("ewc", EWC)
def ewc(job: Job, options: EWC) -> None:
    """Training with λ/2 Σ F_i δ_i² added to the edit loss, F the diagonal of the Fisher information."""
    capability = job.needs_capability()
    F = job.timed(capability.keep, job.model, job.layers, "diagonal", lambda: diagonal(job))
    job.train(options.optimise(job.parameters()), options, extra=penalty(job, F, options.strength))


def diagonal(job: Job) -> Diagonal:
    """The mean over loss terms of squared gradients, each document's summed over its positions before the square.

    That is what EK-FAC's second pass takes in the eigenbasis, taken in W's own coordinates.
    """
    capability = job.needs_capability()
    layers = find_layers(job.model, job.layers)
    # one rotation by the identity a layer: the products cost what EK-FAC's cost
    bases = [KroneckerBasis(layer.shape, None, torch.eye(layer.d_in, device=layer.device)) for layer in layers]
    fit = EKFAC.fit(
        job.model, CrossEntropy(), capability.batches(job.tokenizer), job.layers, labels=capability.labels,
        seed=capability.seed, basis=bases,
    )  # fmt: skip
    wide = [torch.promote_types(layer.parameters()[0].dtype, torch.float32) for layer in layers]
    blocks = zip(layers, fit.spectrum().blocks, wide, strict=True)
    return Diagonal({layer.name: block.values.to(layer.device, dtype) for layer, block, dtype in blocks})
