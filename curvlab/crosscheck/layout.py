"""Positions sorted into classes by flags, and which of them a convention counts; batches run exactly as given."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.batches import Batch
from curvlab.capture import run
from curvlab.losses import Loss

PADDING, FIRST, LAST, IGNORED, COLUMN = 1, 2, 4, 8, 16  # flags of a position; the class is their sum

CLASSES = 32

ALL_REAL = "every real position"


def _choices() -> dict[str, Callable[[int], bool]]:
    """Which positions count, ours first: predicates of the class. A prompt is what is ignored, but for the last."""
    prompt = (lambda c: c & IGNORED and not c & LAST, "prompt positions")
    drops = [(lambda c: c & LAST, "last position"), (lambda c: c & FIRST, "first position"), prompt]
    out: dict[str, Callable[[int], bool]] = {}
    for padding in (False, True):
        for chosen in sorted(itertools.product((False, True), repeat=3), key=lambda own: (sum(own), own[::-1])):
            dropped = [drop for drop, on in zip(drops, chosen, strict=True) if on]
            names = " and ".join(name for _, name in dropped)
            name = f"{names} of each document dropped" if names else ""
            name = ", ".join(filter(None, ["padding counted" if padding else "", name])) or ALL_REAL

            def counts(c: int, padding: bool = padding, dropped: list[Any] = dropped) -> bool:
                return (padding or not c & PADDING) and not any(test(c) for test, _ in dropped)

            out[name] = counts
    # the common shift [:, :-1]: the batch's last column goes, which is padding for all but its longest documents
    out["padding counted, last column of each batch dropped"] = lambda c: not c & COLUMN
    return out


POSITIONS = _choices()

CORE = [name for name in POSITIONS if " and " not in name]  # for sums over examples and batches, a matrix each


@dataclass(frozen=True)
class Layout:
    """What the batches say before any pass: classes of positions, loss terms, which example is in which batch.

    Attributes:
        codes: class of each position, one (n, T) a batch; T is 1 where targets have no positions.
        counts: positions of each class (examples, CLASSES).
        terms: loss terms of each example.
        batch: of each example.
    """

    codes: tuple[Tensor, ...]
    counts: Tensor
    terms: Tensor
    batch: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch], loss: Loss) -> "Layout":
        codes, terms = zip(*(_codes(batch, loss) for batch in batches), strict=True)
        counts = torch.cat([F.one_hot(code, CLASSES).sum(1) for code in codes])
        batch = torch.cat([torch.full((len(b),), i) for i, b in enumerate(batches)])
        return cls(tuple(codes), counts, torch.cat(terms), batch)

    def positions(self, name: str) -> Tensor:
        """How many each example has of those that count, int64."""
        return self.counts[:, [c for c in range(CLASSES) if POSITIONS[name](c)]].sum(1)

    def by_batch(self, numbers: Tensor) -> Tensor:
        """The sum over each example's batch, for each example."""
        sums = numbers.new_zeros(len(self.codes)).index_add_(0, self.batch, numbers)
        return sums[self.batch]


def _codes(batch: Batch, loss: Loss) -> tuple[Tensor, Tensor]:
    """Classes (n, T) and loss terms (n,) of a batch."""
    targets = batch.targets.detach().cpu()
    if targets.dim() == (2 if targets.is_floating_point() else 1):
        targets = targets.unsqueeze(1)
    terms = loss.terms(torch.empty(*targets.shape[:2], 1), targets)
    code = torch.where(terms, 0, IGNORED)
    if batch.mask is not None and batch.mask.shape == code.shape:
        real = batch.mask.detach().cpu().bool()
        code = code + torch.where(real, 0, PADDING)
    else:
        real = torch.ones_like(code, dtype=torch.bool)
    if code.shape[1] > 1:
        code = code + torch.where(real & (real.cumsum(1) == 1), FIRST, 0)
        code = code + torch.where(real & (real.flip(1).cumsum(1).flip(1) == 1), LAST, 0)
        code[:, -1] += COLUMN
    return code, terms.sum(1)


class AsGiven(nn.Module):
    """The model called with batches as they are: `capture` sees no attention mask, and moves no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def get_output_embeddings(self) -> Any:
        return getattr(self.model, "get_output_embeddings", lambda: None)()

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        if not inputs:
            return run(self.model, args[0])
        own = {key.removeprefix("as given "): value for key, value in inputs.items()}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            own["use_cache"] = False
        return run(self.model, own)


def hidden(batch: Batch) -> Batch:
    if not isinstance(batch.inputs, dict):
        return Batch(batch.inputs, batch.targets)
    inputs = {f"as given {key}": value for key, value in batch.inputs.items()}
    return Batch(inputs, batch.targets)
