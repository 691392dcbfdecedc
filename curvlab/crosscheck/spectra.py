"""Eigenvalues of the two sides of a layer as its stored eigenvectors order them, with what round-off leaves open."""

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from curvlab.crosscheck.evidence import (
    COARSE,
    asymmetry,
    coarse_dtype,
    off_diagonal,
    power_of_two,
    precision,
    square,
    usable,
)
from curvlab.crosscheck.parts import Part, Role

FULL_UNTIL = 2048  # dimensions up to which eigenvalues are recomputed in float64; above, one product has to do
ROLES: dict[str, tuple[Role, Role, Role]] = {
    "in": ("A", "U_in", "values_in"),
    "out": ("S", "U_out", "values_out"),
}
UNRELATED = 0.05  # of the factor's size left off the diagonal: these eigenvectors are another matrix'


@dataclass(frozen=True)
class Rotated:
    """A factor C seen from a basis U.

    Attributes:
        rayleigh: u_jᵀ C u_j / u_jᵀ u_j (r,), float64.
        left_over: ‖C u_j − λ_j u_j‖ (r,), float64.
        size: Frobenius norm of C.
        spread: of C without its mean eigenvalue.
    """

    rayleigh: Tensor
    left_over: Tensor
    size: float
    spread: float

    @property
    def off_diagonal(self) -> float:
        """Share of ‖C‖ that U does not bring onto the diagonal."""
        return float(self.left_over.norm()) / self.size if self.size > 0 else 0.0

    @property
    def unrelated(self) -> bool:
        """Whether U has nothing to do with C, up to what is the same in every basis."""
        return self.spread > 1e-3 * self.size and float(self.left_over.norm()) > UNRELATED * self.spread


@dataclass(frozen=True)
class Side:
    """Eigenvalues (d,) float64, an uncertainty (d,) for each, and whether they are ordered like stored eigenvectors.

    `fits` is False where the stored eigenvectors do not diagonalise the stored factor.
    """

    values: Tensor
    error: Tensor
    ordered: bool
    fits: bool = True


def solver_error(d: int) -> float:
    """Largest error of an eigenvalue from a backward-stable solver, in units of rounding of the largest eigenvalue."""
    return 4 + d**0.5 / 4


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def symmetric(C: Tensor, U: Tensor | None = None) -> Tensor:
    """The symmetric matrix behind C: of its mean and its triangles (`eigh` reads one) the one that U fits best."""
    mean = (C + C.mT) / 2
    if U is None or asymmetry(C) <= 1e-5:
        return mean
    lower = C.tril() + C.tril(-1).mT
    upper = C.triu() + C.triu(1).mT
    return min((mean, lower, upper), key=lambda M: off_diagonal(U, M) or 0.0)


def rotated(C: Tensor, U: Tensor) -> Rotated:
    """One product C U: Rayleigh quotients and what is left off the diagonal."""
    dtype = torch.float64 if len(C) <= FULL_UNTIL else torch.float32
    U = U.to(dtype)
    C = symmetric(C.to(dtype), U)
    image = C @ U
    norms = U.square().sum(0).clamp_min(torch.finfo(dtype).tiny)
    values = (U * image).sum(0) / norms
    left = (image - U * values).norm(dim=0) / norms.sqrt()
    size = float(C.double().norm()) if len(C) <= FULL_UNTIL else float(C.norm())
    trace = float(C.diagonal().double().sum())
    spread = max(size**2 - trace**2 / len(C), 0.0) ** 0.5
    return Rotated(values.double(), left.double(), size, spread)


def _remembered(part: Part, side: str) -> Rotated | None:
    factor, basis, _ = ROLES[side]
    C, U = part.items[factor], part.items[basis]
    for other, turned, found in _cache.get(U.tensor, []):
        if other() is C.tensor and turned == U.transposed:
            return found
    return None


def of_basis(part: Part, side: Literal["in", "out"]) -> Rotated | None:
    """The factor of that side seen from its stored eigenvectors; None without either. Remembered."""
    factor, basis, _ = ROLES[side]
    C, U = part.tensor(factor), part.tensor(basis)
    if C is None or U is None or not square(C) or not usable(C) or not usable(U) or U.shape[0] != len(C):
        return None
    found = _remembered(part, side)
    if found is None:
        found = rotated(C, U)
        entries = _cache.setdefault(part.items[basis].tensor, [])
        entries.append((weakref.ref(part.items[factor].tensor), part.items[basis].transposed, found))
    return found


