"""Where statistics come from: enough to notice that they belong to another model, or to weights that have moved."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

from torch import nn

from curvlab.checksum import digest
from curvlab.layers import LayerShape, MatrixLayer, find_layers


@dataclass(frozen=True)
class Origin:
    """Header of saved statistics.

    Attributes:
        model: the name or path it was loaded from, else its class.
        dtype: of the layers' weights.
        draws, seed: of `labels="model"`.
        weights: a checksum of each parameter of the whole model, by name: statistics of a layer depend on all others.
    """

    model: str
    dtype: str
    draws: int
    seed: int
    weights: dict[str, str]

    @property
    def checksum(self) -> str:
        """One of all the weights."""
        return _combined(self.weights)

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
            KeyError, TypeError, ValueError: an entry that is no origin.
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
        now = parameter_checksums(model)
        moved = [name for name in self.weights | now if self.weights.get(name) != now.get(name)]
        if moved:
            dtype = str(next(iter(found.values())).parameters()[0].dtype)
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            raise ValueError(
                f"the weights {moved[:3]}{more} are not those the statistics were taken at ({self.model}, "
                f"{self.dtype}; now {model_name(model)}, {dtype}): fit again, or load without model= to use them all "
                "the same"
            )


def origin_of(model: nn.Module, layers: Sequence[MatrixLayer], draws: int, seed: int) -> Origin:
    """The origin of statistics taken of `model` now."""
    dtype = str(layers[0].parameters()[0].dtype)
    return Origin(model_name(model), dtype, draws, seed, parameter_checksums(model))


def model_name(model: nn.Module) -> str:
    """The name or path that a model of transformers was loaded from, else the name of its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def weights_checksum(model: nn.Module) -> str:
    """One checksum (16 digits) of all parameters."""
    return _combined(parameter_checksums(model))


def parameter_checksums(model: nn.Module) -> dict[str, str]:
    """The `digest` of each parameter, in one pass over the model's weights."""
    found = {}
    for prefix, module in model.named_modules():
        with _loaded(module):
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{own}" if prefix else own
                found[name] = digest([(name, parameter)])
    return found


def _combined(checksums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()[:16]


def _loaded(module: nn.Module) -> AbstractContextManager[None]:
    """The module with its weights at hand, should `accelerate` have offloaded them."""
    if not hasattr(module, "_hf_hook") or not any(p.is_meta for p in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    return align_module_device(module)
