"""What a model computes at one position of each text: inputs of layers (keys), outputs of blocks (hidden states)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Batch, to_device
from curvlab.editing.prefix import Reached
from curvlab.layers import MatrixLayer, device_of

ROWS = 32  # texts of one forward pass


@torch.no_grad()
def read(
    model: nn.Module, batch: Batch, positions: Tensor, layers: Sequence[MatrixLayer], block: nn.Module | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs (N, d_in) of the layers by name, and outputs (N, d) of the block, at each text's position; in float64.

    Texts are cut behind the last position, and a forward pass ends where it has come to all of them.
    """
    length = int(positions.max()) + 1
    inputs = {key: value[:, :length] for key, value in batch.inputs.items()}
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    outputs: list[Tensor] = []
    starts = range(0, len(positions), ROWS)
    done = 0

    def remember(into: list[Tensor], of: Callable[[Any, Any], Tensor]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal done
            x = of(args, output)
            at = positions[start : start + ROWS].to(x.device)
            x = x.reshape(len(at), -1, x.shape[-1])  # (some models flatten their tokens)
            into.append(x[torch.arange(len(at), device=x.device), at].double())
            done += 1
            if done == len(handles):
                raise Reached

        return hook

    handles = [
        layer.module.register_forward_hook(remember(found[layer.name], lambda args, _: args[0])) for layer in layers
    ]
    if block is not None:
        handles.append(block.register_forward_hook(remember(outputs, lambda _, output: hidden_of(output))))
    try:
        for start in starts:
            done = 0
            some = {key: value[start : start + ROWS] for key, value in inputs.items()}
            try:
                model(**to_device(some, device_of(model)), use_cache=False)
            except Reached:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(outputs) if outputs else None


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
