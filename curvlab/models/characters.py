"""A character model small enough for a dense GGN: text as one-hot letters, each position predicting the next."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlab.models.sequence import RunningMean
from curvlab.progress import progress

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"
IGNORE = -100


def pieces(documents: Sequence[str], n: int, length: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n pieces of `length` letters, drawn from all that the documents have one after another.

    Returns:
        One-hot letters (n, length, 29), float64, and the letters that follow (n, length); the last has no label.

    Raises:
        ValueError: fewer than n pieces of text.
    """
    text = " ".join(documents).lower()
    codes = torch.tensor([ALPHABET.find(c) for c in text if c in ALPHABET])
    whole = codes[: len(codes) // length * length].view(-1, length)
    if len(whole) < n or n < 1:
        raise ValueError(f"the documents have {len(whole)} pieces of {length} letters, {n} were asked for")
    chosen = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:n]]
    following = F.pad(chosen[:, 1:], (0, 1), value=IGNORE)
    return F.one_hot(chosen, len(ALPHABET)).double(), following


def character_model(x: Tensor, y: Tensor, *, width: int, steps: int = 600, seed: int = 0) -> RunningMean:
    """Layers fc1 to fc3 of a width, trained on pieces (x, y) by Adam; float64, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RunningMean([len(ALPHABET), width, width, len(ALPHABET)]).double()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-2, total_steps=steps)
    for _ in progress(range(steps), "training on letters"):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model(x[batch]).mT, y[batch], ignore_index=IGNORE)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()
