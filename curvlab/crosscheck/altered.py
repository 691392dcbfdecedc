"""What was done to a factor that no convention explains: matrices made of ours by a step that has a name."""

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlab.crosscheck.layout import ALL_REAL
from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.structures import Side, compare

POWERS = {-1.0: "the inverse", -0.5: "the inverse square root", 0.5: "the square root", 2.0: "the square"}
FLAT = 1e-3  # of the largest eigenvalue: smaller ones are left out where powers are compared


def of_ours(side: Side, d: int, moments: LayerMoments) -> Iterator[tuple[str, Tensor]]:
    """Our sums over single positions (float64), with what they are in words: every choice of positions and labels."""
    for label in [""] if side == "A" else moments.labels:
        for name in moments.sets:
            gram = moments.gram(label, "position", "sum", name)
            if gram is None:
                continue
            Y = gram.view(bias="last" if d == len(gram.matrix) else "none")
            if len(Y) == d and bool(Y.isfinite().all()) and float(Y.norm()) > 0:
                said = [f"labels {label}" if label else "", name if name != ALL_REAL else ""]
                yield ", ".join(filter(None, said)), Y


def damping(X: Tensor, side: Side, moments: LayerMoments, limit: float) -> float | None:
    """δ > 0 where X = c·Y + δ·I to within `limit` for one of our sums Y, c > 0; None else."""
    if side == "eigenvalues":
        return None
    d, size = len(X), float(X.norm())
    trace = float(X.trace()) / d**0.5
    for _, Y in of_ours(side, d, moments):
        unit = Y / Y.norm()
        shared = float(unit.trace()) / d**0.5  # its cosine with I
        if 1 - shared**2 < 1e-9:  # a multiple of I itself
            continue
        along = float((X * unit).sum())
        c, t = (along - shared * trace) / (1 - shared**2), (trace - shared * along) / (1 - shared**2)
        if min(c, t) <= limit * size:  # either part is round-off
            continue
        rest = X - c * unit
        rest.diagonal().sub_(t / d**0.5)
        if float(rest.norm()) <= limit * size:
            return t / d**0.5
    return None


def altered(X: Tensor, side: Side, moments: LayerMoments, limit: float) -> str | None:
    """A step that makes X of ours, in words; None where none of those tried does."""
    if side == "eigenvalues" or X.dim() != 2 or X.shape[0] != X.shape[1]:
        return None
    eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
    if compare(X, eye)[1] <= limit:
        return "a multiple of the identity: nothing of the data is in it"
    for words, Y in of_ours(side, len(X), moments):
        found = _step(X, Y, limit)
        if found is not None:
            return f"{found} ({words})" if words else found
    return None


def _step(X: Tensor, Y: Tensor, limit: float) -> str | None:
    diagonal = Y.diagonal()
    if compare(X, torch.diag(diagonal))[1] <= limit:
        return "the diagonal of ours: what is off it was dropped"
    if bool((diagonal > 0).all()):
        scale = diagonal.rsqrt()
        if compare(X, scale[:, None] * Y * scale)[1] <= limit:
            return "ours with every feature scaled to unit size (a correlation matrix): sizes of features are lost"
    gone = (X == 0).all(0) & (X == 0).all(1) & (diagonal > 0)
    if 0 < int(gone.sum()) < len(X) and compare(X[~gone][:, ~gone], Y[~gone][:, ~gone])[1] <= limit:
        return f"ours with {int(gone.sum())} features (row and column) set to zero"
    values, U = torch.linalg.eigh(Y)
    theirs = torch.linalg.eigvalsh(X)
    if compare(theirs, values)[1] <= limit:
        c = compare(theirs, values)[0]
        same = float((X.diagonal().sort().values - c * diagonal.sort().values).norm()) <= limit * float(X.norm())
        return "ours with its features in another order" if same else "ours in another basis: same eigenvalues"
    return _power(X, values, U, limit)


def _power(X: Tensor, values: Tensor, U: Tensor, limit: float) -> str | None:
    """X = c·Yᵖ, judged where Y's eigenvalues are above round-off."""
    rotated = U.mT @ X @ U
    own = values > FLAT * values[-1]
    if int(own.sum()) < 2:
        return None
    for power, words in POWERS.items():
        if power > 0:
            Z = (U * values.clamp_min(0) ** power) @ U.mT
            if compare(X, Z)[1] <= 2 * limit ** min(power, 1):
                return f"{words} of ours"
            continue
        block = rotated[own][:, own]
        if compare(block, torch.diag(values[own] ** power))[1] <= limit / FLAT:
            return f"{words} of ours"
    return None


def resembles(X: Tensor, side: Side, moments: LayerMoments) -> bool:
    """Whether X, without its multiple of I, is nearer to any of ours than a matrix in a random basis would be.

    The cosine of two symmetric matrices in random bases has a spread of √2/d; three of these are asked for.
    """
    if side == "eigenvalues":
        return True
    best = 0.0
    eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
    own = X - X.trace() / len(X) * eye
    for _, Y in of_ours(side, len(X), moments):
        other = Y - Y.trace() / len(Y) * eye
        size = float(own.norm() * other.norm())
        best = max(best, float((own * other).sum()) / size) if size > 0 else best
    return best > min(3 * 2**0.5 / len(X), 0.5)
