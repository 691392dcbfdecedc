"""K-FAC: G ≈ A ⊗ S, from sums of a aᵀ and g gᵀ (paper, section 3).

Statistics are sums with their counts, so that adding them is mini-batching, streaming (Algorithm 2) and
data-parallel reduction at once: `merge`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.capture import Data, columns, passes
from curvlab.krylov import BlockLanczos
from curvlab.layers import Conv2dLayer, LayerShape, find_layers
from curvlab.losses import Labels, Scale, as_loss
from curvlab.memory import announce, bytes_of
from curvlab.spectrum import Block, KroneckerBasis, Spectrum, eigh
from curvlab.storage import load_tensors, save_tensors

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Factors:
    """Sums of one layer: a_sum = Σ a aᵀ (d_in, d_in) over positions, s_sum = Σ g gᵀ (d_out, d_out)."""

    layer: LayerShape
    a_sum: Tensor
    s_sum: Tensor
    scale: Scale

    @property
    def A(self) -> Tensor:
        """E[a aᵀ] over positions (reduce: over examples)."""
        return self.a_sum / self.scale.positions

    @property
    def S(self) -> Tensor:
        """Σ g gᵀ per loss term, so that A ⊗ S approximates the GGN of the mean loss."""
        return self.s_sum / self.scale.terms


@dataclass(frozen=True)
class KFAC:
    """K-FAC factors of chosen layers.

    Attributes:
        factors: by layer name.
        labels: which labels the pseudo-gradients g were taken at.
        sharing: how a weight used at several positions is treated (Eschenhagen et al. 2023): "expand" takes
            positions as independent, "reduce" averages a and sums g over an example's positions first.
    """

    factors: dict[str, Factors]
    labels: Labels
    sharing: Sharing

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: Any,
        data: Data,
        layers: str | Sequence[str],
        *,
        labels: Labels,
        draws: int = 1,
        seed: int = 0,
        sharing: Sharing = "expand",
        bias: bool = False,
        first_example: int = 0,
        micro_batch: int | None = None,
    ) -> "KFAC":
        """One pass over `data`, all layers at once.

        Args:
            model, loss, data: see `curvlab.capture` and `curvlab.losses`.
            layers: names or patterns (`find_layers`).
            labels: "exact" (H_ŷ in full: one backward pass a class), "model" (`draws` labels drawn from the
                model, keyed by `seed`, example and position) or "data" (the empirical Fisher).
            sharing: see the class.
            bias: join each layer's bias to its W.
            first_example: index of the first example, for a worker that holds a shard of the data.
        """
        if sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing must be 'expand' or 'reduce', got {sharing!r}")
        loss = as_loss(loss)
        chosen = find_layers(model, layers, bias)
        sums: dict[str, Factors] = {}
        for layer in chosen:
            like = layer.parameters()[0]
            dtype = torch.promote_types(like.dtype, torch.float32)
            needed = bytes_of(layer.d_in, layer.d_in, dtype=dtype) + bytes_of(layer.d_out, layer.d_out, dtype=dtype)
            announce(f"K-FAC factors of {layer.name}", needed, "fewer layers at a time", like.device)
            zeros = torch.zeros(1, dtype=dtype, device=like.device)
            a_sum, s_sum = (zeros.new_zeros(d, d) for d in (layer.d_in, layer.d_out))
            sums[layer.name] = Factors(layer.shape, a_sum, s_sum, Scale())
        pixels: dict[tuple[str, torch.Size], PixelGram] = {}
        for pass_ in passes(
            model,
            loss,
            data,
            chosen,
            desc="K-FAC factors",
            first_example=first_example,
            micro_batch=micro_batch,
        ):
            for layer in chosen:
                old = sums[layer.name]
                if isinstance(layer, Conv2dLayer) and sharing == "expand" and pass_.mask is None:
                    x = pass_.raw_input(layer)
                    key = (layer.name, x.shape[1:])
                    if key not in pixels and PixelGram.pays(layer, x):
                        pixels[key] = PixelGram(layer, x, old.a_sum)
                    if key in pixels:
                        gram = pixels[key]
                        gram.add(x)
                        counted = Scale(pass_.terms, len(x) * gram.positions)
                        sums[layer.name] = replace(old, scale=old.scale + counted)
                        continue
                a = pass_.inputs(layer)
                counted = pass_.scale(layer, a)
                if sharing == "reduce":
                    counted = Scale(counted.terms, pass_.used(a))
                    a = a.sum(1, keepdim=True) / pass_.positions(a)
                add_gram(old.a_sum, a)
                sums[layer.name] = replace(old, scale=old.scale + counted)
            for gradients in pass_.gradients(columns(pass_, loss, labels, draws, seed)):
                for name, g in gradients.items():
                    add_gram(sums[name].s_sum, g.sum(1, keepdim=True) if sharing == "reduce" else g)
        for (name, _), gram in pixels.items():
            gram.fold(sums[name].a_sum)
        return cls(sums, labels, sharing)

    @staticmethod
    def merge(*parts: "KFAC", weights: Sequence[float] | None = None) -> "KFAC":
        """Statistics of several fits as one.

        Args:
            weights: None adds the sums, so that every position counts alike (shards, or Algorithm 2 by tokens);
                numbers mix the *means*, part i with share weights[i] / Σ weights, however many tokens it saw.

        Raises:
            ValueError: parts over different layers, labels or sharing, or weights that are no shares.
        """
        first = parts[0]
        for part in parts:
            if (part.labels, part.sharing) != (first.labels, first.sharing):
                raise ValueError("parts with different labels or sharing cannot be merged")
            if [f.layer for f in part.factors.values()] != [f.layer for f in first.factors.values()]:
                raise ValueError("parts over different layers cannot be merged")
        if weights is not None and (len(weights) != len(parts) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(f"weights must be {len(parts)} numbers ≥ 0 with a positive sum, got {list(weights)}")
        merged = {}
        for name, own in first.factors.items():
            these = [part.factors[name] for part in parts]
            scale = sum((f.scale for f in these), start=Scale())
            if weights is None:
                a_sum = torch.stack([f.a_sum for f in these]).sum(0)
                s_sum = torch.stack([f.s_sum for f in these]).sum(0)
            else:
                shares = [w / sum(weights) for w in weights]
                a_sum = torch.stack([w * f.A for w, f in zip(shares, these, strict=True)]).sum(0) * scale.positions
                s_sum = torch.stack([w * f.S for w, f in zip(shares, these, strict=True)]).sum(0) * scale.terms
            merged[name] = Factors(own.layer, a_sum, s_sum, scale)
        return KFAC(merged, first.labels, first.sharing)

    def spectrum(self, gamma: float | None = None, seed: int = 0) -> Spectrum:
        """U_in ⊗ U_out with eigenvalues λ_out λ_inᵀ, one block a layer; computed in float64.

        Args:
            gamma: only the eigenvectors that a null space at this energy share removes (a staircase in the two
                factors' eigenvalues), by Krylov iteration where that is cheaper than full decompositions.
        """
        if gamma is not None and not 0 < gamma < 1:
            raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma}")
        return Spectrum(tuple(kronecker_block(f.layer, f.A, f.S, gamma, seed) for f in self.factors.values()))

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file."""
        tensors = {f"{n}/A": f.a_sum for n, f in self.factors.items()}
        tensors |= {f"{n}/S": f.s_sum for n, f in self.factors.items()}
        header = [{"layer": asdict(f.layer), "scale": asdict(f.scale)} for f in self.factors.values()]
        meta = {"labels": self.labels, "sharing": self.sharing, "factors": json.dumps(header)}
        save_tensors(path, "kfac", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> "KFAC":
        """Read what `save` wrote; ValueError for a damaged or foreign file."""
        tensors, meta = load_tensors(path, "kfac")
        factors = {}
        for entry in json.loads(meta["factors"]):
            layer = LayerShape(**entry["layer"])
            a_sum, s_sum = tensors[f"{layer.name}/A"], tensors[f"{layer.name}/S"]
            factors[layer.name] = Factors(layer, a_sum, s_sum, Scale(**entry["scale"]))
        return cls(factors, meta["labels"], meta["sharing"])  # type: ignore[arg-type]


PIXELS = 4096  # of an image at most, for `PixelGram`: 64 MiB in float32


class PixelGram:
    """Σ a aᵀ of a convolution from one product over its input's pixels, folded into patches at the end.

    Overlapping patches share pixels: (C·H·W)² multiply–adds an example instead of T · d_in², in one large product.
    """

    def __init__(self, layer: Conv2dLayer, x: Tensor, like: Tensor) -> None:
        self.layer = layer
        self.places = layer.places(x[:1])
        pixels = layer.pixels(x[:1]).shape[1]
        self.gram = like.new_zeros(pixels, pixels)

    @staticmethod
    def pays(layer: Conv2dLayer, x: Tensor) -> bool:
        """Whether it is the cheaper way (small products an example run at half the speed of a large one)."""
        return x[0].numel() <= PIXELS and x[0].numel() ** 2 < 2 * layer.places(x[:1]).shape[1] * layer.d_in**2

    @property
    def positions(self) -> int:
        return self.places.shape[1]

    def add(self, x: Tensor) -> None:
        """Another batch (N, C, H, W), of the same size of images."""
        pixels = self.layer.pixels(x).to(self.gram.dtype)
        self.gram.addmm_(pixels.mT, pixels)

    def fold(self, total: Tensor) -> None:
        """total += Σ_t of the entries that position t touches."""
        for index in self.places.mT:
            total.add_(self.gram[index[:, None], index])


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += Σ x xᵀ over the examples and positions of x (N, T, d)."""
    x = x.to(total.dtype)
    if x.shape[1] > x.shape[2]:  # many positions: small products an example
        total.addbmm_(x.mT, x)
    else:
        flat = x.movedim(-1, 0).flatten(1)
        total.addmm_(flat, flat.mT)


def kronecker_block(layer: LayerShape, A: Tensor, S: Tensor, gamma: float | None, seed: int) -> Block:
    """A ⊗ S in its eigenbasis; with γ, only as far down as its null space needs."""
    total = float(A.diagonal().sum(dtype=torch.float64)) * float(S.diagonal().sum(dtype=torch.float64))
    precision = torch.finfo(A.dtype).eps
    if gamma is not None:
        staircase = _staircase(layer, A.double(), S.double(), gamma * total, seed)
        if staircase is not None:
            basis, values, floor = staircase
            return Block(basis, values, total, floor=floor, precision=precision)
    (values_out, u_out), (values_in, u_in) = (eigh(factor.double(), semidefinite=True) for factor in (S, A))
    values = values_out[:, None] * values_in[None, :]
    return Block(KroneckerBasis(layer, u_out, u_in), values, float(values.sum()), precision=precision)


LANCZOS_FROM = 1024  # below, a full decomposition of a factor takes a fraction of a second
LANCZOS_UNTIL = 0.25  # of the dimension: a larger Krylov space costs as much as a full decomposition


class _Leading:
    """The leading eigenpairs of one PSD factor, a growing number of them."""

    def __init__(self, factor: Tensor, seed: int) -> None:
        self.factor, self.dim = factor, len(factor)
        self.lanczos = (
            BlockLanczos(lambda rows: rows @ factor, self.dim, dtype=factor.dtype, device=factor.device, seed=seed)
            if self.dim >= LANCZOS_FROM
            else None
        )
        self.grow(32)

    def grow(self, count: int) -> None:
        """At least `count` pairs, by a full decomposition once that is the cheaper way."""
        limit = LANCZOS_UNTIL * self.dim
        if self.lanczos is not None and count < limit:
            pairs = self.lanczos.solve(lambda values: len(values) >= count, limit=limit)
            if self.lanczos.size <= limit:
                self.values, self.vectors = pairs.values.to(self.factor).clamp_min(0), pairs.vectors
                return
        self.values, self.vectors = eigh(self.factor, semidefinite=True)

    @property
    def complete(self) -> bool:
        return len(self.values) == self.dim


def _staircase(
    layer: LayerShape, A: Tensor, S: Tensor, energy: float, seed: int
) -> tuple[KroneckerBasis, Tensor, float] | None:
    """The eigenpairs above the level at which the products' energy reaches `energy`; None if full ones are cheaper."""
    if max(len(A), len(S)) < LANCZOS_FROM:
        return None
    inner, outer = _Leading(A, seed), _Leading(S, seed)
    while True:
        values = outer.values[:, None] * inner.values[None, :]
        # no product with an unknown eigenvalue exceeds the level
        level_in = 0.0 if inner.complete else float(outer.values[0] * inner.values[-1])
        level_out = 0.0 if outer.complete else float(outer.values[-1] * inner.values[0])
        level = max(level_in, level_out)
        if inner.complete and outer.complete:
            break
        known = values[values > level * (1 + 1e-6)]
        above = known.sort(descending=True).values
        if len(above) and float(above.sum()) >= energy:
            cut = above[int(torch.searchsorted(above.cumsum(0), energy).clamp(max=len(above) - 1))]
            if float(cut) * (1 - 1e-3) > level:  # clear of the level, ties included
                break
        slower = inner if outer.complete or (not inner.complete and level_in >= level_out) else outer
        slower.grow(2 * len(slower.values))
    return KroneckerBasis(layer, outer.vectors, inner.vectors), values, level
