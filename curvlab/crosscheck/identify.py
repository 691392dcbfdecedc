"""Which tensor is which: from keys and file names (claims) and from what the tensors show (evidence)."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import (
    asymmetry,
    coarse_dtype,
    idempotent_defect,
    off_diagonal,
    orthonormal_defect,
    semidefinite_looking,
    square,
    usable,
    zeros_and_ones,
)
from curvlab.crosscheck.extremes import is_count
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.names import SUMS, Claim, matched, of_file, role_of_key, statistics_layer
from curvlab.crosscheck.orphans import adopted
from curvlab.crosscheck.pairs import paired
from curvlab.crosscheck.parts import Item, Part, Role, Stored
from curvlab.crosscheck.sides import AUTHORS_MASK, resolve
from curvlab.crosscheck.stacks import unstack
from curvlab.crosscheck.turned import turned
from curvlab.layers import LayerShape

CHECKPOINT: set[Role] = {"base", "edited"}
OPEN: dict[Claim, tuple[Role, Role]] = {
    "factor": ("A", "S"), "vectors": ("U_in", "U_out"), "values": ("values_in", "values_out"),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One tensor with what is claimed of it.

    Attributes:
        layer: by its key or its file's name; "" where neither tells.
        claim: by its key or its file's name, else what it shows; None where nothing tells.
        file: number of its file, in order.
    """

    layer: str
    claim: Claim | None
    tensor: Tensor
    source: str
    evidence: str
    file: int
    order: int = 0
    own: bool = False  # a weight under its own name in a checkpoint: of no other layer


def identify(stored: Sequence[Stored], layers: Mapping[str, LayerShape] | None = None) -> list[Part]:
    """Layers and roles of all tensors in `stored`.

    Args:
        stored: files as read.
        layers: of the model, where one is given: names and shapes are held against them, and where they are
            `MatrixLayer`s their kind tells how a weight lies.

    Returns:
        One part a layer (several where a layer has several sets of factors). What was assumed, contradictions between
        claims and evidence, and tensors that could not be identified are findings in `Part.assumed`.
    """
    pieces, counts = _claimed(stored, _known(stored, layers))
    pieces = _known_names(pieces, layers)
    pieces, notes = paired(pieces, layers)
    parts: list[Part] = []
    for layer, bundles in _bundles(pieces).items():
        for own in _variants(bundles):
            parts.append(_part(layer, own, counts, layers))
    parts = unstack(parts, layers)
    parts = adopted([_named_by_shape(part, layers) for part in parts], layers)
    parts = [_hinted(turned(part, layers), layers) for part in parts]
    return [part for part in parts if part.items or part.assumed] + notes


def _known(stored: Sequence[Stored], layers: Mapping[str, LayerShape] | None) -> set[str]:
    """Names of layers that the model, files of statistics, or keys of factors and weights give."""
    known = set(layers or ()) | {statistics_layer(file.path) for file in stored}
    for file in stored:
        named = [role_of_key(key) for key in file.tensors]
        known |= {layer for claim, layer in named if claim in ("A", "S", "weight")}
    return known - {""}


def _claimed(stored: Sequence[Stored], known: Collection[str]) -> tuple[list[Piece], dict[tuple[int, str, str], float]]:
    """Tensors with their claims, and counts by file, layer and side; `known`: names of layers."""
    pieces: list[Piece] = []
    counts: dict[tuple[int, str, str], float] = {}
    names = Counter(file.path.name for file in stored)
    for number, file in enumerate(stored):
        name = file.path.name if names[file.path.name] == 1 else f"{file.path.parent.name}/{file.path.name}".strip("/")
        file_layer, file_claim = of_file(file.path, known)
        numbers = dict(file.numbers)
        tensors = {}
        for key, tensor in file.tensors.items():
            if tensor.numel() == 1 and role_of_key(key)[0] in ("count", "count_out"):
                numbers[key] = float(tensor)
            else:
                tensors[key] = tensor
        for key, value in numbers.items():
            claim, layer = role_of_key(key)
            if claim in ("count", "count_out") and isinstance(value, int | float):
                counts[number, layer or file_layer, claim] = _number(value)
        for order, (key, tensor) in enumerate(tensors.items()):
            claim, layer = role_of_key(key)
            by = "its key"
            if claim is None:
                claim, by = file_claim, "its file's name"
            if claim == "ignored":
                continue
            if claim in (None, "values", "vectors", "weight") or (claim == "factor"):
                claim, by = _by_evidence(claim, tensor, by)
            source = f"{name}: {key}" if key else name
            raw = not file.format.startswith(("curvlab", "curvlinops"))  # those readers give means
            if raw and (key.split("/")[-1] in SUMS or file.path.stem in SUMS):
                tensor, source = _mean(tensor, source, counts, number, layer or file_layer, claim)
            if claim == "mask" and key.split("/")[-1] == "M":
                by = f"{by}; {AUTHORS_MASK}"
            pieces.append(Piece(layer or file_layer, claim, tensor, source, by, number, order))
    return pieces, counts


