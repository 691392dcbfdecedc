"""Which tensors belong together: to one layer, and to one set of factors of it."""

from collections.abc import Sequence

from torch import equal

from curvlab.crosscheck.evidence import off_diagonal, usable
from curvlab.crosscheck.names import OPEN, Claim
from curvlab.crosscheck.pieces import Piece


def bundles_of(pieces: Sequence[Piece]) -> dict[str, list[list[Piece]]]:
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


def variants_of(bundles: list[list[Piece]]) -> list[list[Piece]]:
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
    return any(a.shape != b.shape or a.dtype != b.dtype or not equal(a, b) for a, b in pairs)


def _misfit(own: Sequence[Piece], bundle: Sequence[Piece]) -> float:
    """How badly the bundle's eigenvectors diagonalise these factors."""
    total = 0.0
    for basis, factor in (("U_in", "A"), ("U_out", "S")):
        for U in (piece.tensor for piece in bundle if piece.claim == basis and usable(piece.tensor)):
            for C in (piece.tensor for piece in own if piece.claim == factor and usable(piece.tensor)):
                share = off_diagonal(U, C)
                total += 1.0 if share is None else share
    return total
