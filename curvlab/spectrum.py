"""Every curvature becomes a spectrum: a basis of displacements and one eigenvalue a coordinate.

A displacement is a dictionary of matrices (…, d_out, d_in) by layer name; leading dimensions are stacks.
`Basis` is dense (eigenvectors of all parameters of its layers) or Kronecker (U_in ⊗ U_out in column-stacking
vec: coordinates U_outᵀ Q U_in, laid out like W).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvlab.layers import LayerShape, Matrices, flatten, unflatten
from curvlab.memory import announce, bytes_of
from curvlab.storage import load_tensors, parsing, require_shape, save_tensors

if TYPE_CHECKING:
    from curvlab.projector import Ellipsoid, NullSpace


def eigh(C: Tensor, semidefinite: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending in magnitude, and eigenvectors (columns) of a symmetric matrix.

    Symmetrised; repeated in float64 where the solver fails to converge. With `semidefinite`, negative
    eigenvalues are round-off and become zero.

    Raises:
        ValueError: entries that are not finite.
    """
    if not bool(C.isfinite().all()):
        raise ValueError("the curvature has entries that are not finite")
    C = (C + C.mT) / 2
    try:
        values, vectors = torch.linalg.eigh(C)
    except torch.linalg.LinAlgError:
        values, vectors = (t.to(C.dtype) for t in torch.linalg.eigh(C.double()))
    if semidefinite:
        values = values.clamp_min(0)
    order = values.abs().argsort(descending=True, stable=True)
    return values[order], vectors[:, order]


def log_spaced(count: int, points: int) -> list[int]:
    """Up to `points` indices of 1 … count, evenly spaced in the logarithm, the ends among them: a spectrum to draw."""
    steps = torch.logspace(0, math.log10(count), points, dtype=torch.float64)
    return sorted({min(count, max(1, round(x))) for x in steps.tolist()})


@dataclass(frozen=True)
class DenseBasis:
    """Orthonormal columns over the parameters of several layers: vectors (p, r), layout "rows"."""

    layers: tuple[LayerShape, ...]
    vectors: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the coordinates."""
        return (self.vectors.shape[1],)

    @property
    def size(self) -> int:
        """Dimensions of the space, p."""
        return self.vectors.shape[0]

    @property
    def complete(self) -> bool:
        return self.vectors.shape[0] == self.vectors.shape[1]

    def rotate(self, delta: Matrices) -> Tensor:
        """Coordinates (…, r) of a displacement."""
        return flatten(self.layers, delta) @ self.vectors

    def rotate_back(self, coordinates: Tensor) -> Matrices:
        """The displacement with these coordinates."""
        return unflatten(self.layers, coordinates @ self.vectors.mT)

    def restrict(self, used: Tensor) -> tuple["DenseBasis", tuple[Any, ...]]:
        """The columns where the mask `used` (r,) is true, and their index."""
        (index,) = used.nonzero(as_tuple=True)
        if len(index) == self.vectors.shape[1]:
            return self, (index,)
        return replace(self, vectors=self.vectors[:, index].contiguous()), (index,)

    def cost(self, used: Tensor) -> float:
        """Multiply–adds of `filter` with the basis restricted to `used`."""
        return 2.0 * self.size * int(used.sum())

    def plan(self, used: Tensor) -> None:
        """Nothing to choose."""

    def filter(self, delta: Matrices, mask: Tensor, plan: None = None) -> Matrices:
        """U (mask ⊙ Uᵀδ), the mask (…, r) of the basis' dtype."""
        return self.rotate_back(mask * self.rotate(delta))

    def map(self, function: Callable[[Tensor], Tensor]) -> "DenseBasis":
        return replace(self, vectors=function(self.vectors))

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors}

    @property
    def like(self) -> Tensor:
        """A tensor of the basis' dtype and device."""
        return self.vectors


STRIP = 128  # rows of eigenvectors at a time: enough for a matrix product at full speed


@dataclass(frozen=True)
class Plan:
    """How to filter in a Kronecker basis: which side first, then strips of eigenvectors with the range each needs.

    A staircase (K-FAC's mask) fills little of its rectangle; strips follow its steps.

    Attributes:
        out_first: U_outᵀ Q first and strips of rows; else Q U_in first and strips of columns.
        strips: (rows, columns) of the mask; together they hold all of it.
        cost: multiply–adds.
    """

    out_first: bool
    strips: tuple[tuple[slice, slice], ...]
    cost: float


