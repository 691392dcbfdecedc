"""AlphaEdit keeps one projector a layer in a stack (L, d, d): which slice is which layer's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import probes, square, usable
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role
from curvlab.crosscheck.sides import resolve
from curvlab.layers import LayerShape

FITS = 0.02  # relative size of PA − AP below which a projector was plainly made from A


def unstack(parts: Sequence[Part], layers: Mapping[str, LayerShape] | None) -> list[Part]:
    """Slices go to the layers whose second moment they commute with, else in order."""
    out = [part for part in parts if not _stacked(part)]
    for part in parts:
        if not _stacked(part):
            continue
        stack = part.items["projector"]
        rest: dict[Role, Item] = {role: item for role, item in part.items.items() if role != "projector"}
        if rest or part.assumed:
            out.append(replace(part, items=rest))
        slices = [replace(stack, tensor=P, source=f"{stack.source}[{i}]") for i, P in enumerate(stack.tensor)]
        out = _dealt(out, slices, part, layers)
    return out


def _stacked(part: Part) -> bool:
    return "projector" in part.items and part.items["projector"].tensor.dim() == 3


def _dealt(parts: list[Part], slices: list[Item], stack: Part, layers: Mapping[str, LayerShape] | None) -> list[Part]:
    size = slices[0].tensor.shape[-1] if slices else 0
    free = [i for i, part in enumerate(parts) if "A" in part.items and len(part.items["A"].tensor) == size]
    others = [i for i, part in enumerate(parts) if "A" in part.items]
    if not free and len(others) == len(slices):  # of another side, which is found out later
        free = others
    free = [i for i in free if "projector" not in parts[i].items]
    shares = {(i, j): _commutator(P.tensor, parts[i].items["A"].tensor) for i in free for j, P in enumerate(slices)}
    chosen: dict[int, int] = {}  # of a slice: its part
    places = sorted(free, key=lambda i: _natural(parts[i].layer))
    if len(places) == len(slices):  # what fits at its own place stays there
        chosen = {j: i for j, i in enumerate(places) if shares[i, j] <= FITS}
    for (i, j), share in sorted(shares.items(), key=lambda pair: pair[1]):
        if share <= FITS and i not in chosen.values() and j not in chosen:
            chosen[j] = i
    note = _displaced(parts, slices, chosen, places)
    if note:
        moved = next(chosen[j] for j in sorted(chosen) if len(places) != len(slices) or places[j] != chosen[j])
        parts[moved] = replace(parts[moved], assumed=(*parts[moved].assumed, note))
    left, open_ = [i for i in free if i not in chosen.values()], [j for j in range(len(slices)) if j not in chosen]
    by_order = len(left) == len(open_)
    names = [n for n, own in (layers or {}).items() if own.d_in == size and n not in {p.layer for p in parts}]
    for j, item in enumerate(slices):
        if j in chosen:
            parts[chosen[j]] = _joined(parts[chosen[j]], item, "commutes with this layer's second moment", layers)
            continue
        if by_order and left:
            i = left[open_.index(j)]
            note = _note(item, parts[i].layer, "it commutes with no second moment given; by its place in the stack")
            parts[i] = _joined(parts[i], item, "its place in the stack", layers, note)
            continue
        name = names[open_.index(j)] if len(names) == len(open_) else f"{stack.layer or 'stack'}[{j}]"
        note = _note(item, name, "nothing names the layers of a stack of projectors; by its place")
        parts.append(_joined(Part(name, {}), item, "its place in the stack", layers, note))
    return parts


def _natural(layer: str) -> list[tuple[int, str]]:
    """For sorting: layer 10 after layer 2, as a stack has them."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", layer)]


def _displaced(
    parts: Sequence[Part], slices: Sequence[Item], chosen: Mapping[int, int], places: Sequence[int]
) -> Finding | None:
    """Slices that fit another layer than the one at their place, where an edit looks them up by their place."""
    order = [places.index(chosen[j]) for j in sorted(chosen)]
    full = len(places) == len(slices)
    moved = [j for j, i in zip(sorted(chosen), order, strict=True) if i != j] if full else []
    in_order = not moved if full else order == sorted(order)
    if in_order:
        return None
    named = ", ".join(f"[{j}] fits {parts[chosen[j]].layer}" for j in (moved or sorted(chosen))[:6])
    exchanged = any(chosen.get(places.index(chosen[j])) == places[j] for j in moved)
    cause = f"slices of the stack fit other layers than those at their places: {named}" + (
        "; layers are exchanged, and an edit that takes its projector by its place takes another layer's"
        if exchanged else "; they are held against the layers that they fit, not those that their places mean"
    )  # fmt: skip
    source = slices[0].source.rsplit("[", 1)[0]
    remedy = "stack the projectors in the order in which the edit's list has its layers"
    severity = "error" if exchanged else "deviation"
    return Finding("projector-place", severity, source, named, "in order", cause, remedy, "projectors-exchanged")  # type: ignore[arg-type]


def _joined(
    part: Part, item: Item, why: str, layers: Mapping[str, LayerShape] | None, note: Finding | None = None
) -> Part:
    items = dict(part.items) | {"projector": replace(item, evidence=f"{item.evidence}; {why}")}
    part = replace(part, items=items, assumed=(*part.assumed, *([note] if note else [])))
    return part if part.shape is not None else resolve(part, layers.get(part.layer) if layers else None)


def _note(item: Item, name: str, why: str) -> Finding:
    cause = f"{why} this slice is taken for {name}"
    return Finding("layer", "convention", f"{name} · {item.source}", name, None, cause, "give the factors or the model")


def _commutator(P: Tensor, A: Tensor) -> float:
    """‖PA − AP‖ / ‖A‖ on a sample of columns."""
    if not (usable(P) and usable(A) and square(A) and P.shape == A.shape):
        return float("inf")
    P, A = P.to(torch.float32), A.to(torch.float32)
    A = A / A.abs().max().clamp_min(1e-30)
    columns = probes(len(A))
    rest = P @ A[:, columns] - A @ P[:, columns]
    return float(rest.norm() / A[:, columns].norm().clamp_min(1e-30))
