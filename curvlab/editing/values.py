"""Values of locate-and-edit methods: what a module should put out at a subject's last token, by gradient descent.

A shift δ of that output is found for each request (ROME, arXiv 2202.05262, eq. 4): the target's mean negative
log-likelihood over the prefixes, plus `kl` · KL(p_δ ‖ p_0) after "{subject} is a", plus `decay` · ‖δ‖ / ‖v_0‖², where
‖δ‖ ≤ `clamp` · ‖v_0‖ and v_0 is the output before, behind no prefix.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.capture import Batch, to_device
from curvlab.data.text import IGNORE, select
from curvlab.editing.job import output_projections
from curvlab.editing.lookup import Lookup
from curvlab.editing.prefix import Prefix
from curvlab.editing.reading import hidden_of, read, with_hidden
from curvlab.editing.subject import SUBJECTS
from curvlab.editing.training import OPTIMIZERS, Training
from curvlab.layers import device_of


@dataclass(frozen=True)
class Locating(Training):
    """Editing at the subject's last token: values by gradient descent, then weights in closed form.

    Of the training's options `epochs` are the steps of descent of a value and `batch_size` the requests whose values
    descend side by side (each by itself); a request whose loss is below `stop_below` (or `skip_below`) takes no more.

    Attributes:
        relative: `lr` is in units of the root mean square of v_0's entries, so that one value serves models of any
            scale; False: in the output's own units, as the authors' 0.1 for Llama-3.
        kl: weight of the divergence after `essence`.
        decay: weight of ‖δ‖ / ‖v_0‖².
        clamp: largest ‖δ‖ / ‖v_0‖.
        prefixes: texts drawn from the model that a prompt is also seen behind.
        prefix_length: tokens drawn for each.
        subject: "required"; "last-token": where a prompt does not hold its subject, its last token is edited, and
            `essence` is left out; "ignored": so with every prompt (the authors' fact_token "last").
        essence: a text whose prediction should stay, with {subject}.
        damping: share of the mean eigenvalue of C that is added to all of them, so that C can be inverted.
    """

    epochs: int = 25
    batch_size: int = 16
    lr: float = 0.1
    skip_below: float = 0.0
    stop_below: float = 5e-2
    end: bool = False
    relative: bool = True
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 0.75
    prefixes: int = 5
    prefix_length: int = 10
    subject: str = "required"
    essence: str = "{subject} is a"
    damping: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mask_prompt:
            raise ValueError("a value's loss is on the target alone: mask_prompt must be True")
        if not (0 <= self.kl < math.inf and 0 <= self.decay < math.inf and self.clamp > 0):
            raise ValueError(
                f"kl and decay must be at least 0, clamp positive; got {self.kl}, {self.decay}, {self.clamp}"
            )
        if self.prefixes < 0 or self.prefix_length < 1:
            raise ValueError(
                f"prefixes must be at least 0 and prefix_length 1, got {self.prefixes}, {self.prefix_length}"
            )
        if self.subject not in SUBJECTS:
            raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}; got {self.subject!r}")
        if "{subject}" not in self.essence:
            raise ValueError(f"essence must contain {{subject}}, got {self.essence!r}")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be at least 0, got {self.damping}")
        if self.optimizer is torch.optim.LBFGS:
            raise ValueError(f"values descend step by step: use a first-order optimiser ({', '.join(OPTIMIZERS)})")

    @staticmethod
    def default_layers(model: nn.Module) -> list[str]:
        """The MLP output projections of the blocks at 12 to 28 % of the depth, as the authors' 4–8 of Llama-3's 32.

        Raises:
            ValueError: a model without such projections.
        """
        names = output_projections(model)
        first, last = round(4 / 32 * len(names)), round(9 / 32 * len(names))
        return names[first : max(last, first + 1)]


@dataclass(frozen=True)
class Site:
    """A module whose output is shifted.

    Attributes:
        below: a layer's name; blocks below that layer's run once.
    """

    module: nn.Module
    below: str


@dataclass(frozen=True)
class Values:
    """Shifts δ (n, d) and the outputs v_0 (n, d) that they are of, with each request's loss at every step."""

    shifts: Tensor
    before: Tensor
    losses: list[list[float]]


def find_values(model: Any, site: Site, look: Lookup, options: Locating) -> Values:
    """Descend on the shifts of the requests in `look`, each by itself; the weights stay as they are.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    _, output = read(model, look.batch[: look.n], look.positions[: look.n], [], site.module)
    assert output is not None
    before = output.to(torch.promote_types(model.dtype, torch.float32))
    size = before.norm(dim=1, keepdim=True).clamp_min(1e-30)
    unit = size / before.shape[1] ** 0.5 if options.relative else torch.ones_like(size)
    steps = torch.zeros_like(before, requires_grad=True)  # the shifts in these units
    optimizer = options.optimise([steps])
    losses: list[list[float]] = [[] for _ in range(look.n)]
    objective = _Objective(model, site, look, options)
    active = torch.arange(look.n)
    for _ in range(options.epochs):
        optimizer.zero_grad(set_to_none=True)
        at = active.to(steps.device)
        shifts = unit[at] * steps[at]
        each = objective(shifts, active) + options.decay * shifts.norm(dim=1) / size[at].squeeze(1).square()
        for i, value in zip(active.tolist(), each.tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of a value is {value}; try a smaller lr than {options.lr:g}")
            losses[i].append(value)
        going = each.detach().cpu() >= max(options.stop_below, options.skip_below)
        active, at = active[going], at[going.to(at.device)]
        if not len(active):
            break
        each.sum().backward()
        before_step = steps.detach().clone()
        optimizer.step()
        with torch.no_grad():
            moved = steps[at]
            norms = (unit[at] * moved).norm(dim=1, keepdim=True).clamp_min(1e-30)
            steps.copy_(before_step)  # momentum would move those that are done
            steps[at] = moved * (options.clamp * size[at] / norms).clamp_max(1.0)
    return Values((unit * steps).detach(), before, losses)


class _Objective:
    """Loss of some requests (m,) as a function of their shifts (m, d), without the shifts' decay."""

    def __init__(self, model: Any, site: Site, look: Lookup, options: Locating) -> None:
        self.look, self.kl = look, options.kl
        self.texts = _Texts(model, site, look.batch, look.positions, options)
        self.essence: _Texts | None = None
        if look.essence is not None and options.kl > 0:
            self.essence = _Texts(model, site, look.essence, look.essence_positions, options)
        self.first: Tensor | None = None  # log-probabilities after each essence before any shift

    def __call__(self, shifts: Tensor, index: Tensor) -> Tensor:
        look = self.look
        rows = torch.cat([index + context * look.n for context in range(look.contexts)])
        logits, targets = self.texts.logits(rows, shifts.repeat(look.contexts, 1))
        terms = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        means = terms.view_as(targets).sum(1) / (targets != IGNORE).sum(1)
        each = means.unflatten(0, (look.contexts, len(index))).mean(0).to(shifts.device)
        chosen = torch.isin(look.of_essence, index).nonzero().squeeze(1)
        if self.essence is None or not len(chosen):
            return each
        of = torch.searchsorted(index, look.of_essence[chosen]).to(shifts.device)
        logits, targets = self.essence.logits(chosen, shifts[of])
        now = logits[targets != IGNORE].log_softmax(-1)
        if self.first is None:
            self.first = now.detach()  # all requests are still there
        divergence = (now.exp() * (now - self.first[chosen.to(now.device)])).sum(-1)
        return each.index_add(0, of, self.kl * divergence.to(each))


class _Texts:
    """A batch of texts whose logits are wanted again and again, for one shift after another."""

    def __init__(self, model: Any, site: Site, batch: Batch, positions: Tensor, options: Locating) -> None:
        self.model, self.site, self.batch, self.positions = model, site, batch, positions
        self.prefix = Prefix(model, [site.below], batch) if options.cache_prefix else None
        self.sparse = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, rows: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K, V) of the texts `rows` where one of them has a target, in float32 or better, and the targets."""
        device = device_of(self.model)
        batch = select(self.batch, rows)
        kept = (batch.targets != IGNORE).any(0).nonzero().squeeze(1)
        given: dict[str, Any] = {"logits_to_keep": kept.to(device)} if self.sparse else {}
        replayed = nullcontext() if self.prefix is None else self.prefix.replay(rows)
        with replayed, _shifted(self.site.module, self.positions[rows], shifts):
            logits = self.model(**to_device(batch.inputs, device), use_cache=False, **given).logits
        logits = logits if self.sparse else logits[:, kept.to(logits.device)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, batch.targets[:, kept].to(logits.device)


@contextmanager
def _shifted(module: nn.Module, positions: Tensor, shifts: Tensor) -> Iterator[None]:
    """Inside, `shifts` (N, d) are added to the module's output at one position of each text."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        at = positions.to(hidden.device)
        flat = hidden.reshape(len(at), -1, hidden.shape[-1])
        index = torch.arange(len(at), device=hidden.device), at
        moved = flat.index_put(index, shifts.to(hidden), accumulate=True)
        return with_hidden(output, moved.view(hidden.shape))

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
