"""Slow, plain computations that the library is held to, written without it, and the models they run on.

Nothing here calls `curvlab` except to name a loss. Matrices W are d_out × d_in; a batch is
`(inputs, targets)` or `(inputs, targets, mask)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from curvlab.losses import BinaryCrossEntropy, CrossEntropy, SquaredError

IGNORED = -100


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Largest deviation, relative to the largest expected entry."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return
    scale = float(expected.abs().max()) or 1.0
    deviation = float((actual.to(expected) - expected).abs().max())
    assert deviation <= rtol * scale, f"deviates by {deviation:.3g} where {rtol * scale:.3g} is allowed"


# Models


class Tokens(nn.Module):
    """A causal sequence model: (N, T, 3) → (N, T, classes); later positions see earlier ones by running sums."""

    def __init__(self, classes: int = 3, width: int = 4, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first, self.second = linear(3, width), linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x + 0.5 * x.cumsum(1)).tanh()
        return self.second(h + 0.7 * h.cumsum(1)).tanh() * 2


class Keywords(Tokens):
    """`Tokens` called as Hugging Face models are: keyword arguments, outputs under `.logits`."""

    def forward(self, features: Tensor, gain: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(features * gain))


class Pooled(nn.Module):
    """Linear throughout: a shared layer at every position, the mean over positions, a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mean(1))


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def convolutional(side: int = 6, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(2, 3, **({"kernel_size": 3} | options))
    pixels = conv(torch.zeros(1, 2, side, side - 1))[0].numel()
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(pixels, 3))


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": 2, "padding": 1},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2, "dilation": (1, 2)},
    "no bias": {"bias": False},
    "one pixel": {"kernel_size": (6, 5)},
}


def transposed(d_in: int, d_out: int) -> nn.Module:
    """GPT-2's Conv1D with weights that are not symmetric in anything."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer: nn.Module = pytorch_utils.Conv1D(d_out, d_in)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


# Cases


@dataclass
class Case:
    """A model, its loss and data, and the layers looked at."""

    model: nn.Module
    loss: Any
    data: list[tuple[Any, ...]]
    layers: list[str]
    bias: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of every `fit`."""
        return self.model, self.loss, self.data, self.layers

    def only(self, layer: str) -> "Case":
        return replace(self, layers=[layer])


def _targets(loss: Any, *shape: int, classes: int = 3) -> Tensor:
    if isinstance(loss, CrossEntropy):
        return torch.randint(classes, shape)
    targets = torch.randn(*shape, classes)
    return targets.sigmoid().round() if isinstance(loss, BinaryCrossEntropy) else targets


def _split(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Any, ...]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def vectors(loss: Any, layers: list[str], bias: bool, N: int = 7) -> Case:
    x, y = 1.5 * torch.randn(N, 3), _targets(loss, N)
    return Case(mlp(), loss, _split(x, y, 3, N - 3), layers, bias)


def images(options: dict[str, Any], loss: Any, layers: list[str], bias: bool) -> Case:
    model = convolutional(**options)
    x, y = torch.randn(5, 2, 6, 5), _targets(loss, 5)
    return Case(model, loss, _split(x, y, 2, 3), layers, bias)


def sequences(loss: Any, layers: list[str], bias: bool, linear: Callable[[int, int], nn.Module] = nn.Linear) -> Case:
    x, y = torch.randn(4, 3, 3), _targets(loss, 4, 3)
    if isinstance(loss, CrossEntropy):
        y[0, 0] = y[2, 1] = y[3, :2] = loss.ignore_index
    return Case(Tokens(linear=linear), loss, _split(x, y, 3, 1), layers, bias)


def ragged(loss: Any, layers: list[str], bias: bool) -> Case:
    """Batches of different lengths, one of them a single position."""
    data = [(torch.randn(n, t, 3), _targets(loss, n, t)) for n, t in ((2, 1), (1, 3), (2, 2))]
    return Case(Tokens(), loss, data, layers, bias)