@dataclass(frozen=True)
class KroneckerBasis:
    """U_in ⊗ U_out of one layer: u_out (d_out, r_out), None for the identity; u_in (d_in, r_in)."""

    layer: LayerShape
    u_out: Tensor | None
    u_in: Tensor

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        return (self.layer,)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.layer.d_out if self.u_out is None else self.u_out.shape[1], self.u_in.shape[1])

    @property
    def size(self) -> int:
        return self.layer.size

    @property
    def complete(self) -> bool:
        return self.shape == (self.layer.d_out, self.layer.d_in)

    @property
    def _out_first(self) -> bool:
        """Which side to multiply first: the one after which less remains to be done."""
        (d_out, d_in), (r_out, r_in) = (self.layer.d_out, self.layer.d_in), self.shape
        return r_out * d_in * (d_out + r_in) < d_out * r_in * (d_in + r_out)

    def rotate(self, delta: Matrices) -> Tensor:
        """U_outᵀ Q U_in: (…, r_out, r_in)."""
        Q = delta[self.layer.name]
        if self.u_out is None:
            return Q @ self.u_in
        return (self.u_out.mT @ Q) @ self.u_in if self._out_first else self.u_out.mT @ (Q @ self.u_in)

    def rotate_back(self, coordinates: Tensor) -> Matrices:
        """U_out Z U_inᵀ."""
        if self.u_out is None:
            Q = coordinates @ self.u_in.mT
        elif self._out_first:
            Q = self.u_out @ (coordinates @ self.u_in.mT)
        else:
            Q = (self.u_out @ coordinates) @ self.u_in.mT
        return {self.layer.name: Q}

    def restrict(self, used: Tensor) -> tuple["KroneckerBasis", tuple[Any, ...]]:
        """The eigenvectors of the smallest rectangle that holds the mask `used` (r_out, r_in), and its index."""
        rows, columns = self._rectangle(used)
        u_in = self.u_in if len(columns) == self.u_in.shape[1] else self.u_in[:, columns].contiguous()
        u_out = self.u_out
        if u_out is not None and len(rows) < u_out.shape[1]:
            u_out = u_out[:, rows].contiguous()
        return KroneckerBasis(self.layer, u_out, u_in), (rows[:, None], columns[None, :])

    def cost(self, used: Tensor) -> float:
        """Multiply–adds of `filter` with the basis restricted to `used`."""
        rows, columns = self._rectangle(used)
        return self.plan(used[rows][:, columns]).cost

    def plan(self, used: Tensor) -> Plan:
        """The cheapest way to filter with a mask inside `used` (r_out, r_in)."""
        d_out, d_in, (r_out, r_in) = self.layer.d_out, self.layer.d_in, used.shape
        if self.u_out is None:
            return Plan(True, ((slice(0, d_out), slice(0, r_in)),), 2.0 * d_out * d_in * r_in)
        whole = (slice(0, r_out), slice(0, r_in))
        plans = []
        for out_first in (True, False):
            first = 2.0 * d_out * d_in * (r_out if out_first else r_in)
            strips = _strips(used) if out_first else [(rows, columns) for columns, rows in _strips(used.mT)]
            for choice in ([whole], strips):
                area = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in choice)
                plans.append(Plan(out_first, tuple(choice), first + 2.0 * (d_in if out_first else d_out) * area))
        # one large product runs a little faster than strips of it
        return min(plans, key=lambda plan: plan.cost * (1.0 if len(plan.strips) == 1 else 1.1))

    def filter(self, delta: Matrices, mask: Tensor, plan: Plan) -> Matrices:
        """U_out (mask ⊙ (U_outᵀ Q U_in)) U_inᵀ, the mask (…, r_out, r_in) of the basis' dtype."""
        Q = delta[self.layer.name]
        u_out, u_in = self.u_out, self.u_in
        parts = []
        if plan.out_first:
            Z = Q if u_out is None else u_out.mT @ Q
            for rows, columns in plan.strips:
                inner = u_in[:, columns]
                parts.append((mask[..., rows, columns] * (Z[..., rows, :] @ inner)) @ inner.mT)
            Z = torch.cat(parts, -2) if len(parts) > 1 else parts[0]
            return {self.layer.name: Z if u_out is None else u_out @ Z}
        assert u_out is not None
        Z = Q @ u_in
        for rows, columns in plan.strips:
            outer = u_out[:, rows]
            parts.append(outer @ (mask[..., rows, columns] * (outer.mT @ Z[..., columns])))
        Z = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return {self.layer.name: Z @ u_in.mT}

    def _rectangle(self, used: Tensor) -> tuple[Tensor, Tensor]:
        (columns,) = used.any(0).nonzero(as_tuple=True)
        if self.u_out is None:  # no basis to restrict on this side
            return torch.arange(self.layer.d_out, device=used.device), columns
        return used.any(1).nonzero(as_tuple=True)[0], columns

    def map(self, function: Callable[[Tensor], Tensor]) -> "KroneckerBasis":
        return replace(self, u_out=None if self.u_out is None else function(self.u_out), u_in=function(self.u_in))

    def tensors(self) -> dict[str, Tensor]:
        return {"u_in": self.u_in} | ({} if self.u_out is None else {"u_out": self.u_out})

    @property
    def like(self) -> Tensor:
        return self.u_in


