"""Passes over the data: layer inputs a and pseudo-gradients g = ∂/∂s of the chosen layers.

The model runs once a batch; backward passes stop at the lowest layer asked for, and no parameter
gathers a gradient. Batches are `(inputs, targets)` or `(inputs, targets, mask)`; inputs a tensor or a
dictionary of tensors (keyword arguments); mask (N, T) is true where a position is real (not padding).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.layers import MatrixLayer
from curvlab.losses import Labels, Loss, Scale
from curvlab.progress import progress

Data = Iterable[Any]

MAX_COLUMNS = 2048  # backward passes a batch that `labels="exact"` may ask for
MICRO_BATCH = 128  # examples of one forward pass; larger batches are split (exactly: statistics are sums)


@dataclass(frozen=True)
class Batch:
    """Inputs, targets and the mask of real positions, on one device."""

    inputs: Any
    targets: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.targets.shape[0]

    def __getitem__(self, index: slice) -> "Batch":
        if isinstance(self.inputs, dict):
            inputs: Any = {key: value[index] for key, value in self.inputs.items()}
        else:
            inputs = self.inputs[index]
        return Batch(inputs, self.targets[index], None if self.mask is None else self.mask[index])


@dataclass(frozen=True)
class Pass:
    """One forward pass with its graph, ready for backward passes to the layers' outputs.

    Attributes:
        outputs: ŷ as (N, T, C), attached to the graph.
        targets: (N, T) class indices or (N, T, C).
        examples: (N,) running index of each example in the data; draws are keyed by it.
        scale: loss terms and, for each layer, positions counted in this pass.
    """

    layers: Sequence[MatrixLayer]
    outputs: Tensor
    targets: Tensor
    examples: Tensor
    mask: Tensor | None
    raw_inputs: dict[str, Tensor]
    raw_outputs: dict[str, Tensor]
    versions: dict[str, int]
    terms: int

    def inputs(self, layer: MatrixLayer) -> Tensor:
        """a: (N, T, d_in), zero at padding."""
        return self._without_padding(layer.inputs(self.raw_input(layer)))

    def raw_input(self, layer: MatrixLayer) -> Tensor:
        """The module's input as it came."""
        x = self.raw_inputs[layer.name]
        if x._version != self.versions[layer.name]:
            raise RuntimeError(
                f"the input of {layer.name!r} was changed in place later in the forward pass; "
                "make that operation out of place (such as ReLU(inplace=False))"
            )
        return x

    def scale(self, layer: MatrixLayer, a: Tensor) -> Scale:
        """Terms and positions of this pass; `a` is `inputs(layer)`."""
        real = self._mask_of(a)
        return Scale(self.terms, a.shape[0] * a.shape[1] if real is None else int(real.sum()))

    def used(self, a: Tensor) -> int:
        """Examples with a real position."""
        real = self._mask_of(a)
        return a.shape[0] if real is None else int(real.any(1).sum())

    def positions(self, a: Tensor) -> Tensor | int:
        """Real positions of each example, to divide a sum over positions (N, 1, d) by."""
        real = self._mask_of(a)
        return a.shape[1] if real is None else real.sum(1).clamp_min(1)[:, None, None]

    def gradients(self, vectors: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
        """For each v (N, T, C): Jᵀv at each layer's output, as (N, T_layer, d_out) by layer name."""
        outputs = [self.raw_outputs[layer.name] for layer in self.layers]
        for v in vectors:
            grads = torch.autograd.grad(self.outputs, outputs, v, retain_graph=True)
            yield {
                layer.name: self._without_padding(layer.outputs(g)) for layer, g in zip(self.layers, grads, strict=True)
            }

    def _mask_of(self, t: Tensor) -> Tensor | None:
        if self.mask is None or t.shape[1] == 1 != self.mask.shape[1]:
            return None
        if self.mask.shape != t.shape[:2]:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit the layer's positions {tuple(t.shape[:2])}")
        return self.mask

    def _without_padding(self, t: Tensor) -> Tensor:
        mask = self._mask_of(t)
        return t if mask is None else t * mask.unsqueeze(-1)


def columns(pass_: Pass, loss: Loss, labels: Labels, draws: int = 1, seed: int = 0) -> Iterator[Tensor]:
    """Vectors v_k (N, T, C) with Σ_k v_k v_kᵀ = H_ŷ (exactly, in expectation, or empirically).

    `exact`: the columns of a factor of H_ŷ, one loss position at a time. `model`: `draws` gradients at labels
    drawn from the model, over √draws; positions draw independently. `data`: the gradient at the data's labels.
    """
    outputs, targets = pass_.outputs.detach(), pass_.targets
    if labels == "data":
        yield loss.gradient(outputs, targets)
    elif labels == "model":
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        for draw in range(draws):
            yield loss.sampled_gradient(outputs, targets, seed, draw, pass_.examples) / draws**0.5
    elif labels == "exact":
        positions, classes = outputs.shape[1:]
        if positions * classes > MAX_COLUMNS:
            raise ValueError(
                f"labels='exact' takes one backward pass a class and loss position: {classes} × {positions} "
                f"exceeds {MAX_COLUMNS}; use labels='model' (unbiased) instead"
            )
        factor = loss.hessian_factor(outputs, targets)
        for t in range(positions):
            for k in range(factor.shape[-1]):
                v = torch.zeros_like(outputs)
                v[:, t] = factor[:, t, :, k]
                yield v
    else:
        raise ValueError(f"labels must be 'exact', 'model' or 'data', got {labels!r}")


def split(data: Data, micro_batch: int | None = None) -> Iterator[Batch]:
    """The batches of `data`, cut into at most `micro_batch` examples each."""
    size = MICRO_BATCH if micro_batch is None else micro_batch
    empty = True
    for item in data:
        if isinstance(item, Tensor) or (not isinstance(item, Batch) and len(item) not in (2, 3)):
            raise ValueError("data must yield (inputs, targets) or (inputs, targets, mask) batches")
        batch = item if isinstance(item, Batch) else Batch(*item)
        leading = next(iter(batch.inputs.values())) if isinstance(batch.inputs, dict) else batch.inputs
        if len(leading) != len(batch):
            raise ValueError(f"a batch has {len(leading)} inputs but {len(batch)} targets")
        for start in range(0, len(batch), size):
            empty = False
            yield batch[start : start + size]
    if empty:
        raise ValueError("the data are empty: no batch with at least one example")


def passes(
    model: nn.Module,
    loss: Loss,
    data: Data,
    layers: Sequence[MatrixLayer],
    *,
    desc: str,
    first_example: int = 0,
    micro_batch: int | None = None,
) -> Iterator[Pass]:
    """One `Pass` a micro-batch of `data`.

    Args:
        first_example: index of the first example in the whole data set (for a worker that holds a shard).

    Raises:
        ValueError: empty or ill-shaped data, targets out of range or with a loss at padding, a model in training
            mode with BatchNorm or Dropout, a layer that the forward pass uses never or more than once.
        FloatingPointError: a loss that is not finite.
    """
    _check_mode(model)
    device = layers[0].parameters()[0].device
    start = first_example
    with _frozen(model):
        for batch in progress(split(data, micro_batch), desc):
            pass_ = _forward(model, loss, batch, layers, start, device)
            start += len(batch)
            yield pass_


def run(model: Callable[..., Any], inputs: Any) -> Tensor:
    """The model's outputs, or their `.logits`."""
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the model must return a tensor or an object with .logits, got {type(outputs).__name__}")
    return outputs


def shaped(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs as (N, T, C) and targets alike; one loss position where the model gives one output an example.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if outputs.dim() == 2:
        outputs, targets = outputs.unsqueeze(1), targets.unsqueeze(1)
    if outputs.dim() != 3:
        raise ValueError(f"outputs must be (N, C) or (N, T, C), got {tuple(outputs.shape)}")
    fits = (outputs.shape[:2], outputs.shape) if targets.is_floating_point() else (outputs.shape[:2],)
    if targets.shape not in fits:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape)}")
    return outputs, targets


