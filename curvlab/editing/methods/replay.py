"""Replay: the capability set's own loss, mixed into the edit loss."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.capture import Batch
from curvlab.editing.job import Job, editor
from curvlab.editing.prefix import Prefix
from curvlab.editing.training import Weighted, target_loss
from curvlab.memory import announce


@dataclass(frozen=True)
class Replay(Weighted):
    """Training with replay.

    Attributes:
        strength: weight of the capability loss (mean over the next tokens of one batch of documents a step)
            beside the edit loss.
    """

    strength: float = 1.0


@editor("replay", Replay)
def replay(job: Job, options: Replay) -> None:
    """Fine-tuning with a batch of capability documents in every step."""
    extra = replayed(job, options)
    job.train(options.optimise(job.parameters()), options, extra=extra)


def replayed(job: Job, options: Replay) -> Callable[[], Tensor]:
    """The loss of one batch of documents after another, in an order drawn anew for each pass."""
    batches = job.needs_capability().batches(job.tokenizer)
    prefixes = _prefixes(job, batches) if options.cache_prefix else []
    generator = torch.Generator().manual_seed(job.seed + 1)
    waiting: list[int] = []

    def loss() -> Tensor:
        if not waiting:
            waiting.extend(torch.randperm(len(batches), generator=generator).tolist())
        index = waiting.pop()
        with prefixes[index].replay(torch.arange(len(batches[index]))) if prefixes else nullcontext():
            return options.strength * target_loss(job.model, batches[index])

    return loss


def _prefixes(job: Job, batches: list[Batch]) -> list[Prefix]:
    """Hidden states of all documents below the edited layers; none where these are in the first block."""
    first = Prefix(job.model, job.layers, batches[0])
    if first.hidden is None:
        return []
    needed = first.hidden.nbytes // batches[0].targets.numel() * sum(batch.targets.numel() for batch in batches)
    announce("hidden states of the capability set", needed, "cache_prefix=False", first.hidden.device)
    return [first, *(Prefix(job.model, job.layers, batch, verify=False) for batch in batches[1:])]