Basis = DenseBasis | KroneckerBasis


def _strips(used: Tensor) -> list[tuple[slice, slice]]:
    """Rows of a mask, `STRIP` at a time, with the range of columns that each uses."""
    strips = []
    for start in range(0, len(used), STRIP):
        rows = used[start : start + STRIP]
        columns = rows.any(0).nonzero()
        bounds = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        strips.append((slice(start, start + len(rows)), slice(*bounds)))
    return strips or [(slice(0, 0), slice(0, used.shape[1]))]


@dataclass(frozen=True)
class Block:
    """Eigenvalues and eigenvectors of one block of a block-diagonal curvature.

    Attributes:
        basis: the eigenvectors; all of them, or the leading ones.
        values: eigenvalues, float64, shaped like the basis' coordinates.
        total: Σ|σ| over *all* eigenvalues, known or not (the trace, for a semi-definite curvature).
        total_error: its standard error, where it had to be estimated.
        floor: no unknown eigenvalue exceeds it in magnitude; 0 where all are known.
        precision: unit of rounding of the statistics behind the values (a float64 decomposition of float32 sums
            gives values of float32 precision); values that differ by no more are one eigenvalue.
    """

    basis: Basis
    values: Tensor
    total: float
    total_error: float = 0.0
    floor: float = 0.0
    precision: float = 0.0

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != self.basis.shape:
            raise ValueError(f"eigenvalues {tuple(self.values.shape)} do not fit the basis {self.basis.shape}")

    @cached_property
    def magnitudes(self) -> Tensor:
        """|σ| of the known eigenvalues, float64, shaped like the coordinates."""
        return self.values.double().abs()

    @property
    def mean_outside(self) -> float:
        """Mean |σ| of the unknown eigenvalues; 0 where all are known."""
        unknown = self.basis.size - self.values.numel()
        return max(self.total - float(self.magnitudes.sum()), 0.0) / unknown if unknown else 0.0


