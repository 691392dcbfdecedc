"""The edit loss descended: batches of requests, the paper's stop rules, hidden states below the edits cached."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from curvlab.capture import Batch, to_device
from curvlab.data.edits import Request
from curvlab.data.text import IGNORE, PLAIN, encode_pairs, fill, select
from curvlab.editing.prefix import Prefix
from curvlab.editing.rotated import RotatedInputs
from curvlab.eigenbasis import Eigenbasis
from curvlab.layers import device_of

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class Training:
    """How requests are trained on (paper, Table 2).

    Attributes:
        epochs: passes over the requests at most.
        batch_size: requests a step.
        lr: learning rate.
        optimizer: one of `OPTIMIZERS`, or a function (parameters, lr=…) → torch optimiser.
        skip_below: a batch whose loss is below it takes no step (nats a target token).
        stop_below: training stops once an epoch's mean loss is below it.
        template: the prompt a request is trained in; `curvlab.data.text.QA` is the paper's QA context.
        mask_prompt: the loss is on the target alone.
        ending: text put after each target, such as the full stop of the model's own documents.
        end: the end-of-text token follows.
        cache_prefix: hidden states below the lowest edited block are computed once.
    """

    epochs: int = 25
    batch_size: int = 32
    lr: float = 5e-4
    optimizer: str | Callable[..., Optimizer] = "adam"
    skip_below: float = 1e-2
    stop_below: float = 1e-2
    template: str = PLAIN
    mask_prompt: bool = True
    ending: str = ""
    end: bool = True
    cache_prefix: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise ValueError(
                f"epochs, batch_size and lr must be positive, got {self.epochs}, {self.batch_size}, {self.lr}"
            )
        if not (isinstance(self.epochs, int) and isinstance(self.batch_size, int)):
            raise ValueError(f"epochs and batch_size must be whole numbers, got {self.epochs}, {self.batch_size}")
        if not (self.skip_below >= 0 and self.stop_below >= 0):
            raise ValueError(
                f"skip_below and stop_below are losses ≥ 0, got {self.skip_below}, {self.stop_below} (0 is never met)"
            )
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be a function or one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        fill(self.template, "")

    def encode(self, tokenizer: Any, requests: Sequence[Request], **how: Any) -> list[Batch]:
        """Requests as batches (`encode_pairs`); `how` overrides."""
        pairs = [(request.prompt, request.target + self.ending) for request in requests]
        given: dict[str, Any] = {"template": self.template, "mask_prompt": self.mask_prompt, "end": self.end} | how
        return encode_pairs(tokenizer, pairs, **given)

    def check(self, tokenizer: Any, requests: Sequence[Request], max_length: int) -> None:
        """Refuse requests that cannot be encoded in this template, or are longer than `max_length` tokens in it."""
        (batch,) = self.encode(tokenizer, requests)
        lengths = batch.inputs["attention_mask"].sum(1)
        if int(lengths.max()) > max_length:
            n, longest = int((lengths > max_length).sum()), requests[int(lengths.argmax())]
            raise ValueError(
                f"{n} requests have more tokens in their template than the model takes ({int(lengths.max())} of "
                f"{max_length}), such as {longest.prompt[:60]!r}…"
            )

    def optimise(self, parameters: Sequence[Tensor]) -> Optimizer:
        """The optimiser over `parameters`."""
        make = OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        return make(parameters, lr=self.lr)


@dataclass(frozen=True)
class Weighted(Training):
    """Training with a second term in the loss, weighted by `strength`."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength must be positive and finite, got {self.strength}")


@dataclass(frozen=True)
class Sequential(Training):
    """Training in rounds; `chunk` requests a round, each starting where the last one ended."""

    chunk: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")

    def rounds(self, requests: Sequence[Request], seed: int) -> Iterator[tuple[list[Request], int]]:
        """The requests of each round, in their order, and the seed of its draws."""
        for start in range(0, len(requests), self.chunk):
            yield list(requests[start : start + self.chunk]), seed + start


