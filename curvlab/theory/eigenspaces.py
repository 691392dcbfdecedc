"""A dense matrix by its eigenspaces: explicit projectors for predicates on eigenvalues."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.theory.check import roundoff


@dataclass(frozen=True)
class Eigenspaces:
    """Eigenvectors of a dense matrix, ascending; `group` says which eigenvalue in `levels` each belongs to."""

    vectors: Tensor
    group: Tensor
    levels: Tensor

    @classmethod
    def of(cls, C: Tensor) -> "Eigenspaces":
        values, vectors = torch.linalg.eigh(C)
        tolerance = roundoff(C.dtype, len(C)) * float(values.abs().max())
        group = torch.cat([torch.zeros(1, dtype=torch.long), (values.diff() > tolerance).long().cumsum(0)])
        sums, counts = (torch.zeros(int(group[-1]) + 1, dtype=C.dtype) for _ in range(2))
        levels = sums.index_add(0, group, values) / counts.index_add(0, group, torch.ones_like(values))
        return cls(vectors, group, levels.where(levels > tolerance, 0.0))

    @property
    def shares(self) -> Tensor:
        """The distinct eigenvalues, as shares of the largest."""
        return self.levels / (float(self.levels[-1]) or 1.0)

    def nearest(self, values: Tensor) -> Tensor:
        """Which distinct eigenvalue each value is."""
        return (values[..., None] - self.levels).abs().argmin(-1)

    def projector(self, keep: Tensor) -> Tensor:
        V = self.vectors[:, keep[self.group]]
        return V @ V.mT

    def error(self, keep: Tensor) -> float:
        """Rounding / gap (Davis and Kahan), the gap as a share of the norm."""
        parted = keep[1:] != keep[:-1]
        gap = float(self.shares.diff()[parted].min()) if bool(parted.any()) else 1.0
        return roundoff(self.vectors.dtype, len(self.vectors)) / gap

    def below(self, gamma: float) -> Tensor | None:
        """ψ of the γ-approximate null space, σ < σ_k; None where a share of the energy meets γ within rounding."""
        counts = torch.bincount(self.group).to(self.levels)
        energy = (counts * self.levels).flip(0).cumsum(0)
        if not float(energy[-1]) > 0:
            return torch.ones_like(self.levels, dtype=torch.bool)
        shares = energy / energy[-1]
        if float((shares - gamma).abs().min()) < roundoff(self.levels.dtype, len(self.vectors)):
            return None
        cut = len(shares) - 1 - int((shares < gamma).sum())  # the level of σ_k, ascending
        return torch.arange(len(shares)) < cut

    def after(self, k: int) -> Tensor | None:
        """ψ of what is left when the eigenspaces of the k leading eigenvalues are removed; None if fewer are not 0."""
        last = int(self.group[-k])
        return torch.arange(len(self.levels)) < last if float(self.levels[last]) > 0 else None
