"""What the figure of a cross-check draws: spectra, masks in sorted order, overlaps of leading subspaces.

Numbers only, few enough for a JSON file; `figures/crosscheck.py` draws them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvlab.crosscheck.extremes import sound
from curvlab.crosscheck.parts import Part, Role
from curvlab.memory import announce, bytes_of
from curvlab.spectrum import eigh, log_spaced

POINTS = 64  # of a curve
CELLS = 96  # of a mask, along each side

Curves = dict[str, Any]
SIDES: tuple[tuple[str, Role, Role], ...] = (("A", "U_in", "values_in"), ("S", "U_out", "values_out"))


def curves(part: Part, reference: Mapping[str, Tensor] | None = None, gamma: float | None = None) -> Curves:
    """Of one layer.

    Args:
        reference: A (d_in, d_in) and S (d_out, d_out) recomputed from model and data; without it a stored basis is
            held against the stored factors.
        gamma: of the staircase that is drawn over the mask.
    """
    part = sound(part)
    found = {side: _side(part, side, basis, values) for side, basis, values in SIDES}  # type: ignore[arg-type]
    spectra = {side: _points(values) for side, (values, _) in found.items() if values is not None}
    overlaps = {}
    for side, (_, basis) in found.items():
        own = part.tensor(side)  # type: ignore[arg-type]
        other = None if reference is None else reference.get(side)
        against = "our factors" if other is not None else "the stored factors"
        if other is None and part.tensor("U_in" if side == "A" else "U_out") is not None:
            other = own
        if basis is not None and other is not None and len(other) == len(basis):
            points = _overlap(basis, _decomposed(other)[1])
            overlaps[side] = {"points": points, "dimension": len(basis), "against": against}
    sources = dict.fromkeys(item.source for item in part.items.values())
    return {
        "layer": part.layer,
        "source": ", ".join(sources),
        "spectra": spectra,
        "mask": _mask(part, found["A"][0], found["S"][0], gamma),
        "overlaps": overlaps,
    }


def _side(part: Part, factor: Role, basis: Role, values: Role) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvalues in the order of the stored basis, and that basis with the largest first."""
    matrix, vectors, stored = part.tensor(factor), part.tensor(basis), part.tensor(values)
    if vectors is not None and matrix is not None and matrix.shape == vectors.shape:
        stored = torch.einsum("ij,ij->j", vectors.double(), matrix.double() @ vectors.double())
    if vectors is None and matrix is not None and matrix.dim() == 2 and len(matrix) == matrix.shape[1]:
        stored, vectors = _decomposed(matrix)
    if stored is None:
        return None, None
    stored = stored.double().flatten()
    if vectors is None or vectors.shape[-1] != len(stored):
        return stored, None
    return stored, vectors.double()[:, stored.argsort(descending=True)]


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, the largest magnitude first; negative eigenvalues as they are."""
    announce("eigenvectors for the figure", 3 * bytes_of(*matrix.shape, dtype=torch.float64), "one layer at a time")
    return eigh(matrix.double())


def _points(values: Tensor) -> list[list[float]]:
    ordered = values.sort(descending=True).values
    return [[index, float(ordered[index - 1])] for index in log_spaced(len(ordered), POINTS)]


def _overlap(one: Tensor, other: Tensor) -> list[list[float]]:
    """‖U_rᵀ V_r‖² / r of the spans of the leading r columns."""
    squares = (one.mT @ other.to(one)).square().cumsum(0).cumsum(1).diagonal()
    return [[rank, float(squares[rank - 1]) / rank] for rank in log_spaced(len(squares), POINTS)]


def _mask(
    part: Part, values_in: Tensor | None, values_out: Tensor | None, gamma: float | None
) -> dict[str, Any] | None:
    """The mask sorted by the factors' eigenvalues, in cells, and the staircase of the rule at γ.

    Where no γ is asked for, at the γ that removes as many directions.
    """
    mask = part.tensor("mask")
    if mask is None or values_in is None or values_out is None or mask.shape != (len(values_out), len(values_in)):
        return None
    down, right = values_out.argsort(descending=True), values_in.argsort(descending=True)
    kept = (mask != 0)[down][:, right]
    products = values_out[down].clamp_min(0)[:, None] * values_in[right].clamp_min(0)[None, :]
    ordered = products.flatten().sort(descending=True).values
    share = ordered.cumsum(0) / ordered.sum().clamp_min(torch.finfo(torch.float64).tiny)
    count = kept.numel() - int(kept.sum()) if gamma is None else 1 + int((share < gamma).sum())
    count = min(count, kept.numel())
    rule: list[list[float]] = []
    if count:
        steps = (products >= ordered[count - 1]).sum(0).tolist()  # rows removed in each column
        changed = [c for c in range(len(steps)) if c == 0 or steps[c] != steps[c - 1]]
        rule = [[c + 0.5, steps[c] + 0.5] for c in changed]  # cell i spans i ± 0.5
        rule.append([len(steps) + 0.5, steps[-1] + 0.5])
    cells = torch.nn.functional.adaptive_avg_pool2d(
        kept.float()[None, None], (min(CELLS, kept.shape[0]), min(CELLS, kept.shape[1]))
    )[0, 0]
    return {
        "shape": list(kept.shape),
        "kept": [[round(float(cell), 3) for cell in row] for row in cells],
        "rule": rule,
        "gamma": gamma or (float(share[count - 1]) if count else 0.0),
    }