def count_examples(data: Data) -> int | None:
    """Examples in `data`, where that is known without a pass over it."""
    dataset = getattr(data, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__"):
        return len(dataset)
    if isinstance(data, (list, tuple)) and all(isinstance(item, Batch) or len(item) > 1 for item in data):
        return sum(len(item) if isinstance(item, Batch) else len(item[1]) for item in data)
    return None


def require_reiterable(data: Data) -> None:
    """Refuse an iterator, which a second pass would find empty.

    Raises:
        ValueError: `data` can be iterated only once.
    """
    if iter(data) is data:
        raise ValueError(
            "this needs several passes over the data: give a DataLoader or a list of batches, not an iterator"
        )


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: tensor.to(device) for key, tensor in value.items()}
    return value.to(device)


def _forward(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    layers: Sequence[MatrixLayer],
    start: int,
    device: torch.device,
) -> Pass:
    raw_inputs: dict[str, Tensor] = {}
    raw_outputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def hook(layer: MatrixLayer) -> Any:
        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.name in raw_outputs:
                raise ValueError(
                    f"layer {layer.name!r} is used more than once in a forward pass; the curvature of a reused "
                    "layer is not that of one W a: choose another layer"
                )
            if not args:
                raise ValueError(f"layer {layer.name!r} is called with keyword arguments; pass its input by position")
            x = args[0].detach()
            raw_inputs[layer.name], versions[layer.name] = x, x._version
            s = output if output.requires_grad else output.detach().requires_grad_()
            raw_outputs[layer.name] = s
            return s.clone()  # an in-place activation must not turn s into φ(s)

        return layer.module.register_forward_hook(remember)

    handles = [hook(layer) for layer in layers]
    try:
        with torch.enable_grad():
            outputs, targets = shaped(run(model, to_device(batch.inputs, device)), batch.targets.to(device))
    finally:
        for handle in handles:
            handle.remove()
    unused = [layer.name for layer in layers if layer.name not in raw_outputs]
    if unused:
        raise ValueError(f"the forward pass never used {unused}")
    mask = None if batch.mask is None else batch.mask.to(device).bool()
    with torch.no_grad():
        terms = loss.terms(outputs, targets)
        _check_targets(outputs, targets, terms, mask)
        if not bool(loss.value(outputs, targets).isfinite().all()):
            raise FloatingPointError(f"the loss is not finite on examples {start} to {start + len(batch) - 1}")
    examples = torch.arange(start, start + len(batch), device=device)
    return Pass(layers, outputs, targets, examples, mask, raw_inputs, raw_outputs, versions, terms=int(terms.sum()))


