"""Labels drawn from the model with a seed that is not known: what can be told by the spread of draws of ours."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from curvlab.crosscheck.moments import LayerMoments
from curvlab.crosscheck.structures import Fit, Side, Structure, candidates, compare, explained

DRAWN = 3.0  # spreads of our own draws within which another draw of labels is accepted: a statistical bound
CLOSER = 0.5  # of the least distance among draws: nearer than that, two share their labels


def drawn_fits(X: Tensor, side: Side, moments: LayerMoments) -> list[tuple[Fit, float]]:
    """Structures at labels drawn from the model with a seed that is not ours, each with the spread of our own draws.

    The spread is the root mean square over draws of ‖S_k − cM‖/‖S_k‖, M the mean of the other draws; X may be as far
    from the mean of all as `DRAWN` spreads. Left out: centred ones and those whose scale no count explains (a draw
    would forgive these); sums of batches unless X has their rank. None is left where X is much nearer to one labelling
    (the data's, or one of our draws) than our draws are to it: it is then that one at other weights. The plainest
    comes first.
    """
    by_structure: dict[Structure, dict[str, Tensor]] = {}
    for structure, Y in candidates(side, moments, X.shape[1] if side != "S" else None):
        if structure.labels != "exact" and not structure.centred and Y.shape == X.shape and float(Y.norm()) > 0:
            by_structure.setdefault(replace(structure, labels="model"), {})[structure.labels] = Y
    found = []
    for structure, references in by_structure.items():
        draws = {label: Y for label, Y in references.items() if label != "data"}
        if len(draws) < 2 or (structure.form == "batch" and not _of_rank(X, side, moments.counts["batch"])):
            continue
        total = torch.stack(list(draws.values())).sum(0)
        own = [compare(Y, (total - Y) / (len(draws) - 1)) for Y in draws.values()]
        spread = math.sqrt(sum(r * r for _, r in own) / len(own))
        c, residual = compare(X, total / len(draws))
        if structure.weight == "sum" and _is_one_of(X, references):
            return []
        if residual > DRAWN * spread or c <= 0:
            continue
        scatter = math.sqrt(sum((factor - 1) ** 2 for factor, _ in own) / len(own))
        fit = explained(Fit(structure, c, residual, exact=False), moments, min(max(5 * scatter, 0.05), 0.5))
        if fit.formula is not None:
            found.append((fit, spread))
    return sorted(found, key=lambda pair: pair[0].cost)


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
