"""The soft constraint: the edit loss plus λ/2 δᵀCδ with C the capability set's K-FAC (or EK-FAC) curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from curvlab.editing.job import Job, editor
from curvlab.editing.training import Weighted
from curvlab.layers import Matrices


@dataclass(frozen=True)
class Penalised(Weighted):
    """Training with a penalty.

    Attributes:
        strength: λ of λ/2 δᵀCδ; λ = 1 weighs a nat a capability token like a nat a target token.
        curvature: C, "kfac" or "ekfac".
    """

    strength: float = 100.0
    curvature: Literal["kfac", "ekfac"] = "kfac"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in ("kfac", "ekfac"):
            raise ValueError(f"curvature must be 'kfac' or 'ekfac', got {self.curvature!r}")


@editor("kfac-penalty", Penalised)
def kfac_penalty(job: Job, options: Penalised) -> None:
    """Training with λ/2 δᵀ(A ⊗ S)δ added to the edit loss."""
    spectrum = job.timed(job.needs_capability().spectrum, job.model, job.tokenizer, job.layers, options.curvature)
    parameters = job.parameters()
    spectrum = spectrum.to(parameters[0].dtype)
    job.train(options.optimise(parameters), options, extra=penalty(job, spectrum, options.strength))


class Quadratic(Protocol):
    """A curvature C known by δᵀCδ, such as a `Spectrum`."""

    def quadratic_form(self, delta: Matrices) -> Tensor:
        """δᵀCδ, differentiable."""


def penalty(job: Job, curvature: Quadratic, strength: float) -> Callable[[], Tensor]:
    """λ/2 δᵀCδ of the displacement from where the layers stand now, differentiable."""
    layers = job.matrix_layers()
    start = {layer.name: layer.matrix().clone() for layer in layers}

    def value() -> Tensor:
        delta = {layer.name: layer.matrix(layer.parameters()) - start[layer.name] for layer in layers}
        return 0.5 * strength * curvature.quadratic_form(delta)

    return value
