"""Training of MEND's network: edits of training requests that teach their paraphrases and leave other text alone."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from curvlab.capture import Batch, to_device
from curvlab.data.edits import Request
from curvlab.data.text import IGNORE, encode_documents, encode_pairs
from curvlab.editing.hypernetwork import Hypernetwork
from curvlab.editing.meta_draws import draw, prompts_of
from curvlab.editing.rank_one import Factors, rank_one_factors
from curvlab.editing.wording import Wording
from curvlab.layers import Matrices, MatrixLayer, device_of
from curvlab.losses import CrossEntropy
from curvlab.memory import announce
from curvlab.storage import load_tensors, save_tensors

CHECKPOINT = "MEND network in training"
CHECKPOINT_SECONDS = 60.0
_log = logging.getLogger("curvlab")


@dataclass(frozen=True)
class MetaTraining(Wording):
    """How the network is trained (paper: c_edit 0.1, c_loc 1, Adam; the network's lr 1e-6, the α's 1e-4).

    Attributes:
        steps: of the optimiser.
        group: requests edited together in a step, as many as are to be edited at once in use.
        asked: of these, how many at most are asked for (each in a paraphrase or its prompt); for each, one text that
            has nothing to do with the edits is held fast.
        c_edit, c_loc: weights of the mean −log p of the edited targets (nats a token) and of the mean
            KL(before ‖ after) of the unrelated texts' next tokens.
        lr: of the network (Adam).
        lr_lr: of the learned edit learning rates α.
        edit_lr: where these begin.
        rank: of the network's residual blocks.
        hidden: blocks with a ReLU; one without follows.
        normalise: u and δ are normalised by the training requests' mean and standard deviation.
        clip: largest norm of a gradient of the network.
        max_length: tokens at which an unrelated text is cut.
    """

    steps: int = 1000
    group: int = 10
    asked: int = 10
    c_edit: float = 0.1
    c_loc: float = 1.0
    lr: float = 1e-4
    lr_lr: float = 1e-4
    edit_lr: float = 1e-4
    rank: int = 1920
    hidden: int = 1
    normalise: bool = True
    clip: float = 100.0
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group", "asked", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0 or self.hidden < 0 or self.max_length < 2:
            raise ValueError("steps and hidden must not be negative, max_length at least 2")
        for name in ("lr", "lr_lr", "edit_lr", "clip", "c_edit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.c_loc < math.inf:
            raise ValueError(f"c_loc must be finite and not negative, got {self.c_loc}")


def train_network(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[MatrixLayer],
    requests: Sequence[Request],
    unrelated: Sequence[str],
    options: MetaTraining,
    *,
    seed: int,
    checkpoint: Path,
) -> Hypernetwork:
    """A network trained on `requests`, whose gradients at the model's weights are taken once.

    Each step's draws depend on `seed` and its number alone. Now and then all that is needed to go on is written to
    `checkpoint`: the same call goes on from there, to the same network. The file is left to the caller to delete.

    Raises:
        ValueError: fewer requests than a step edits, or no unrelated text for some request.
        FloatingPointError: a loss that is not finite.
    """
    if len(requests) < options.group:
        raise ValueError(f"MEND edits group={options.group} requests a step, {len(requests)} to train on were given")
    network = Hypernetwork(
        layers, rank=options.rank, hidden=options.hidden, edit_lr=options.edit_lr, normalise=options.normalise,
        seed=seed,
    ).to(device_of(model), torch.promote_types(layers[0].parameters()[0].dtype, torch.float32))  # fmt: skip
    given = _factors(model, tokenizer, layers, requests, options)
    network.observe({name: Factors.cat(parts) for name, parts in given.items()})
    network.belongs_to(model, prompts_of(requests))
    groups: list[dict[str, Any]] = [
        {"params": list(network.networks.parameters())},
        {"params": [network.alpha], "lr": options.lr_lr},
    ]
    optimizer = torch.optim.Adam(groups, lr=options.lr)
    first, spent, losses = _resume(network, optimizer, checkpoint)
    started = written = time.perf_counter()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        with tqdm(
            total=options.steps, initial=first, desc="MEND's network", delay=1.0, leave=False, disable=None
        ) as bar:
            for step in range(first, options.steps):
                edited, asked, texts = draw(requests, unrelated, options.group, options.asked, seed=seed, step=step)
                optimizer.zero_grad(set_to_none=True)
                delta = network({name: Factors.cat([parts[i] for i in edited]) for name, parts in given.items()})
                edit, locality = losses_of(model, tokenizer, layers, delta, asked, texts, options)
                loss = options.c_edit * edit + options.c_loc * locality
                if not bool(loss.isfinite()):
                    raise FloatingPointError(f"MEND's training loss is {float(loss.detach())} in step {step + 1}")
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), options.clip)
                optimizer.step()
                losses.append((float(edit.detach()), float(locality.detach())))
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(edit=f"{losses[-1][0]:.2f}", locality=f"{losses[-1][1]:.3f}")
                if time.perf_counter() - written > CHECKPOINT_SECONDS:
                    _save(network, optimizer, checkpoint, step + 1, spent + time.perf_counter() - started, losses)
                    written = time.perf_counter()
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
    network.record = {
        "requests": len(requests),
        "steps": options.steps,
        "seconds": spent + time.perf_counter() - started,
        "edit_losses": _thinned([edit for edit, _ in losses]),
        "locality_losses": _thinned([locality for _, locality in losses]),
    }
    return network.requires_grad_(False)


def losses_of(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[MatrixLayer],
    delta: Matrices,
    asked: Sequence[tuple[str, str]],
    texts: Sequence[str],
    options: MetaTraining,
) -> tuple[Tensor, Tensor]:
    """(−log p of the asked (prompt, target) pairs, KL of the texts) with the weights W + ΔW, differentiable in ΔW.

    Both are means over tokens, in nats; the model itself is left alone.
    """
    replaced = {}
    for layer in layers:
        (weight,) = layer.parameters()
        moved = layer.tensors(delta[layer.name])[0].to(weight.device)
        replaced[f"{layer.name}.weight"] = (weight.detach() + moved).to(weight.dtype)
    pairs = [(prompt, target + options.ending) for prompt, target in asked]
    (batch,) = encode_pairs(tokenizer, pairs, template=options.template, end=options.end)
    targets = batch.targets.to(device_of(model)).flatten()
    edit = F.cross_entropy(_logits(model, replaced, batch).flatten(0, 1), targets, ignore_index=IGNORE)
    (batch,) = encode_documents(tokenizer, texts, max_length=options.max_length, batch_size=len(texts))
    with torch.no_grad():
        before = _logits(model, {}, batch)
    targets = batch.targets.to(before.device)
    divergence = CrossEntropy().bregman(_logits(model, replaced, batch), before, targets)
    return edit, divergence.sum() / (targets != IGNORE).sum()


def _logits(model: nn.Module, replaced: dict[str, Tensor], batch: Batch) -> Tensor:
    inputs = to_device(batch.inputs, device_of(model)) | {"use_cache": False}
    logits: Tensor = functional_call(model, replaced, (), inputs).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _factors(
    model: nn.Module, tokenizer: Any, layers: Sequence[MatrixLayer], requests: Sequence[Request], options: MetaTraining
) -> dict[str, list[Factors]]:
    """By layer, the factors of each request."""
    batches = options.batches(tokenizer, requests)
    positions = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
    needed = 4 * positions * sum(layer.d_in + layer.d_out for layer in layers)
    announce("gradients of MEND's training requests", needed, "fewer training requests", layers[0].device)
    joined, _ = rank_one_factors(model, batches, layers, desc="gradients to train on")
    return {n: [own.where(own.request == i) for i in range(len(requests))] for n, own in joined.items()}


def _thinned(values: list[float], points: int = 100) -> list[float]:
    """Means over at most `points` stretches."""
    size = max(1, -(-len(values) // points))
    return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]


def _save(
    network: Hypernetwork,
    optimizer: torch.optim.Optimizer,
    path: Path,
    step: int,
    seconds: float,
    losses: list[tuple[float, float]],
) -> None:
    tensors = network.tensors() | {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, p in network.named_parameters():
        tensors |= {f"{key}/{name}": optimizer.state[p][key] for key in _STATE}
    save_tensors(path, CHECKPOINT, tensors, {"step": str(step), "seconds": str(seconds)})


def _resume(
    network: Hypernetwork, optimizer: torch.optim.Optimizer, path: Path
) -> tuple[int, float, list[tuple[float, float]]]:
    """Steps already taken, the seconds they took and their losses; from the beginning where the file is damaged."""
    if not path.is_file():
        return 0, 0.0, []
    try:
        tensors, header = load_tensors(path, CHECKPOINT)
        step, seconds = int(header["step"]), float(header["seconds"])
        losses: Any = [tuple(pair) for pair in tensors["losses"].tolist()]
        state = {n: {key: tensors[f"{key}/{n}"] for key in _STATE} for n, _ in network.named_parameters()}
        network.take(tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        _log.warning("MEND's training begins anew: %s", error)
        return 0, 0.0, []
    for name, p in network.named_parameters():
        optimizer.state[p] = {key: value if key == "step" else value.to(p.device) for key, value in state[name].items()}
    return step, seconds, losses


_STATE = ("step", "exp_avg", "exp_avg_sq")
