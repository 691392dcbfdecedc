"""A layer's weight seen as one matrix W (d_out × d_in, one more column for a joint bias).

Everything downstream speaks of this matrix only: `s = W a` with a the layer's input at one position
(a Linear on a vector has one position, a Conv2d has one per output pixel, a token is one position).
"""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """What remains of a layer without its model: its name and the shape of W.

    Attributes:
        name: the module's name in the model.
        d_out, d_in: shape of W; `d_in` counts the bias column when `bias` is true.
        bias: whether the bias is the last column of W.
    """

    name: str
    d_out: int
    d_in: int
    bias: bool

    @property
    def size(self) -> int:
        """Number of parameters, d_out · d_in."""
        return self.d_out * self.d_in


Matrices = dict[str, Tensor]  # one (…, d_out, d_in) matrix a layer name: weights, gradients, displacements


def flatten(layers: Sequence[LayerShape], matrices: Matrices) -> Tensor:
    """Matrices (…, d_out, d_in) as one vector (…, p): layers in order, each row-major."""
    return torch.cat([matrices[layer.name].flatten(-2) for layer in layers], dim=-1)


def unflatten(layers: Sequence[LayerShape], vectors: Tensor) -> Matrices:
    """The inverse of `flatten`: vectors (…, p) as one (…, d_out, d_in) matrix a layer."""
    parts = vectors.split([layer.size for layer in layers], dim=-1)
    return {
        layer.name: part.unflatten(-1, (layer.d_out, layer.d_in)) for layer, part in zip(layers, parts, strict=True)
    }


@dataclass(frozen=True)
class MatrixLayer(LayerShape):
    """One layer of a model, its weight seen as a matrix; `module` is the layer itself."""

    module: nn.Module

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.name, self.d_out, self.d_in, self.bias)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return device_of(self.module)

    @property
    def parameter_names(self) -> list[str]:
        return [f"{self.name}.weight"] + ([f"{self.name}.bias"] if self.bias else [])

    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it belongs to W."""
        names = ["weight", "bias"] if self.bias else ["weight"]
        return [cast(nn.Parameter, getattr(self.module, name)) for name in names]

    def matrix(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """W (d_out, d_in) of `tensors` laid out as `parameters()`: weights, gradients or updates alike."""
        if tensors is None:
            tensors = [p.detach() for p in self.parameters()]
        W = self._weight_matrix(tensors[0])
        return torch.cat([W, tensors[1].unsqueeze(-1)], dim=-1) if self.bias else W

    def tensors(self, W: Tensor) -> list[Tensor]:
        """The inverse of `matrix`: W (d_out, d_in) as tensors shaped like `parameters()`."""
        if W.shape[-2:] != (self.d_out, self.d_in):
            raise ValueError(f"{self.name}: expected a {self.d_out} × {self.d_in} matrix, got {tuple(W.shape)}")
        if not self.bias:
            return [self._matrix_weight(W)]
        return [self._matrix_weight(W[..., :-1]), W[..., -1]]

    def write(self, W: Tensor) -> None:
        """Copy W (d_out, d_in) into the module's parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), self.tensors(W), strict=True):
                parameter.copy_(value)

    def inputs(self, x: Tensor) -> Tensor:
        """The module's input as a (N, T, d_in): T positions an example, a one for the bias."""
        a = self._positions(x)
        return F.pad(a, (0, 1), value=1.0) if self.bias else a

    def outputs(self, s: Tensor) -> Tensor:
        """The module's output (or its gradient) as (N, T, d_out)."""
        return s.unsqueeze(1) if s.dim() == 2 else s.flatten(1, -2)

    def _positions(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"{self.name}: inputs must have a batch dimension, got shape {tuple(x.shape)}")
        return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)

    def _weight_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _matrix_weight(self, W: Tensor) -> Tensor:
        return W


