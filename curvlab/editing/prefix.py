"""Nothing below the lowest edited block changes: its hidden states are computed once for the edit set.

A transformers model keeps its blocks in one `ModuleList`. `Prefix` runs the blocks below the lowest edited one a
single time and replays what came out of them in every later forward pass, whatever the model's family.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Batch, to_device
from curvlab.layers import device_of
from curvlab.memory import announce

AGREES = 0.05  # relative error of replayed outputs that rounding explains, in bfloat16 too


class Prefix:
    """The hidden states of a batch of texts below the lowest of some layers.

    Args:
        micro_batch: texts of one forward pass.
        verify: compare the model's outputs on two texts with and without them.

    Raises:
        MemoryError: hidden states that cannot fit.

    Attributes:
        skipped: how many blocks need not run again; 0 where the lowest layer lies in the first block, or where
            replaying was seen to change the model's outputs (blocks that hand on more than hidden states).
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], batch: Batch, micro_batch: int = 32, verify: bool = True
    ) -> None:
        self.blocks = blocks_below(model, layers)
        self.hidden: Tensor | None = None
        self._tuple_of = 0  # how many values a block returns as a tuple; 0 for a bare tensor
        if self.blocks and not (self._fill(model, batch, micro_batch) and (not verify or self._agrees(model, batch))):
            warnings.warn(
                f"{type(model).__name__}: blocks below the edited layers hand on more than hidden states, which are "
                "therefore not cached",
                stacklevel=2,
            )
            self.blocks, self.hidden = [], None

    @property
    def skipped(self) -> int:
        return len(self.blocks)

    @contextmanager
    def replay(self, index: Tensor) -> Iterator[None]:
        """Forward passes inside see the stored states of the examples `index` instead of running lower blocks."""
        if self.hidden is None:
            yield
            return
        stored = self.hidden[index.to(self.hidden.device)]

        def output(hidden: Tensor) -> Any:
            return (hidden, *[None] * (self._tuple_of - 1)) if self._tuple_of else hidden

        def passed_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return output(hidden)

        def recalled(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return output(stored[:, : hidden.shape[1]])

        replaced = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = recalled if block is self.blocks[-1] else passed_on
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, replaced, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.forward = forward

    @torch.no_grad()
    def _fill(self, model: nn.Module, batch: Batch, micro_batch: int) -> bool:
        """Compute the states; whether they are one vector a token."""
        starts = range(0, len(batch), micro_batch)
        first = self._run(model, batch[:micro_batch])
        if first.dim() != 3 or first.shape[:2] != batch.targets[:micro_batch].shape:
            return False
        needed = first[0].nbytes * len(batch)
        announce("hidden states below the edited layers", needed, "cache_prefix=False", first.device)
        self.hidden = torch.cat([first, *(self._run(model, batch[i : i + micro_batch]) for i in starts[1:])])
        return True

    @torch.no_grad()
    def _agrees(self, model: nn.Module, batch: Batch) -> bool:
        """Whether the model's outputs are the same with them."""
        few = batch[:2]
        inputs = to_device(few.inputs, device_of(model))
        wanted = model(**inputs, use_cache=False).logits
        with self.replay(torch.arange(len(few))):
            found = model(**inputs, use_cache=False).logits
        real = slice(None) if few.mask is None else few.mask.to(wanted.device)
        error = (found - wanted)[real].float().norm()
        return not bool(error > AGREES * wanted[real].float().norm())  # (NaN is for the loss to report)

    def _run(self, model: nn.Module, batch: Batch) -> Tensor:
        found: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise Reached

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            with suppress(Reached):
                model(**to_device(batch.inputs, device_of(model)), use_cache=False)
        finally:
            handle.remove()
        (output,) = found
        self._tuple_of = len(output) if isinstance(output, tuple) else 0
        return output[0] if self._tuple_of else output


class Reached(Exception):
    """The forward pass has come as far as is needed."""


def blocks_below(model: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The blocks of the model's `ModuleList` below the lowest of `layers`; none for a layer outside such a list."""
    modules = dict(model.named_modules())
    places: list[tuple[str, int]] = []
    for layer in layers:
        parts = layer.split(".")
        stems = [".".join(parts[:i]) for i in range(1, len(parts))]
        stem = next((s for s in stems if isinstance(modules.get(s), nn.ModuleList)), None)
        if stem is None:
            return []
        places.append((stem, int(layer.removeprefix(f"{stem}.").split(".")[0])))
    if len({stem for stem, _ in places}) != 1:
        return []
    stem = places[0][0]
    lowest = min(index for _, index in places)
    return [modules[f"{stem}.{i}"] for i in range(lowest)]
