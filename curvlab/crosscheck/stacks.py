"""AlphaEdit keeps one projector a layer in a stack (L, d, d): which slice is which layer's."""

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
    for (i, j), share in sorted(shares.items(), key=lambda pair: pair[1]):
        if share <= FITS and i not in chosen.values() and j not in chosen:
            chosen[j] = i
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