class Conv2dLayer(MatrixLayer):
    """A convolution: the input is unfolded into patches, one position per output pixel."""

    def _positions(self, x: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, self.module)
        if x.dim() != 4:
            raise ValueError(f"{self.name}: Conv2d inputs must be (N, C, H, W), got shape {tuple(x.shape)}")
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        return F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride).mT

    def outputs(self, s: Tensor) -> Tensor:
        return s.flatten(2).mT

    def places(self, x: Tensor) -> Tensor:
        """Which entry of `pixels(x)` each entry of a (d_in, T) is."""
        numbers = torch.arange(1.0, x[0].numel() + 1, dtype=torch.float64, device=x.device).view(1, *x.shape[1:])
        index = self._positions(numbers)[0].mT.long()  # padding is 0
        return F.pad(index, (0, 0, 0, 1), value=x[0].numel() + 1) if self.bias else index

    def pixels(self, x: Tensor) -> Tensor:
        """A zero (padding), the input's pixels, and a one (bias): (N, C·H·W + 2)."""
        return F.pad(F.pad(x.flatten(1), (1, 0)), (0, 1), value=1.0)

    def _weight_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(-3)

    def _matrix_weight(self, W: Tensor) -> Tensor:
        return W.unflatten(-1, cast(nn.Conv2d, self.module).weight.shape[1:])


class TransposedLayer(MatrixLayer):
    """GPT-2's Conv1D: a linear layer that stores its weight as (d_in, d_out)."""

    def _weight_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _matrix_weight(self, W: Tensor) -> Tensor:
        return W.mT


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its first parameter's device, or where `accelerate` brings its weights and inputs."""
    hook = getattr(module, "_hf_hook", None)
    for own in getattr(hook, "hooks", (hook,)):
        where = getattr(own, "execution_device", None)
        if where is not None:
            return torch.device(where)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _kind(module: nn.Module) -> type[MatrixLayer] | None:
    if isinstance(module, nn.Linear):
        return MatrixLayer
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer
    # by name, so that transformers need not be installed
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return TransposedLayer
    return None


def find_layers(model: nn.Module, layers: str | Sequence[str], bias: bool = False) -> list[MatrixLayer]:
    """The layers of `model` named by `layers`, in the model's order.

    Args:
        layers: module names or shell patterns such as `"fc2"`, `"conv*"`, `"model.layers.*.mlp.down_proj"`,
            or one of them. A pattern selects the supported modules (Linear, Conv2d, GPT-2's Conv1D) it matches.
        bias: join the bias, where there is one, to W as its last column. False: the weight alone, as in the paper.

    Raises:
        ValueError: a name that fits nothing (with the nearest names), a module of another kind,
            a grouped convolution, or a weight that several modules share.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError("no layers were named; name at least one, such as layers=['fc2']")
    modules = dict(model.named_modules())
    supported = [name for name, module in modules.items() if _kind(module) and name]
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in modules:
            if pattern not in supported:
                raise ValueError(
                    f"layer {pattern!r} is a {type(modules[pattern]).__name__}; "
                    f"curvature is defined for Linear, Conv2d and transformers' Conv1D: {supported}"
                )
            chosen.add(pattern)
            continue
        matches = fnmatch.filter(supported, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern.removesuffix(".weight"), supported, n=3) or supported
            raise ValueError(f"no layer fits {pattern!r}; did you mean one of {near}?")
        chosen.update(matches)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return [_matrix_layer(name, modules[name], bias, owners) for name in modules if name in chosen]


def supported_layers(model: nn.Module) -> list[MatrixLayer]:
    """All layers of `model` that are one matrix of their own; tied, grouped and parametrized ones are left out."""
    found = []
    for name, module in model.named_modules():
        if name and _kind(module):
            with suppress(ValueError):
                found += find_layers(model, name)
    return found


def _matrix_layer(name: str, module: nn.Module, bias: bool, owners: dict[int, list[str]]) -> MatrixLayer:
    kind = _kind(module)
    assert kind is not None
    weight = cast(Tensor, module.weight)
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"layer {name!r}: grouped convolutions (groups={module.groups}) are not one matrix")
    joint = bias and module.bias is not None
    for parameter in [weight] + ([cast(Tensor, module.bias)] if joint else []):
        if id(parameter) not in owners:
            raise ValueError(
                f"layer {name!r}: its weight is no plain parameter (parametrized or merged modules are not)"
            )
        if len(owners[id(parameter)]) > 1:
            raise ValueError(
                f"layer {name!r} shares its weight with {owners[id(parameter)]}; the curvature of tied weights "
                "is not that of one layer: untie them (clone the parameter) or choose another layer"
            )
    if kind is TransposedLayer:
        d_in, d_out = weight.shape
    else:
        d_out, d_in = weight.shape[0], math.prod(weight.shape[1:])
    return kind(name, d_out, d_in + joint, joint, module)
