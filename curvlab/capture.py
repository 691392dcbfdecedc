"""Passes over the data: layer inputs a and pseudo-gradients g = ∂/∂s of the chosen layers.

The model runs once a batch; backward passes stop at the lowest layer asked for, and no parameter
gathers a gradient. Batches are `(inputs, targets)` or `(inputs, targets, mask)`; inputs a tensor or a
dictionary of tensors (keyword arguments); mask (N, T) is true where a position is real (not padding).

Language models of `transformers` are called with {"input_ids", "attention_mask"}, targets (N, T) the next token at
each position. Where a batch has no mask of its own, `attention_mask` (N, T) is the mask. Padding may lie on either
side: what begins with padding is moved to begin with its first real token.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.batches import Batch, Data, as_batch, count_examples, output_width, require_reiterable, split, to_device
from curvlab.layers import MatrixLayer, device_of
from curvlab.losses import Labels, Loss, Scale
from curvlab.memory import announce, bytes_of, human, peak
from curvlab.progress import progress

__all__ = [
    "Batch", "Data", "Pass", "as_batch", "check_exact", "columns", "count_examples", "passes", "require_reiterable",
    "run", "shaped", "split", "split_at", "to_device",
]  # fmt: skip

MAX_COLUMNS = 2048  # backward passes a batch that `labels="exact"` may ask for

PIECE_BYTES = 2**27  # of the outputs' float64 copies, made for a few examples at a time


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

    def inputs(self, layer: MatrixLayer, packed: bool = False) -> Tensor:
        """a: (N, T, d_in), zero at padding; packed (1, R, d_in), the real positions alone, where some are not."""
        return self._without_padding(self._by_example(layer.inputs(self.raw_input(layer))), packed)

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

    def gradients(self, vectors: Iterable[Tensor], packed: bool = False) -> Iterator[dict[str, Tensor]]:
        """For each v (N, T, C): Jᵀv at each layer's output, (N, T_layer, d_out) by layer name, or packed as `inputs`.

        The graph goes with the last of them, so that its memory is free before the next pass.
        """
        coming = iter(vectors)
        following = next(coming, None)
        while following is not None:
            outputs = [self.raw_outputs[layer.name] for layer in self.layers]
            v, following = following, next(coming, None)
            grads = torch.autograd.grad(self.outputs, outputs, v, retain_graph=following is not None)
            yield {
                layer.name: self._without_padding(self._by_example(layer.outputs(g)), packed)
                for layer, g in zip(self.layers, grads, strict=True)
            }

    def _by_example(self, t: Tensor) -> Tensor:
        """(N, T, d), also where a model flattens its tokens to (N·T, d) before the layer (OPT, mixtures of experts)."""
        N, T = self.outputs.shape[:2] if self.mask is None else self.mask.shape
        return t.reshape(N, T, -1) if t.shape[:2] == (N * T, 1) and T > 1 else t

    def _mask_of(self, t: Tensor) -> Tensor | None:
        if self.mask is None or t.shape[1] == 1 != self.mask.shape[1]:
            return None
        if self.mask.shape != t.shape[:2]:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit the layer's positions {tuple(t.shape[:2])}")
        return self.mask.to(t.device)

    def _without_padding(self, t: Tensor, packed: bool) -> Tensor:
        mask = self._mask_of(t)
        if mask is None:
            return t
        # not a product: what a model computes at padding may be anything, NaN among it
        return t[mask].unsqueeze(0) if packed else t.masked_fill(~mask.unsqueeze(-1), 0)


def columns(pass_: Pass, loss: Loss, labels: Labels, draws: int = 1, seed: int = 0) -> Iterator[Tensor]:
    """Vectors v_k (N, T, C) with Σ_k v_k v_kᵀ = H_ŷ (exactly, in expectation, or empirically).

    `exact`: the columns of a factor of H_ŷ, one loss position at a time. `model`: `draws` gradients at labels
    drawn from the model, over √draws; positions draw independently. `data`: the gradient at the data's labels.
    """
    outputs, targets = pass_.outputs.detach(), pass_.targets
    if labels == "data":
        yield _by_pieces(outputs, lambda part, piece: loss.gradient(piece, targets[part]))
    elif labels == "model":
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")

        def sampled(draw: int) -> Callable[[slice, Tensor], Tensor]:
            return lambda part, piece: (
                loss.sampled_gradient(piece, targets[part], seed, draw, pass_.examples[part]) / draws**0.5
            )

        for draw in range(draws):
            yield _by_pieces(outputs, sampled(draw))
    elif labels == "exact":
        positions, classes = outputs.shape[1:]
        check_exact(positions, classes)
        factor = loss.hessian_factor(_float(outputs), targets).to(outputs.dtype)
        carrying = loss.terms(outputs, targets).any(0).tolist()
        for t in (t for t in range(positions) if carrying[t]):
            for k in range(factor.shape[-1]):
                v = torch.zeros_like(outputs)
                v[:, t] = factor[:, t, :, k]
                yield v
    else:
        raise ValueError(f"labels must be 'exact', 'model' or 'data', got {labels!r}")


def check_exact(positions: int, classes: int | None) -> None:
    """Raise ValueError where `labels="exact"` would take more backward passes a batch than `MAX_COLUMNS`.

    `classes` None, where it is not known before a pass, says nothing.
    """
    if positions * (classes or 0) > MAX_COLUMNS:
        raise ValueError(
            f"labels='exact' takes one backward pass a class and loss position: {classes} × {positions} "
            f"exceeds {MAX_COLUMNS}; use labels='model' (unbiased) instead"
        )


def _float(t: Tensor) -> Tensor:
    """In float32 or better: 1 − p of a confident prediction has no digits left in bfloat16."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _pieces(outputs: Tensor) -> list[slice]:
    """Slices over the examples of (N, T, C) such that float64 copies of one stay below `PIECE_BYTES`."""
    size = max(1, PIECE_BYTES // max(1, 8 * outputs[0].numel()))
    return [slice(start, start + size) for start in range(0, len(outputs), size)]


def _by_pieces(outputs: Tensor, compute: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """`compute(part, outputs[part])` in float32 or better, as (N, T, C) in the outputs' dtype."""
    parts = _pieces(outputs)
    if len(parts) == 1:
        return compute(parts[0], _float(outputs)).to(outputs.dtype)
    v = torch.empty_like(outputs)
    for part in parts:
        v[part] = compute(part, _float(outputs[part]))
    return v


def passes(
    model: nn.Module,
    loss: Loss,
    data: Data,
    layers: Sequence[MatrixLayer],
    *,
    desc: str,
    first_example: int = 0,
    micro_batch: int | None = None,
    backward: bool = True,
    select: Callable[[int, Batch], bool] | None = None,
) -> Iterator[Pass]:
    """One `Pass` a micro-batch of `data`.

    Args:
        first_example: index of the first example in the whole data set (for a worker that holds a shard).
        micro_batch: examples of one forward pass (`split`).
        backward: False keeps no graph, for statistics of inputs alone.
        select: called with each micro-batch and its number; those for which it is false are only counted (another
            process' share, or what was done before an interruption).

    Raises:
        ValueError: empty or ill-shaped data, targets out of range or with a loss at padding, a model in training
            mode with BatchNorm or Dropout, a layer that the forward pass uses never or more than once.
        FloatingPointError: a loss that is not finite.
        MemoryError: outputs that cannot fit.
    """
    _check_mode(model)
    width, announced = output_width(model), 0
    start = first_example
    examples: tuple[Batch, ...] = ()  # of which the bar counts
    with _frozen(model), progress(examples, desc, count_examples(data)) as bar:
        for number, batch in enumerate(split(data, micro_batch, model)):
            if select is None or select(number, batch):
                needed = output_bytes(batch.targets.shape[:2], width, layers[0].parameters()[0].dtype)
                if needed > announced:
                    announce(f"{desc}: outputs of a pass", needed, "a smaller micro_batch", device_of(model))
                    announced = needed
                yield _forward(model, loss, batch, layers, start, backward)
                bar.set_postfix_str(f"peak {human(peak(device_of(model)))}", refresh=False)
            bar.update(len(batch))
            start += len(batch)


def output_bytes(shape: Sequence[int], width: int | None, dtype: torch.dtype) -> int:
    """Outputs of a pass over (N, T) positions, the vectors v (both in the model's dtype), and their wider pieces."""
    if width is None or len(shape) < 2:
        return 0
    whole = (*shape, width)
    return 2 * bytes_of(*whole, dtype=dtype) + 3 * min(PIECE_BYTES, bytes_of(*whole, dtype=torch.float64))


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


def _forward(
    model: nn.Module, loss: Loss, batch: Batch, layers: Sequence[MatrixLayer], start: int, backward: bool
) -> Pass:
    raw_inputs: dict[str, Tensor] = {}
    raw_outputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def hook(layer: MatrixLayer) -> Any:
        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.name in raw_inputs:
                raise ValueError(
                    f"layer {layer.name!r} is used more than once in a forward pass; the curvature of a reused "
                    "layer is not that of one W a: choose another layer"
                )
            if not args:
                raise ValueError(f"layer {layer.name!r} is called with keyword arguments; pass its input by position")
            x = args[0].detach()
            raw_inputs[layer.name], versions[layer.name] = x, x._version
            if not backward:
                return output
            s = output if output.requires_grad else output.detach().requires_grad_()
            raw_outputs[layer.name] = s
            return s.clone()  # an in-place activation must not turn s into φ(s)

        return layer.module.register_forward_hook(remember)

    handles = [hook(layer) for layer in layers]
    try:
        with torch.set_grad_enabled(backward):
            outputs = run(model, to_device(batch.inputs, device_of(model)))
            # the loss is where the model's last part is
            outputs, targets = shaped(outputs, batch.targets.to(outputs.device))
    finally:
        for handle in handles:
            handle.remove()
    device = outputs.device
    unused = [layer.name for layer in layers if layer.name not in raw_inputs]
    if unused:
        raise ValueError(f"the forward pass never used {unused}")
    mask = None if batch.mask is None else batch.mask.to(device).bool()
    with torch.no_grad():
        terms = loss.terms(outputs, targets)
        _check_targets(outputs, targets, terms, mask)
        if not all(bool(loss.value(_float(outputs[p]), targets[p]).isfinite().all()) for p in _pieces(outputs)):
            raise FloatingPointError(f"the loss is not finite on examples {start} to {start + len(batch) - 1}")
    if mask is not None and bool(mask.all()):
        mask = None  # nothing to take out
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
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # anew: weights that accelerate offloads are exchanged
            parameter.requires_grad_(flags[name])


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
