"""EK-FAC's sums of squares in a given basis: a position, an example or a batch at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlab.curvature.ekfac import add_squares

Sums = dict[tuple[str, str, str, str | int], Tensor]


class Squares:
    """Σ (U_outᵀ q U_in)² over gradients q, in the eigenvectors U_out (d_out, r) and U_in (d_in, s), in columns.

    A U_in of d_in + 1 rows has the bias in its last one.
    """

    def __init__(self, u_out: Tensor, u_in: Tensor) -> None:
        self.u_out, self.u_in = u_out.double(), u_in.double()

    def _fits(self, a: Tensor) -> Tensor:
        a = a.to(self.u_in)
        return F.pad(a, (0, 1), value=1.0) if a.shape[-1] + 1 == self.u_in.shape[0] else a

    def _total(self, sums: Sums, key: tuple[str, str, str, str | int]) -> Tensor:
        if key not in sums:
            sums[key] = self.u_in.new_zeros(self.u_out.shape[1], self.u_in.shape[1])
        return sums[key]

    def add_positions(self, sums: Sums, key: tuple[str, str, str, str | int], a: Tensor, g: Tensor) -> None:
        """Every position as if it were an example: a (R, d_in), g (R, d_out)."""
        rotated = (g.to(self.u_out) @ self.u_out).square(), (self._fits(a) @ self.u_in).square()
        self._total(sums, key).addmm_(rotated[0].mT, rotated[1])

    def add_examples(
        self, sums: Sums, open_: Sums | None, key: tuple[str, str, str], a: Tensor, g: Tensor, chosen: Tensor
    ) -> None:
        """The gradient of each example, summed over the `chosen` (N, T) of its positions; `open_` adds up a batch's."""
        labels, weight, positions = key
        a, g = self._fits(a), g.to(self.u_out).masked_fill(~chosen.unsqueeze(-1), 0)
        a = a.masked_fill(~chosen.unsqueeze(-1), 0)
        if a.shape[1] > 1:
            total = self._total(sums, (labels, "example", weight, positions))
            add_squares(total, g.mT.unsqueeze(1), a, self.u_out, self.u_in)
        if open_ is None:
            return
        q = torch.einsum("nto,nti->oi", g, a)
        own = (labels, "batch", weight, positions)
        open_[own] = open_[own] + q if own in open_ else q

    def add_gradient(self, sums: Sums, key: tuple[str, str, str, str | int], q: Tensor) -> None:
        """One gradient (d_out, d_in)."""
        self._total(sums, key).add_((self.u_out.mT @ q @ self.u_in).square_())
