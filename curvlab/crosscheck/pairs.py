"""Weights before and after an edit: which file is which, and which layers changed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role, Stored
from curvlab.crosscheck.pieces import Piece
from curvlab.layers import LayerShape

MODEL = "the model given"  # format of the model's own tensors among the files
When = Literal["base", "edited"]
BEFORE = ("base", "before", "pre", "original", "orig", "unedited", "pretrained", "theta0", "w0", "start")
AFTER = ("edited", "after", "post", "updated", "finetuned", "final", "new")


def with_model(stored: Sequence[Stored], model: nn.Module) -> list[Stored]:
    """The files, and the model's own tensors as the base of checkpoints that were stored once only, after the edit."""
    own = {_plain(name): tensor.detach() for name, tensor in model.state_dict().items()}
    times = Counter(_plain(key) for file in stored for key in file.tensors)
    found = {key: own[key].cpu() for key, count in times.items() if count == 1 and key in own and _is_parameter(key)}
    if not found or any(count > 1 and _is_parameter(key) for key, count in times.items()):
        return list(stored)
    return [*stored, Stored(Path("the model"), MODEL, found)]


def _plain(key: str) -> str:
    return key.removeprefix("_orig_mod.").removeprefix("module.")


def _is_parameter(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in ("weight", "bias") and "." in key


def paired(pieces: Sequence[Piece], layers: Mapping[str, LayerShape] | None) -> tuple[list[Piece], list[Part]]:
    """Weights by tensor as base and edited; unchanged ones go where nothing else of their layer is known.

    Returns:
        The pieces, and parts that hold only notes on what was left out, or tensors that changed beside the layers.
    """
    files = {piece.file for piece in pieces if piece.claim in ("weight", "bias")}
    stored: dict[str, list[Piece]] = {}
    others = []
    for piece in pieces:
        if piece.claim in ("weight", "bias") or (piece.claim is None and piece.layer and piece.file in files):
            name = f"{piece.layer}.bias" if piece.claim == "bias" else piece.layer
            stored.setdefault(name, []).append(piece)
        else:
            others.append(piece)
    stored = _like_factors(stored, {piece.layer for piece in others if piece.layer})
    named = {piece.layer for piece in others}
    weights = {name: own for name, own in stored.items() if own[0].claim == "weight"}
    notes: list[Part] = []
    left_out = 0
    for layer, own in stored.items():
        if layer not in weights and len(own) < 2:
            others += [piece for piece in own if piece.claim is None]
            left_out += own[0].claim == "bias" and len(weights) > 8
            continue
        whens, assumed = _whens(own)
        if assumed and layer in named:
            notes.append(Part(layer, {}, assumed=(assumed,)))
        elif assumed and not any(part.assumed and part.layer == "" for part in notes):
            notes.append(Part("", {}, assumed=(replace(assumed, subject=assumed.subject.split(" · ")[-1]),)))
        differ = len(own) == 2 and own[0].tensor.shape == own[1].tensor.shape and _differ(own[0].tensor, own[1].tensor)
        matrix = layer in weights and own[0].tensor.dim() in (2, 4)
        ours = matrix and (not layers or layer in layers)
        if ours and (layer in named or differ or len(weights) <= 8):
            named_here = bool(layer)
            for piece, when in zip(own, whens, strict=True):
                others.append(replace(piece, layer=layer, claim=when, tensor=piece.tensor.flatten(1), own=named_here))
        elif differ:
            items: dict[Role, Item] = {
                when: Item(when, piece.tensor, piece.source, piece.evidence)
                for piece, when in zip(own, whens, strict=True)
            }
            notes.append(Part(layer, items))
        else:
            left_out += 1
    if left_out:
        cause = f"{left_out} tensors of the checkpoint were not looked at: unchanged or stored once, no other files"
        finding = Finding("unidentified", "convention", "checkpoint", left_out, None, cause)
        notes.append(Part("", {}, assumed=(finding,)))
    return others, notes


def _like_factors(stored: dict[str, list[Piece]], known: set[str]) -> dict[str, list[Piece]]:
    """Weights called by another ending of a layer's path than its factors take the factors' name."""
    out: dict[str, list[Piece]] = {}
    for name, own in stored.items():
        if name in known or not name:
            out.setdefault(name, []).extend(own)
            continue
        same = [n for n in known if n.endswith(f".{name}") or name.endswith(f".{n}")]
        back = [n for n in stored if len(same) == 1 and (same[0].endswith(f".{n}") or n.endswith(f".{same[0]}"))]
        new = same[0] if len(same) == 1 and back == [name] and same[0] not in stored else name
        out.setdefault(new, []).extend(own)
    return out


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than the coarser dtype's rounding of the same numbers."""
    if one.dtype != other.dtype and one.is_floating_point() and other.is_floating_point():
        coarse = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        one, other = one.to(coarse), other.to(coarse)
    return not torch.equal(one, other.to(one.device))


def _whens(own: Sequence[Piece]) -> tuple[list[When], Finding | None]:
    """Before or after, by the words of files and keys, else by order (said as an assumption)."""
    words = [_when(piece.source) for piece in own]
    given = [piece.source.startswith("the model: ") for piece in own]
    if sum(given) == 1 and len(own) == 2:
        return ["base" if model else "edited" for model in given], None
    if len(own) == 1:
        return [words[0] or "base"], None
    if len(own) == 2:
        if words[0] and words[0] != words[1]:
            return [words[0], "edited" if words[0] == "base" else "base"], None
        if words[1] and words[0] is None:
            return ["edited" if words[1] == "base" else "base", words[1]], None
    cause = f"{len(own)} files hold {own[0].layer}.weight; the first is taken as the base, the last as the edited one"
    subject = f"{own[0].layer} · {', '.join(piece.source for piece in own)}"
    finding = Finding("weights", "convention", subject, "by order", None, cause, "call them base and edited")
    return ["base"] + ["edited"] * (len(own) - 1), finding  # type: ignore[return-value]


def _when(source: str) -> When | None:
    text = source.lower()
    before, after = (any(word in text for word in words) for words in (BEFORE, AFTER))
    if before == after:
        return None
    return "base" if before else "edited"
