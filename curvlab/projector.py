"""The two constraints on a spectrum: the γ-approximate null space and the ellipsoid ½ δᵀCδ ≤ ε.

Both act on displacements: dictionaries of matrices (…, d_out, d_in) by layer name. Leading dimensions are
stacks of runs; `stack` joins constraints that share a basis into one that treats run r by its own mask or ε.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from curvlab.layers import LayerShape, Matrices, flatten, unflatten
from curvlab.spectrum import Basis, Block, DenseBasis, KroneckerBasis, Spectrum, pack_bases, unpack_bases
from curvlab.storage import load_tensors, parsing, save_tensors


@dataclass(frozen=True)
class NullBlock:
    """One block of a null space.

    Attributes:
        basis: eigenvectors; at least the removed ones.
        removed: bool, shaped like the coordinates (with a leading dimension for a stack).
        energy: share of Σ|σ| in the removed directions; a number, or one a run.
        threshold: |σ_k|, the smallest magnitude that is removed; a number, or one a run.
    """

    basis: Basis
    removed: Tensor
    energy: Tensor
    threshold: Tensor

    @cached_property
    def _cheapest(self) -> tuple[Basis, Tensor, Any, bool]:
        """The restricted basis that costs least, its mask and plan, and whether that mask says what is removed."""
        stacked = self.removed.dim() > len(self.basis.shape)
        masks = [(self.removed, True)] + ([(~self.removed, False)] if self.basis.complete else [])
        options = [(mask.any(0) if stacked else mask, mask, removes) for mask, removes in masks]
        used, mask, removes = min(options, key=lambda option: self.basis.cost(option[0]))
        basis, index = self.basis.restrict(used)
        return basis, mask[..., *index].to(basis.like.dtype), basis.plan(used[index]), removes

    def project(self, delta: Matrices) -> Matrices:
        basis, mask, plan, removes = self._cheapest
        part = basis.filter(delta, mask, plan)
        return {name: delta[name] - Q for name, Q in part.items()} if removes else part

    @property
    def kept(self) -> Tensor:
        """Dimensions that remain; one a run for a stack."""
        dims = tuple(range(-len(self.basis.shape), 0))
        return self.basis.size - self.removed.sum(dims)


@dataclass(frozen=True)
class NullSpace:
    """The span of the eigenvectors that γ leaves: a linear constraint, δ = Pδ (paper, eq. for P_γ).

    Attributes:
        blocks: one a layer, or one over layers jointly.
        gamma: the energy share asked for; None where k was given.
    """

    blocks: tuple[NullBlock, ...]
    gamma: float | None

    linear = True

    @property
    def layers(self) -> list[LayerShape]:
        return [layer for block in self.blocks for layer in block.basis.layers]

    @property
    def dimensions(self) -> int:
        """Of the whole space."""
        return sum(block.basis.size for block in self.blocks)

    @property
    def kept(self) -> int:
        """Dimensions of the null space (of one run)."""
        return int(sum(block.kept for block in self.blocks))

    @property
    def removed(self) -> int:
        """Dimensions taken away: whole eigenspaces, at least the k that γ asks for."""
        return self.dimensions - self.kept

    @property
    def energy_removed(self) -> float:
        """Share of Σ|σ| removed, at least γ (the smallest over the blocks)."""
        return min(float(block.energy) for block in self.blocks)

    def project(self, delta: Matrices) -> Matrices:
        """P δ. Layers that the constraint does not know are refused."""
        _check_layers(self.layers, delta)
        out: Matrices = {}
        for block in self.blocks:
            out |= block.project({layer.name: delta[layer.name] for layer in block.basis.layers})
        return out

    def confine(self, delta: Matrices) -> Matrices:
        """The nearest displacement that the constraint allows."""
        return self.project(delta)

    def admit(self, start: Matrices, before: Matrices, after: Matrices) -> Matrices:
        """The weights to which a step from `before` to `after` may go: the step is projected."""
        allowed = self.project({name: W - before[name] for name, W in after.items()})
        return {name: before[name] + Q for name, Q in allowed.items()}

    @property
    def coordinate_shapes(self) -> list[tuple[int, ...]]:
        """Of the coordinates Z of each block, for descent in the eigenbasis."""
        return [_coordinate_shape(block.basis) for block in self.blocks]

    def displacement(self, coordinates: Sequence[Tensor]) -> Matrices:
        """U (M ⊙ Z), differentiable in Z; where only removed eigenvectors are known, P Z in W's own coordinates."""
        out: Matrices = {}
        for block, Z in zip(self.blocks, coordinates, strict=True):
            if block.basis.complete:
                out |= block.basis.rotate_back(Z * ~block.removed)
            else:
                out |= block.project(_as_matrices(block.basis, Z))
        return out

    def coordinates(self, delta: Matrices) -> list[Tensor]:
        """The coordinates of P δ."""
        return [
            block.basis.rotate(delta) * ~block.removed
            if block.basis.complete
            else _as_vector(block.basis, block.project(delta))
            for block in self.blocks
        ]

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "NullSpace":
        """The same constraint computing in another dtype, on another device."""
        move = _mover(dtype, device)
        return replace(
            self,
            blocks=tuple(
                NullBlock(b.basis.map(move), b.removed.to(device), b.energy, b.threshold) for b in self.blocks
            ),
        )

    def on(self, bases: dict[int, Basis]) -> "NullSpace":
        """The same constraint with bases exchanged, by the id of the old one."""
        return replace(self, blocks=tuple(replace(b, basis=bases.get(id(b.basis), b.basis)) for b in self.blocks))

    def compact(self) -> "NullSpace":
        """The same projector holding only the eigenvectors that it uses (no descent in the eigenbasis then)."""
        blocks = []
        for b in self.blocks:
            used = b.removed if b.removed.dim() == len(b.basis.shape) else b.removed.any(0)
            basis, index = b.basis.restrict(used)
            blocks.append(NullBlock(basis, b.removed[..., *index], b.energy, b.threshold))
        return replace(self, blocks=tuple(blocks))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _save(path, "null space", self.blocks, {"gamma": self.gamma})

    @classmethod
    def load(cls, path: str | Path) -> "NullSpace":
        """Read what `save` wrote; ValueError for a damaged or foreign file."""
        blocks, numbers = _load(path, "null space")
        return cls(
            tuple(NullBlock(basis, t["removed"], t["energy"], t["threshold"]) for basis, t in blocks),
            numbers["gamma"],
        )