@dataclass(frozen=True)
class Spectrum:
    """A curvature in its eigenbasis: one block a layer (Kronecker), or one over layers jointly (dense).

    Attributes:
        blocks: the blocks; displacements in different blocks do not interact.
        scaled: whether the eigenvalues carry the loss' units (a bare activation covariance does not).
    """

    blocks: tuple[Block, ...]
    scaled: bool = True

    @property
    def layers(self) -> list[LayerShape]:
        return [layer for block in self.blocks for layer in block.basis.layers]

    @property
    def size(self) -> int:
        return sum(block.basis.size for block in self.blocks)

    def null_space(self, gamma: float | None = None, *, k: int | None = None) -> "NullSpace":
        """The γ-approximate null space of every block, or what is left after the k leading eigenvalues."""
        from curvlab.projector import null_space

        return null_space(self, gamma, k)

    def ellipsoid(self, epsilon: float, *, outside: Literal["bound", "mean"] = "bound") -> "Ellipsoid":
        """The displacements with ½ δᵀCδ ≤ ε (nats, for cross-entropy) around the weights at which it is attached.

        `outside`: with what curvature unknown eigenvalues count (`curvlab.projector.ellipsoid`).
        """
        from curvlab.projector import ellipsoid

        return ellipsoid(self, epsilon, outside)

    def quadratic_form(self, delta: Matrices) -> Tensor:
        """δᵀCδ of the known eigenvalues, float64; stacks (R, …) give (R,)."""
        total = torch.zeros((), dtype=torch.float64)
        for block in self.blocks:
            Z = block.basis.rotate({name: Q.to(block.basis.like) for name, Q in delta.items()}).double()
            total = total.to(Z.device) + (Z.square() * block.values).sum(tuple(range(-block.values.dim(), 0)))
        return total

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Spectrum":
        """The eigenvectors in another dtype or on another device; eigenvalues stay float64."""
        blocks = [
            replace(b, basis=b.basis.map(lambda t: t.to(device, dtype)), values=b.values.to(device))
            for b in self.blocks
        ]
        return replace(self, blocks=tuple(blocks))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file (eigenvectors, eigenvalues, and a JSON header)."""
        bases, header = pack_bases([block.basis for block in self.blocks])
        values = {f"{i}.values": block.values for i, block in enumerate(self.blocks)}
        numbers = [(block.total, block.total_error, block.floor, block.precision) for block in self.blocks]
        meta = {"bases": header, "numbers": json.dumps(numbers), "scaled": json.dumps(self.scaled)}
        save_tensors(path, "spectrum", bases | values, meta)

    @classmethod
    def load(cls, path: str | Path) -> "Spectrum":
        """Read what `save` wrote.

        Raises:
            ValueError: a damaged file, or one of another kind.
        """
        tensors, meta = load_tensors(path, "spectrum")
        with parsing(path):
            bases = zip(unpack_bases(tensors, meta["bases"]), json.loads(meta["numbers"]), strict=True)
            blocks = [Block(b, values_of(tensors, i, b), *numbers) for i, (b, numbers) in enumerate(bases)]
            return cls(tuple(blocks), json.loads(meta["scaled"]))


def pack_bases(bases: Sequence[Basis]) -> tuple[dict[str, Tensor], str]:
    """Bases as named tensors and a JSON description."""
    tensors = {f"{i}.{name}": t for i, basis in enumerate(bases) for name, t in basis.tensors().items()}
    layers = [[asdict(layer) for layer in basis.layers] for basis in bases]
    kinds = [type(basis).__name__ for basis in bases]
    return tensors, json.dumps([{"basis": kind, "layers": l} for kind, l in zip(kinds, layers, strict=True)])


def unpack_bases(tensors: dict[str, Tensor], header: str) -> list[Basis]:
    """The inverse of `pack_bases`.

    Raises:
        KeyError: a tensor, or an entry of the description, that is missing.
        ValueError: vectors that are not of their layers' dimensions.
    """
    bases: list[Basis] = []
    for i, entry in enumerate(json.loads(header)):
        layers = tuple(LayerShape(**layer) for layer in entry["layers"])
        if entry["basis"] == "DenseBasis":
            bases.append(DenseBasis(layers, tensors[f"{i}.vectors"]))
        else:
            bases.append(KroneckerBasis(layers[0], tensors.get(f"{i}.u_out"), tensors[f"{i}.u_in"]))
        dims = {"vectors": sum(l.size for l in layers), "u_out": layers[0].d_out, "u_in": layers[0].d_in}
        for name, t in bases[-1].tensors().items():
            require_shape(f"{i}.{name}", t, (dims[name], t.shape[-1]))
    return bases


def values_of(tensors: dict[str, Tensor], i: int, basis: Basis) -> Tensor:
    """The eigenvalues of block `i` among the tensors of a file.

    Raises:
        KeyError: they are missing.
        ValueError: they do not fit the basis, or are not finite.
    """
    found = tensors[f"{i}.values"]
    require_shape(f"{i}.values", found, basis.shape)
    if not bool(found.isfinite().all()):
        raise ValueError(f"'{i}.values' has entries that are not finite")
    return found


def dense_spectrum(C: Tensor, layers: Sequence[LayerShape], semidefinite: bool) -> Spectrum:
    """All eigenpairs of a dense curvature (p, p) in the layout "rows".

    Parameters without curvature (whole rows of zeros: dead units) are split off first.
    """
    p = len(C)
    announce(f"eigenvectors of {p:,} parameters", 3 * bytes_of(p, p, dtype=C.dtype), "spectrum(gamma=…)", C.device)
    alive = (C != 0).any(0)
    n = int(alive.sum())
    values, vectors = eigh(C if n == p else C[alive][:, alive], semidefinite)
    if n < p:
        full = C.new_zeros(p, p)
        full[alive.nonzero(), torch.arange(n, device=C.device)] = vectors
        full[(~alive).nonzero(), torch.arange(n, p, device=C.device)[:, None]] = 1.0
        vectors, values = full, torch.cat([values, values.new_zeros(p - n)])
    values = values.double()
    return Spectrum((Block(DenseBasis(tuple(layers), vectors), values, float(values.abs().sum())),))