def _check_targets(outputs: Tensor, targets: Tensor, terms: Tensor, mask: Tensor | None) -> None:
    if not targets.is_floating_point() and bool((terms & ((targets < 0) | (targets >= outputs.shape[-1]))).any()):
        raise ValueError(
            f"class indices must lie in 0 to {outputs.shape[-1] - 1}, got {targets.min()} to {targets.max()}"
        )
    if mask is not None and mask.shape == terms.shape and bool((terms & ~mask).any()):
        raise ValueError("padding carries a loss: set the targets there to the loss' ignore_index")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that graphs start at the lowest captured layer."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_mode(model: nn.Module) -> None:
    mixing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    wrong = [name for name, module in model.named_modules() if module.training and isinstance(module, mixing)]
    if wrong:
        raise ValueError(
            f"curvature of a model in training mode is random or mixes examples ({wrong}); call model.eval()"
        )


def split_at(model: nn.Sequential, layer: str) -> tuple[nn.Sequential, nn.Sequential]:
    """(body, head) of a `Sequential`: head begins with `layer`, both share the model's modules.

    Nothing below the edited layer changes: run the body once, and descend and refit on the head alone.

    Raises:
        ValueError: a model that is no `Sequential`, or has no such direct child.
    """
    names = list(dict(model.named_children()))
    if not isinstance(model, nn.Sequential) or layer not in names:
        raise ValueError(f"{layer!r} is no direct child of a Sequential; children: {names}")
    cut = names.index(layer)
    children = list(model.named_children())
    return nn.Sequential(OrderedDict(children[:cut])), nn.Sequential(OrderedDict(children[cut:]))