@dataclass(frozen=True)
class EllipsoidBlock:
    """λ ≥ 0 in a basis; directions outside the basis count with λ = `floor`."""

    basis: Basis
    curvature: Tensor
    floor: float


@dataclass(frozen=True)
class Ellipsoid:
    """The displacements with ½ Σ λ Z² ≤ ε around the weights at which descent began.

    For cross-entropy ½ δᵀCδ is the quadratic model of KL(p_0 ‖ p): ε bounds the model, not the measured KL,
    and neither the loss. `epsilon` is a number, or a tensor (R,) for a stack of runs.
    """

    blocks: tuple[EllipsoidBlock, ...]
    epsilon: float | Tensor

    linear = False

    @property
    def layers(self) -> list[LayerShape]:
        return [layer for block in self.blocks for layer in block.basis.layers]

    @property
    def coordinate_shapes(self) -> list[tuple[int, ...]]:
        return [_coordinate_shape(block.basis) for block in self.blocks]

    def spent(self, delta: Matrices) -> Tensor:
        """½ δᵀCδ, float64; one number, or one a run."""
        _check_layers(self.layers, delta)
        total = torch.zeros((), dtype=torch.float64)
        for block, (Z, outside) in zip(self.blocks, self._parts(delta), strict=True):
            curvature = block.curvature.double()
            inside = (Z.double().square() * curvature).sum(tuple(range(-curvature.dim(), 0)))
            total = total.to(Z.device) + inside + block.floor * outside
        return total / 2

    def confine(self, delta: Matrices) -> Matrices:
        """The nearest displacement (Euclidean) inside: Z ← Z / (1 + μλ), μ ≥ 0 from a one-dimensional root."""
        _check_layers(self.layers, delta)
        parts = self._parts(delta)
        mu = self._multiplier(parts)
        out: Matrices = {}
        for block, (Z, _) in zip(self.blocks, parts, strict=True):
            shrink = 1 / (1 + _expand(mu, block.curvature) * block.curvature)
            if block.basis.complete:
                out |= block.basis.rotate_back(Z * shrink)
                continue
            # what lies outside the basis shrinks by one number c: c δ + U ((shrink − c) ⊙ Z)
            c = 1 / (1 + mu * block.floor)
            inner = block.basis.rotate_back(Z * (shrink - _expand(c, block.curvature)))
            for name, Q in inner.items():
                whole = delta[name].to(Q)
                out[name] = _expand(c, whole[(0,) * (whole.dim() - 2)]) * whole + Q
        return {name: Q.to(delta[name].dtype) for name, Q in out.items()}

    def admit(self, start: Matrices, before: Matrices, after: Matrices) -> Matrices:
        """The weights to which a step from `before` to `after` may go: the displacement from `start` is shrunk."""
        allowed = self.confine({name: W - start[name] for name, W in after.items()})
        return {name: start[name] + Q for name, Q in allowed.items()}

    def project(self, delta: Matrices) -> Matrices:
        raise ValueError(
            "an ellipsoid bounds the whole displacement, a gradient alone cannot be projected onto it; "
            "use project='update' or project='eigenbasis'"
        )

    def displacement(self, coordinates: Sequence[Tensor]) -> Matrices:
        """U Z, differentiable in Z."""
        out: Matrices = {}
        for block, Z in zip(self.blocks, coordinates, strict=True):
            out |= block.basis.rotate_back(Z) if block.basis.complete else _as_matrices(block.basis, Z)
        return out

    def coordinates(self, delta: Matrices) -> list[Tensor]:
        return [
            block.basis.rotate(delta) if block.basis.complete else _as_vector(block.basis, delta)
            for block in self.blocks
        ]

    def confine_coordinates(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """The nearest coordinates inside; no rotation where the basis is complete."""
        if not all(block.basis.complete for block in self.blocks):
            return self.coordinates(self.confine(self.displacement(coordinates)))
        mu = self._multiplier([(Z, Z.new_zeros((), dtype=torch.float64)) for Z in coordinates])
        return [
            Z / (1 + _expand(mu, block.curvature) * block.curvature)
            for block, Z in zip(self.blocks, coordinates, strict=True)
        ]

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Ellipsoid":
        move = _mover(dtype, device)
        epsilon = self.epsilon.to(device) if isinstance(self.epsilon, Tensor) else self.epsilon
        return Ellipsoid(
            tuple(EllipsoidBlock(b.basis.map(move), move(b.curvature), b.floor) for b in self.blocks), epsilon
        )

    def on(self, bases: dict[int, Basis]) -> "Ellipsoid":
        """The same constraint with bases exchanged, by the id of the old one."""
        blocks = []
        for b in self.blocks:
            basis = bases.get(id(b.basis), b.basis)
            blocks.append(EllipsoidBlock(basis, b.curvature.to(basis.like), b.floor))
        return replace(self, blocks=tuple(blocks))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _save(
            path,
            "ellipsoid",
            self.blocks,
            {"epsilon": _number(self.epsilon), "floors": [b.floor for b in self.blocks]},
        )

    @classmethod
    def load(cls, path: str | Path) -> "Ellipsoid":
        """Read what `save` wrote; ValueError for a damaged or foreign file."""
        blocks, numbers = _load(path, "ellipsoid")
        epsilon = numbers["epsilon"]
        return cls(
            tuple(
                EllipsoidBlock(basis, t["curvature"], floor)
                for (basis, t), floor in zip(blocks, numbers["floors"], strict=True)
            ),
            torch.tensor(epsilon, dtype=torch.float64) if isinstance(epsilon, list) else epsilon,
        )

    def _parts(self, delta: Matrices) -> list[tuple[Tensor, Tensor]]:
        """Of each block: coordinates, and the squared norm of what lies outside the basis (float64)."""
        parts = []
        for block in self.blocks:
            here = {layer.name: delta[layer.name].to(block.basis.like) for layer in block.basis.layers}
            Z = block.basis.rotate(here)
            outside = Z.new_zeros((), dtype=torch.float64)
            if not block.basis.complete:
                whole = torch.stack([Q.double().square().sum((-2, -1)) for Q in here.values()]).sum(0)
                inside = Z.double().square().sum(tuple(range(-block.curvature.dim(), 0)))
                outside = (whole - inside).clamp_min(0)
            parts.append((Z, outside))
        return parts

    def _multiplier(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The smallest μ ≥ 0 with ½ Σ λ (Z / (1 + μλ))² ≤ ε, one a run.

        Newton on (½ Σ …)^−½, which is concave and increasing in μ and nearly linear: it converges from
        below without a safeguard (the secular equation of trust regions).
        """
        squares = []
        for block, (Z, outside) in zip(self.blocks, parts, strict=True):
            curvature = block.curvature.double()
            squares.append((curvature.flatten(), Z.double().square().flatten(-curvature.dim())))
            if block.floor:
                squares.append((curvature.new_full((1,), block.floor), outside.unsqueeze(-1)))
        lam = torch.cat([c for c, _ in squares])
        energy = torch.cat([z for _, z in squares], dim=-1) * lam / 2
        epsilon = torch.as_tensor(self.epsilon, dtype=torch.float64, device=lam.device)
        mu = torch.zeros(energy.shape[:-1], dtype=torch.float64, device=lam.device)
        for _ in range(100):
            shrink = 1 / (1 + mu.unsqueeze(-1) * lam)
            terms = energy * shrink.square()
            spent = terms.sum(-1)
            excess = (spent / epsilon).sqrt()
            if not bool((excess > 1 + 1e-12).any()):  # (a diverged run's NaN is no reason to go on)
                break
            slope = (terms * lam * shrink).sum(-1)  # −½ d(spent)/dμ
            step = spent * (excess - 1) / slope.clamp_min(torch.finfo(torch.float64).tiny)
            mu = torch.where(excess > 1, mu + step, mu)
        return mu


Constraint = NullSpace | Ellipsoid
Outside = Literal["bound", "mean"]


def null_space(spectrum: Spectrum, gamma: float | None = None, k: int | None = None) -> NullSpace:
    """The γ-approximate null space of each block, k = min{r : Σ_{i≤r}|σ_i| ≥ γ Σ|σ_i|} (paper, section 2).

    The whole eigenspace of |σ_k| is removed, ties included: a cut inside it would depend on the basis.

    Args:
        gamma: energy share in (0, 1).
        k: instead of γ, the number of leading eigenvalues to remove.

    Raises:
        ValueError: γ outside (0, 1); a spectrum that is known too far down neither for γ nor for k.
    """
    if (gamma is None) == (k is None):
        raise ValueError("give either gamma or k")
    if gamma is not None and not 0 < gamma < 1:
        raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma}")
    if k is not None and not 0 < k <= spectrum.size:
        raise ValueError(f"k must lie between 1 and {spectrum.size}, got {k}")
    return NullSpace(tuple(_null_block(block, gamma, k) for block in spectrum.blocks), gamma)


def _null_block(block: Block, gamma: float | None, k: int | None) -> NullBlock:
    magnitudes = block.magnitudes
    ordered = magnitudes.flatten().sort(descending=True).values
    if gamma is not None:
        target = gamma * block.total
        position = int(torch.searchsorted(ordered.cumsum(0), target))
        known = len(ordered) == block.basis.size
        if position == len(ordered) and known:
            position -= 1  # γ within rounding of one
    else:
        assert k is not None
        position = k - 1
    short = "the spectrum is known only down to |σ| = {:.3g}; compute more of it: spectrum(gamma=…) or spectrum(k=…)"
    if position >= len(ordered):
        raise ValueError(short.format(block.floor))
    threshold = float(ordered[position])
    # eigenvalues that differ by rounding belong to one eigenspace
    eps = max(torch.finfo(block.basis.like.dtype).eps, block.precision)
    tie = min(16 * eps * float(ordered[0]), 1e-3 * threshold)
    if block.floor > 0 and threshold - tie <= block.floor:
        raise ValueError(short.format(block.floor))
    removed = (magnitudes >= threshold - tie) & (magnitudes > 0)  # without curvature there is nothing to remove
    energy = float(magnitudes[removed].sum()) / block.total if block.total > 0 else 1.0
    return NullBlock(
        block.basis,
        removed,
        torch.tensor(energy, dtype=torch.float64),
        torch.tensor(threshold, dtype=torch.float64),
    )


def ellipsoid(spectrum: Spectrum, epsilon: float, outside: Outside = "bound") -> Ellipsoid:
    """The set ½ δᵀCδ ≤ ε; |σ| stands for an indefinite curvature.

    Args:
        outside: with what curvature directions count of which only Σ|σ| is known: "bound", the smallest known
            |σ|, which keeps the promise and overstates by far what thousands of them cost; or "mean", their mean |σ|.

    Raises:
        ValueError: ε not positive and finite; eigenvalues without the loss' units; a truncated Kronecker basis.
    """
    if outside not in ("bound", "mean"):
        raise ValueError(f"outside must be 'bound' or 'mean', got {outside!r}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not spectrum.scaled:
        raise ValueError(
            "a bare activation covariance has no units of loss; fit it with labels=… so that tr(S)/d_out scales it"
        )
    for block in spectrum.blocks:
        if isinstance(block.basis, KroneckerBasis) and not block.basis.complete:
            raise ValueError("an ellipsoid needs all eigenvectors of a Kronecker curvature: spectrum() without gamma")
    return Ellipsoid(
        tuple(
            EllipsoidBlock(
                b.basis, b.magnitudes.to(b.basis.like.dtype), b.floor if outside == "bound" else b.mean_outside
            )
            for b in spectrum.blocks
        ),
        epsilon,
    )


def stack(constraints: Sequence[Constraint]) -> Constraint:
    """One constraint for a stack of runs: run r obeys `constraints[r]`. All must share their bases.

    Raises:
        ValueError: constraints of different kinds or with different bases.
    """
    first = constraints[0]
    for other in constraints:
        same = type(other) is type(first) and len(other.blocks) == len(first.blocks)
        if not same or [id(block.basis) for block in first.blocks] != [id(block.basis) for block in other.blocks]:
            raise ValueError("only constraints on one spectrum can be stacked")
    if isinstance(first, Ellipsoid):
        return replace(
            first,
            epsilon=torch.tensor([c.epsilon for c in constraints if isinstance(c, Ellipsoid)], dtype=torch.float64),
        )
    nulls = [c for c in constraints if isinstance(c, NullSpace)]
    return NullSpace(
        tuple(
            NullBlock(
                blocks[0].basis,
                torch.stack([b.removed for b in blocks]),
                torch.stack([b.energy for b in blocks]),
                torch.stack([b.threshold for b in blocks]),
            )
            for blocks in zip(*(c.blocks for c in nulls), strict=True)
        ),
        gamma=None,
    )


def overlap(first: NullSpace, second: NullSpace) -> float:
    """Share of `first` that lies inside `second`: tr(P₁ P₂) / tr P₁, in [0, 1].

    Both over the same layers, at least one of them with a dense basis or both Kronecker, layer by layer.
    """
    if [layer.name for layer in first.layers] != [layer.name for layer in second.layers]:
        raise ValueError("the null spaces are over different layers")
    if first.kept == 0:
        raise ValueError("the first null space is empty")
    # tr(P₁P₂) = p − k₁ − k₂ + tr(R₁R₂), R the removed projectors
    common = first.dimensions - first.removed - second.removed + _trace_removed(first, second)
    return common / first.kept


def _trace_removed(first: NullSpace, second: NullSpace) -> float:
    if any(isinstance(b.basis, DenseBasis) for b in second.blocks):
        first, second = second, first
    if all(isinstance(b.basis, KroneckerBasis) for b in first.blocks):
        total = 0.0
        for a, b in zip(first.blocks, second.blocks, strict=True):
            x, y = a.basis, b.basis
            assert isinstance(x, KroneckerBasis)
            assert isinstance(y, KroneckerBasis)
            inner = (x.u_in.mT @ y.u_in.to(x.u_in)).double().square()
            eye = torch.eye(x.layer.d_out, dtype=x.like.dtype, device=x.like.device)
            left, right = (eye if u is None else u.to(eye) for u in (x.u_out, y.u_out))
            outer = (left.mT @ right).double().square()
            total += float((a.removed.double() * (outer @ b.removed.double() @ inner.mT)).sum())
        return total
    total = 0.0
    for block in first.blocks:
        assert isinstance(block.basis, DenseBasis)
        for vectors in block.basis.vectors[:, block.removed].mT.split(256):  # rows: removed eigenvectors
            zero = {layer.name: vectors.new_zeros(len(vectors), layer.d_out, layer.d_in) for layer in first.layers}
            delta = zero | _as_matrices(block.basis, vectors)
            projected = second.to(vectors.dtype, vectors.device).project(delta)
            total += sum(float((delta[n] * (delta[n] - projected[n])).sum(dtype=torch.float64)) for n in delta)
    return total


def _coordinate_shape(basis: Basis) -> tuple[int, ...]:
    """The eigenbasis' own coordinates; W's where only some eigenvectors are known."""
    return basis.shape if basis.complete else (basis.size,)


def _as_matrices(basis: Basis, vectors: Tensor) -> Matrices:
    return unflatten(basis.layers, vectors)


def _as_vector(basis: Basis, delta: Matrices) -> Tensor:
    return flatten(basis.layers, delta)


def _expand(mu: Tensor, like: Tensor) -> Tensor:
    """μ (R,) shaped to multiply (R, *like.shape), in `like`'s dtype; a scalar stays one."""
    return mu.to(like)[(...,) + (None,) * like.dim()] if mu.dim() else mu.to(like)


def _number(value: float | Tensor) -> float | list[float]:
    return value.tolist() if isinstance(value, Tensor) else value


def _mover(dtype: torch.dtype, device: torch.device | str | None) -> Callable[[Tensor], Tensor]:
    def move(t: Tensor) -> Tensor:
        return t.to(dtype=dtype, device=t.device if device is None else device)

    return move


def _check_layers(layers: Sequence[LayerShape], delta: Matrices) -> None:
    for layer in layers:
        if layer.name not in delta:
            raise ValueError(f"the constraint covers layer {layer.name!r}, the displacement has {sorted(delta)}")
        if delta[layer.name].shape[-2:] != (layer.d_out, layer.d_in):
            shape = tuple(delta[layer.name].shape)
            raise ValueError(f"layer {layer.name!r}: expected (…, {layer.d_out}, {layer.d_in}), got {shape}")
    unknown = sorted(set(delta) - {layer.name for layer in layers})
    if unknown:
        raise ValueError(f"the constraint knows no layers {unknown}; it covers {[layer.name for layer in layers]}")


def _save(
    path: str | Path,
    kind: str,
    blocks: Sequence[NullBlock | EllipsoidBlock],
    numbers: dict[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        own = (
            {"removed": block.removed, "energy": block.energy, "threshold": block.threshold}
            if isinstance(block, NullBlock)
            else {"curvature": block.curvature}
        )
        tensors |= {f"{i}.{name}": t for name, t in own.items()}
    basis_tensors, header = pack_bases([block.basis for block in blocks])
    save_tensors(path, kind, tensors | basis_tensors, {"bases": header, "numbers": json.dumps(numbers)})


def _load(path: str | Path, kind: str) -> tuple[list[tuple[Basis, dict[str, Tensor]]], dict[str, Any]]:
    tensors, meta = load_tensors(path, kind)
    with parsing(path):
        bases = unpack_bases(tensors, meta["bases"])
        own = [
            {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            for i in range(len(bases))
        ]
        return list(zip(bases, own, strict=True)), json.loads(meta["numbers"])
