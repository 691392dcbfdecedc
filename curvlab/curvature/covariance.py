"""Activation covariance A = E[a aᵀ]: the curvature I ⊗ A of Adam-NSCL and AlphaEdit (uncentred)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, Pass
from curvlab.curvature.gather import Sums, Vectors, Work, count, gather, scale_of
from curvlab.curvature.grams import add_gram, mirror
from curvlab.curvature.kfac import KFAC, gram_of
from curvlab.curvature.origin import Origin
from curvlab.layers import LayerShape
from curvlab.losses import Labels, Scale
from curvlab.spectrum import Block, KroneckerBasis, Spectrum, eigh
from curvlab.storage import load_tensors, parsing, require_sum_of_squares, save_tensors


@dataclass(frozen=True)
class Moments:
    """Sums of one layer: a_sum = Σ a aᵀ (d_in, d_in), and Σ ‖g‖² where labels were given."""

    layer: LayerShape
    a_sum: Tensor
    g_norm: float
    scale: Scale

    @property
    def A(self) -> Tensor:
        """E[a aᵀ] over positions."""
        return self.a_sum / self.scale.positions


@dataclass(frozen=True)
class Covariance:
    """Activation covariances of chosen layers.

    Attributes:
        moments: by layer name.
        labels: None for a forward-only fit; else the labels behind tr(S), which gives the loss' units.
        origin: of which model, at which weights; None where parts of several origins were merged.
    """

    moments: dict[str, Moments]
    labels: Labels | None
    origin: Origin | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: Any,
        data: Data,
        layers: str | Sequence[str],
        *,
        labels: Labels | None = None,
        draws: int = 1,
        seed: int = 0,
        bias: bool = False,
        first_example: int = 0,
        micro_batch: int | None = None,
        checkpoint: str | Path | None = None,
        distributed: bool = False,
    ) -> "Covariance":
        """One forward pass over `data`; with `labels` also backward, to scale by tr(S)/d_out for an ellipsoid.

        The other arguments are those of `KFAC.fit`.
        """
        work = Work.of(
            model, loss, data, layers, labels, draws, seed, bias, first_example, micro_batch, checkpoint, distributed
        )
        origin = work.origin
        sums = work.zeros("activation covariance", lambda layer: {"A": (layer.d_in, layer.d_in)})
        sums |= {f"{layer.name}/g": torch.zeros((), dtype=torch.float64, device=layer.device) for layer in work.layers}

        def add(sums: Sums, pass_: Pass, vectors: Vectors) -> None:
            for layer in work.layers:
                a = pass_.inputs(layer, packed=True)
                add_gram(sums[f"{layer.name}/A"], a)
                count(sums, layer, Scale(pass_.terms, a.shape[0] * a.shape[1]))
            for by_layer in pass_.gradients(vectors, packed=True):
                for name, g in by_layer.items():
                    sums[f"{name}/g"] += g.double().square().sum()

        def finish(sums: Sums) -> None:
            for layer in work.layers:
                mirror(sums[f"{layer.name}/A"])

        gather(work, sums, add, desc="activation covariance", identity={"kind": "covariance"}, finish=finish)
        moments = {}
        for layer in work.layers:
            g_norm = float(sums[f"{layer.name}/g"])
            moments[layer.name] = Moments(layer.shape, sums[f"{layer.name}/A"], g_norm, scale_of(sums, layer.name))
        return cls(moments, labels, origin)

    @classmethod
    def of(cls, kfac: KFAC) -> "Covariance":
        """The covariance behind K-FAC factors, with their tr(S): no pass of its own."""
        if kfac.sharing != "expand":
            raise ValueError("K-FAC's factors with sharing='reduce' are means over positions, no covariance of inputs")
        moments = {
            name: Moments(f.layer, f.a_sum, float(f.s_sum.diagonal().sum(dtype=torch.float64)), f.scale)
            for name, f in kfac.factors.items()
        }
        return cls(moments, kfac.labels, kfac.origin)

    @staticmethod
    def merge(*parts: "Covariance") -> "Covariance":
        """Statistics of several fits as one: sums add.

        Raises:
            ValueError: no parts, or parts with different labels or layers.
        """
        if not parts:
            raise ValueError("nothing to merge: no parts were given")
        first = parts[0]
        for part in parts:
            same = [m.layer for m in part.moments.values()] == [m.layer for m in first.moments.values()]
            if part.labels != first.labels or not same:
                raise ValueError("parts with different labels or layers cannot be merged")
        merged = {}
        for name, own in first.moments.items():
            these = [part.moments[name] for part in parts]
            a_sum = torch.stack([m.a_sum for m in these]).sum(0)
            scale = sum((m.scale for m in these), start=Scale())
            merged[name] = Moments(own.layer, a_sum, sum(m.g_norm for m in these), scale)
        origin = first.origin if all(part.origin == first.origin for part in parts) else None
        return Covariance(merged, first.labels, origin)

    def spectrum(self) -> Spectrum:
        """U_in ⊗ I with eigenvalues 1 λ_inᵀ (times tr(S)/d_out where labels were given); float64."""
        blocks = []
        for m in self.moments.values():
            values, u_in = eigh(m.A.double(), semidefinite=True)
            if self.labels is not None:
                values = values * (m.g_norm / m.scale.terms / m.layer.d_out)
            grid = values.expand(m.layer.d_out, -1)
            precision = torch.finfo(m.A.dtype).eps
            blocks.append(Block(KroneckerBasis(m.layer, None, u_in), grid, float(grid.sum()), precision=precision))
        return Spectrum(tuple(blocks), scaled=self.labels is not None)

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file, with a JSON header that says where they come from."""
        header = [
            {"layer": asdict(m.layer), "scale": asdict(m.scale), "g_norm": m.g_norm} for m in self.moments.values()
        ]
        meta = {"labels": json.dumps(self.labels), "moments": json.dumps(header), "origin": Origin.pack(self.origin)}
        save_tensors(path, "covariance", {name: m.a_sum for name, m in self.moments.items()}, meta)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Covariance":
        """Read what `save` wrote; `model` and errors as in `KFAC.load`."""
        tensors, meta = load_tensors(path, "covariance")
        moments = {}
        with parsing(path):
            for entry in json.loads(meta["moments"]):
                layer = LayerShape(**entry["layer"])
                a_sum, g_norm = gram_of(tensors, layer.name, layer.d_in), float(entry["g_norm"])
                require_sum_of_squares("g_norm", torch.tensor(g_norm))
                moments[layer.name] = Moments(layer, a_sum, g_norm, Scale(**entry["scale"]))
            origin = Origin.unpack(meta, model, [m.layer for m in moments.values()])
            return cls(moments, json.loads(meta["labels"]), origin)
