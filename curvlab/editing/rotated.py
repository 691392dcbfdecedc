"""What no edit changes of a descent in the eigenbasis: the rotated inputs of the lowest edited layers."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Batch, to_device
from curvlab.editing.prefix import Prefix, Reached
from curvlab.eigenbasis import Eigenbasis
from curvlab.layers import device_of
from curvlab.memory import announce, bytes_of

MICRO_BATCH = 32


class RotatedInputs:
    """x U_in of the layers that no edited layer feeds, for all texts of a batch; computed anew after a refit.

    Which layers these are is seen in a forward pass: their inputs depend on nothing that is trained.

    Raises:
        MemoryError: rotated inputs that cannot fit.
    """

    def __init__(self, model: nn.Module, eigen: Eigenbasis, batch: Batch, prefix: Prefix | None) -> None:
        self.model, self.eigen, self.batch, self.prefix = model, eigen, batch, prefix
        self._of: Any = None  # the constraint whose eigenvectors the inputs were rotated by
        self._stored: dict[str, Tensor] = {}
        inputs = self._inputs(slice(0, 1), [layer.name for layer in eigen.layers])
        length = batch.targets.shape[1]
        self.names = [n for n, x in inputs.items() if not x.requires_grad and x.shape[:-1] == (1, length)]
        needed = sum(bytes_of(len(batch), length, inputs[n].shape[-1], dtype=inputs[n].dtype) for n in self.names)
        announce("rotated inputs of the lowest edited layers", needed, "cache_rotated=False", device_of(model))

    def use(self, index: Tensor, chosen: Batch) -> None:
        """Let the next forward pass, of the examples `index` cropped as in `chosen`, use them."""
        if self._of is not self.eigen.constraint:
            self._fill()
        for name, stored in self._stored.items():
            rotated = stored[index.to(stored.device), : chosen.targets.shape[1]]
            self.eigen.use_rotated(name, rotated)

    @torch.no_grad()
    def _fill(self) -> None:
        self._stored = {}  # before new ones take their place
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for start in range(0, len(self.batch) if self.names else 0, MICRO_BATCH):
            inputs = self._inputs(slice(start, start + MICRO_BATCH), self.names)
            for name in self.names:
                parts[name].append(self.eigen.rotate_input(name, inputs[name]))
        self._stored = {name: torch.cat(pieces) for name, pieces in parts.items()}
        self._of = self.eigen.constraint

    def _inputs(self, part: slice, names: Sequence[str]) -> dict[str, Tensor]:
        """The inputs (n, T, d_in) of the layers `names`; the forward pass ends where it has come to all of them."""
        found: dict[str, Tensor] = {}

        def remember(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found[name] = args[0]
                if len(found) == len(names):
                    raise Reached

            return hook

        few = self.batch[part]
        index = torch.arange(len(self.batch))[part]
        layers = [layer for layer in self.eigen.layers if layer.name in names]
        handles = [layer.module.register_forward_pre_hook(remember(layer.name)) for layer in layers]
        try:
            with nullcontext() if self.prefix is None else self.prefix.replay(index), suppress(Reached):
                self.model(**to_device(few.inputs, device_of(self.model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found
