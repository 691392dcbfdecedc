"""Labels drawn from the model with a seed that is not known: what can be told by the spread of draws of ours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.structures import Fit, Side, Structure, candidates, compare, explained
from curvlab.spectrum import eigh

CLOSER = 0.5  # of the least distance among draws: nearer than that, two share their labels
TOLD = 1.5  # an unrelated matrix must be this many times as far as any of our draws: else nothing is told
NEARER = 0.8  # of the distance of the nearest unrelated matrix; half way would refuse draws with a rare large gradient
TYPICAL = 1.5  # times the farthest of our draws: as another draw may be, where nothing is told
RIDGE = 0.01  # of the mean eigenvalue, added where directions are weighted alike
LIFT = 0.02  # of the mean eigenvalue: less of a multiple of I is not looked for in a draw
TINY = 1e-6  # of the largest entry: smaller ones may vanish in storage
DRAWN = 3.0  # spreads beyond which no draw lies, however far unrelated matrices are


@dataclass(frozen=True)
class Drawn:
    """A structure that X may be another draw of.

    Attributes:
        spread: of our draws, ‖S_k − cM‖/‖S_k‖, the farthest one.
        limit: that X's residual was held to.
        told: whether an unrelated matrix would have been refused.
    """

    fit: Fit
    spread: float
    limit: float
    told: bool
    lifted: float | None = None  # a multiple of I in it, over the mean eigenvalue, beyond what our draws have


def drawn_fits(X: Tensor, side: Side, moments: LayerMoments) -> list[Drawn]:
    """Structures at labels drawn from the model with a seed that is not ours; those that are told first, then by cost.

    Two distances to the mean of our draws: of Frobenius norms, and with all its eigen-directions weighted alike, which
    tells matrices apart whose large entries are noise. Each must lie nearer to what our own draws have (each to the
    mean of the others) than to what unrelated matrices have: a multiple of I, the diagonal, ours in a random basis.
    Where these are as near as draws are, only products of single positions (examples for EK-FAC) are left, as not told.
    Left out: centred ones and those whose scale no count explains (a draw would forgive these);
    sums of batches unless X has their rank. None is left where X is much nearer to one labelling (the data's, or one
    of our draws) than our draws are to it: it is then that one at other weights.
    """
    by_structure: dict[Structure, dict[str, Tensor]] = {}
    for structure, Y in candidates(side, moments, X.shape[1] if side != "S" else None):
        if structure.labels != "exact" and not structure.centred and Y.shape == X.shape and float(Y.norm()) > 0:
            by_structure.setdefault(replace(structure, labels="model"), {})[structure.labels] = Y
    by_structure = {
        structure: references for structure, references in by_structure.items()
        if len(references.keys() - {"data"}) >= 2
        and (structure.form != "batch" or _of_rank(X, side, moments.counts["batch"]))
    }  # fmt: skip
    if any(structure.weight == "sum" and _is_one_of(X, refs) for structure, refs in by_structure.items()):
        return []
    found: list[Drawn] = []
    for structure in sorted(by_structure, key=lambda own: own.cost):
        draws = [Y for label, Y in by_structure[structure].items() if label != "data"]
        one = _judged(X, structure, draws, moments)
        plain = structure.form == ("example" if side == "eigenvalues" else "position")
        if one is not None and one.fit.formula is not None and (one.told or plain):
            found.append(one)
            if one.told:
                break
    return sorted(found, key=lambda one: (not one.told, one.fit.cost))


def _judged(X: Tensor, structure: Structure, draws: list[Tensor], moments: LayerMoments) -> Drawn | None:
    total = torch.stack(draws).sum(0)
    others = [(total - Y) / (len(draws) - 1) for Y in draws]
    own = [compare(Y, M) for Y, M in zip(draws, others, strict=True)]
    mean = total / len(draws)
    c, residual = compare(X, mean)
    spread = max(r for _, r in own)
    if residual > DRAWN * spread or c <= 0 or bool(((X == 0) & (mean.abs() > TINY * mean.abs().max())).any()):
        return None  # no sum of products over many positions is exactly zero where ours are not
    unrelated = _unrelated(mean, structure.side)
    limit, told = _limit(spread, [compare(Z, mean)[1] for Z in unrelated])
    if residual > limit:
        return None
    alike = max(_alike(Y, M, structure.side) for Y, M in zip(draws, others, strict=True))
    limit_alike, told_alike = _limit(alike, [_alike(Z, mean, structure.side) for Z in unrelated])
    if _alike(X, mean, structure.side) > limit_alike:
        return None
    scatter = math.sqrt(sum((factor - 1) ** 2 for factor, _ in own) / len(own))
    fit = explained(Fit(structure, c, residual, exact=False), moments, min(max(5 * scatter, 0.05), 0.5))
    lifts = [_lift(Y, M) for Y, M in zip(draws, others, strict=True)] if structure.side == "S" else []
    lifted = _lift(X, mean) if lifts else None
    if lifted is not None and lifted <= max(LIFT, _beyond(lifts)):
        lifted = None
    return Drawn(fit, spread, limit, told or told_alike, lifted)


def _lift(X: Tensor, M: Tensor) -> float:
    """δ over the mean eigenvalue of cM in X ≈ cM + δI, by M's eigenvalues, each direction weighted alike."""
    values, U = eigh(M, semidefinite=True)
    floor = values + RIDGE * values.mean()
    own = (U * (X @ U)).sum(0) / floor
    c, delta = torch.linalg.lstsq(torch.stack([values / floor, 1 / floor], 1), own[:, None]).solution.flatten().tolist()
    return delta / (c * float(values.mean())) if c > 0 else math.inf


