"""Which tensor is which: from keys and file names (claims) and from what the tensors show (evidence)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from curvlab.crosscheck.bundles import bundles_of, variants_of
from curvlab.crosscheck.evidence import asymmetry, orthonormal_defect, semidefinite_looking, square, usable
from curvlab.crosscheck.extremes import is_count
from curvlab.crosscheck.findings import Finding, Severity
from curvlab.crosscheck.names import OPEN, Claim, matched
from curvlab.crosscheck.naming import hinted, named_by_shape, said_of_sides
from curvlab.crosscheck.orphans import adopted
from curvlab.crosscheck.pairs import paired
from curvlab.crosscheck.parts import Item, Part, Role, Stored
from curvlab.crosscheck.pieces import Piece, claimed, known_names
from curvlab.crosscheck.sides import AUTHORS_MASK, resolve
from curvlab.crosscheck.stacks import unstack
from curvlab.crosscheck.turned import turned
from curvlab.layers import LayerShape


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
    pieces, counts = claimed(stored, known_names(stored, layers))
    pieces = _known_names(pieces, layers)
    pieces, notes = paired(pieces, layers)
    parts: list[Part] = []
    for layer, bundles in bundles_of(pieces).items():
        for own in variants_of(bundles):
            parts.append(_part(layer, own, counts, layers))
    parts = unstack(parts, layers)
    parts = adopted([named_by_shape(part, layers) for part in parts], layers)
    parts = [hinted(turned(part, layers), layers) for part in parts]
    return [part for part in parts if part.items or part.assumed] + notes


def _known_names(pieces: list[Piece], layers: Mapping[str, LayerShape] | None) -> list[Piece]:
    """Names that mean a layer of the model become that layer's name."""
    if not layers:
        return pieces
    found = {piece.layer: matched(piece.layer, layers) for piece in pieces if piece.layer}
    return [replace(piece, layer=found.get(piece.layer) or piece.layer) for piece in pieces]


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
    return said_of_sides(resolve(part, layers.get(layer) if layers else None), layers)


def _no_count(layer: str, pieces: Sequence[Piece], count: float) -> Finding:
    subject = " · ".join(filter(None, [layer, pieces[0].source.split(":")[0]]))
    cause = f"N is {count:g}, no number of samples: what depends on it (ranks, sums for means) was not checked"
    remedy = "store the number of samples (positions) behind the statistics, a whole number from 1"
    severity: Severity = "convention" if math.isnan(count) else "error"  # words, which nothing is computed with
    return Finding("factor-count", severity, subject, f"{count:g}", "1 or more", cause, remedy, "no-count")


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
