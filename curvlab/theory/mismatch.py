"""Claim 17: a capability set that is small, or another one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Loss
from curvlab.projector import NullSpace, overlap
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, roundoff
from curvlab.theory.curvatures import estimate, matrix, plain, projector

ESTIMATES = ("ggn", "kfac", "covariance")


def take(data: Iterable[tuple[Tensor, Tensor]], n: int) -> list[tuple[Tensor, Tensor]]:
    """The first n examples."""
    out, left = [], n
    for x, y in data:
        if left > 0:
            out.append((x[:left], y[:left]))
            left -= len(x)
    return out


def removed_in_common(first: NullSpace, second: NullSpace) -> float:
    """Share of the directions that `first` removes which `second` removes too: tr(R₁R₂) / tr R₁."""
    inside = overlap(first, second) * first.kept if first.kept else 0.0  # tr(P₁P₂) = p − r₁ − r₂ + tr(R₁R₂)
    return (inside - first.dimensions + first.removed + second.removed) / first.removed


@claim(17, "review, limitations")
def sample_is_as_good(
    model: nn.Module, loss: Loss, capability: Any, sample: Any, layer: str, *, gamma: float = 0.9,
    factor: float = 2.0, should: bool | None = None,
) -> Findings:  # fmt: skip
    """A null space from a sample lets through at most twice the energy that the one from the whole capability set does.

    Energy is tr(P G) / tr G, G the GGN of the whole set and P the γ-null space of a curvature of the sample: GGN,
    K-FAC and covariance, each against itself on the whole set (1 − γ at most, for the GGN). Empirical; the sample
    may be a part of the set, or of other classes, or of another task.

    Control: the removed subspace in the place of the null space.

    Args:
        capability: the whole set.
        sample: what the curvature is fitted on.
        factor: "twice".
        should: whether the sample is expected to be good enough.
    """
    found, values = _let_through(model, loss, capability, sample, layer, gamma)
    bound = roundoff(explicit.zero(find_layers(model, layer)).dtype, len(values))
    cases = [
        Case(f"{n}: energy let through", own["let through"], factor * own["by the whole set"] + bound, should)
        for n, own in found.items()
    ]
    if cases and "ggn" in found:
        whole = found["ggn"]["by the whole set"]
        cases.append(control("ggn: removed and kept exchanged", 1 - whole, factor * whole + bound))
    return Findings(cases, {"gamma": gamma, "examples": _count(sample), **found})


@claim(17, "ours: Ky Fan")
def no_estimate_beats_the_whole_set(
    model: nn.Module, loss: Loss, capability: Any, sample: Any, layer: str, *, gamma: float = 0.9
) -> Findings:
    """No estimate of a null space lets through less energy of the whole set's GGN than its own trailing eigenvectors.

    Of all subspaces of a dimension they have the smallest tr(P G) (Ky Fan). By how much an estimate exceeds it says
    what the mismatch costs; the series has it, and how many of the removed directions are the same.

    Control: the leading eigenvectors claimed to be the best.

    Args:
        capability: the whole set.
        sample: what GGN, K-FAC and covariance are fitted on.
    """
    found, values = _let_through(model, loss, capability, sample, layer, gamma)
    bound = roundoff(explicit.zero(find_layers(model, layer)).dtype, len(values))
    cases = []
    for name, own in found.items():
        best = float(values[own["removed"] :].sum() / values.sum())
        cases.append(Case(f"{name}: energy let through − the least", own["let through"] - best, -bound, True, ">="))
        if name == "ggn" and own["removed"] < len(values) and float(values[-1]) < 0.99 * float(values[0]):
            worst = float(values.flip(0)[own["removed"] :].sum() / values.sum())
            cases.append(control("trailing − leading eigenvectors", best - worst, -bound, ">="))
    return Findings(cases, {"gamma": gamma, "examples": _count(sample), **found})


@claim(17, "ours")
def samples_underestimate_boundedly(model: nn.Module, loss: Loss, data: Any, layer: str, *, n: int) -> Findings:
    """The curvature of n of N examples is at most N/n times the whole set's: what is null for all is null for them.

    G is a mean of positive semi-definite terms and the sample's are among them. For K-FAC both factors are such
    means, so that it is (N/n)²; for the covariance N/n again. Nothing bounds the other side: directions that the
    sample does not see may be sharp.

    Control: no factor at all, for the sample and for the rest: one of them exceeds the whole somewhere.

    Args:
        n: the sample, the first n examples.

    Raises:
        ValueError: a sample without examples, or without a label that counts.
    """
    (chosen,) = find_layers(model, layer)
    count = _count(data)
    if n < 1:
        raise ValueError(f"the sample must have at least one example, got n = {n}")
    sample, rest = take(data, n), _rest(data, n)
    if not explicit.terms(model, loss, sample, [chosen]):
        raise ValueError(f"no label of the first {n} examples counts: the sample has no loss")
    whole = plain(model, loss, data, chosen)
    (terms, positions), (m, p) = (_counts(model, loss, these, chosen) for these in (data, sample))
    factors = {"ggn": terms / m, "kfac": terms / m * positions / p, "covariance": positions / p}
    cases = []
    for name, C in whole.items():
        size = float(torch.linalg.matrix_norm(C, 2))
        if size == 0:
            continue
        part = matrix(estimate(name, model, loss, sample, layer)).double()
        excess = _top(part - factors[name] * C) / (factors[name] * size)
        bound = roundoff(explicit.zero([chosen]).dtype, len(C))
        cases.append(Case(f"{name}: largest eigenvalue of C_n − factor · C_N", excess, bound))
        if name == "ggn" and n < count and explicit.terms(model, loss, rest, [chosen]):
            other = matrix(estimate(name, model, loss, rest, layer)).double()
            wrong = max(_top(part - C), _top(other - C)) / size
            cases.append(control("ggn: the same without the factor", wrong, bound))
    return Findings(cases, {"examples": n, "of": count})


def _let_through(
    model: nn.Module, loss: Loss, capability: Any, sample: Any, layer: str, gamma: float
) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """What each estimate's null space lets through of the GGN of the capability set, and that GGN's eigenvalues."""
    G = GaussNewton.fit(model, loss, capability, layer).dense("rows").double()
    values, trace = torch.linalg.eigvalsh(G).flip(0).clamp_min(0), float(G.trace())
    found = {}
    for name in ESTIMATES:
        whole, part = (estimate(name, model, loss, d, layer).null_space(gamma) for d in (capability, sample))
        if trace == 0 or not whole.removed or not part.removed:
            continue
        found[name] = {
            "let through": float((projector(part) * G).sum()) / trace,
            "by the whole set": float((projector(whole) * G).sum()) / trace,
            "removed": part.removed, "removed by the whole set": whole.removed,
            "found of its removed": removed_in_common(whole, part),
            "null inside its null": overlap(part, whole) if part.kept else 1.0,
        }  # fmt: skip
    return found, values


def _count(data: Any) -> int:
    return sum(len(x) for x, _ in data)


def _rest(data: Any, n: int) -> list[tuple[Tensor, Tensor]]:
    """The examples after the first n."""
    out = []
    for x, y in data:
        if n < len(x):
            out.append((x[n:], y[n:]))
        n = max(n - len(x), 0)
    return out


def _counts(model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer) -> tuple[int, int]:
    """Loss terms, and positions at which the layer's weight is used."""
    return explicit.terms(model, loss, data, [layer]), len(explicit.layer_inputs(model, layer, data))


def _top(C: Tensor) -> float:
    return float(torch.linalg.eigvalsh((C + C.mT) / 2)[-1])
