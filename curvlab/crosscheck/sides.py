"""Which side of a layer a tensor belongs to, and whether it lies in columns or rows: claims held against evidence.

The shape of W is taken from the model or stored weights where there are any, else from what most tensors agree on.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from curvlab.crosscheck.evidence import off_diagonal, square, usable
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role
from curvlab.layers import LayerShape

AUTHORS_MASK = "the authors' M, d_in x d_out"  # in an item's evidence: the format says how it lies
INPUT: tuple[Role, ...] = ("A", "U_in", "values_in")
OUTPUT: tuple[Role, ...] = ("S", "U_out", "values_out")
WEIGHTS: tuple[Role, ...] = ("base", "edited", "gradient", "update")
LAID_OUT: tuple[Role, ...] = ("mask", "eigenvalues", *WEIGHTS)
OTHER: dict[Role, Role] = dict(zip(INPUT + OUTPUT, OUTPUT + INPUT, strict=True))
CLEAR = 0.1  # off-diagonal share (see `off_diagonal`) above which a basis plainly belongs to another matrix


def resolve(part: Part, layer: LayerShape | None) -> Part:
    """The part with roles and orientations that evidence supports, its shape, and findings where claims were wrong."""
    part = replace(part, shape=_shape(part, layer))
    part = _unswap_by_shape(part, layer is not None)
    part = _unswap_by_agreement(part)
    part = _lay_out(part)
    part = _columns(part)
    return _misfits(part)


def _sizes(part: Part, roles: Iterable[Role]) -> list[int]:
    tensors = [part.items[role].tensor for role in roles if role in part.items]
    return [len(tensor) for tensor in tensors if tensor.dim() > 0 and tensor.numel() > 0]


def _shape(part: Part, layer: LayerShape | None) -> tuple[int, int] | None:
    """(d_out, d_in): of the model, of weights, or what the claims together say."""
    sizes = _sizes(part, (*INPUT, *OUTPUT, "projector"))
    mask = [part.items[r] for r in ("mask", "eigenvalues") if r in part.items and part.items[r].tensor.dim() == 2]
    mask = [item for item in mask if item.tensor.numel()]
    sizes += [n for item in mask for n in item.tensor.shape]
    if layer is not None:
        inner = _sizes(part, (*INPUT, "projector"))
        swapped = layer.d_out == layer.d_in + 1 and layer.d_in in sizes  # then A of d_in + 1 is S
        joined = not layer.bias and layer.d_in + 1 in inner and layer.d_in not in inner and not swapped
        return layer.d_out, layer.d_in + joined
    for role in ("base", "edited", "gradient", "update"):
        if role in part.items and part.items[role].tensor.dim() == 2:
            d_out, d_in = part.items[role].oriented.shape
            if d_out != d_in and sizes and d_in not in sizes and d_in + 1 in sizes:
                d_in += 1
            if not sizes or set(sizes) <= {d_out, d_in}:
                return (d_in, d_out) if outvoted(part, d_out, d_in) else (d_out, d_in)
    votes_in, votes_out = Counter(_sizes(part, INPUT)), Counter(_sizes(part, OUTPUT))
    for item in mask:
        d_out, d_in = item.oriented.shape
        votes_in[d_in] += 1
        votes_out[d_out] += 1
    both = set(votes_in) | set(votes_out)
    if len(both) > 2 or not both:
        votes_in += Counter(_sizes(part, ["projector"]))
        if not votes_in or not votes_out:
            return None
        return votes_out.most_common(1)[0][0], votes_in.most_common(1)[0][0]
    if len(both) == 1:
        (n,) = both
        return (n, n) if votes_in and votes_out else None
    first, second = both
    if not votes_in or not votes_out:
        return None
    as_is = votes_in[first] + votes_out[second]
    crossed = votes_in[second] + votes_out[first]
    if as_is == crossed:  # the factors are the source; their bases were made from them
        a = part.items.get("A")
        if a is not None and a.tensor.shape[0] == second:
            return first, second
        return second, first
    return (second, first) if as_is > crossed else (first, second)


def outvoted(part: Part, d_out: int, d_in: int) -> bool:
    """Whether the other items agree that a weight read as d_out x d_in lies d_in x d_out, as GPT-2's Conv1D has it.

    Three items that agree are enough; a name that GPT-2 gives its Conv1D, and two.
    """
    if d_out == d_in:
        return False
    inner, outer = _sizes(part, INPUT), _sizes(part, OUTPUT)
    laid = [tuple(part.items[r].oriented.shape) for r in ("mask", "eigenvalues") if r in part.items]
    as_is = inner.count(d_in) + outer.count(d_out) + laid.count((d_out, d_in))
    turned = inner.count(d_out) + outer.count(d_in) + laid.count((d_in, d_out))
    return as_is == 0 and turned >= (2 if conv1d_name(part.layer) else 3)


def conv1d_name(layer: str) -> bool:
    """Whether GPT-2 calls a Conv1D so, whose weight lies d_in x d_out."""
    return layer.rsplit(".", 1)[-1] in ("c_proj", "c_attn", "c_fc", "q_attn")


def _unswap_by_shape(part: Part, from_model: bool) -> Part:
    if part.shape is None or part.shape[0] == part.shape[1]:
        return part
    d_out, d_in = part.shape
    wrong: list[Role] = []
    for roles, own, other in ((INPUT, d_in, d_out), (OUTPUT, d_out, d_in)):
        for role in roles:
            if role in part.items and part.items[role].tensor.numel():
                size = part.items[role].tensor.shape[0]
                partner = part.items.get(OTHER[role])
                if size == other and size != own and (partner is None or partner.tensor.shape[0] != other):
                    wrong.append(role)
    if not wrong:
        return part
    against = "of the layer" if from_model else "that the other tensors and the authors' layout of M agree on"
    return _swapped(part, wrong, f"shapes: W is {d_out} x {d_in} by the shape {against}")


def _unswap_by_agreement(part: Part) -> Part:
    """For square layers: each basis diagonalises the factor of the other side."""
    A, S, u_in, u_out = (_matrix(part, role) for role in ("A", "S", "U_in", "U_out"))
    if A is None or S is None or A.shape != S.shape or (u_in is None and u_out is None):
        return part
    pairs = [(u_in, A, S), (u_out, S, A)]
    own = [_best(u, mine) for u, mine, _ in pairs if u is not None and u.shape == A.shape]
    crossed = [_best(u, other) for u, _, other in pairs if u is not None and u.shape == A.shape]
    known = [(a, b) for a, b in zip(own, crossed, strict=True) if a is not None and b is not None]
    if not known or not all(a > CLEAR and b < 0.3 * a for a, b in known):
        return part
    numbers = ", ".join(f"{a:.2g} by its own side's factor, {b:.2g} by the other's" for a, b in known)
    wrong: list[Role] = ["U_in", "U_out"] if _mask_sides_with(part, u_in, u_out, A, S) else ["A", "S"]
    return _swapped(part, [r for r in wrong if r in part.items], f"what is left off the diagonal is {numbers}")


def _mask_sides_with(part: Part, u_in: Tensor | None, u_out: Tensor | None, A: Tensor, S: Tensor) -> bool:
    """Whether the mask says that A and S are right and the eigenvectors exchanged."""
    mask = part.tensor("mask")
    if mask is None or mask.shape != A.shape or u_in is None or u_out is None:
        return False
    rows = [torch.einsum("ij,ij->j", U.double(), C.double() @ U.double()) for U, C in ((u_out, A), (u_in, S))]
    products = torch.outer(*rows)  # as if the factors were exchanged; else transposed
    removed = ~mask.bool()
    mean = float(products.mean())
    kept_apart = [abs(float(values[removed].mean()) - mean) for values in (products, products.mT) if removed.any()]
    return len(kept_apart) == 2 and kept_apart[1] > kept_apart[0]


def _swapped(part: Part, wrong: list[Role], evidence: str) -> Part:
    items: dict[Role, Item] = {role: item for role, item in part.items.items() if role not in wrong}
    for role in wrong:
        found = part.items[role]
        items[OTHER[role]] = replace(found, role=OTHER[role], evidence=f"{found.evidence}; {evidence}: sides exchanged")
    names = " and ".join(part.items[role].source for role in wrong)
    finding = Finding(
        "sides",
        "error",
        part.subject(*wrong),
        ", ".join(f"{role}: {tuple(part.items[role].tensor.shape)}" for role in wrong),
        "the other side",
        f"input and output side are exchanged in {names} ({evidence}); taken the other way round from here on",
        "A (and Ua) belong to the layer's inputs, B or S (and Ub) to the gradients at its outputs: exchange them",
        "swapped-factors",
    )
    return replace(part, items=items, assumed=(*part.assumed, finding))


def _lay_out(part: Part) -> Part:
    """Masks, eigenvalues and weights: (d_out, d_in) or its transpose, by shape."""
    if part.shape is None:
        return part
    items, found = dict(part.items), list(part.assumed)
    d_out, d_in = part.shape
    for role in LAID_OUT:
        item = items.get(role)
        if item is None or d_out == d_in or item.tensor.dim() != 2:
            continue
        shape = tuple(item.tensor.shape)
        if shape == (d_in, d_out) or (role in WEIGHTS and shape == (d_in - 1, d_out) != (d_out, d_in - 1)):
            items[role] = replace(item, transposed=True, evidence=f"{item.evidence}; shape of d_in x d_out")
        elif shape == (d_out, d_in):
            items[role] = replace(item, transposed=False, evidence=f"{item.evidence}; shape of W")
            if AUTHORS_MASK in item.evidence and role == "mask":
                found.append(
                    Finding(
                        "mask-orientation",
                        "error",
                        part.subject("mask"),
                        f"{d_out} x {d_in}, d_out x d_in",
                        f"{d_in} x {d_out}, d_in x d_out",
                        "M lies the other way round than its format has it (d_in x d_out, used as M.T): "
                        "the step multiplies coordinates by the wrong entries, or fails",
                        "store M as the outer product of input and output eigenvalues compared: "
                        "torch.outer(lambda_in, lambda_out) < threshold",
                        "transposed-mask",
                    )
                )
    return replace(part, items=items, assumed=tuple(found))


def _columns(part: Part) -> Part:
    """Eigenvectors that lie in rows: U C Uᵀ is diagonal, Uᵀ C U is not."""
    items, rows = dict(part.items), []
    for role, factor in (("U_in", "A"), ("U_out", "S")):
        C = _matrix(part, factor)  # type: ignore[arg-type]
        U = _matrix(part, role)  # type: ignore[arg-type]
        if C is None or U is None or U.shape != C.shape:
            continue
        stands, turned = off_diagonal(U, C), off_diagonal(U.mT, C)
        if stands is None or turned is None or stands <= CLEAR:
            continue
        if turned < (0.4 if len(C) >= 16 else 0.05) * stands:
            items[role] = replace(items[role], transposed=True, evidence=f"{items[role].evidence}; lies in rows")  # type: ignore[index]
            rows.append((role, stands, turned))
    if not rows:
        return part
    roles = [role for role, _, _ in rows]
    numbers = ", ".join(f"{role}: {stands:.2g} as stored, {turned:.2g} transposed" for role, stands, turned in rows)
    finding = Finding(
        "eigenvector-orientation",
        "error",
        part.subject(*roles),  # type: ignore[arg-type]
        max(stands for _, stands, _ in rows),
        CLEAR,
        f"eigenvectors lie in rows where columns are used; share of the factor off the diagonal: {numbers}; "
        "taken as rows from here on",
        "store the eigenvectors as torch.linalg.eigh returns them, in columns (numpy's svd gives Vh: transpose it)",
        "transposed-eigenvectors",
    )
    return replace(part, items=items, assumed=(*part.assumed, finding))


def _misfits(part: Part) -> Part:
    """Tensors whose shape fits neither side are named and left out."""
    if part.shape is None:
        return part
    d_out, d_in = part.shape
    wanted: dict[Role, list[tuple[int, ...]]] = {
        "A": [(d_in, d_in)], "S": [(d_out, d_out)], "values_in": [(d_in,)], "values_out": [(d_out,)],
        "mask": [(d_out, d_in)], "eigenvalues": [(d_out, d_in)], "projector": [(d_in, d_in), (d_out, d_out)],
        "base": [(d_out, d_in), (d_out, d_in - 1)], "edited": [(d_out, d_in), (d_out, d_in - 1)],
        "gradient": [(d_out, d_in), (d_out, d_in - 1)], "update": [(d_out, d_in), (d_out, d_in - 1)],
    }  # fmt: skip
    bad: list[Role] = []
    for role, item in part.items.items():
        shape = tuple(item.oriented.shape) if item.tensor.dim() == 2 else tuple(item.tensor.shape)
        if item.tensor.numel() == 0:
            continue  # named elsewhere
        if role in ("U_in", "U_out"):
            d = d_in if role == "U_in" else d_out
            if item.tensor.dim() != 2 or shape[0] != d or shape[1] > d:
                bad.append(role)
        elif shape not in wanted[role]:
            bad.append(role)
    if not bad:
        return part
    shapes = ", ".join(f"{part.items[role].source} {tuple(part.items[role].tensor.shape)}" for role in bad)
    finding = Finding(
        "shapes",
        "error",
        part.subject(*bad),
        shapes,
        f"W: {d_out} x {d_in}",
        f"shapes that fit no side of a layer with W of {d_out} x {d_in}: {shapes}; left out from here on",
        "look whether these files belong to the same layer, and whether the bias was joined in some of them only",
        "mismatched-shapes",
    )
    items = {role: item for role, item in part.items.items() if role not in bad}
    return replace(part, items=items, assumed=(*part.assumed, finding))


def _matrix(part: Part, role: Role) -> Tensor | None:
    """A square matrix with finite entries, as it is oriented by now."""
    tensor = part.tensor(role)
    return tensor if tensor is not None and square(tensor) and usable(tensor) else None


def _best(U: Tensor, C: Tensor) -> float | None:
    """The off-diagonal share, in columns or rows, whichever is less."""
    found = [share for share in (off_diagonal(U, C), off_diagonal(U.mT, C)) if share is not None]
    return min(found) if found else None
