"""Products with an exact curvature matrix, from what one pass over the data leaves behind.

Vectors are rows (B, p): the chosen layers' W in order, each row-major. Sums over examples, not means.

* `RowGram`: C = Σ r rᵀ over gradient rows r = vec(Σ_t g_t a_tᵀ); where the weight is used once an example
  the row is the pair (g, a), so that products need neither autograd nor p numbers a row.
* `KroneckerSum`: C = Σ_n S_n ⊗ a_n a_nᵀ, the Hessian of one layer whose weight is used once an example.
* `AutogradProduct`: nothing stored, every product is a pass over the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from curvlab.capture import Data, run, shaped, split, to_device
from curvlab.layers import LayerShape, MatrixLayer, flatten, unflatten
from curvlab.losses import Loss
from curvlab.memory import announce, bytes_of
from curvlab.progress import progress

CHUNK = 1024  # examples (of those stored) worked on at a time
PACK = 512  # fewer, where each is unfolded into its d (d + 1) / 2 pairs: they should stay in the cache


class Product(Protocol):
    """A symmetric matrix known by its products."""

    @property
    def layers(self) -> Sequence[LayerShape]:
        """Whose parameters the matrix is over."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """(B, p) → (B, p)."""

    def trace(self) -> float:
        """tr C."""

    def dense(self) -> Tensor:
        """C (p, p)."""


@dataclass
class OuterRows:
    """Rows g_nk a_nᵀ of a layer whose weight is used once an example: a (N, d_in), g (N, K, d_out)."""

    layer: LayerShape
    a: Tensor
    g: Tensor

    def __len__(self) -> int:
        return len(self.a)

    @cached_property
    def live(self) -> tuple["OuterRows", Tensor, Tensor]:
        """These rows without units that are dead on all examples, and the indices (d, 1), (1, d') of the others."""
        (out,) = (self.g != 0).any(0).any(0).nonzero(as_tuple=True)
        (into,) = (self.a != 0).any(0).nonzero(as_tuple=True)
        shape = replace(self.layer, d_out=len(out), d_in=len(into))
        return OuterRows(shape, self.a[:, into], self.g[..., out]), out[:, None], into[None, :]

    def dot(self, V: Tensor, part: slice) -> Tensor:
        """⟨row, V⟩ for V (B, d_out, d_in): (n, B, K)."""
        u = (self.a[part] @ V.flatten(0, 1).mT).unflatten(1, V.shape[:2])
        return u @ self.g[part].mT

    def combine(self, weights: Tensor, part: slice) -> Tensor:
        """Σ weight · row for weights (n, B, K): (B, d_out, d_in)."""
        u = weights @ self.g[part]
        return (u.flatten(1).mT @ self.a[part]).unflatten(0, u.shape[1:])

    def squared_norm(self) -> float:
        return float((self.g.square().sum((1, 2)) * self.a.square().sum(1)).sum(dtype=torch.float64))

    def rows(self, part: slice) -> Tensor:
        """(n·K, d_out·d_in)."""
        return torch.einsum("nki,nj->nkij", self.g[part], self.a[part]).flatten(0, 1).flatten(1)


@dataclass
class FullRows:
    """Rows written out, for a weight used at several positions: q (N, K, d_out · d_in)."""

    layer: LayerShape
    q: Tensor

    def __len__(self) -> int:
        return len(self.q)

    def dot(self, V: Tensor, part: slice) -> Tensor:
        q = self.q[part]
        return (q.flatten(0, 1) @ V.flatten(1).mT).unflatten(0, q.shape[:2]).mT

    def combine(self, weights: Tensor, part: slice) -> Tensor:
        flat = weights.transpose(0, 1).flatten(1) @ self.q[part].flatten(0, 1)
        return flat.unflatten(1, (self.layer.d_out, self.layer.d_in))

    def squared_norm(self) -> float:
        return sum(float(part.square().sum(dtype=torch.float64)) for part in self.q.split(CHUNK))

    def rows(self, part: slice) -> Tensor:
        return self.q[part].flatten(0, 1)


Rows = OuterRows | FullRows


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of several passes as one (sequences of different lengths have different numbers of rows)."""
    first = parts[0]
    if all(isinstance(part, OuterRows) for part in parts):
        outer = [part for part in parts if isinstance(part, OuterRows)]
        return OuterRows(first.layer, torch.cat([part.a for part in outer]), _stack([part.g for part in outer]))
    return FullRows(first.layer, _stack([_written_out(part) for part in parts]))


def _written_out(rows: Rows) -> Tensor:
    return rows.q if isinstance(rows, FullRows) else torch.einsum("nki,nj->nkij", rows.g, rows.a).flatten(2)


def _stack(parts: list[Tensor]) -> Tensor:
    K = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, K - part.shape[1])) for part in parts])


def _slices(n: int, size: int = CHUNK) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def pack_symmetric(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x_i x_j for i ≤ j: (n, d) → (n, d (d + 1) / 2)."""
    return x.index_select(1, rows).mul_(x.index_select(1, columns))


def unpacked_index(live: Tensor) -> Tensor:
    """For each (i, j), row-major, the place of the pair (min, max) in the packed upper triangle of the live indices.

    Pairs with an index that is not live (d,) get the place after the last.
    """
    (where,) = live.nonzero(as_tuple=True)
    i, j = torch.triu_indices(len(where), len(where), device=live.device)
    index = torch.full((len(live), len(live)), len(i), device=live.device)
    packed = torch.arange(len(i), device=live.device)
    index[where[i], where[j]] = packed
    index[where[j], where[i]] = packed
    return index


def kronecker_sum(a: Tensor, packed_s: Callable[[slice], Tensor], live_out: Tensor) -> Tensor:
    """Σ_n S_n ⊗ a_n a_nᵀ, (d_out·d_in)² row-major, as one matrix product of the symmetric halves.

    Args:
        a: (N, d_in); inputs that are zero on all examples (dead units) are left out of the product.
        packed_s: upper triangles of S_n over the live outputs, (n, d (d + 1) / 2), for a slice of the examples.
        live_out: (d_out,) which outputs have curvature on any example.
    """
    live_in = (a != 0).any(0)
    live = a if bool(live_in.all()) else a[:, live_in]
    d_out, d_in = len(live_out), len(live_in)
    i, j = torch.triu_indices(live.shape[1], live.shape[1], device=a.device)
    pairs = int(live_out.sum())
    pairs = pairs * (pairs + 1) // 2
    halves = a.new_zeros(pairs + 1, len(i) + 1)  # the last row and column stay zero, for what is not live
    inner = halves[:-1, :-1]
    for part in progress(_slices(len(a), PACK), "assembling"):
        inner.addmm_(packed_s(part).mT, pack_symmetric(live[part], i, j))
    wide = halves.index_select(1, unpacked_index(live_in).flatten()).unflatten(1, (d_in, d_in))
    full = a.new_empty(d_out, d_in, d_out, d_in)
    for row, places in enumerate(unpacked_index(live_out)):
        full[row] = wide.index_select(0, places).transpose(0, 1)
    return full.flatten(0, 1).flatten(1)


@dataclass
class RowGram:
    """C = Σ r rᵀ; a row is the concatenation of its layers' rows."""

    rows: Sequence[Rows]

    @property
    def layers(self) -> Sequence[LayerShape]:
        return [rows.layer for rows in self.rows]

    @property
    def _like(self) -> Tensor:
        first = self.rows[0]
        return first.a if isinstance(first, OuterRows) else first.q

    def matmat(self, vectors: Tensor) -> Tensor:
        matrices = unflatten(self.layers, vectors.to(self._like))
        out = {name: torch.zeros_like(V) for name, V in matrices.items()}
        # dead units take no part in a product
        used = [rows.live if isinstance(rows, OuterRows) else (rows, None, None) for rows in self.rows]
        inner = [
            matrices[rows.layer.name] if i is None else matrices[rows.layer.name][:, i, j].contiguous()
            for rows, i, j in used
        ]
        sums = [torch.zeros_like(V) for V in inner]
        for part in _slices(len(self.rows[0])):
            weights = torch.stack([rows.dot(V, part) for (rows, _, _), V in zip(used, inner, strict=True)]).sum(0)
            for (rows, _, _), total in zip(used, sums, strict=True):
                total += rows.combine(weights, part)
        for (rows, i, j), total in zip(used, sums, strict=True):
            out[rows.layer.name][(slice(None), i, j) if i is not None else slice(None)] = total
        return flatten(self.layers, out)

    def trace(self) -> float:
        return sum(rows.squared_norm() for rows in self.rows)

    def dense(self) -> Tensor:
        p = sum(layer.size for layer in self.layers)
        announce_dense(p, self._like)
        if len(self.rows) == 1:
            return self._block(self.rows[0], self.rows[0])
        C = self._like.new_empty(p, p)
        starts = torch.tensor([0] + [layer.size for layer in self.layers]).cumsum(0).tolist()
        for i, first in enumerate(self.rows):
            for j, second in enumerate(self.rows[i:], start=i):
                block = self._block(first, second)
                C[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block
                C[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = block.mT
        return C

    def _block(self, first: Rows, second: Rows) -> Tensor:
        if first is second and isinstance(first, OuterRows):
            live = (first.g != 0).any(0).any(0)
            g = first.g[..., live]
            i, j = torch.triu_indices(g.shape[2], g.shape[2], device=g.device)
            upper = i * g.shape[2] + j

            def packed(part: slice) -> Tensor:
                return (g[part].mT @ g[part]).flatten(1).index_select(1, upper)

            return kronecker_sum(first.a, packed, live)
        C = self._like.new_zeros(first.layer.size, second.layer.size)
        if isinstance(first, OuterRows) and isinstance(second, OuterRows):
            pairs = C.new_zeros(first.layer.d_in * second.layer.d_in, first.layer.d_out * second.layer.d_out)
            for part in _slices(len(first)):
                aa = torch.einsum("ni,nj->nij", first.a[part], second.a[part]).flatten(1)
                pairs.addmm_(aa.mT, (first.g[part].mT @ second.g[part]).flatten(1))
            shape = (first.layer.d_in, second.layer.d_in, first.layer.d_out, second.layer.d_out)
            return pairs.reshape(shape).permute(2, 0, 3, 1).flatten(0, 1).flatten(1)
        for part in _slices(len(first)):
            C.addmm_(first.rows(part).mT, second.rows(part))
        return C


@dataclass
class KroneckerSum:
    """C = Σ_n S_n ⊗ a_n a_nᵀ (row-major): a (N, d_in), s (N, d_out, d_out) symmetric."""

    layer: LayerShape
    a: Tensor
    s: Tensor

    @property
    def layers(self) -> Sequence[LayerShape]:
        return [self.layer]

    def matmat(self, vectors: Tensor) -> Tensor:
        V = unflatten(self.layers, vectors.to(self.a))[self.layer.name]
        out = torch.zeros_like(V)
        for part in _slices(len(self.a)):
            a = self.a[part]
            u = (a @ V.flatten(0, 1).mT).unflatten(1, V.shape[:2]) @ self.s[part]
            out += (u.flatten(1).mT @ a).unflatten(0, V.shape[:2])
        return out.flatten(1)

    def trace(self) -> float:
        traces = self.s.diagonal(dim1=1, dim2=2).sum(1)
        return float((traces * self.a.square().sum(1)).sum(dtype=torch.float64))

    def dense(self) -> Tensor:
        announce_dense(self.layer.size, self.a)
        live = (self.s != 0).any(0).any(0)
        s = self.s if bool(live.all()) else self.s[:, live][:, :, live]
        i, j = torch.triu_indices(s.shape[1], s.shape[1], device=s.device)
        upper = i * s.shape[1] + j
        return kronecker_sum(self.a, lambda part: s[part].flatten(1).index_select(1, upper), live)


@dataclass
class AutogradProduct:
    """Products by passes over the data: the GGN by jvp and vjp, the Hessian by jvp of the gradient."""

    model: nn.Module
    loss: Loss
    data: Data
    layers: Sequence[MatrixLayer]
    hessian: bool
    micro_batch: int | None = None
    vectors_at_once: int = 16
    known_trace: float | None = None

    @torch.no_grad()  # the other parameters may ask for gradients
    def matmat(self, vectors: Tensor) -> Tensor:
        parameters = {
            name: p.detach()
            for layer in self.layers
            for name, p in zip(layer.parameter_names, layer.parameters(), strict=True)
        }
        like = next(iter(parameters.values()))
        out = torch.zeros(vectors.shape, dtype=like.dtype, device=like.device)
        for batch in progress(split(self.data, self.micro_batch, self.model), f"products with {len(vectors)} vectors"):
            inputs, targets = to_device(batch.inputs, like.device), batch.targets.to(like.device)

            def product(v: Tensor, inputs=inputs, targets=targets) -> Tensor:  # type: ignore[no-untyped-def]
                tangent = self._tensors(v)

                def outputs(p: dict[str, Tensor]) -> Tensor:
                    return run(_Call(self.model, p), inputs)

                def total(p: dict[str, Tensor]) -> Tensor:
                    return self.loss.value(*shaped(outputs(p), targets)).sum()

                if self.hessian:
                    return self._vector(jvp(grad(total), (parameters,), (tangent,))[1])
                f, pullback = vjp(outputs, parameters)[:2]
                df = jvp(outputs, (parameters,), (tangent,))[1]
                f3, y3 = shaped(f, targets)
                (result,) = pullback(self.loss.hessian_product(f3, y3, df.reshape(f3.shape)).reshape(f.shape))
                return self._vector(result)

            out += vmap(product, chunk_size=self.vectors_at_once)(vectors.to(like))
        return out

    def _tensors(self, v: Tensor) -> dict[str, Tensor]:
        matrices = unflatten(self.layers, v)
        return {
            name: t
            for layer in self.layers
            for name, t in zip(layer.parameter_names, layer.tensors(matrices[layer.name]), strict=True)
        }

    def _vector(self, tensors: dict[str, Tensor]) -> Tensor:
        return flatten(
            self.layers,
            {layer.name: layer.matrix([tensors[name] for name in layer.parameter_names]) for layer in self.layers},
        )

    def trace(self) -> float:
        """As known from an earlier pass, or else a product a parameter."""
        if self.known_trace is not None:
            return self.known_trace
        return float(self.dense().detach().diagonal().sum(dtype=torch.float64))

    def dense(self) -> Tensor:
        like = self.layers[0].parameters()[0]
        p = sum(layer.size for layer in self.layers)
        announce_dense(p, like)
        blocks = torch.eye(p, dtype=like.dtype, device=like.device).split(64 * self.vectors_at_once)
        C = torch.cat([self.matmat(block) for block in blocks])
        return (C + C.mT) / 2


@dataclass
class _Call:
    """`model` called with other parameters."""

    model: nn.Module
    parameters: dict[str, Tensor]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return functional_call(self.model, self.parameters, args, kwargs)


def announce_dense(p: int, like: Tensor) -> None:
    announce(
        f"dense curvature of {p:,} parameters",
        2 * bytes_of(p, p, dtype=like.dtype),
        "products and leading eigenpairs: .matmat, .spectrum(gamma=…) or .spectrum(k=…)",
        like.device,
    )
