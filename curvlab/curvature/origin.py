"""Where statistics come from: enough to notice that they belong to another model, or to weights that have moved."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from curvlab.layers import LayerShape, MatrixLayer, find_layers


@dataclass(frozen=True)
class Origin:
    """Header of saved statistics.

    Attributes:
        model: the name or path it was loaded from, else its class.
        dtype: of the layers' weights.
        draws, seed: of `labels="model"`.
        weights: a checksum of each layer's weight (and bias, where joint), by layer name.
    """

    model: str
    dtype: str
    draws: int
    seed: int
    weights: dict[str, str]

    @staticmethod
    def pack(origin: "Origin | None") -> str:
        """As JSON, for a file's header."""
        return json.dumps(None if origin is None else asdict(origin))

    @classmethod
    def unpack(
        cls, header: Mapping[str, str], model: nn.Module | None, layers: Sequence[LayerShape]
    ) -> "Origin | None":
        """What `pack` wrote under "origin", held to `model` if one is given.

        Raises:
            ValueError: see `check`; or nothing to hold the model to.
        """
        entry = json.loads(header.get("origin", "null"))
        origin = None if entry is None else cls(**entry)
        if model is not None:
            if origin is None:
                raise ValueError("these statistics do not say where they come from (merged, or of an older version)")
            origin.check(model, layers)
        return origin

    def check(self, model: nn.Module, layers: Sequence[LayerShape]) -> None:
        """Whether statistics of this origin are those of `model` as it is now.

        Raises:
            ValueError: a layer that is missing or of another shape, or weights that have changed since.
        """
        bias = any(layer.bias for layer in layers)
        found = {layer.name: layer for layer in find_layers(model, [layer.name for layer in layers], bias)}
        for layer in layers:
            own = found[layer.name]
            if own.shape != layer:
                raise ValueError(f"{layer.name}: the statistics are of {layer}, the model has {own.shape}")
        moved = [name for name, layer in found.items() if _layer_checksum(layer) != self.weights[name]]
        if moved:
            dtype = str(next(iter(found.values())).parameters()[0].dtype)
            raise ValueError(
                f"the weights of {moved} are not those the statistics were taken at ({self.model}, {self.dtype}; now "
                f"{model_name(model)}, {dtype}): fit again, or load without model= to use them all the same"
            )


def origin_of(model: nn.Module, layers: Sequence[MatrixLayer], draws: int, seed: int) -> Origin:
    """The origin of statistics taken of `model` now."""
    weights = {layer.name: _layer_checksum(layer) for layer in layers}
    return Origin(model_name(model), str(layers[0].parameters()[0].dtype), draws, seed, weights)


def model_name(model: nn.Module) -> str:
    """The name or path that a model of transformers was loaded from, else the name of its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def weights_checksum(model: nn.Module) -> str:
    """`digest` of all parameters."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for prefix, module in model.named_modules():
            with _loaded(module):
                for name, parameter in module.named_parameters(recurse=False):
                    yield f"{prefix}.{name}", parameter

    return digest(tensors())


def _layer_checksum(layer: MatrixLayer) -> str:
    with _loaded(layer.module):
        return digest(zip(layer.parameter_names, layer.parameters(), strict=True))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (16 digits) of named tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _loaded(module: nn.Module) -> AbstractContextManager[None]:
    """The module with its weights at hand, should `accelerate` have offloaded them."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    return align_module_device(module)
