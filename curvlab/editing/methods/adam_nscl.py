"""Adam-NSCL (Wang et al. 2021): Adam's update projected onto what the capability set's inputs barely see."""

from dataclasses import dataclass

import torch

from curvlab.editing.job import Job, editor
from curvlab.editing.methods.crispedit import Constrained, constrained_training
from curvlab.projector import NullBlock, NullSpace
from curvlab.spectrum import Spectrum


@dataclass(frozen=True)
class AdamNSCL(Constrained):
    """Constrained training by the input covariance.

    Attributes:
        ratio: an eigenvector of the covariance is free if its eigenvalue is at most `ratio` times the smallest one
            (the authors' 10 or 30). `gamma` and `epsilon` are not used.
    """

    ratio: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio >= 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}")
        if (self.curvature, self.constraint) != ("covariance", "null"):
            raise ValueError("Adam-NSCL is defined by the covariance's null space; see 'crispedit' for others")


@editor("adam-nscl", AdamNSCL, curvature="covariance", project="update", drift=None)
def adam_nscl(job: Job, options: AdamNSCL) -> None:
    """Adam, its update projected onto the input covariance's eigenvectors with near-smallest eigenvalues."""
    spectrum = job.timed(job.needs_capability().spectrum, job.model, job.tokenizer, job.layers, options.curvature)
    constrained_training(job, options, near_smallest(spectrum, options.ratio))


def near_smallest(spectrum: Spectrum, ratio: float) -> NullSpace:
    """The eigenvectors with eigenvalue ≤ ratio · the smallest, of each block; rounding counts as the smallest."""
    blocks = []
    for block in spectrum.blocks:
        values = block.magnitudes
        rounding = max(block.precision, torch.finfo(torch.float32).eps) * float(values.max())
        removed = values > ratio * max(float(values.min()), rounding)
        energy = values[removed].sum() / values.sum()
        threshold = values[removed].min() if bool(removed.any()) else values.max()
        blocks.append(NullBlock(block.basis, removed, energy, threshold))
    return NullSpace(tuple(blocks), None)