@dataclass(frozen=True)
class Curve:
    """How a training went.

    Attributes:
        losses: mean edit loss of each epoch (nats a target token, before the step).
        skipped: batches of each epoch that took no step.
        stopped: why it ended.
    """

    losses: list[float]
    skipped: list[int]
    stopped: Literal["loss", "epochs"]


def descend(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[Request],
    optimizer: Optimizer,
    options: Training,
    *,
    layers: Sequence[str],
    seed: int,
    desc: str,
    extra: Callable[[], Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[], object] | None = None,
    eigen: Eigenbasis | None = None,
) -> Curve:
    """Minimise the mean cross-entropy of the requests' targets.

    Args:
        optimizer: over whatever is to move; all else is left alone.
        layers: names of the edited layers; blocks below the lowest run once (`Prefix`).
        seed: of the order of the requests.
        extra: a term added to each step's loss (a penalty, a replayed batch); it does not count for the stop rules.
        after_step: called when a step has been taken.
        after_epoch: called when an epoch has ended and another will follow.
        eigen: layers that descend in the eigenbasis, whose rotated inputs are to be cached (`RotatedInputs`).

    Raises:
        FloatingPointError: a loss that is not finite.
        MemoryError: what is to be cached cannot fit.
    """
    (batch,) = options.encode(tokenizer, requests)
    prefix = Prefix(model, layers, batch) if options.cache_prefix else None
    rotated = None if eigen is None else RotatedInputs(model, eigen, batch, prefix)
    closure_needed = _needs_closure(optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    skipped: list[int] = []
    stopped: Literal["loss", "epochs"] = "epochs"
    steps = -(-len(batch) // options.batch_size)
    with tqdm(total=options.epochs * steps, desc=desc, delay=1.0, leave=False, disable=None) as bar:
        for _ in range(options.epochs):
            total = torch.zeros((), dtype=torch.float64)
            skipped.append(0)
            for index in torch.randperm(len(batch), generator=generator).split(options.batch_size):
                chosen = select(batch, index)

                def edit_loss(index: Tensor = index, chosen: Batch = chosen) -> Tensor:
                    with nullcontext() if prefix is None else prefix.replay(index):
                        if rotated is not None:
                            rotated.use(index, chosen)
                        return target_loss(model, chosen)

                def objective(loss: Tensor | None = None, edit_loss: Callable[[], Tensor] = edit_loss) -> Tensor:
                    """The loss with its gradient; `loss` where the edit loss is known already."""
                    optimizer.zero_grad(set_to_none=True)
                    whole = edit_loss() if loss is None else loss
                    if extra is not None:
                        whole = whole + extra().to(whole.device)
                    whole.backward()
                    return whole.detach()

                loss = edit_loss()
                value = float(loss.detach())
                if not math.isfinite(value):
                    moved = bool(losses) or total > 0
                    why = f"try a smaller lr than {options.lr:g}" if moved else "no step was taken: look at the weights"
                    raise FloatingPointError(f"the edit loss is {value} in epoch {len(losses) + 1}; {why}")
                total += value * len(index)
                bar.update()
                if value < options.skip_below:
                    skipped[-1] += 1
                    continue
                if closure_needed:  # LBFGS, which looks at the loss where it likes
                    optimizer.step(objective)  # type: ignore[arg-type]
                else:
                    objective(loss)
                    optimizer.step()
                if after_step is not None:
                    after_step()
            losses.append(float(total) / len(batch))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if losses[-1] < options.stop_below:
                stopped = "loss"
                break
            if after_epoch is not None and len(losses) < options.epochs:
                after_epoch()
    optimizer.zero_grad(set_to_none=True)
    return Curve(losses, skipped, stopped)


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def target_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) over a batch's targets; logits are formed where a target is, and nowhere else."""
    device = device_of(model)
    targets = batch.targets.to(device)
    inputs = to_device(batch.inputs, device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = (targets != IGNORE).any(0).nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        targets = targets[:, kept]
    else:
        logits = model(**inputs, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=IGNORE)
