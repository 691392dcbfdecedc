"""Training of a small classifier from scratch, the same numbers from the same seed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm


@dataclass(frozen=True)
class TrainingRun:
    """What a training run did: epochs run, mean loss of the last epoch (nats), wall seconds, last score."""

    epochs: int
    loss: float
    seconds: float
    score: float | None


def pretrain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    target: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress_desc: str = "pretrain",
) -> TrainingRun:
    """Train `model` in place on inputs x (N, ...) and labels y (N,) by cross-entropy; say how it went.

    Adam without weight decay, under one cycle of learning rates that peaks at `lr`; the defaults bring LeNet5
    to 99.0-99.2 % on MNIST's test set. The order of the examples comes from `seed` alone, so a run repeats
    exactly on one machine with one number of threads; the initial weights are the caller's.
    `evaluate(model)` scores the model after each epoch, and training stops early once the score is at least
    `target`. Raises ValueError for arguments that make no sense and FloatingPointError when the loss stops
    being finite.
    """
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"pretrain needs N > 0 inputs and labels of shape (N,), got {len(x)} and {tuple(y.shape)}")
    if epochs < 1 or batch_size < 1 or lr <= 0:
        raise ValueError(f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size} and {lr}")
    if target is not None and evaluate is None:
        raise ValueError("target needs evaluate, the function whose score it is compared with")

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(x) // batch_size)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=epochs * steps + 1)
    was_training = model.training
    loss_of_epoch, score, done = 0.0, None, 0
    try:
        # disable=None hides the bar where standard error is no terminal.
        with tqdm(total=epochs * steps, desc=progress_desc, delay=1, disable=None, leave=False) as bar:
            for _ in range(epochs):
                model.train()
                total = torch.zeros((), dtype=torch.float64)
                for index in torch.randperm(len(x), generator=generator).split(batch_size):
                    optimiser.zero_grad(set_to_none=True)
                    loss = F.cross_entropy(model(x[index]), y[index])
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    total += loss.detach().cpu() * len(index)
                    bar.update()
                done += 1
                loss_of_epoch = float(total) / len(x)
                if not torch.isfinite(total):
                    raise FloatingPointError(f"the loss is {loss_of_epoch} after epoch {done}; try a smaller lr")
                if evaluate is not None:
                    score = evaluate(model)
                    bar.set_postfix(loss=f"{loss_of_epoch:.3f}", score=f"{score:.4f}")
                    if target is not None and score >= target:
                        break
    finally:
        model.train(was_training)
    return TrainingRun(done, loss_of_epoch, time.perf_counter() - start, score)