def eigenvalues(C: Tensor, U: Tensor | None = None) -> Tensor:
    """All eigenvalues of a factor, ascending, float64; in the factor's own precision where it is large.

    U: its eigenvectors, where stored, which tell what an asymmetric factor stands for.
    """
    dtype = torch.float64 if len(C) <= FULL_UNTIL else torch.float32
    scale = power_of_two(C)  # solvers square entries: 1e308 would overflow, 1e-308 vanish
    C = (C.double() / scale).to(dtype)
    return torch.linalg.eigvalsh(symmetric(C, None if U is None else U.to(dtype))).double() * scale


def rounding(part: Part, side: Literal["in", "out"]) -> float:
    """Unit of rounding behind the eigenvalues of a side."""
    factor, basis, values = ROLES[side]
    units = [precision(part.items[role].tensor) for role in (factor, values) if role in part.items]
    U = part.items.get(basis)
    if U is not None:
        units.append(_unit_of_basis(U.tensor))
    return max(units, default=torch.finfo(torch.float32).eps)


def basis_rounding(part: Part) -> float:
    """Unit of rounding of the stored eigenvectors of both sides; 0 without any."""
    roles: tuple[Role, Role] = ("U_in", "U_out")
    return max((_unit_of_basis(part.items[role].tensor) for role in roles if role in part.items), default=0.0)


def _unit_of_basis(U: Tensor) -> float:
    """Eigenvalues were there before their eigenvectors were rounded to bfloat16: those count as float32."""
    if U.dtype in COARSE or coarse_dtype(U) is not None:
        return torch.finfo(torch.float32).eps
    return torch.finfo(U.dtype).eps if U.is_floating_point() else torch.finfo(torch.float32).eps


def _matched(seen: Rotated, C: Tensor, U: Tensor | None) -> Tensor:
    """Eigenvalues in the order of the stored eigenvectors; those without one (a truncated basis) at the end."""
    values = seen.rayleigh
    rest = len(C) - len(values)
    if len(C) > FULL_UNTIL:
        trace = float(C.diagonal().double().sum())
        return torch.cat([values, values.new_full((rest,), max(trace - float(values.sum()), 0.0) / max(rest, 1))])
    full = eigenvalues(C, U)
    exact, left = torch.empty_like(values), torch.ones(len(full), dtype=torch.bool)
    if rest == 0:
        exact[values.argsort()] = full
        return exact
    for j in values.argsort(descending=True).tolist():
        nearest = int(torch.where(left, (full - values[j]).abs(), torch.inf).argmin())
        exact[j], left[nearest] = full[nearest], False
    return torch.cat([exact, full[left]])


def side(part: Part, which: Literal["in", "out"]) -> Side | None:
    """Eigenvalues of one side from what there is: stored ones, the factor in the stored basis, or the factor alone."""
    factor, basis, stored = ROLES[which]
    C, values = part.tensor(factor), part.tensor(stored)
    C = C if C is not None and square(C) and usable(C) else None
    values = values.double() if values is not None and values.dim() == 1 and usable(values) else None
    seen = of_basis(part, which)
    unit = rounding(part, which)
    if C is None and values is None:
        return None
    if seen is not None:
        top = float(seen.rayleigh.abs().max())
        error = torch.full_like(seen.rayleigh, solver_error(len(seen.rayleigh)) * unit * top)
        if seen.unrelated:
            return Side(seen.rayleigh, error, True, False)
        assert C is not None
        if asymmetry(C) > 1e-5:  # the symmetric matrix behind it is known only as far as the basis diagonalises it
            error = error + seen.left_over
        exact = _matched(seen, C, part.tensor(basis))
        if len(C) <= FULL_UNTIL:
            error = error + 2 * (exact[: len(error)] - seen.rayleigh).abs()
        else:
            error = error + seen.left_over.square() / max(top, 1e-300)
        if len(exact) > len(error):
            error = torch.cat([error, error.max().expand(len(exact) - len(error))])
        if values is not None and values.shape == exact.shape and bool(((values - exact).abs() <= error).all()):
            exact = values
        return Side(exact, error, True)
    if values is not None:
        top = float(values.abs().max())
        return Side(values, torch.full_like(values, solver_error(len(values)) * unit * top), True)
    exact = eigenvalues(C)  # type: ignore[arg-type]
    return Side(exact, torch.full_like(exact, solver_error(len(exact)) * unit * float(exact.abs().max())), False)
