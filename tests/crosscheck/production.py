"""Factors as production runs compute them, token by token in float64, in every convention; and models."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curvlab.capture import Batch
from curvlab.draws import categorical, uniforms

IGNORE = -100
VOCABULARY = 11


def llama(seed: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def gpt2(seed: int) -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def lenet(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 5),
        ).eval()  # fmt: skip


def texts(seed: int, *, left: bool = False, prompts: bool = False, sizes: tuple[int, ...] = (4, 4, 3)) -> list[Batch]:
    """Documents of 3 to 8 tokens in padded batches of these sizes; padded with a token that has an embedding."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        lengths = torch.randint(3, 9, (size,), generator=generator).tolist()
        lengths[0] = 8
        ids, labels, mask = [], [], []
        for n in lengths:
            tokens = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
            following = [*tokens[1:], IGNORE]
            if prompts:
                following = [IGNORE if t < n // 2 else y for t, y in enumerate(following)]
            pad = 8 - n
            rows = (tokens, [3] * pad), (following, [IGNORE] * pad), ([1] * n, [0] * pad)
            own = [b + a if left else a + b for a, b in rows]
            for target, row in zip((ids, labels, mask), own, strict=True):
                target.append(row)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        out.append(Batch(inputs, torch.tensor(labels)))
    return out


def images(seed: int, sizes: tuple[int, ...] = (12, 12, 7)) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(torch.randn(n, 1, 9, 9, generator=generator) + 0.5, torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


@dataclass(frozen=True)
class Run:
    """The conventions of a production run; the defaults are ours.

    Attributes:
        positions: "real", "last dropped", "first dropped", "prompt dropped", "with a loss",
            "padding".
        reduction: of the loss: "sum", "batch mean", "document mean".
        form: "position", "example", "batch".
        scale: "mean" (A by positions, S by loss terms), "sum".
    """

    labels: str = "data"
    seed: int = 0
    positions: str = "real"
    reduction: str = "sum"
    form: str = "position"
    centred: bool = False
    bias: bool = False
    scale: str = "mean"
    mean_a: bool = True  # of an example's or batch's positions


@dataclass(frozen=True)
class Made:
    A: Tensor
    S: Tensor
    N: int
    gradients: Tensor  # one (d_out, d_in) a unit of the form
    terms: int


def produce(model: nn.Module, layer: str, batches: list[Batch], how: Run) -> Made:
    """Explicit loops, in float64."""
    model = model.double()
    module = model.get_submodule(layer)
    units: list[list[tuple[Tensor, Tensor]]] = []  # (a, g) of each position, by unit of the form
    example = positions = terms = 0
    for batch in batches:
        a, s, outputs = _run(model, module, batch)
        loss, counted = _loss(outputs, batch, how, example)
        terms += counted
        (g,) = torch.autograd.grad(loss, s)
        rows_a, rows_g = _rows(module, a), _rows_out(module, g)
        if how.form == "batch":
            units.append([])
        for n in range(len(batch)):
            if how.form == "example":
                units.append([])
            for t in range(rows_a.shape[1]):
                if not _counts(batch, n, t, how.positions):
                    continue
                positions += 1
                if how.form == "position":
                    units.append([])
                units[-1].append((rows_a[n, t], rows_g[n, t]))
        example += len(batch)
    model.float()
    A, S, gradients = [], [], []
    for unit in filter(None, units):
        a_rows = torch.stack([F.pad(a, (0, 1), value=1.0) if how.bias else a for a, _ in unit])
        g_rows = torch.stack([g for _, g in unit])
        A.append(a_rows.mean(0) if how.mean_a else a_rows.sum(0))
        S.append(g_rows.sum(0))
        gradients.append(g_rows.T @ a_rows)
    a_sum, s_sum = _second(torch.stack(A), how.centred), _second(torch.stack(S), how.centred)
    if how.scale == "mean":
        a_sum, s_sum = a_sum / len(A), s_sum / terms
    return Made(a_sum, s_sum, positions, torch.stack(gradients), terms)


def _second(rows: Tensor, centred: bool) -> Tensor:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    mean = rows.mean(0) if centred else torch.zeros_like(rows[0])
    for row in rows:
        total += torch.outer(row - mean, row - mean)
    return total


def _run(model: nn.Module, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    kept: dict[str, Tensor] = {}

    def hook(m: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept["a"] = args[0].detach()
        kept["s"] = output.detach().requires_grad_()
        return kept["s"] * 1

    handle = module.register_forward_hook(hook)
    try:
        if isinstance(batch.inputs, dict):
            outputs = model(**batch.inputs, use_cache=False).logits
        else:
            outputs = model(batch.inputs.double())
    finally:
        handle.remove()
    return kept["a"], kept["s"], outputs


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size).transpose(1, 2)
    return x if x.dim() == 3 else x[:, None]


def _rows_out(module: nn.Module, g: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return g.flatten(2).transpose(1, 2)
    return g if g.dim() == 3 else g[:, None]


def _loss(outputs: Tensor, batch: Batch, how: Run, first: int) -> tuple[Tensor, int]:
    flat = outputs.dim() == 2
    logits = outputs[:, None] if flat else outputs
    targets = batch.targets[:, None] if flat else batch.targets
    if how.labels == "model":
        u = uniforms(how.seed, 0, torch.arange(first, first + len(batch)), logits.shape[1]).squeeze(-1)
        targets = categorical(logits.detach(), u).where(targets != IGNORE, IGNORE)
    losses = []
    for row, own in zip(logits, targets, strict=True):
        value = F.cross_entropy(row, own, ignore_index=IGNORE, reduction="sum")
        losses.append(value / (own != IGNORE).sum() if how.reduction == "document mean" else value)
    terms = int((targets != IGNORE).sum())
    total = torch.stack(losses).sum()
    return total / terms if how.reduction == "batch mean" else total, terms


def _counts(batch: Batch, n: int, t: int, positions: str) -> bool:
    if not isinstance(batch.inputs, dict) or positions == "padding":
        return True
    real = batch.inputs["attention_mask"][n].bool()
    where = real.nonzero().flatten()
    first, last = int(where[0]), int(where[-1])
    return (
        bool(real[t])
        and {
            "real": True,
            "last dropped": t != last,
            "first dropped": t != first,
            "prompt dropped": bool(batch.targets[n, t] != IGNORE) or t == last,
            "with a loss": bool(batch.targets[n, t] != IGNORE),
        }[positions]
    )