def _number(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _mean(
    tensor: Tensor,
    source: str,
    counts: Mapping[tuple[int, str, str], float],
    file: int,
    layer: str,
    claim: Claim | None,
) -> tuple[Tensor, str]:
    """A format that keeps sums and their counts: the mean."""
    count = counts.get((file, layer, "count_out" if claim == "S" else "count"))
    if count is None or not is_count(count) or not tensor.is_floating_point():
        return tensor, source
    coarse = coarse_dtype(tensor)
    mean = tensor / count if coarse is None else (tensor.double() / count).to(coarse)  # no more digits than the sum
    return mean, f"{source} / {count:.0f}"


def _by_evidence(claim: Claim | None, tensor: Tensor, by: str) -> tuple[Claim | None, str]:
    """What a tensor is by itself, where its key says nothing or not enough."""
    if claim == "weight":
        return claim, by
    if not usable(tensor):
        return claim, by
    if tensor.dim() == 1:
        if (
            claim in ("values", None)
            and tensor.is_floating_point()
            and float(tensor.min()) >= -1e-3 * float(tensor.abs().max())
        ):
            return "values", "a vector without negative numbers"
        return None, by
    if tensor.dim() == 3 and square(tensor[0]) and claim is None:
        return ("projector", "a stack of idempotent matrices") if _is_projector(tensor[0]) else ("factor", by)
    if tensor.dim() != 2:
        return None, by
    if claim == "values":
        return "eigenvalues", by
    if claim == "vectors":
        return claim, by
    if zeros_and_ones(tensor) and not (square(tensor) and tensor.is_floating_point() and _is_projector(tensor)):
        return "mask", "zeros and ones"
    if not tensor.is_floating_point():
        return None, by
    if square(tensor):
        if _is_projector(tensor):
            return "projector", "symmetric and idempotent"
        if asymmetry(tensor) < 1e-3 and semidefinite_looking(tensor):
            return "factor", "symmetric, no negative principal minors of order two"
        if orthonormal_defect(tensor) < 0.05:
            return "vectors", "orthonormal columns"
        return None, by
    return ("eigenvalues", "a matrix without negative numbers") if float(tensor.min()) >= 0 else (None, by)


def _is_projector(P: Tensor) -> bool:
    return asymmetry(P) < 1e-2 and idempotent_defect(P) < 1e-2 and float(P.abs().max()) > 0


def _known_names(pieces: list[Piece], layers: Mapping[str, LayerShape] | None) -> list[Piece]:
    """Names that mean a layer of the model become that layer's name."""
    if not layers:
        return pieces
    found = {piece.layer: matched(piece.layer, layers) for piece in pieces if piece.layer}
    return [replace(piece, layer=found.get(piece.layer) or piece.layer) for piece in pieces]


def _bundles(pieces: Sequence[Piece]) -> dict[str, list[list[Piece]]]:
    """By layer, then by file; pieces without a layer go to the only one there is."""
    names = list(dict.fromkeys(piece.layer for piece in pieces if piece.layer))
    dotted = [name for name in names if "." in name]
    named = [n for n in names if any(piece.layer == n and not piece.own for piece in pieces)]
    names, dotted = (named, [n for n in dotted if n in named]) if named else (names, dotted)
    alone = names[0] if len(names) == 1 else dotted[0] if len(dotted) == 1 and len(names) == 2 else ""
    by_layer: dict[str, dict[int, list[Piece]]] = {}
    for piece in pieces:
        layer = piece.layer if piece.own or piece.layer in dotted or not alone else alone
        by_layer.setdefault(layer, {}).setdefault(piece.file, []).append(piece)
    return {layer: list(files.values()) for layer, files in by_layer.items()}


def _roles(bundle: Sequence[Piece]) -> set[Claim | None]:
    return {piece.claim for piece in bundle if piece.claim not in OPEN and piece.claim is not None}


def _variants(bundles: list[list[Piece]]) -> list[list[Piece]]:
    """Files of one layer put together; files that hold the same role begin another set, caches go where they fit."""
    bundles = sorted(bundles, key=lambda bundle: not _roles(bundle) & {"A", "S"})  # factors first, order kept
    variants: list[list[Piece]] = []
    for bundle in bundles:
        free = [own for own in variants if not _clash(own, bundle)]
        if not free:
            variants.append(list(bundle))
        elif len(free) == 1:
            free[0].extend(bundle)
        else:
            min(free, key=lambda own: _misfit(own, bundle)).extend(bundle)
    return variants


def _clash(own: Sequence[Piece], bundle: Sequence[Piece]) -> bool:
    """Whether both hold a role, and not the same numbers for it."""
    pairs = [(a.tensor, b.tensor) for a in own for b in bundle if a.claim == b.claim and a.claim in _roles(bundle)]
    return any(a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b) for a, b in pairs)


