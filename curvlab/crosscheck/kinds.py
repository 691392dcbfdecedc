"""What a tensor is by itself: a factor, eigenvectors, eigenvalues, a mask or a projector."""

from torch import Tensor

from curvlab.crosscheck.evidence import (
    asymmetry,
    idempotent_defect,
    orthonormal_defect,
    semidefinite_looking,
    square,
    usable,
    zeros_and_ones,
)
from curvlab.crosscheck.names import Claim


def by_evidence(claim: Claim | None, tensor: Tensor, by: str) -> tuple[Claim | None, str]:
    """What a tensor is by itself, where its key says nothing or not enough."""
    if claim == "weight":
        return claim, by
    if not usable(tensor):
        return claim, by
    if tensor.dim() == 1:
        if (
            claim in ("values", None)
            and tensor.is_floating_point()
            and float(tensor.min()) >= -1e-3 * float(tensor.abs().max())
        ):
            return "values", "a vector without negative numbers"
        return None, by
    if tensor.dim() == 3 and square(tensor[0]) and claim is None:
        return ("projector", "a stack of idempotent matrices") if is_projector(tensor[0]) else ("factor", by)
    if tensor.dim() != 2:
        return None, by
    if claim == "values":
        return "eigenvalues", by
    if claim == "vectors":
        return claim, by
    if zeros_and_ones(tensor) and not (square(tensor) and tensor.is_floating_point() and is_projector(tensor)):
        return "mask", "zeros and ones"
    if not tensor.is_floating_point():
        return None, by
    if square(tensor):
        if is_projector(tensor):
            return "projector", "symmetric and idempotent"
        if asymmetry(tensor) < 1e-3 and semidefinite_looking(tensor):
            return "factor", "symmetric, no negative principal minors of order two"
        if orthonormal_defect(tensor) < 0.05:
            return "vectors", "orthonormal columns"
        return None, by
    return ("eigenvalues", "a matrix without negative numbers") if float(tensor.min()) >= 0 else (None, by)


def is_projector(P: Tensor) -> bool:
    return asymmetry(P) < 1e-2 and idempotent_defect(P) < 1e-2 and float(P.abs().max()) > 0
