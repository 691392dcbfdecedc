"""Activation covariance A = E[a aᵀ]: the curvature I ⊗ A of Adam-NSCL and AlphaEdit (uncentred)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, columns, passes
from curvlab.curvature.kfac import add_gram
from curvlab.layers import LayerShape, find_layers
from curvlab.losses import Labels, Scale, as_loss
from curvlab.memory import announce, bytes_of
from curvlab.spectrum import Block, KroneckerBasis, Spectrum, eigh
from curvlab.storage import load_tensors, save_tensors


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
    """

    moments: dict[str, Moments]
    labels: Labels | None

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
    ) -> "Covariance":
        """One forward pass over `data`; with `labels` also backward, to scale by tr(S)/d_out for an ellipsoid.

        The other arguments are those of `KFAC.fit`.
        """
        loss = as_loss(loss)
        chosen = find_layers(model, layers, bias)
        sums: dict[str, Moments] = {}
        for layer in chosen:
            like = layer.parameters()[0]
            dtype = torch.promote_types(like.dtype, torch.float32)
            needed = bytes_of(layer.d_in, layer.d_in, dtype=dtype)
            announce(f"activation covariance of {layer.name}", needed, "fewer layers at a time", like.device)
            zeros = torch.zeros(layer.d_in, layer.d_in, dtype=dtype, device=like.device)
            sums[layer.name] = Moments(layer.shape, zeros, 0.0, Scale())
        for pass_ in passes(
            model, loss, data, chosen, desc="covariance", first_example=first_example, micro_batch=micro_batch
        ):
            for layer in chosen:
                a, old = pass_.inputs(layer), sums[layer.name]
                add_gram(old.a_sum, a)
                sums[layer.name] = replace(old, scale=old.scale + pass_.scale(layer, a))
            vectors = columns(pass_, loss, labels, draws, seed) if labels is not None else ()
            for gradients in pass_.gradients(vectors):
                for name, g in gradients.items():
                    old = sums[name]
                    sums[name] = replace(old, g_norm=old.g_norm + float(g.square().sum(dtype=torch.float64)))
        return cls(sums, labels)

    @staticmethod
    def merge(*parts: "Covariance") -> "Covariance":
        """Statistics of several fits as one: sums add."""
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
        return Covariance(merged, first.labels)

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
        """Write the statistics to a safetensors file."""
        header = [
            {"layer": asdict(m.layer), "scale": asdict(m.scale), "g_norm": m.g_norm} for m in self.moments.values()
        ]
        meta = {"labels": json.dumps(self.labels), "moments": json.dumps(header)}
        save_tensors(path, "covariance", {name: m.a_sum for name, m in self.moments.items()}, meta)

    @classmethod
    def load(cls, path: str | Path) -> "Covariance":
        """Read what `save` wrote; ValueError for a damaged or foreign file."""
        tensors, meta = load_tensors(path, "covariance")
        moments = {}
        for entry in json.loads(meta["moments"]):
            layer = LayerShape(**entry["layer"])
            moments[layer.name] = Moments(layer, tensors[layer.name], entry["g_norm"], Scale(**entry["scale"]))
        return cls(moments, json.loads(meta["labels"]))
