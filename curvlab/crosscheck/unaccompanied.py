"""Eigenvectors without the factors they are of: held against recomputed ones, in the convention that fits them best."""

from dataclasses import replace

from torch import Tensor

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.parts import Item, Part, Role
from curvlab.crosscheck.spectra import rotated
from curvlab.crosscheck.structures import Side, candidates

FITS = 1e-2  # of a factor's norm left off the diagonal, bfloat16 eigenvectors included
SIDES: tuple[tuple[Side, Role, Role, str], ...] = (("A", "A", "U_in", "input"), ("S", "S", "U_out", "output"))


def alone(part: Part) -> bool:
    """Whether the part has eigenvectors of both sides, and nothing that they could be of."""
    have = set(part.items)
    return {"U_in", "U_out"} <= have and not have & {"A", "S", "eigenvalues", "values_in", "values_out"}


def accompanied(part: Part, moments: LayerMoments) -> tuple[Part, list[Finding]]:
    """The part with recomputed factors that its eigenvectors diagonalise, and what is to say where there are none.

    A and S are sums; their scale changes neither eigenvectors nor a γ mask.
    """
    items, findings = dict(part.items), []
    for side, role, basis, name in SIDES:
        U = part.tensor(basis)
        assert U is not None
        where = part.subject(basis)
        misfit, convention, Y = _best(side, U, moments)
        if Y is not None and misfit <= FITS:
            source = f"{role} recomputed ({convention})"
            items[role] = Item(
                role, Y / max(moments.counts["real position"], 1), source, "recomputed from model and data"
            )
            cause = f"these eigenvectors are of the recomputed {name} factor: {convention}"
            findings.append(Finding("basis-recomputed", "ok", where, misfit, FITS, cause))
            continue
        other = part.tensor("U_out" if side == "A" else "U_in")
        assert other is not None
        if other.shape == U.shape and _best(side, other, moments)[0] <= FITS:
            cause = f"the eigenvectors stored for the other side diagonalise the recomputed {name} factor: exchanged"
            remedy = "exchange Ua and Ub: Ua belongs to the input side (d_in x d_in)"
            findings.append(Finding("basis-recomputed", "error", where, misfit, FITS, cause, remedy, "swapped-factors"))
        elif side == "A":
            cause = (
                f"no recomputed input factor is diagonal in these eigenvectors (nearest: {convention}): they are of "
                "another layer, of weights that have moved since, or of other data than these"
            )
            remedy = "give the factor files they were made of, or the run's own data; else make the cache again"
            findings.append(Finding("basis-recomputed", "deviation", where, misfit, FITS, cause, remedy, "stale-mask"))
        else:
            cause = (
                f"no recomputed output factor is diagonal in these eigenvectors (nearest: {convention}); with labels "
                "drawn from the model by an unknown seed none can be, and the mask's energy stays unknown"
            )
            remedy = "give the factor file: with it the mask is checked in full"
            findings.append(Finding("basis-recomputed", "convention", where, misfit, FITS, cause, remedy))
    return replace(part, items=items), findings


def _best(side: Side, U: Tensor, moments: LayerMoments) -> tuple[float, str, Tensor | None]:
    """The least share off the diagonal among all conventions, which one, and its matrix; the plainest among equals."""
    best: tuple[float, str, Tensor | None] = (1.0, "none", None)
    for structure, Y in candidates(side, moments, len(U)):
        if Y.shape == (len(U),) * 2 and bool(Y.any()):
            misfit = rotated(Y, U).off_diagonal
            if misfit < best[0] * 0.99 - 1e-9:
                best = (misfit, str(structure), Y)
    return best