def _misfit(own: Sequence[Piece], bundle: Sequence[Piece]) -> float:
    """How badly the bundle's eigenvectors diagonalise these factors."""
    total = 0.0
    for basis, factor in (("U_in", "A"), ("U_out", "S")):
        for U in (piece.tensor for piece in bundle if piece.claim == basis and usable(piece.tensor)):
            for C in (piece.tensor for piece in own if piece.claim == factor and usable(piece.tensor)):
                share = off_diagonal(U, C)
                total += 1.0 if share is None else share
    return total


def _part(
    layer: str,
    pieces: Sequence[Piece],
    counts: Mapping[tuple[int, str, str], float],
    layers: Mapping[str, LayerShape] | None,
) -> Part:
    """Roles filled from pieces: claims first, then the open ones by size and order."""
    items: dict[Role, Item] = {}
    assumed: list[Finding] = []
    files = list(dict.fromkeys(piece.file for piece in pieces))
    count = next((counts[f, n, "count"] for f in files for n in (layer, "") if (f, n, "count") in counts), None)
    if count is None:
        count = next((value for (f, _, side), value in counts.items() if f in files and side == "count"), None)
    if count is not None and not is_count(count):
        assumed.append(_no_count(layer, pieces, count))
        count = None
    kinds = [_kind_by_evidence(piece, layer, assumed) for piece in pieces]
    for piece in sorted(kinds, key=lambda piece: piece.claim in OPEN):
        role = _role(piece, items, layers.get(layer) if layers else None)
        if role is not None and role in items and piece.claim not in OPEN and items[role].tensor.equal(piece.tensor):
            continue  # another copy
        if role is None or role in items:
            assumed.append(_unidentified(layer, piece, role))
            continue
        tensor = piece.tensor.logical_not() if piece.claim == "removed" else piece.tensor
        if piece.claim in OPEN and len(pieces) > 1 and _by_order(piece, kinds):
            assumed.append(_ordered(layer, piece, role))
        items[role] = Item(role, tensor, piece.source, piece.evidence, AUTHORS_MASK in piece.evidence)
    part = Part(layer, items, count, None, tuple(assumed))
    if "projector" in items and items["projector"].tensor.dim() == 3:
        return part  # a stack: resolved once its slices have their layers
    return _said(resolve(part, layers.get(layer) if layers else None), layers)


def _no_count(layer: str, pieces: Sequence[Piece], count: float) -> Finding:
    subject = " · ".join(filter(None, [layer, pieces[0].source.split(":")[0]]))
    cause = f"N is {count:g}, no number of samples: what depends on it (ranks, sums for means) was not checked"
    remedy = "store the number of samples (positions) behind the statistics, a whole number from 1"
    return Finding("factor-count", "error", subject, f"{count:g}", "1 or more", cause, remedy, "no-count")


def _kind_by_evidence(piece: Piece, layer: str, assumed: list[Finding]) -> Piece:
    """A factor under a basis' name, or the other way round."""
    if piece.claim not in ("A", "S", "U_in", "U_out") or not usable(piece.tensor) or not square(piece.tensor):
        return piece
    tensor = piece.tensor.float()
    like_factor = asymmetry(tensor) < 1e-3 and semidefinite_looking(tensor)
    like_basis = orthonormal_defect(tensor) < 0.05
    is_factor = piece.claim in ("A", "S")
    if like_factor in (like_basis, is_factor):
        return piece
    other: dict[Claim, Claim] = {"A": "U_in", "U_in": "A", "S": "U_out", "U_out": "S"}
    what = "a symmetric positive matrix" if like_factor else "a matrix with orthonormal columns"
    assumed.append(
        Finding(
            "kind", "error", f"{layer} · {piece.source}", what, "a factor" if is_factor else "eigenvectors",
            f"{piece.source} is {what}, not what its name claims; factors and eigenvectors seem exchanged",
            "store the factors and their eigenvectors under their own names", "swapped-kinds",
        )
    )  # fmt: skip
    return replace(piece, claim=other[piece.claim], evidence=what)


