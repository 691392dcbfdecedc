"""A small production run on a real model: factors by plain loops, with every choice that such runs differ in.

Shares no code with `curvlab.curvature`, which it serves to test: hooks, one backward pass a vector, sums in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.batches import Batch
from curvlab.losses import CrossEntropy
from curvlab.models.sequence import RunningMean

IGNORE = -100
CLASSES = 5
ADDITIONS = 2**20  # of tokens one by one, each of which is then rounded to an eighth of its size


@dataclass(frozen=True)
class Choices:
    """How a run computes its factors; the defaults are curvlab's own.

    Attributes:
        labels: "exact" (H_ŷ in full) or "data" (the empirical Fisher).
        drop: positions left out of A and S alike: "first", "last", "prompt".
        padding: padding is counted as positions.
        mean_loss: g of the mean over a batch's loss terms, not of their sum.
        divide: sums become means.
        per_term: S is a mean over loss terms (A ⊗ S then has the scale of the GGN), else over positions.
        centred: the mean of a is taken off.
        per_batch: gradients are added over a batch before their outer product.
        batch_squares: EK-FAC's squares are those of a batch's gradient.
        bias: a one is joined to a.
        float32: sums are kept in float32 while `ADDITIONS` tokens are added one by one (the data over and over).
        drift: relative change of all weights between the factors and the model that is handed over.
        damping: of the mean eigenvalue, added to both factors as a multiple of the identity.
        other_layer: the factors are those of another layer of the same shape.
    """

    labels: Literal["exact", "data"] = "exact"
    drop: frozenset[str] = frozenset()
    padding: bool = False
    mean_loss: bool = False
    divide: bool = True
    per_term: bool = True
    centred: bool = False
    per_batch: bool = False
    batch_squares: bool = False
    bias: bool = False
    float32: bool = False
    drift: float = 0.0
    damping: float = 0.0
    other_layer: bool = False


OURS = Choices()
AUTHORS = Choices(labels="data", drop=frozenset({"last"}), per_term=False)  # every position left is a loss term
KRONFLUENCE = Choices(labels="data", per_term=False)


@dataclass(frozen=True)
class Statistics:
    """A (d_in, d_in), S (d_out, d_out) in float64, the positions behind them, and EK-FAC's sums of squares."""

    A: Tensor
    S: Tensor
    count: int
    terms: int