def keywords(loss: Any, layers: list[str], bias: bool) -> Case:
    data = [({"features": torch.randn(n, 2, 3), "gain": torch.rand(n, 1, 1)}, _targets(loss, n, 2)) for n in (2, 1)]
    return Case(Keywords(), loss, data, layers, bias)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: vectors(CrossEntropy(), ["0"], False),
    "linear, bias": lambda: vectors(CrossEntropy(), ["0"], True),
    "linear, last": lambda: vectors(CrossEntropy(), ["2"], True),
    "linear, two layers": lambda: vectors(CrossEntropy(), ["0", "2"], True),
    "linear, squared error": lambda: vectors(SquaredError(scale=0.6), ["0", "2"], False),
    "linear, logistic": lambda: vectors(BinaryCrossEntropy(), ["0"], True),
    "sequence, logistic": lambda: sequences(BinaryCrossEntropy(), ["first", "second"], False),
    "linear, ignored": lambda: _some_ignored(vectors(CrossEntropy(ignore_index=1), ["0"], False)),
    "sequence": lambda: sequences(CrossEntropy(), ["first"], False),
    "sequence, two layers": lambda: sequences(CrossEntropy(), ["first", "second"], True),
    "sequence, squared error": lambda: sequences(SquaredError(scale=2.5), ["first"], True),
    "sequence, ragged": lambda: ragged(CrossEntropy(), ["first", "second"], False),
    "sequence, keywords": lambda: keywords(CrossEntropy(), ["first"], True),
    "Conv1D": lambda: sequences(CrossEntropy(), ["first"], False, transposed),
    "Conv1D, two layers": lambda: sequences(CrossEntropy(), ["first", "second"], True, transposed),
    "convolution and linear": lambda: images({"stride": 2}, CrossEntropy(), ["0", "3"], True),
} | {
    f"convolution, {name}": lambda options=options: images(options, CrossEntropy(), ["0"], True)  # type: ignore[misc]
    for name, options in CONVOLUTIONS.items()
}


def _some_ignored(case: Case) -> Case:
    assert any((y == case.loss.ignore_index).any() for _, y in case.data)
    assert any((y != case.loss.ignore_index).any() for _, y in case.data)
    return case


