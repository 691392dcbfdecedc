"""Caches whose names lead to no factors: joined to those that their eigenvectors diagonalise, else said."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from curvlab.crosscheck.evidence import off_diagonal, usable
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role
from curvlab.crosscheck.sides import CLEAR, resolve
from curvlab.layers import LayerShape

FACTORS: tuple[Role, ...] = ("A", "S")
CACHE: tuple[Role, ...] = ("U_in", "U_out", "mask")


def adopted(parts: Sequence[Part], layers: Mapping[str, LayerShape] | None) -> list[Part]:
    """Parts that hold a mask or eigenvectors and no factors go to the factors they belong to, or say that none do."""
    out = list(parts)
    for orphan in parts:
        if not set(CACHE) & set(orphan.items) or set(FACTORS) & set(orphan.items):
            continue
        alike = [part for part in out if _like(part, orphan)]
        free = [part for part in alike if not set(part.items) & set(orphan.items)]
        fits = [part for part in free if _diagonal(part, orphan)]
        nameless = not orphan.layer and len(free) == 1
        if len(fits) == 1 or nameless:
            (parent,) = fits if len(fits) == 1 else free
            why = "its eigenvectors diagonalise their factors" if len(fits) == 1 else "the only factors of its shape"
            out = [_joined(parent, orphan, why, layers) if part is parent else part for part in out]
            out = [part for part in out if part is not orphan]
        elif alike:
            out = [_alone(part, alike) if part is orphan else part for part in out]
    return out


def _like(part: Part, orphan: Part) -> bool:
    """Whether the part has factors of the sizes that the orphan has, in either order."""
    if not set(FACTORS) & set(part.items):
        return False
    own = {len(part.items[role].tensor) for role in FACTORS if role in part.items}
    mine = {n for role in CACHE if role in orphan.items for n in orphan.items[role].tensor.shape}
    return own == mine or (len(own & mine) > 0 and not set(FACTORS) <= set(part.items))


def _diagonal(part: Part, orphan: Part) -> bool:
    shares = []
    for basis in ("U_in", "U_out"):
        U = orphan.tensor(basis)
        for C in (part.tensor(role) for role in FACTORS):
            if U is not None and C is not None and usable(U) and usable(C):
                both = [off_diagonal(V, C) for V in (U, U.mT)]
                shares += [share for share in both if share is not None]
    return bool(shares) and min(shares) <= CLEAR


def _joined(parent: Part, orphan: Part, why: str, layers: Mapping[str, LayerShape] | None) -> Part:
    items: dict[Role, Item] = {**parent.items, **orphan.items}
    called = f"called {orphan.layer!r} by its name" if orphan.layer else "without a layer's name"
    cause = f"{_sources(orphan)} is {called}, and is held against the factors of {parent.layer or 'one layer'}: {why}"
    said = Finding("layer", "convention", f"{parent.layer} · {_sources(orphan)}".strip(" ·"), parent.layer, None, cause)
    kept = [found for found in orphan.assumed if found.check != "layer"]
    joined = replace(parent, items=items, shape=None, assumed=(*parent.assumed, *kept, said))
    return resolve(joined, layers.get(parent.layer) if layers else None)


def _alone(orphan: Part, alike: Sequence[Part]) -> Part:
    names = ", ".join(part.layer or "a nameless layer" for part in alike[:3])
    cause = (
        f"{_sources(orphan)} ({orphan.layer or 'no layer named'}) has no factors of its own, though factors of its "
        f"sizes are there ({names}), which it does not diagonalise or which have a cache already: it was held "
        "against none"
    )
    remedy = "name the cache after its layer as the factors are, or give that layer's factors"
    where = f"{orphan.layer} · {_sources(orphan)}".strip(" ·")
    found = Finding("cache-factors", "deviation", where, 0, 1, cause, remedy, "cache-without-factors")
    return replace(orphan, assumed=(*orphan.assumed, found))


def _sources(part: Part) -> str:
    return ", ".join(dict.fromkeys(item.source.split(":")[0] for item in part.items.values()))
