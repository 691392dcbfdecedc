"""The γ rule held against a mask: k = min{r : Σ_{i≤r} σ_i ≥ γ Σσ}, the whole eigenspace of σ_k removed (paper, sec. 2).

The authors' M = product < sorted[rank − 1] is the same rule. Eigenvalues recomputed from stored factors differ from
production's in their last digits: each product carries an uncertainty, and what lies within it of the threshold may
be on either side.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlab.crosscheck.spectra import Side


@dataclass(frozen=True)
class Products:
    """Eigenvalues of the layer (d_out, d_in), float64, each with its uncertainty; negative ones are round-off."""

    values: Tensor
    error: Tensor
    unit: float

    @classmethod
    def of(cls, outer: Side, inner: Side, unit: float) -> "Products":
        """λ_out λ_inᵀ and first-order errors."""
        out, inn = outer.values.clamp_min(0), inner.values.clamp_min(0)
        error = torch.outer(out + outer.error, inner.error).addr_(outer.error, inn)
        return cls(torch.outer(out, inn), error, unit)

    @property
    def mT(self) -> "Products":
        return Products(self.values.mT, self.error.mT, self.unit)

    @property
    def total(self) -> float:
        return float(self.values.sum())

    def loose(self, times: float) -> "Products":
        """With larger uncertainties."""
        return Products(self.values, times * self.error, self.unit)

    def resorted(self, rows: bool | None, columns: bool | None) -> "Products":
        """As if eigenvalues of rows or columns were sorted: True descending, False ascending, None as they are."""
        values, error = self.values, self.error
        for dim, descending in ((0, rows), (1, columns)):
            if descending is not None:
                order = values.sum(1 - dim).argsort(descending=descending, stable=True)
                values, error = values.index_select(dim, order), error.index_select(dim, order)
        return Products(values, error, self.unit)


def threshold_room(products: Products, removed: Tensor, slack: float = 1.0) -> float:
    """How much room there is for a threshold with σ ≥ t removed and σ < t kept; negative: there is none.

    In the unit of the products; uncertainties are multiplied by `slack`.
    """
    inf = torch.tensor(float("inf"), dtype=torch.float64)
    lowest_removed = torch.where(removed, products.values + slack * products.error, inf).min()
    highest_kept = torch.where(removed, -inf, products.values - slack * products.error).max()
    return float(lowest_removed - highest_kept)


@dataclass(frozen=True)
class Range:
    """The γ for which the rule removes just this: above `low`, up to `high` (round-off included)."""

    low: float
    high: float
    removed: float

    def holds(self, gamma: float) -> bool:
        return self.low < gamma <= self.high

    def distance(self, gamma: float) -> float:
        return max(self.low - gamma, gamma - self.high, 0.0)

    def __str__(self) -> str:
        return f"{1 - self.low:.3g} > 1 - gamma >= {max(1 - self.high, 0):.3g}"


def gamma_range(products: Products, removed: Tensor) -> Range:
    """Which γ a threshold mask corresponds to."""
    values, error = products.values, products.error
    total = products.total
    if total <= 0 or not bool(removed.any()):
        return Range(0.0, 0.0, 0.0)
    inf = torch.tensor(float("inf"), dtype=torch.float64)
    # the lowest eigenspace removed, as far as round-off can tell
    top = torch.where(removed, values + error, inf).min()
    lowest = removed & (values - error <= top)
    below = ~removed & (values + error >= torch.where(removed, values - error, inf).min())
    share = float(values[removed].sum()) / total
    slack = 16 * products.unit
    low = share - float(values[lowest].sum()) / total
    return Range(low - slack, share + float(values[below].sum()) / total + slack, share)


def rank_of(ordered: Tensor, gamma: float) -> int:
    """Position of σ_k in eigenvalues that are summed in the order given, float64."""
    sums = ordered.cumsum(0)
    return min(int(torch.searchsorted(sums, gamma * float(sums[-1]))), len(ordered) - 1)


def threshold_of(products: Products, gamma: float) -> tuple[float, float]:
    """σ_k of the rule, and its uncertainty."""
    flat = products.values.flatten()
    ordered, index = flat.sort(descending=True)
    at = rank_of(ordered, gamma)
    return float(ordered[at]), float(products.error.flatten()[index[at]])


def sequential_ranks(products: Products, gamma: float) -> list[int]:
    """How many directions a float32 running sum takes to reach γ: of its own end, of the exact total, of shares."""
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 does there is what is asked
        ordered = products.values.flatten().sort(descending=True).values.numpy().astype(np.float32)
        sums = np.cumsum(ordered, dtype=np.float32)  # numpy adds one after another
        total = np.float32(ordered.sum(dtype=np.float64))
        shares = np.cumsum(ordered / total, dtype=np.float32) if total > 0 else sums
        found = [np.searchsorted(sums, np.float32(gamma) * sums[-1]), np.searchsorted(sums / sums[-1], gamma)]
        found += [np.searchsorted(sums, np.float32(gamma) * total), np.searchsorted(shares, gamma)]
    return sorted({min(int(rank), len(ordered) - 1) + 1 for rank in found})


def nested(kept: Tensor) -> bool:
    """Whether rows keep nested sets of columns: a threshold of any products is a staircase once sorted."""
    rows = kept.sum(1).argsort(descending=True, stable=True)
    columns = kept.sum(0).argsort(descending=True, stable=True)
    stairs = kept[rows][:, columns]
    return bool((stairs[:, 1:] <= stairs[:, :-1]).all() and (stairs[1:] <= stairs[:-1]).all())
