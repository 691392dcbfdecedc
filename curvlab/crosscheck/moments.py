"""The sums that every convention of a factor is made of, as `curvlab.crosscheck.gathering` leaves them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from curvlab.crosscheck.layout import ALL_REAL, Layout
from curvlab.layers import MatrixLayer

Key = tuple[str, str, str, str | int]  # labels ("" for inputs), form, weight, positions or class
FORMS = ("position", "example", "batch")
A_WEIGHTS = ("sum", "mean", "batches alike", "documents alike")
S_WEIGHTS = ("sum", "mean over each batch", "mean over each document", "batches alike")


@dataclass
class Gram:
    """Σ r rᵀ over rows r = [x, 1] (float64): the last column holds Σ x and the count, for centring and a joint bias."""

    matrix: Tensor

    @classmethod
    def empty(cls, d: int, device: torch.device) -> "Gram":
        return cls(torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device))

    def add(self, rows: Tensor) -> None:
        """Rows (R, d + 1), in the precision in which products shall be taken."""
        if rows.dtype == torch.float64:
            self.matrix.addmm_(rows.mT, rows)
        else:
            self.matrix += rows.mT @ rows

    def view(self, *, centred: bool = False, bias: str = "none") -> Tensor:
        """(d, d), or (d + 1, d + 1) with the bias "last" or "first"."""
        M = self.matrix
        if centred and float(M[-1, -1]) > 0:
            M = M - torch.outer(M[:, -1], M[:, -1]) / M[-1, -1]
        if bias == "none":
            return M[:-1, :-1]
        return M if bias == "last" else M.roll((1, 1), (0, 1))


@dataclass
class LayerMoments:
    """Sums of one layer.

    Attributes:
        layer: whose.
        flagged: whether its positions are the loss' (tokens); else all of them belong to one class.
        sets: the choices of positions that differ on these data, each with its classes.
        grams: by key; keys of form "position" with a class in the last place.
        squares: EK-FAC sums in the given basis, by the same keys; empty without one.
        scales: constant by which a weight that is the same everywhere multiplies the plain sums.
        layout: of the data.
        positions_per_example: of the layer, where it is not flagged.
        thorough: whether memory sufficed for sums over examples and batches, and for weights that vary.
        labels: of the gradients, in order: "data", "model 0" … (the seed), "exact".
    """

    layer: MatrixLayer
    flagged: bool
    sets: dict[str, frozenset[int]]
    layout: Layout
    scales: dict[str, float]
    grams: dict[Key, Gram] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    positions_seen: int = 0
    thorough: bool = True

    def gram(self, labels: str, form: str, weight: str, positions: str) -> Gram | None:
        """Of a convention; None where these data do not tell it from a plainer one, or it was not gathered."""
        if positions not in self.sets:
            return None
        scale = 1.0
        if weight in self.scales:
            scale, weight = self.scales[weight], "sum"
        found = self._sum({key: gram.matrix for key, gram in self.grams.items()}, labels, form, weight, positions)
        return None if found is None else Gram(found * scale)

    def squares_of(self, labels: str, form: str, weight: str, positions: str) -> Tensor | None:
        """EK-FAC's sums (d_out, d_in), likewise."""
        if positions not in self.sets:
            return None
        scale = 1.0
        if weight in self.scales:
            scale, weight = self.scales[weight], "sum"
        found = self._sum(self.squares, labels, form, weight, positions)
        return None if found is None else found * scale

    def _sum(self, sums: Mapping[Key, Tensor], labels: str, form: str, weight: str, positions: str) -> Tensor | None:
        if (labels, form, weight, positions) in sums:
            return sums[labels, form, weight, positions]
        found = [sums.get((labels, form, weight, c)) for c in sorted(self.sets[positions])]
        parts = [part for part in found if part is not None]
        return torch.stack(parts).sum(0) if parts else None

    @cached_property
    def counts(self) -> dict[str, int]:
        """N by its name: what a sum may have been divided by."""
        layout = self.layout
        out = {"loss term": int(layout.terms.sum()), "document": len(layout.terms), "batch": len(layout.codes)}
        if self.flagged:
            out["real position"] = int(layout.positions(ALL_REAL).sum())
            out["position, padding included"] = int(layout.counts.sum())
        else:
            out["real position"] = self.positions_seen
        return out

    def positions(self, name: str) -> int:
        """How many count in this choice."""
        return int(self.layout.positions(name).sum()) if self.flagged else self.positions_seen
