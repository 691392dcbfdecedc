"""Pretraining of a small causal language model from scratch: packed documents, resumable, the same from a seed."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from curvlab.data.text import IGNORE
from curvlab.storage import load_tensors, save_tensors

_log = logging.getLogger("curvlab")
_CHECKPOINT = "language model in training"
_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        steps: optimiser steps; the learning rate rises to `lr` over the first twentieth and falls to zero as a cosine.
        rows, length: a batch is `rows` rows of up to `length` tokens, filled with whole documents.
        bf16: matrix products in bfloat16 where the processor has them (elsewhere they are slow); weights and Adam's
            state stay float32.
        prompt_weight: of the loss on what is given rather than learned.
    """

    steps: int
    rows: int
    length: int
    lr: float
    bf16: bool = False
    prompt_weight: float = 0.1
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Document:
    """Token ids, the first `prompt` of which are given rather than learned (their loss counts less)."""

    ids: tuple[int, ...]
    prompt: int = 0


def pack(documents: Sequence[Document], length: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, length) of token ids, of the number (0, 1, ...) of the document a token belongs to in its row, and of
    whether it belongs to a prompt.

    Documents stay in order and whole (cut at `length`); the rest of a row is `pad`, each pad a document of its own.
    """
    rows: list[list[int]] = []
    owners: list[list[int]] = []
    prompts: list[list[bool]] = []
    for document in documents:
        tokens = document.ids[:length]
        if not rows or len(rows[-1]) + len(tokens) > length:
            rows.append([])
            owners.append([])
            prompts.append([])
        owners[-1] += [owners[-1][-1] + 1 if owners[-1] else 0] * len(tokens)
        rows[-1] += tokens
        prompts[-1] += [i < document.prompt for i in range(len(tokens))]
    for row, owner, prompt in zip(rows, owners, prompts, strict=True):
        missing = length - len(row)
        row += [pad] * missing
        prompt += [False] * missing
        owner += range(owner[-1] + 1, owner[-1] + 1 + missing)
    return torch.tensor(rows), torch.tensor(owners), torch.tensor(prompts)


def packed_inputs(ids: Tensor, owners: Tensor, pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """(the model's inputs, next-token targets): no token sees, or is predicted from, another document."""
    length = ids.shape[1]
    same = owners[:, :, None] == owners[:, None, :]
    start = torch.where(F.pad(owners.diff(dim=1), (1, 0), value=1) != 0, torch.arange(length), 0).cummax(1).values
    inputs = {
        "input_ids": ids,
        "attention_mask": same.tril().unsqueeze(1),
        "position_ids": torch.arange(length) - start,
    }
    follows = F.pad(owners[:, 1:] == owners[:, :-1], (0, 1))
    targets = torch.where(follows & (ids != pad), ids.roll(-1, 1), IGNORE)
    return inputs, targets


def train(
    model: nn.Module, documents: Sequence[Document], schedule: Schedule, *, pad: int, seed: int, checkpoint: Path
) -> dict[str, float]:
    """Train `model` in place on tokenised documents; what it took, and the mean loss (nats) of the last tenth.

    The order of the documents comes from `seed` alone, so that a run repeats exactly on one machine with one number
    of threads. Now and then everything needed to go on is written to `checkpoint`; a later call with the same
    arguments goes on from there, to the same weights. The file is left to the caller to delete.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.lr, schedule.steps + 1, pct_start=0.05, cycle_momentum=False, div_factor=20
    )
    first, seconds, cpu_seconds = _resume(model, optimizer, scheduler, checkpoint)
    bf16 = schedule.bf16 and torch.cpu._is_avx512_bf16_supported()
    batches = _batches(documents, schedule, pad, seed)
    for _ in range(first):
        next(batches)
    started, cpu_started, written = time.perf_counter(), time.process_time(), time.perf_counter()
    losses: list[float] = []
    model.train()
    with tqdm(total=schedule.steps, initial=first, desc="pretrain", delay=1, disable=None, leave=False) as bar:
        for step in range(first, schedule.steps):
            ids, owners, prompts = next(batches)
            inputs, targets = packed_inputs(ids, owners, pad)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(**inputs, use_cache=False).logits
            losses_ = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            # A target within a prompt (a name, the numbers to add) can hardly be predicted: it would add mostly noise.
            weights = torch.where(prompts.roll(-1, 1), schedule.prompt_weight, 1.0) * (targets != IGNORE)
            loss = (losses_ * weights.flatten()).sum() / weights.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if losses[-1] != losses[-1]:
                raise FloatingPointError(f"the loss is not finite at step {step}")
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                _log.info("pretrain: step %d of %d, loss %.3f", step, schedule.steps, losses[-1])
            if time.perf_counter() - written > _CHECKPOINT_SECONDS:
                spent = (seconds + time.perf_counter() - started, cpu_seconds + time.process_time() - cpu_started)
                _save(model, optimizer, checkpoint, step + 1, *spent)
                written = time.perf_counter()
    model.eval()
    last = losses[-max(1, schedule.steps // 10) :]
    return {
        "bf16": float(bf16),
        "loss": sum(last) / max(1, len(last)),
        "seconds": seconds + time.perf_counter() - started,
        "cpu_seconds": cpu_seconds + time.process_time() - cpu_started,
    }


def _batches(
    documents: Sequence[Document], schedule: Schedule, pad: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pass after pass over the documents, each in another order; a pass' last rows come in a smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        packed = pack([documents[i] for i in order], schedule.length, pad)
        yield from zip(*(part.split(schedule.rows) for part in packed), strict=True)


def _save(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int, seconds: float, cpu_seconds: float
) -> None:
    tensors: dict[str, Tensor] = {f"weight.{name}": p for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    header = {"step": str(step), "seconds": str(seconds), "cpu_seconds": str(cpu_seconds)}
    save_tensors(path, _CHECKPOINT, tensors, header)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, path: Path) -> tuple[int, float, float]:
    """Steps already done, and the wall and processor seconds they took."""
    if not path.is_file():
        return 0, 0.0, 0.0
    tensors, header = load_tensors(path, _CHECKPOINT)
    step = int(header["step"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"weight.{name}"])
            optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    # The learning rate is a function of the step alone.
    scheduler.last_epoch = step - 1
    scheduler._step_count = step
    scheduler.step()
    return step, float(header["seconds"]), float(header["cpu_seconds"])
