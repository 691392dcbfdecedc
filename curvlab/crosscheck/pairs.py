"""Weights before and after an edit: which file is which, and which layers changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Part
from curvlab.layers import LayerShape

if TYPE_CHECKING:
    from curvlab.crosscheck.identify import Piece

When = Literal["base", "edited"]
BEFORE = ("base", "before", "pre", "original", "orig", "unedited", "pretrained", "theta0", "w0", "start")
AFTER = ("edited", "after", "post", "updated", "finetuned", "final", "new")


def paired(pieces: Sequence["Piece"], layers: Mapping[str, LayerShape] | None) -> tuple[list["Piece"], list[Part]]:
    """Weights by layer as base and edited; unchanged ones go where nothing else of their layer is known.

    Returns:
        The pieces, and parts that hold only notes on what was left out.
    """
    others = [piece for piece in pieces if piece.claim not in ("weight", "bias")]
    weights: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.claim == "weight":
            weights.setdefault(piece.layer, []).append(piece)
    named = {piece.layer for piece in others}
    notes: list[Part] = []
    left_out, changed = 0, []
    for layer, own in weights.items():
        whens, assumed = _whens(own)
        if assumed and layer in named:
            notes.append(Part(layer, {}, assumed=(assumed,)))
        elif assumed and not any(part.assumed and part.layer == "" for part in notes):
            notes.append(Part("", {}, assumed=(replace(assumed, subject=assumed.subject.split(" · ")[-1]),)))
        same = len(own) == 2 and own[0].tensor.shape == own[1].tensor.shape
        differ = same and not torch.equal(own[0].tensor, own[1].tensor)
        matrix = own[0].tensor.dim() in (2, 4) and (not layers or layer in layers)
        if not (matrix and (layer in named or differ or len(weights) <= 8)):
            left_out += 1
            changed += [layer] if differ else []
            continue
        for piece, when in zip(own, whens, strict=True):
            tensor = piece.tensor.flatten(1)
            known = layers.get(layer) if layers else None
            if known is not None and tuple(tensor.shape) == (known.d_in, known.d_out) and known.d_in != known.d_out:
                tensor = tensor.mT  # GPT-2's Conv1D
            others.append(replace(piece, claim=when, tensor=tensor))
    if left_out:
        cause = f"{left_out} tensors of the checkpoint were not looked at: vectors, or layers without other files"
        if changed:
            cause += f"; {len(changed)} of them changed as well: {', '.join(changed[:5])}"
        finding = Finding("unidentified", "convention", "checkpoint", left_out, None, cause)
        notes.append(Part("", {}, assumed=(finding,)))
    return others, notes


def _whens(own: Sequence["Piece"]) -> tuple[list[When], Finding | None]:
    """Before or after, by the words of files and keys, else by order (said as an assumption)."""
    words = [_when(piece.source) for piece in own]
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
