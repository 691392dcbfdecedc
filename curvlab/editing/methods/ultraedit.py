"""UltraEdit (Gu et al. 2025, arXiv 2505.14679): one regularised least squares a layer on normalised gradients."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from curvlab.editing.job import Job, editor, longest
from curvlab.editing.rank_one import Factors, rank_one_factors
from curvlab.editing.running import Running
from curvlab.editing.training import Curve
from curvlab.editing.wording import Wording
from curvlab.layers import LayerShape, MatrixLayer
from curvlab.storage import load_tensors, save_tensors

_KIND = "running statistics of UltraEdit"


class Lifelong:
    """Running statistics of inputs h and output gradients v by layer: what a later edit continues from.

    Give the same object to successive edits of one model; each takes its requests in once it has succeeded. Undoing
    an edit does not take them out again.
    """

    def __init__(self) -> None:
        self.layers: dict[str, tuple[Running, Running]] = {}

    def __repr__(self) -> str:
        seen = {name: h.n for name, (h, _) in self.layers.items()}
        return f"Lifelong(positions={seen})"

    def check(self, layers: list[MatrixLayer]) -> None:
        """Refuse statistics of a layer of another shape."""
        for layer in layers:
            if layer.name in self.layers:
                h, v = self.layers[layer.name]
                if (len(v.mean), len(h.mean)) != (layer.d_out, layer.d_in):
                    found = f"{len(v.mean)} × {len(h.mean)}"
                    raise ValueError(
                        f"{layer.name}: the lifelong statistics are of a {found} layer, the model's is "
                        f"{layer.d_out} × {layer.d_in}; begin with a new Lifelong()"
                    )

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, pair in self.layers.items():
            for side, running in zip("hv", pair, strict=True):
                tensors |= {f"{name}/{side}/mean": running.mean, f"{name}/{side}/squares": running.squares}
        save_tensors(path, _KIND, tensors, {"n": json.dumps({name: h.n for name, (h, _) in self.layers.items()})})

    @classmethod
    def load(cls, path: str | Path) -> "Lifelong":
        """Read what `save` wrote."""
        tensors, header = load_tensors(path, _KIND)
        found = cls()
        for name, n in json.loads(header["n"]).items():
            h, v = (Running(n, tensors[f"{name}/{s}/mean"], tensors[f"{name}/{s}/squares"]) for s in "hv")
            found.layers[name] = (h, v)
        return found


@dataclass(frozen=True)
class UltraEdit(Wording):
    """A closed-form edit of each layer.

    Attributes:
        lr: η of the wanted change of a layer's output, V = −η ‖h̃‖² ṽ. The authors' 1e-6 is for layers with thousands
            of inputs; ‖h̃‖² is about d_in.
        chunk: requests a round; the next round's gradients are of the edited model.
        ridge: λ of Σ ‖Δ h − V‖² + λ ‖Δ‖² (the authors' is 1).
        positions: "target", those that predict a token of the target (paper); "all", padding apart (the authors'
            configurations).
        shared: layers of the same shape share their statistics (as in the authors' code).
        lifelong: statistics to continue from, and to take this edit's requests in; None begins anew.
    """

    lr: float = 1e-6
    chunk: int = 100
    ridge: float = 1.0
    positions: Literal["target", "all"] = "target"
    shared: bool = False
    lifelong: Lifelong | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.lr < math.inf and 0 < self.ridge < math.inf):
            raise ValueError(f"lr and ridge must be positive and finite, got {self.lr}, {self.ridge}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.positions not in ("target", "all"):
            raise ValueError(f"positions must be 'target' or 'all', got {self.positions!r}")


@editor("ultraedit", UltraEdit)
def ultraedit(job: Job, options: UltraEdit) -> None:
    """A closed-form edit of each layer from normalised inputs and output gradients (UltraEdit)."""
    options.encoding().check(job.tokenizer, job.requests, longest(job.model))
    layers = job.matrix_layers()
    carried = options.lifelong or Lifelong()
    carried.check(layers)
    job.parameters()  # in float32 from one round to the next
    seen = dict(carried.layers)
    for start in range(0, len(job.requests), options.chunk):
        batches = options.batches(job.tokenizer, job.requests[start : start + options.chunk])
        only = options.positions == "target"
        factors, loss = rank_one_factors(job.model, batches, layers, desc=job.desc, targets_only=only)
        job.curves.append(Curve([loss], [0], "epochs"))
        for layer in layers:
            seen[layer.name] = _updated(seen.get(layer.name), factors[layer.name])
        for layer in layers:
            h, v = _statistics(layer, layers, seen, options.shared)
            if h.n < 2:
                raise ValueError("one position has no standard deviation: give more requests, or end=True")
            own = factors[layer.name]
            wanted = output_change(h.normalise(own.u), v.normalise(own.delta), options.lr)
            W = layer.matrix()
            W = W + least_squares(own.u, wanted, options.ridge).to(W.dtype)
            if not bool(W.isfinite().all()):
                raise FloatingPointError(f"{layer.name} is not finite after the edit; try a smaller lr")
            layer.write(W)
    job.counts["positions"] = float(next(iter(seen.values()))[0].n)
    carried.layers = seen


def _updated(before: tuple[Running, Running] | None, factors: Factors) -> tuple[Running, Running]:
    h, v = Running.of(factors.u), Running.of(factors.delta)
    return (h, v) if before is None else (before[0].to(h.mean.device) + h, before[1].to(v.mean.device) + v)


def _statistics(
    layer: MatrixLayer, layers: list[MatrixLayer], seen: dict[str, tuple[Running, Running]], shared: bool
) -> tuple[Running, Running]:
    """Those of the layer, or of all edited layers of its shape."""
    h, v = seen[layer.name]
    if shared:
        for other in layers:
            if other.name != layer.name and _size(other) == _size(layer):
                h = h + seen[other.name][0].to(h.mean.device)
                v = v + seen[other.name][1].to(v.mean.device)
    return h, v


def _size(layer: LayerShape) -> tuple[int, int]:
    return layer.d_out, layer.d_in


def output_change(h: Tensor, v: Tensor, lr: float) -> Tensor:
    """V = −η ‖h̃‖² ṽ (R, d_out), of normalised inputs h̃ (R, d_in) and gradients ṽ (R, d_out)."""
    return -lr * h.square().sum(1, keepdim=True) * v


def least_squares(H: Tensor, V: Tensor, ridge: float) -> Tensor:
    """The Δ (d_out, d_in) with least Σ_r ‖Δ h_r − v_r‖² + λ ‖Δ‖²: the transpose of (HᵀH + λI)⁻¹ Hᵀ V, float64.

    Of the two equal forms, Hᵀ (HHᵀ + λI)⁻¹ V the other, the one with the smaller system is solved.
    """
    H, V = H.double(), V.double()
    few = len(H) <= H.shape[1]
    gram = H @ H.T if few else H.T @ H
    gram.diagonal().add_(ridge)
    root = torch.linalg.cholesky(gram)
    if few:
        return torch.cholesky_solve(V, root).T @ H
    return torch.cholesky_solve(H.T @ V, root).T