def _role(piece: Piece, items: Mapping[Role, Item], layer: LayerShape | None) -> Role | None:
    if piece.claim in (None, "count", "count_out", "ignored", "bias", "weight"):
        return None
    if piece.claim == "removed":
        return "mask"
    if piece.claim not in OPEN:
        return piece.claim  # type: ignore[return-value]
    inner, outer = OPEN[piece.claim]
    if piece.tensor.dim() == 0:
        return None
    size = piece.tensor.shape[0]
    if layer is not None and layer.d_in != layer.d_out and size in (layer.d_in, layer.d_in + 1, layer.d_out):
        return outer if size == layer.d_out else inner
    mask = items.get("mask")
    if mask is not None and mask.tensor.dim() == 2 and mask.tensor.shape[0] != mask.tensor.shape[1]:
        return inner if size == mask.oriented.shape[1] else outer
    for one, role in (("A", inner), ("U_in", inner), ("S", outer), ("U_out", outer)):
        if one in items and items[one].tensor.shape[0] == size and role not in items:  # type: ignore[index]
            return role
    return inner if inner not in items else outer


def _by_order(piece: Piece, pieces: Sequence[Piece]) -> bool:
    same = [other for other in pieces if other.claim == piece.claim and other.tensor.shape == piece.tensor.shape]
    return len(same) > 1


def _ordered(layer: str, piece: Piece, role: Role) -> Finding:
    cause = f"nothing names the side of {piece.source}; by its place among the others it is taken for {role}"
    remedy = "name the tensors (A, B, Ua, Ub), or give the model"
    return Finding("sides", "convention", f"{layer} · {piece.source}".strip(" ·"), role, None, cause, remedy)


def _unidentified(layer: str, piece: Piece, role: Role | None) -> Finding:
    shape = "x".join(map(str, piece.tensor.shape)) or "a number"
    if role is None:
        cause = f"{piece.source} ({shape}, {piece.tensor.dtype}) is none of what is known here and was not checked"
    else:
        cause = f"{piece.source} ({shape}) would be a second {role} of this layer and was not checked"
    remedy = "name it after what it is (A, B, Ua, Ub, M, P, weight, gradient, update), or leave it out"
    return Finding("unidentified", "convention", f"{layer} · {piece.source}".strip(" ·"), shape, None, cause, remedy)


def _said(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """Where a square layer leaves nothing but the keys to tell the sides."""
    sided = [role for role in ("A", "S", "U_in", "U_out") if role in part.items]
    told = layers is not None and part.layer in layers
    if part.shape is None or part.shape[0] != part.shape[1] or not sided:
        return part
    cause = "the layer is square: which side is the input's is taken from the keys, shapes cannot tell"
    remedy = "" if told else "give a model and data to have it tested"
    finding = Finding("sides", "convention", part.subject(*sided), "by key", None, cause, remedy)
    return replace(part, assumed=(*part.assumed, finding))


NARROWING, WIDENING = ("down_proj", "fc2", "wo", "dense_4h_to_h"), ("up_proj", "gate_proj", "c_fc", "fc1")


def _hinted(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """A hint where a layer's name says which side is the wider, and the sides are the other way round."""
    last = part.layer.rsplit(".", 1)[-1]
    sided = [role for role in ("A", "S", "U_in", "U_out") if role in part.items]
    if (layers and part.layer in layers) or part.shape is None or not sided:
        return part
    d_out, d_in = part.shape
    narrowing = last in NARROWING or part.layer.endswith("mlp.c_proj")
    exchanged = d_in < d_out if narrowing else last in WIDENING and d_in > d_out
    if not exchanged:
        return part
    cause = (
        f"the input side has {d_in} and the output side {d_out} dimensions, though layers called {last!r} mostly "
        f"{'narrow' if narrowing else 'widen'}: A and B may be exchanged throughout"
    )
    finding = Finding(
        "sides", "convention", part.subject(*sided), f"{d_out} x {d_in}", f"{d_in} x {d_out}", cause, "give the model"
    )
    return replace(part, assumed=(*part.assumed, finding))


def _named_by_shape(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """A part whose name the model does not know takes the name of the only layer with its shape."""
    if not layers or part.layer in layers or part.shape is None or (part.layer and set(part.items) <= CHECKPOINT):
        return part
    d_out, d_in = part.shape
    fits = [n for n, own in layers.items() if own.d_out == d_out and d_in - own.d_in in (0, 1)]
    swaps = [n for n, own in layers.items() if own.d_in == d_out and own.d_out == d_in and d_out != d_in]
    if len(fits or swaps) != 1:
        cause = f"no layer of the model is called {part.layer!r}, and {len(fits)} have W of {d_out} x {d_in}"
        finding = Finding("layer", "convention", part.subject(*part.items), part.layer, None, cause, "name the layer")
        return replace(part, assumed=(*part.assumed, finding))
    name = (fits or swaps)[0]
    cause = f"no name tells the layer; {name} is the only one of the model with such a shape"
    finding = Finding("layer", "convention", part.subject(*part.items), name, None, cause)
    part = resolve(replace(part, layer=name, shape=None), layers[name])
    return replace(part, assumed=(*part.assumed, finding))