def case(name: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    return CASES[name]()


def padded(seed: int = 0, loss: Any = None) -> tuple[Case, Case]:
    """The same sequences padded to one batch (garbage in the padding) and one by one.

    Prompts: the first label of a sequence is ignored. The model is causal and padding comes last.
    """
    torch.manual_seed(seed)
    model, lengths = Tokens(), (2, 4, 3)
    single, x, y, mask = [], 3 * torch.randn(3, 4, 3), torch.full((3, 4), IGNORED), torch.zeros(3, 4, dtype=torch.bool)
    for n, length in enumerate(lengths):
        y[n, 1:length] = torch.randint(3, (length - 1,))
        mask[n, :length] = True
        single.append((x[n : n + 1, :length], y[n : n + 1, :length]))
    loss = CrossEntropy(IGNORED)
    layers = ["first", "second"]
    return Case(model, loss, [(x, y, mask)], layers, True), Case(model, loss, list(single), layers, True)


# Calls of a model with other parameters


def parameter_names(case: Case) -> list[str]:
    names = []
    for layer in case.layers:
        names.append(f"{layer}.weight")
        if case.bias and case.model.get_submodule(layer).bias is not None:
            names.append(f"{layer}.bias")
    return names


def parameters(case: Case) -> dict[str, Tensor]:
    return {name: case.model.get_parameter(name).detach() for name in parameter_names(case)}


def _named(case: Case, theta: Tensor) -> dict[str, Tensor]:
    own = parameters(case)
    parts = theta.split([p.numel() for p in own.values()])
    return {name: part.view_as(p) for (name, p), part in zip(own.items(), parts, strict=True)}


def call(model: nn.Module, inputs: Any, named: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs as (N, T, C)."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    outputs = functional_call(model, named or {}, args, kwargs)
    outputs = getattr(outputs, "logits", outputs)
    return outputs.unsqueeze(1) if outputs.dim() == 2 else outputs


def losses(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """ℓ of each term (N, T), zero where a label is ignored."""
    targets = targets.view(outputs.shape if targets.is_floating_point() else outputs.shape[:2])
    if isinstance(loss, SquaredError):
        return 0.5 * loss.scale * ((outputs - targets) ** 2).sum(-1)
    if isinstance(loss, BinaryCrossEntropy):
        return ((1 + outputs.exp()).log() - targets * outputs).sum(-1)
    kept = targets != loss.ignore_index
    log_p = outputs - outputs.logsumexp(-1, keepdim=True)
    picked = log_p.gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return -picked * kept


def count_terms(case: Case) -> int:
    total = 0
    for batch in case.data:
        if not isinstance(case.loss, CrossEntropy):
            total += call(case.model, batch[0]).shape[:2].numel()
        else:
            total += int((batch[1] != case.loss.ignore_index).sum())
    return total


# Exact curvature, in the layout "parameters": each layer's weight flattened by torch, then its bias


def _theta(case: Case) -> Tensor:
    return torch.cat([p.flatten() for p in parameters(case).values()])


def hessian_matrix(case: Case) -> Tensor:
    """∂²L/∂θ² of the mean loss, by torch.func."""

    def total(theta: Tensor) -> Tensor:
        named = _named(case, theta)
        return sum(losses(case.loss, call(case.model, batch[0], named), batch[1]).sum() for batch in case.data)

    return hessian(total)(_theta(case)).detach() / count_terms(case)


def output_hessian(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """∂²ℓ/∂ŷ² of one loss term: outputs (C,)."""
    H = hessian(lambda o: losses(loss, o[None, None], targets[None, None]).sum())(outputs)
    return H.detach()


def gauss_newton_matrix(case: Case) -> Tensor:
    """1/terms Σ Jᵀ H_ŷ J, J from torch.func and H_ŷ term by term."""
    theta = _theta(case)
    G = theta.new_zeros(len(theta), len(theta))
    for batch in case.data:
        inputs, targets = batch[:2]
        J = jacrev(lambda t, x=inputs: call(case.model, x, _named(case, t)))(theta).detach()
        outputs = call(case.model, inputs).detach()
        y = targets.reshape(outputs.shape if targets.is_floating_point() else outputs.shape[:2])
        for n in range(outputs.shape[0]):
            for t in range(outputs.shape[1]):
                G += J[n, t].T @ output_hessian(case.loss, outputs[n, t], y[n, t]) @ J[n, t]
    return G / count_terms(case)


def weight_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W of torch-shaped parameters."""
    W = weight.reshape(len(weight), -1)
    if type(module).__name__ == "Conv1D":
        W = weight.T
    return W if bias is None else torch.cat([W, bias[:, None]], 1)


def reorder(case: Case, C: Tensor, layout: str) -> Tensor:
    """A matrix in the layout "parameters" in another one, by following where each parameter goes."""
    if layout == "parameters":
        return C
    index = _named(case, torch.arange(len(C)))
    order = []
    for layer in case.layers:
        W = weight_matrix(case.model.get_submodule(layer), index[f"{layer}.weight"], index.get(f"{layer}.bias"))
        order.append((W.T if layout == "vec" else W).reshape(-1))
    order = torch.cat(order)
    return C[order][:, order]


def random_displacement(layers: Sequence[Any], *stack: int) -> dict[str, Tensor]:
    return {layer.name: torch.randn(*stack, layer.d_out, layer.d_in) for layer in layers}


def rows_vector(layers: Sequence[Any], delta: dict[str, Tensor]) -> Tensor:
    return torch.cat([delta[layer.name].reshape(-1) for layer in layers])


# Positions: inputs a and pseudo-gradients g, one example and one position at a time


def layer_inputs(case: Case, layer: str, inputs: Any) -> Tensor:
    """a (T, d_in) of one example."""
    module, seen = case.model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    call(case.model, inputs)
    handle.remove()
    (x,) = seen
    assert len(x) == 1
    a = torch.stack(list(_patches(module, x))) if isinstance(module, nn.Conv2d) else x.reshape(-1, x.shape[-1])
    joint = case.bias and module.bias is not None
    return torch.cat([a, torch.ones(len(a), 1)], 1) if joint else a


def _patches(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    if conv.padding == "same":
        total = (dh * (kh - 1), dw * (kw - 1))
        before_after = [(t // 2, t - t // 2) for t in total]
    else:
        before_after = [(p, p) for p in conv.padding]  # type: ignore[misc]
    modes = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}
    image = torch.from_numpy(np.pad(x[0].numpy(), [(0, 0), *before_after], mode=modes[conv.padding_mode]))  # type: ignore[call-overload]
    _, height, width = image.shape
    for i in range(0, height - dh * (kh - 1), sh):
        for j in range(0, width - dw * (kw - 1), sw):
            yield image[:, i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw].reshape(-1)


def output_jacobian(case: Case, layer: str, inputs: Any) -> Tensor:
    """∂ŷ/∂s of one example: (T_loss, C, T, d_out), by a displacement added to the layer's output."""
    module, shape = case.model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda _, __, s: shape.append(s.shape))
    call(case.model, inputs)
    handle.remove()

    def outputs(displacement: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda _, __, s: s + displacement)
        try:
            return call(case.model, inputs)[0]
        finally:
            handle.remove()

    J = torch.autograd.functional.jacobian(outputs, torch.zeros(shape[0]))
    if isinstance(module, nn.Conv2d):
        return J[:, :, 0].flatten(3).mT
    return J.reshape(*J.shape[:2], -1, shape[0][-1])


@dataclass
class Datum:
    """One example seen from one layer: a (T, d_in); g (K, T, d_out), one a column of H_ŷ or one for its label."""

    a: Tensor
    g: Tensor

    @property
    def gradients(self) -> Tensor:
        """q_k = Σ_t g_t a_tᵀ: (K, d_out, d_in)."""
        return torch.stack([sum(torch.outer(g, a) for g, a in zip(gk, self.a, strict=True)) for gk in self.g])


def data_of(case: Case, layer: str, labels: str = "exact") -> list[Datum]:
    """Every example by itself; padding is cut away."""
    out = []
    for batch in case.data:
        inputs, targets, *mask = batch
        for n in range(len(targets)):
            one = {k: v[n : n + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[n : n + 1]
            outputs = call(case.model, one).detach()[0]
            y = targets[n : n + 1].reshape(outputs.shape if targets.is_floating_point() else outputs.shape[:1])
            J = output_jacobian(case, layer, one)
            columns = []
            for t in range(len(outputs)):
                if labels == "exact":
                    # any factor will do: here the symmetric square root
                    values, U = torch.linalg.eigh(output_hessian(case.loss, outputs[t], y[t]))
                    L = U * values.clamp_min(0).sqrt()
                    columns += [torch.einsum("c,ctd->td", L[:, k], J[t]) for k in range(L.shape[1])]
                else:
                    d = jacrev(lambda o, t=t, y=y: losses(case.loss, o[None, None], y[t][None, None]).sum())(outputs[t])
                    columns.append(torch.einsum("c,ctd->td", d, J[t]))
            g = torch.stack(columns) if labels == "exact" else torch.stack(columns).sum(0, keepdim=True)
            a = layer_inputs(case, layer, one)
            if mask and len(a) > 1:
                a, g = a[mask[0][n]], g[:, mask[0][n]]
            out.append(Datum(a, g))
    return out


def kfac_factors(case: Case, layer: str, labels: str = "exact", sharing: str = "expand") -> tuple[Tensor, Tensor]:
    """A and S, position by position (expand) or example by example (reduce)."""
    data = data_of(case, layer, labels)
    terms = count_terms(case)
    if sharing == "expand":
        A = sum(torch.outer(a, a) for d in data for a in d.a) / sum(len(d.a) for d in data)
        S = sum(torch.outer(g, g) for d in data for gk in d.g for g in gk) / terms
    else:
        A = sum(torch.outer(d.a.mean(0), d.a.mean(0)) for d in data) / len(data)
        S = sum(torch.outer(gk.sum(0), gk.sum(0)) for d in data for gk in d.g) / terms
    return A, S


def dense_of(spectrum: Any) -> Tensor:
    """The matrix (layout "rows") of a one-block spectrum with all eigenvectors, built column by column."""
    (block,) = spectrum.blocks
    p = block.basis.size
    (layers,) = [block.basis.layers]
    columns = []
    for e in torch.eye(p):
        parts = e.split([layer.size for layer in layers])
        delta = {l.name: part.view(l.d_out, l.d_in) for l, part in zip(layers, parts, strict=True)}
        back = block.basis.rotate_back(block.values * block.basis.rotate(delta))
        columns.append(rows_vector(layers, back))
    return torch.stack(columns, 1)


def cross_entropy_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL between softmaxes of logits, by torch's own function."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