def _beyond(draws: list[float]) -> float:
    """Where no further draw is expected: of four draws, 8 of their standard deviations above their mean."""
    mean = sum(draws) / len(draws)
    return mean + 8 * math.sqrt(sum((x - mean) ** 2 for x in draws) / (len(draws) - 1))


def _limit(own: float, unrelated: list[float]) -> tuple[float, bool]:
    """Well below the nearest unrelated matrix, where that is far enough from our draws; and whether it is."""
    chance = min(unrelated)
    if chance >= TOLD * own:
        return min(NEARER * chance, DRAWN * own), True
    return TYPICAL * own, False


def _unrelated(mean: Tensor, side: Side) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if side == "eigenvalues":
        order = torch.randperm(mean.numel(), generator=generator).to(mean.device)
        return [torch.ones_like(mean), mean.flatten()[order].view_as(mean)]
    d = len(mean)
    values = eigh(mean, semidefinite=True)[0]
    V = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0].to(mean)
    turned = (V * values) @ V.mT
    return [torch.eye(d, dtype=mean.dtype, device=mean.device), torch.diag(mean.diagonal()), turned]


def _alike(X: Tensor, M: Tensor, side: Side) -> float:
    """‖W/c − I‖/√d, W = M^-½ X M^-½ and c its mean eigenvalue: all eigen-directions of M count alike."""
    if side == "eigenvalues":
        W = X / (M + RIDGE * M.mean())
        return float((W / W.mean() - 1).norm()) / math.sqrt(W.numel())
    values, U = eigh(M, semidefinite=True)
    root = (values + RIDGE * values.mean()).sqrt()
    W = (U.mT @ X @ U) / torch.outer(root, root)
    size = W.diagonal().mean()
    if not float(size) > 0:
        return math.inf
    W = W / size
    return float((W - torch.eye(len(W), dtype=W.dtype, device=W.device)).norm()) / math.sqrt(len(W))


def _of_rank(X: Tensor, side: Side, rank: int) -> bool:
    """Whether a second moment has at most this rank, and might have more."""
    return side == "S" and rank < len(X) and float(torch.linalg.matrix_rank(X, rtol=1e-5)) <= rank


def _is_one_of(X: Tensor, references: Mapping[str, Tensor]) -> bool:
    """Whether X is much nearer to one labelling than our draws are."""
    for label, R in references.items():
        others = [compare(Y, R)[1] for other, Y in references.items() if other not in (label, "data")]
        if others and compare(X, R)[1] < CLOSER * min(others):
            return True
    return False
