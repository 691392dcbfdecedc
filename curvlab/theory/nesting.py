"""Claim 9: γ-approximate null spaces are not nested."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.layers import find_layers
from curvlab.losses import Loss
from curvlab.projector import NullSpace, overlap
from curvlab.spectrum import Spectrum
from curvlab.theory.check import Case, Findings, claim, control, roundoff
from curvlab.theory.curvatures import both, fitted, five_spectra, projector

GAMMAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@claim(9, "ours")
def approximate_null_spaces_nest(
    model: nn.Module, loss: Loss, data: Any, layer: str, *, gammas: Sequence[float] = GAMMAS, should: bool | None = None
) -> Findings:
    """The γ-null space of the covariance lies in that of K-FAC, and that in the GGN's, as their exact null spaces do.

    It does not follow: γ cuts each spectrum at its own level, and what one of them counts among the small need not
    be small for another. The smallest counterexample is A = diag(0.7, 0.3), S = diag(0.9, 0.1) and γ = 0.65: the
    covariance removes the first input, K-FAC the products 0.63 and 0.27, of which the second belongs to the second
    input. Measured is the largest share outside, over γ; γ at which a null space is empty are left out. They do nest
    where K-FAC is exact and S proportional to the identity (the last layer under squared error), or A of rank one.

    Control: a random subspace in the place of the covariance's.

    Args:
        should: whether the nesting is expected; None: a result either way.
    """
    spectra = {name: fitted(name, model, loss, data, layer) for name in ("covariance", "kfac", "ggn")}
    bound = max(_bound(spectrum) for spectrum in spectra.values())
    series: dict[str, dict[str, float]] = {}
    for inner, outer in (("covariance", "kfac"), ("kfac", "ggn")):
        for gamma in gammas:
            first, second = (spectra[name].null_space(gamma) for name in (inner, outer))
            if first.kept:
                series.setdefault(f"{inner} outside {outer}", {})[str(gamma)] = 1 - overlap(first, second)
    if not series or not spectra["kfac"].null_space(min(gammas)).removed:  # without curvature all is null
        return Findings([])
    outside = max(max(shares.values()) for shares in series.values())
    random = 1 - _random_share(spectra["kfac"].null_space(min(gammas)))
    return Findings(
        [
            Case("share of a null space outside the next, the largest", outside, bound, should),
            control("share of a random subspace outside K-FAC's", random, bound),
        ],
        series,
    )


@claim(9, "ours")
def one_curvature_nests(
    model: nn.Module, loss: Loss, data: Any, layer: str, *, gammas: Sequence[float] = GAMMAS
) -> Findings:
    """For one curvature and γ1 < γ2 the γ2-null space lies in the γ1-null space.

    Both are spans of eigenvectors from one basis, and a larger γ removes all that a smaller one does, whole
    eigenspaces included.

    Control: a random subspace in the place of the γ2-null space.
    """
    cases, series = [], {}
    for name, spectrum in five_spectra(model, loss, data, layer).items():
        nulls = [spectrum.null_space(gamma) for gamma in sorted(gammas)]
        outside = [1 - overlap(small, large) for large, small in pairwise(nulls) if small.kept]
        series[name] = {str(gamma): null.kept for gamma, null in zip(sorted(gammas), nulls, strict=True)}
        if outside and nulls[0].removed:
            cases.append(Case(f"{name}: largest share outside", max(outside), _bound(spectrum)))
            cases.append(control(f"{name}: a random subspace", 1 - _random_share(nulls[0]), _bound(spectrum)))
    return Findings(cases, series)


@claim(9, "ours")
def overlap_is_the_share(
    model: nn.Module, loss: Loss, data: Any, layer: str, *, gammas: Sequence[float] = GAMMAS
) -> Findings:
    """The overlap of two null spaces is the share tr(P₁P₂) / tr P₁ of the first inside the second.

    That is the mean squared cosine of their principal angles. The library has it from the removed eigenvectors;
    here it is computed with projectors in full, cut from matrices in full, for all ordered pairs of the five
    curvatures. A cut between eigenvalues that rounding could exchange, or could tie, or an energy within rounding of
    γ, is left out: there the two computations may rightly differ.

    Control: the share outside instead.
    """
    found = list(both(model, loss, data, find_layers(model, layer)))
    spectra = {name: spectrum for name, spectrum, _ in found}
    plain = {name: _Plain.of(C) for name, _, C in found}
    tolerance = math.sqrt(max(_bound(spectrum) for spectrum in spectra.values()))
    eps = max(torch.finfo(spectrum.blocks[0].basis.like.dtype).eps for spectrum in spectra.values())
    errors, by_angles, wrong, series = [], [], [], []
    for gamma in gammas:
        nulls = {name: spectrum.null_space(gamma) for name, spectrum in spectra.items()}
        cuts = {name: c for name, own in plain.items() if (c := own.cut(gamma, tolerance, eps)) is not None}
        for one, (P1, _) in cuts.items():
            kept = round(float(P1.trace()))
            for two, (P2, removed) in cuts.items():
                if not kept or not nulls[one].kept:
                    continue
                share = float((P1 * P2).sum()) / kept
                given = overlap(nulls[one], nulls[two])
                sines = torch.linalg.eigvalsh(removed.mT @ P1 @ removed).clamp(0, 1)  # squared
                errors.append(abs(given - share))
                by_angles.append(abs(given - (1 - float(sines.sum()) / kept)))
                wrong.append(abs(given - (1 - share)))
                angle = math.degrees(math.asin(math.sqrt(float(sines.max()))))
                series.append(
                    {
                        "first": one, "second": two, "gamma": gamma, "share": share, "kept": kept,
                        "by chance": float(P2.trace()) / len(P2),
                        "largest angle": angle, "directions outside": int((sines > tolerance).sum()),
                    }
                )  # fmt: skip
    if not errors:
        return Findings([])
    return Findings(
        [
            Case("largest difference from tr(P₁P₂) / tr P₁", max(errors), tolerance),
            Case("largest difference from the mean squared cosine", max(by_angles), tolerance),
            control("largest difference from the share outside", max(wrong), tolerance),
        ],
        {"pairs": series},
    )


@dataclass(frozen=True)
class _Plain:
    """A curvature's eigenvalues in descending magnitude, and its eigenvectors (columns)."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, C: Tensor) -> "_Plain":
        values, vectors = torch.linalg.eigh(C.double())
        order = values.abs().argsort(descending=True)
        return cls(values.abs()[order], vectors[:, order])

    def cut(self, gamma: float, tolerance: float, eps: float) -> tuple[Tensor, Tensor] | None:
        """P_γ and the removed eigenvectors; None where rounding, in units of `eps`, decides about the cut."""
        total, largest = float(self.values.sum()), float(self.values[0])
        if total == 0:
            return None
        energy = self.values.cumsum(0) / total
        k = int((energy < gamma).sum())
        removed = self.values >= self.values[k] - tolerance**2 * largest
        n = int(removed.sum())
        if float(self.values[k] - self.values[n - 1]) > 8 * eps * largest:  # maybe equal, maybe not
            return None
        gap = float(self.values[n - 1] - self.values[n]) / largest if n < len(removed) else 1.0
        if gap < tolerance or float((energy - gamma).abs().min()) < tolerance**2:
            return None
        R = self.vectors[:, :n]
        return torch.eye(len(R)).to(R) - R @ R.mT, R


def _bound(spectrum: Spectrum) -> float:
    return roundoff(spectrum.blocks[0].basis.like.dtype, spectrum.size)


def _random_share(null: NullSpace, seed: int = 0) -> float:
    """Share of a random subspace of the same dimension inside a null space."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(null.dimensions, max(null.kept, 1), generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(X).Q
    return float((Q * (projector(null) @ Q)).sum()) / Q.shape[1]
