"""K-FAC: G ≈ A ⊗ S, from sums of a aᵀ and g gᵀ (paper, section 3).

Statistics are sums with their counts, so that adding them is mini-batching, streaming (Algorithm 2) and
data-parallel reduction at once: `merge`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.capture import Data, Pass
from curvlab.curvature.gather import Sums, Vectors, Work, count, gather, scale_of
from curvlab.curvature.grams import add_gram, mirror
from curvlab.curvature.origin import Origin
from curvlab.curvature.pixels import PixelGram
from curvlab.krylov import BlockLanczos
from curvlab.layers import Conv2dLayer, LayerShape, MatrixLayer
from curvlab.losses import Labels, Scale
from curvlab.spectrum import Block, KroneckerBasis, Spectrum, eigh
from curvlab.storage import load_tensors, parsing, require_shape, require_sum_of_squares, save_tensors

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
        origin: of which model, at which weights; None where parts of several origins were merged.
    """

    factors: dict[str, Factors]
    labels: Labels
    sharing: Sharing
    origin: Origin | None = None

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
        checkpoint: str | Path | None = None,
        distributed: bool = False,
    ) -> "KFAC":
        """One pass over `data`, all layers at once; sums in float32 or better, on each layer's own device.

        All weights are read once more, for the origin: on a CPU 0.1 s for 100 million in float32.

        Args:
            model, loss, data: see `curvlab.capture` and `curvlab.losses`.
            layers: names or patterns (`find_layers`).
            labels: "exact" (H_ŷ in full: one backward pass a class), "model" (`draws` labels drawn from the
                model, keyed by `seed`, example and position) or "data" (the empirical Fisher).
            sharing: see the class.
            bias: join each layer's bias to its W.
            first_example: index of the first example, for a worker that holds a shard of the data.
            micro_batch: examples of one forward pass; None as many as are reasonable (`curvlab.capture.split`).
            checkpoint: a file for the sums so far. A fit that was interrupted continues from it when it is started
                again with the same arguments, and ends with the same sums, bit for bit; a finished one is read back.
            distributed: share the work with the other processes of torchrun (`curvlab.distributed`); all of them get
                the sums over all. Each keeps its own checkpoint, of the name given and ".0of2", ".1of2", ….

        Raises:
            ValueError: what `curvlab.capture.passes` refuses, or a checkpoint of another fit.
            MemoryError: factors or outputs that cannot fit.
        """
        if sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing must be 'expand' or 'reduce', got {sharing!r}")
        if labels is None:
            raise ValueError("labels must be 'exact', 'model' or 'data', got None")
        work = Work.of(
            model, loss, data, layers, labels, draws, seed, bias, first_example, micro_batch, checkpoint, distributed
        )
        origin = work.origin
        sums = work.zeros("K-FAC factors", lambda layer: {"A": (layer.d_in,) * 2, "S": (layer.d_out,) * 2})
        adder = _Adder(work.layers, sharing)
        identity = {"kind": "kfac", "sharing": sharing}
        gather(work, sums, adder.add, desc="K-FAC factors", identity=identity, finish=adder.finish)
        factors = {
            layer.name: Factors(
                layer.shape, sums[f"{layer.name}/A"], sums[f"{layer.name}/S"], scale_of(sums, layer.name)
            )
            for layer in work.layers
        }
        return cls(factors, labels, sharing, origin)

    @staticmethod
    def merge(*parts: "KFAC", weights: Sequence[float] | None = None) -> "KFAC":
        """Statistics of several fits as one.

        Args:
            weights: None adds the sums, so that every position counts alike (shards, or Algorithm 2 by tokens);
                numbers mix the *means*, part i with share weights[i] / Σ weights, however many tokens it saw.

        Raises:
            ValueError: no parts, parts over different layers, labels or sharing, or weights that are no shares; of
                means, a part that has none.
        """
        if not parts:
            raise ValueError("nothing to merge: no parts were given")
        first = parts[0]
        for part in parts:
            if (part.labels, part.sharing) != (first.labels, first.sharing):
                raise ValueError("parts with different labels or sharing cannot be merged")
            if [f.layer for f in part.factors.values()] != [f.layer for f in first.factors.values()]:
                raise ValueError("parts over different layers cannot be merged")
        if weights is not None:
            if len(weights) != len(parts) or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
                raise ValueError(
                    f"weights must be {len(parts)} numbers ≥ 0 with a positive, finite sum, got {list(weights)}"
                )
            for i, part in enumerate(parts):
                empty = [n for n, f in part.factors.items() if min(f.scale.terms, f.scale.positions) < 1]
                if empty:
                    raise ValueError(f"part {i} has no loss terms or positions at {empty}, hence no means to mix")
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
        origin = first.origin if all(part.origin == first.origin for part in parts) else None
        return KFAC(merged, first.labels, first.sharing, origin)

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
        """Write the statistics to a safetensors file, with a JSON header that says where they come from."""
        tensors = {f"{n}/A": f.a_sum for n, f in self.factors.items()}
        tensors |= {f"{n}/S": f.s_sum for n, f in self.factors.items()}
        header = [{"layer": asdict(f.layer), "scale": asdict(f.scale)} for f in self.factors.values()]
        meta = {"labels": self.labels, "sharing": self.sharing, "factors": json.dumps(header)}
        save_tensors(path, "kfac", tensors, meta | {"origin": Origin.pack(self.origin)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "KFAC":
        """Read what `save` wrote.

        Args:
            model: whose statistics these should be, at its present weights.

        Raises:
            ValueError: a damaged or foreign file, or statistics of another model or of weights that have moved since
                (any of the model's, not these layers' alone).
        """
        tensors, meta = load_tensors(path, "kfac")
        factors = {}
        with parsing(path):
            for entry in json.loads(meta["factors"]):
                layer = LayerShape(**entry["layer"])
                a_sum, s_sum = (
                    gram_of(tensors, f"{layer.name}/{side}", d) for side, d in (("A", layer.d_in), ("S", layer.d_out))
                )
                factors[layer.name] = Factors(layer, a_sum, s_sum, Scale(**entry["scale"]))
            origin = Origin.unpack(meta, model, [f.layer for f in factors.values()])
            return cls(factors, meta["labels"], meta["sharing"], origin)  # type: ignore[arg-type]


def gram_of(tensors: dict[str, Tensor], name: str, d: int) -> Tensor:
    """A sum Σ x xᵀ (d, d) among the tensors of a file.

    Raises:
        KeyError: it is missing.
        ValueError: it is of another shape, or its diagonal cannot be a sum of squares.
    """
    found = tensors[name]
    require_shape(name, found, (d, d))
    require_sum_of_squares(name, found.diagonal())
    return found


class _Adder:
    """How a pass is added to the sums: a aᵀ and g gᵀ, position by position or example by example."""

    def __init__(self, layers: Sequence[MatrixLayer], sharing: Sharing) -> None:
        self.layers, self.sharing = layers, sharing
        self.pixels: dict[tuple[str, torch.Size], PixelGram | None] = {}

    def add(self, sums: Sums, pass_: Pass, vectors: Vectors) -> None:
        for layer in self.layers:
            pixels = self._pixels(pass_, layer)
            if pixels is not None:
                x = pass_.raw_input(layer)
                pixels.add(sums, x)
                count(sums, layer, Scale(pass_.terms, len(x) * pixels.positions))
                continue
            a = pass_.inputs(layer, packed=self.sharing == "expand")
            positions = a.shape[0] * a.shape[1]
            if self.sharing == "reduce":
                positions = pass_.used(a)
                a = a.sum(1, keepdim=True) / pass_.positions(a)
            add_gram(sums[f"{layer.name}/A"], a)
            count(sums, layer, Scale(pass_.terms, positions))
        for by_layer in pass_.gradients(vectors, packed=self.sharing == "expand"):
            for name, g in by_layer.items():
                add_gram(sums[f"{name}/S"], g.sum(1, keepdim=True) if self.sharing == "reduce" else g)

    def _pixels(self, pass_: Pass, layer: MatrixLayer) -> PixelGram | None:
        """For a convolution, where overlapping patches make pixels the cheaper way."""
        if not isinstance(layer, Conv2dLayer) or self.sharing == "reduce" or pass_.mask is not None:
            return None
        x = pass_.raw_input(layer)
        key = (layer.name, x.shape[1:])
        if key not in self.pixels:
            pays = PixelGram.pays(layer, x)
            self.pixels[key] = PixelGram(layer, tuple(x.shape[1:]), x.device) if pays else None
        return self.pixels[key]

    def finish(self, sums: Sums) -> None:
        for layer in self.layers:
            if isinstance(layer, Conv2dLayer):
                PixelGram.fold(layer, sums)
            mirror(sums[f"{layer.name}/A"])
            mirror(sums[f"{layer.name}/S"])


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