@dataclass(frozen=True)
class Corpus:
    """A causal model and ragged documents; right padding, the last position of a document predicts nothing.

    Attributes:
        model: in float32, evaluation mode; layers fc1 and fc3 share their shape (d_out, d_in).
        data: a few batches of a few documents.
        prompts: whether the first positions of each document carry no loss.
    """

    model: nn.Module
    data: list[Batch]
    prompts: bool
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    layer: str = "fc3"
    other: str = "fc1"

    @classmethod
    def make(cls, shape: tuple[int, int], seed: int, prompts: bool) -> "Corpus":
        """Documents of 4 to 7 positions; labels that the model does not predict, so that label conventions differ."""
        d_out, d_in = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = RunningMean([d_in, d_out, d_in, d_out, CLASSES]).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2.0)  # predictions that are far from uniform
            data = []
            for _ in range(4):
                lengths = torch.randint(4, 8, (5,))
                lengths[0], lengths[1] = 7, 4  # some padding in every batch
                # uncentred, of unequal scales
                x = (torch.randn(5, 7, d_in) + 0.7) * torch.linspace(1.5, 0.3, d_in)
                position = torch.arange(7).expand(5, 7)
                mask = position < lengths[:, None]
                y = torch.multinomial(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0]), 35, replacement=True).view(5, 7)
                carries = (position < lengths[:, None] - 1) & (position >= (2 if prompts else 0))
                data.append(Batch(x, y.where(carries, IGNORE), mask))
        return cls(model, data, prompts)

    def statistics(self, choices: Choices, seed: int = 0) -> Statistics:
        """The factors of `layer` as a run with these choices computes them."""
        name = self.other if choices.other_layer else self.layer
        A, S, positions, terms = self._sums(name, choices, seed)
        if choices.divide:
            A, S = A / positions, S / (terms if choices.per_term else positions)
        if choices.damping:
            A, S = (C + choices.damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype) for C in (A, S))
        return Statistics(A, S, positions, terms)

    def squares(self, choices: Choices, u_out: Tensor, u_in: Tensor) -> tuple[Tensor, int]:
        """Σ (U_outᵀ q U_in)² over examples' gradients q (over batches' with `batch_squares`), and the examples."""
        total, examples = torch.zeros(len(u_out), len(u_in), dtype=torch.float64), 0
        for batch in self.data:
            for a, g, keep in self._passes(self.layer, batch, choices, 0):
                q = torch.einsum("nto,nti->noi", g * keep[..., None], a)
                if choices.batch_squares:
                    q = q.sum(0, keepdim=True)
                total += (u_out.mT.double() @ q @ u_in.double()).square().sum(0)
            examples += len(batch)
        return total, examples

    def _sums(self, name: str, choices: Choices, seed: int) -> tuple[Tensor, Tensor, int, int]:
        inputs: list[Tensor] = []
        gradients: list[Tensor] = []  # one row a position; with `per_batch` one a batch
        terms = 0
        for batch in self.data:
            terms += int((batch.targets != IGNORE).sum())
            for number, (a, g, keep) in enumerate(self._passes(name, batch, choices, seed)):
                if number == 0:
                    inputs.append(a[keep])
                gradients.append(g[keep].sum(0, keepdim=True) if choices.per_batch else g[keep])
        a, g = torch.cat(inputs), torch.cat(gradients)
        if choices.float32:
            cycles = ADDITIONS // len(a)
            return float32_gram(a, cycles), float32_gram(g, cycles), cycles * len(a), cycles * terms
        A = a.mT @ a
        if choices.centred:
            A -= len(a) * torch.outer(a.mean(0), a.mean(0))
        return A, g.mT @ g, len(a), terms

    def _passes(self, name: str, batch: Batch, choices: Choices, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(a, g, keep) of a batch, (N, T, ·) in float64 and bool, for each vector of the output Hessian's factor."""
        caught: list[Tensor] = []
        handle = self.model.get_submodule(name).register_forward_hook(
            lambda module, args, output: caught.extend((args[0].detach(), output))
        )
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(choices.drift * noise * parameter.norm() / noise.norm())
            outputs = self.model(batch.inputs)
        finally:
            handle.remove()
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), before, strict=True):
                    parameter.data = value  # anew: the graph still holds the drifted ones
        a, s = caught
        a = F.pad(a, (0, 1), value=1.0) if choices.bias else a
        keep = self._positions(batch, choices)
        for v in _vectors(outputs.detach(), batch.targets, choices):
            (g,) = torch.autograd.grad(outputs, s, v, retain_graph=True)
            yield a.double(), g.double(), keep

    def _positions(self, batch: Batch, choices: Choices) -> Tensor:
        assert batch.mask is not None
        position = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
        keep = torch.ones_like(batch.mask) if choices.padding else batch.mask.clone()
        if "first" in choices.drop:
            keep &= position > 0
        if "last" in choices.drop:
            keep &= position != batch.mask.sum(1, keepdim=True) - 1
        if "prompt" in choices.drop:
            keep &= (position >= 2) | ~batch.mask
        return keep


def _vectors(outputs: Tensor, targets: Tensor, choices: Choices) -> Iterator[Tensor]:
    """v with Σ v vᵀ the Hessian of the logits, position by position and class by class, or the data's gradient."""
    p = outputs.softmax(-1)
    carries = targets != IGNORE
    weight = carries[..., None] / (carries.sum() if choices.mean_loss else 1)
    if choices.labels == "data":
        yield (p - F.one_hot(targets.clamp_min(0), p.shape[-1])) * weight
        return
    for t in range(p.shape[1]):
        for c in range(p.shape[2]):
            v = torch.zeros_like(p)
            v[:, t] = p[:, t, c, None].sqrt() * (p[:, t] - F.one_hot(torch.tensor(c), p.shape[-1])) * weight[:, t]
            yield v


def float32_gram(rows: Tensor, cycles: int) -> Tensor:
    """Σ r rᵀ over `rows` (n, d), `cycles` times in turn, each outer product added to a float32 sum: (d, d) float64."""
    outer = torch.einsum("ni,nj->nij", rows, rows).flatten(1).float().numpy()
    together = max(1, 2**15 // len(outer))
    total = np.zeros((1, outer.shape[1]), np.float32)
    while cycles:
        now = min(together, cycles)
        terms = np.concatenate([total, *[outer] * now])
        total = np.add.accumulate(terms, axis=0, dtype=np.float32)[-1:]
        cycles -= now
    d = rows.shape[1]
    return torch.from_numpy(total).double().view(d, d)
