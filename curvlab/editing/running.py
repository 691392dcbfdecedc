"""Running mean and standard deviation of features, the same however their rows are cut into batches."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Running:
    """Moments of the rows seen so far (Welford 1962; merged as by Chan et al. 1979), float64.

    Attributes:
        n: rows.
        mean: (d,).
        squares: (d,), Σ (x − mean)².
    """

    n: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Running":
        """Of the rows of x (R, d)."""
        x = x.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).square().sum(0))

    def __add__(self, other: "Running") -> "Running":
        """Of both sets of rows together."""
        n = self.n + other.n
        if n == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.n / n)
        return Running(n, mean, self.squares + other.squares + apart.square() * (self.n * other.n / n))

    def to(self, device: torch.device) -> "Running":
        return Running(self.n, self.mean.to(device), self.squares.to(device))

    @property
    def std(self) -> Tensor:
        """(d,), with n − 1; zero for a single row."""
        return (self.squares / max(1, self.n - 1)).sqrt()

    def normalise(self, x: Tensor) -> Tensor:
        """(x − mean) / (std + eps), eps that of x's dtype; features that never varied become zero."""
        wide = (x.double() - self.mean) / (self.std + torch.finfo(x.dtype).eps)
        return wide.to(x.dtype)
