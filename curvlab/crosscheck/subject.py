"""What a part is checked with: a model, its loss and data."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from curvlab.batches import Batch
from curvlab.losses import Loss


@dataclass(frozen=True)
class Subject:
    """A model and data to recompute with.

    Attributes:
        data: batches as the production run would have made them (padding, batch sizes, order).
    """

    model: nn.Module
    loss: Loss
    data: Sequence[Batch]
