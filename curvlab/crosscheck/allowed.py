"""The subspaces in which a part allows its layer to move, from whatever constraint it holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlab.crosscheck.parts import Part, Role
from curvlab.curvature.kfac import kronecker_block
from curvlab.layers import LayerShape
from curvlab.projector import NullSpace
from curvlab.spectrum import Spectrum

THRESHOLD = 1e-3  # relative width of the band of eigenvalues around λ_γ that may go or stay


@dataclass(frozen=True)
class Allowed:
    """One allowed subspace.

    Attributes:
        name: in words, for the report.
        roles: the items that it is made of.
        project: Q (d_out, d_in) float64 to PQ.
        removed: share of all dimensions that it removes.
        precision: unit of rounding of what it is made of.
    """

    name: str
    roles: tuple[Role, ...]
    project: Callable[[Tensor], Tensor]
    removed: float
    precision: float


def allowed(part: Part, shape: tuple[int, int], gamma: float | None) -> list[Allowed]:
    """Mask in its bases, projector onto input directions, and the γ-null space of the factors: those that are there.

    `shape`: (d_out, d_in) of the update. Items with one more input for a joint bias act on it with a bias that stays.
    """
    out = []
    mask, u_out, u_in = part.tensor("mask"), part.tensor("U_out"), part.tensor("U_in")
    if mask is not None and u_out is not None and u_in is not None and mask.shape == (u_out.shape[1], u_in.shape[1]):
        kept, left, right = mask.double(), u_out.double(), u_in.double()

        def by_mask(Q: Tensor) -> Tensor:
            return left @ (kept * (left.mT @ Q @ right)) @ right.mT

        if len(left) == shape[0] and len(right) in (shape[1], shape[1] + 1):
            removed = 1 - float(kept.mean())
            precision = max(_unit(u_out), _unit(u_in))
            out.append(Allowed("its mask", ("mask", "U_out", "U_in"), _padded(by_mask, right), removed, precision))
    projector = part.tensor("projector")
    if projector is not None and projector.dim() == 2 and len(projector) in (shape[1], shape[1] + 1):
        P = projector.double()
        removed = 1 - float(P.trace()) / len(P)
        out.append(Allowed("its projector", ("projector",), _padded(lambda Q: Q @ P, P), removed, _unit(projector)))
    A, S = part.tensor("A"), part.tensor("S")
    if gamma is None or A is None or S is None or out:
        return out
    if len(S) == shape[0] and len(A) in (shape[1], shape[1] + 1) and bool(A.isfinite().all() and S.isfinite().all()):
        layer = LayerShape(part.layer, len(S), len(A), len(A) != shape[1])
        null = _null_space(layer, A.double(), S.double(), gamma)

        def by_factors(Q: Tensor) -> Tensor:
            return null.project({part.layer: Q})[part.layer]

        removed, precision = null.removed / null.dimensions, max(_unit(A), _unit(S))
        out.append(Allowed(f"its factors at γ = {gamma:g}", ("A", "S"), _padded(by_factors, A), removed, precision))
    return out


def _null_space(layer: LayerShape, A: Tensor, S: Tensor, gamma: float) -> NullSpace:
    """The γ-null space, less what lies at the threshold itself: whether that goes is for round-off and ties to say."""
    block = kronecker_block(layer, A, S, gamma, 0)
    null = Spectrum((block,)).null_space(gamma)
    (own,) = null.blocks
    above = own.removed & (block.magnitudes > float(own.threshold) * (1 + THRESHOLD))
    return replace(null, blocks=(replace(own, removed=above),)) if bool(above.any()) else null


def _unit(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _padded(project: Callable[[Tensor], Tensor], inner: Tensor) -> Callable[[Tensor], Tensor]:
    """With a column of zeros for the bias where `inner` counts one."""

    def wrapped(Q: Tensor) -> Tensor:
        if Q.shape[1] == len(inner):
            return project(Q)
        return project(torch.nn.functional.pad(Q, (0, 1)))[:, :-1]

    return wrapped
