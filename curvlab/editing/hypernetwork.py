"""MEND's network (Mitchell et al. 2022, arXiv 2110.11309, sec. 3): rank-one factors of gradients become edits."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvlab.curvature.origin import model_name, weights_checksum
from curvlab.editing.rank_one import Factors
from curvlab.editing.running import Running
from curvlab.layers import LayerShape, Matrices
from curvlab.records import fingerprint
from curvlab.storage import load_tensors, save_tensors

KIND = "MEND network"


class Residual(nn.Module):
    """z + σ(s_ℓ ⊙ (U V z + b) + o_ℓ), U V of low rank, a scale s and an offset o for each layer ℓ; σ ReLU or none.

    U begins as zero, so that the block begins as the identity.
    """

    def __init__(self, size: int, rank: int, layers: int, relu: bool, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, size)
        self.U = nn.Parameter(torch.zeros(size, rank))
        self.V = nn.Parameter(torch.randn(rank, size, generator=generator) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(layers, size))
        self.offset = nn.Parameter(torch.zeros(layers, size))
        self.relu = relu

    def forward(self, z: Tensor, layer: int) -> Tensor:
        inner = self.scale[layer] * (z @ self.V.T @ self.U.T + self.bias) + self.offset[layer]
        return z + (inner.relu() if self.relu else inner)


class Hypernetwork(nn.Module):
    """Edits from gradients: ΔW = −α Σ_r δ̃_r ũ_rᵀ over the tokens, [ũ, δ̃] = g([u, δ]) with u and δ normalised.

    Layers of one shape share a network g, with a scale and an offset of their own; every layer has its own learned α
    and its own mean and standard deviation of u and δ (on the training requests). Edits of several requests add up, as
    their gradients do. Tokens without a gradient edit nothing.

    Args:
        layers: that are edited.
        rank, hidden: of each of the hidden + 1 residual blocks of a network; the last has no ReLU.
        edit_lr: where the α begin.
        normalise: False hands u and δ on as they are, and the untrained edit is a step of gradient descent.
        seed: of the initial weights.

    Attributes:
        record: what is known of its training, and saved with it.
        prompts: (P,) int64, sorted hashes of the prompts it was trained on (`hashed`).
        checksum, model: of the model that it was trained for.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        rank: int = 1920,
        hidden: int = 1,
        edit_lr: float = 1e-4,
        normalise: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers = [LayerShape(layer.name, layer.d_out, layer.d_in, layer.bias) for layer in layers]
        self.shape = {"rank": rank, "hidden": hidden, "normalise": normalise}
        self.normalise = normalise
        self.alpha = nn.Parameter(torch.full((len(self.layers),), edit_lr))
        self.statistics: dict[str, tuple[Running, Running]] = {}
        self.record: dict[str, Any] = {}
        self.prompts = torch.empty(0, dtype=torch.int64)
        self.checksum, self.model = "", ""
        generator = torch.Generator().manual_seed(seed)
        self.place: dict[str, tuple[str, int]] = {}  # a layer's network, and its number in there
        members: dict[str, int] = {}
        for layer in self.layers:
            key = f"{layer.d_out}x{layer.d_in}"
            self.place[layer.name] = (key, members.get(key, 0))
            members[key] = members.get(key, 0) + 1
        sizes = {f"{layer.d_out}x{layer.d_in}": layer.d_out + layer.d_in for layer in self.layers}
        self.networks = nn.ModuleDict(
            {
                key: nn.ModuleList(Residual(size, rank, members[key], i < hidden, generator) for i in range(hidden + 1))
                for key, size in sizes.items()
            }
        )

    def forward(self, factors: dict[str, Factors]) -> Matrices:
        """ΔW (d_out, d_in) of each layer."""
        edits = {}
        for alpha, layer in zip(self.alpha, self.layers, strict=True):
            u, delta = self.transform(layer.name, factors[layer.name])
            edits[layer.name] = -alpha * (delta.T @ u)
        return edits

    def transform(self, layer: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """ũ (R', d_in) and δ̃ (R', d_out) of a layer, at the R' of R tokens that have a gradient."""
        own = factors.where((factors.delta != 0).any(1))
        u, delta = own.u.to(self.alpha), own.delta.to(self.alpha)
        if self.normalise:
            seen_u, seen_delta = (seen.to(u.device) for seen in self.statistics[layer])
            u, delta = seen_u.normalise(u), seen_delta.normalise(delta)
        key, number = self.place[layer]
        z = torch.cat([u, delta], dim=1)
        for block in cast(nn.ModuleList, self.networks[key]):
            z = block(z, number)
        return z[:, : u.shape[1]], z[:, u.shape[1] :]

    def observe(self, factors: dict[str, Factors]) -> None:
        """Take the mean and standard deviation of u and δ from these."""
        for name, given in factors.items():
            own = given.where((given.delta != 0).any(1))
            self.statistics[name] = (Running.of(own.u), Running.of(own.delta))

    def check(self, layers: Sequence[LayerShape], model: nn.Module | None = None) -> None:
        """Refuse to edit other layers than those it was trained for, or (with `model`) another model.

        Raises:
            ValueError: what is different.
        """
        wanted = [LayerShape(layer.name, layer.d_out, layer.d_in, layer.bias) for layer in layers]
        if wanted != self.layers:
            own, other = ([f"{x.name} ({x.d_out} × {x.d_in})" for x in found] for found in (self.layers, wanted))
            raise ValueError(f"this MEND network edits {own}, asked for {other}: name its layers, or train another")
        if model is not None and weights_checksum(model) != self.checksum:
            raise ValueError(
                f"this MEND network was trained for {self.model} with other weights than this {model_name(model)} has; "
                "train one for this model, or give network=Hypernetwork.load(file) to use it all the same"
            )

    def belongs_to(self, model: nn.Module, prompts: Iterable[str]) -> None:
        """Note what it is trained for and on."""
        self.model, self.checksum = model_name(model), weights_checksum(model)
        self.prompts = torch.tensor(sorted({hashed(prompt) for prompt in prompts}), dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """All that is learned or measured, by name."""
        found = {f"weight/{name}": p.detach() for name, p in self.named_parameters()}
        for name, pair in self.statistics.items():
            for side, running in zip(("u", "delta"), pair, strict=True):
                found |= {f"{side}/{name}/mean": running.mean, f"{side}/{name}/squares": running.squares}
                found[f"{side}/{name}/n"] = torch.tensor(running.n)
        return found | {"prompts": self.prompts}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(tensors[f"weight/{name}"])
        for layer in self.layers:
            if f"u/{layer.name}/n" in tensors:
                self.statistics[layer.name] = tuple(  # type: ignore[assignment]
                    Running(int(tensors[f"{s}/{layer.name}/n"]), *(tensors[f"{s}/{layer.name}/{k}"] for k in _MOMENTS))
                    for s in ("u", "delta")
                )
        self.prompts = tensors["prompts"]

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, with a JSON header that says what it is for."""
        header = {"layers": [asdict(layer) for layer in self.layers], "shape": self.shape, "record": self.record}
        meta = {name: json.dumps(value) for name, value in header.items()}
        save_tensors(path, KIND, self.tensors(), meta | {"model": self.model, "checksum": self.checksum})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Hypernetwork":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, damaged, or (with `model`) of another model.
        """
        tensors, meta = load_tensors(path, KIND)
        try:
            layers = [LayerShape(**layer) for layer in json.loads(meta["layers"])]
            found = cls(layers, **json.loads(meta["shape"])).to(tensors["weight/alpha"].dtype)
            found.take(tensors)
            found.record, found.model, found.checksum = json.loads(meta["record"]), meta["model"], meta["checksum"]
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no intact MEND network: {error}") from error
        if model is not None:
            found.check(found.layers, model)
        return found

    def __repr__(self) -> str:
        return f"Hypernetwork({self.model}, {[layer.name for layer in self.layers]}, {fingerprint(self.record)})"


_MOMENTS = ("mean", "squares")


def hashed(text: str) -> int:
    """63 bits of a prompt, its white space apart."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode()).digest()[:8]) >> 1
