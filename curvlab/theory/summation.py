"""Claim 16: the energy of the products of eigenvalues, summed in float32 and by the library."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from curvlab.curvature.kfac import kronecker_block
from curvlab.layers import LayerShape
from curvlab.spectrum import Spectrum
from curvlab.theory.check import Case, Findings, claim, control, roundoff

SpectrumKind = Literal["power law 1", "power law 0.5", "spike and tail"]
EPS = torch.finfo(torch.float32).eps
POSITIONS = 1_000_000  # of the partial sums are compared


@claim(16, "ours")
def float32_energy(
    *,
    shape: tuple[int, int] = (4096, 14336),
    spectra: Sequence[SpectrumKind] = ("spike and tail", "power law 1", "power law 0.5"),
    gammas: Sequence[float] = (0.99, 0.999, 1 - 1e-5),
    device: str = "cpu",
) -> Findings:
    """The energy of all products of eigenvalues can be summed in float32, if not one product after another.

    Sums in pairs err by about log₂ n roundings; torch's cumsum on a CPU carries float64 and rounds each partial sum
    once. One after another, a product below half a unit in the last place of the sum so far is lost: of a spectrum
    with a spike and a long flat tail the whole tail, and k with it. Whatever the sum, shares stored in float32 are
    uncertain by some units in the last place, and the energy left over, 1 − γ, is known to 2 eps / (1 − γ) of itself.

    Control: half of the products left out.

    Args:
        shape: (d_out, d_in), of at least 2²⁰ products: below, the tail of the spike would not be lost.
        device: where torch sums; its cumsum carries float64 on a CPU only.
    """
    n = shape[0] * shape[1]
    if n < 2**20:
        raise ValueError(f"shape must have at least 2^20 products, got {n}")
    in_pairs = 2 * math.log2(n) * EPS
    once = EPS if device == "cpu" else in_pairs
    cases: list[Case] = []
    series: dict[str, object] = {"shape": list(shape), "products": n, "device": device}
    if device == "cpu":
        series["on a GPU"] = "not measured: none was lent"
    for kind in spectra:
        x = sorted_products(kind, shape)
        exact = np.cumsum(x, dtype=np.float64)
        total, on_device = float(exact[-1]), torch.from_numpy(x).to(device)
        ranks = {gamma: _rank(exact, gamma) for gamma in gammas}
        pairs = float(on_device.sum())
        cases.append(Case(f"{kind}: torch.sum, error / total", abs(pairs / total - 1), in_pairs))
        lost = _surely_lost(x, exact)
        found: dict[str, object] = {"torch.sum": pairs / total - 1, "surely lost in order": lost}
        for name in ("torch.cumsum", "one after another", "half left out"):
            if name == "torch.cumsum":
                sums = on_device.cumsum(0).cpu().numpy()
            else:  # numpy's cumsum adds in the array's own precision, in order
                sums = np.cumsum(x) if name == "one after another" else exact[: n // 2]
            error = _largest_error(sums, exact)
            if name == "torch.cumsum":
                cases.append(Case(f"{kind}: torch.cumsum, largest error of a partial sum", error, once))
            elif name == "one after another" and lost > 10 * in_pairs:
                cases.append(Case(f"{kind}: added one after another, the same", error, in_pairs, should=False))
            entry: dict[str, object] = {"largest relative error": error}
            for gamma, k64 in ranks.items():
                k = _rank(sums, gamma)
                off = abs(float(exact[k - 1] - exact[k64 - 1])) / total / (1 - gamma)
                # four roundings (sum, total, quotient, γ), and k falls on a whole product
                bound = (2 * EPS + 2 * (once - EPS) + float(x[k64 - 1]) / total) / (1 - gamma)
                entry[f"γ = {gamma:g}"] = {"k": k, "k in float64": k64, "energy off, of 1 − γ": off}
                what = f"{kind}, γ = {gamma:g}: energy at k, {name}, off by a share of 1 − γ"
                if name == "torch.cumsum":
                    cases.append(Case(what, off, bound))
                elif name == "half left out":
                    cases.append(control(what, off, bound))
                elif lost > 10 * in_pairs:
                    cases.append(Case(what, off, bound, should=False))
            found[name] = entry
            del sums
        del x, exact, on_device  # before the next ones are allocated
        series[kind] = found
    return Findings(cases, series)


@claim(16, "ours")
def library_energy_is_exact(
    *,
    outer: Sequence[int],
    inner: Sequence[int],
    digits: Sequence[int] = (1, 7, 10, 17),
) -> Findings:
    """The library's null space removes exactly the products that integer arithmetic says, as γ approaches 1.

    Eigenvalues are whole numbers and γ = 1 − 2⁻ᵈ: the products, their sums and γ times the total have no rounding in
    Python's integers, and none in float64 below 2⁵³. What float64 sums decide is then what exact arithmetic decides.

    Control: k one eigenspace further.

    Args:
        outer, inner: eigenvalues of the two factors, ≥ 0.
        digits: d of γ = 1 − 2⁻ᵈ.
    """
    layer = LayerShape("layer", len(outer), len(inner), False)
    S, A = (torch.tensor([float(v) for v in values], dtype=torch.float64).diag() for values in (outer, inner))
    spectrum = Spectrum((kronecker_block(layer, A, S, None, 0),))
    exact = sorted((a * b for a in outer for b in inner), reverse=True)
    total, levels = sum(exact), sorted({v for v in exact if v > 0}, reverse=True)
    if total == 0 or total * 2 ** max(digits) >= 2**53:
        raise ValueError("the eigenvalues must not all be zero, and energy · 2^d must be below 2^53")
    cases: list[Case] = []
    for d in digits:
        reached, k = 0, 0
        while reached * 2**d < (2**d - 1) * total:
            reached += exact[k]
            k += 1
        removed = sum(v >= exact[k - 1] for v in exact)
        space = spectrum.null_space(1 - 2.0**-d)
        wrong = removed + exact.count(levels[levels.index(exact[k - 1]) + 1]) if exact[k - 1] != levels[-1] else 0
        energy = sum(v for v in exact if v >= exact[k - 1]) / total
        cases += [
            Case(f"γ = 1 − 2^−{d}: removed, library against integers", abs(space.removed - removed), 0.0),
            Case(f"γ = 1 − 2^−{d}: energy removed", abs(space.energy_removed - energy), roundoff(torch.float64, 1)),
            control(f"γ = 1 − 2^−{d}: an eigenspace further", abs(space.removed - wrong), 0.0),
        ]
    return Findings(cases)


def sorted_products(kind: SpectrumKind, shape: tuple[int, int]) -> np.ndarray:
    """All products of two factors' eigenvalues, float32, descending."""
    factors = []
    for d in shape:
        if kind == "spike and tail":  # 1 and a flat rest of √0.02 in all: the products of both rests are 0.02 / n each
            values = np.full(d, math.sqrt(0.02) / (d - 1))
            values[0] = 1.0
        else:
            values = np.arange(1, d + 1, dtype=np.float64) ** -float(kind.split()[-1])
        factors.append(values.astype(np.float32))
    x = np.multiply.outer(factors[0], factors[1]).ravel()
    np.negative(x, out=x)
    x.sort()
    return np.negative(x, out=x)


def _surely_lost(x: np.ndarray, exact: np.ndarray) -> float:
    """Share of the energy behind the first product below half a unit in the last place of the sum so far.

    There the sum stands still; the products descend, so that it does not move again. A unit in the last place is at
    least eps / 2 of a sum, and the sum so far at least three quarters of the exact one.
    """
    first, last = 0, len(x)
    while first < last:  # bisection: products fall, sums rise
        middle = (first + last) // 2
        first, last = (first, middle) if x[middle] < exact[middle] * (0.75 * EPS / 4) else (middle + 1, last)
    return 1 - float(exact[first] / exact[-1]) if first < len(x) else 0.0


def _largest_error(sums: np.ndarray, exact: np.ndarray) -> float:
    """Of the partial sums, relative."""
    step = max(len(sums) // POSITIONS, 1)
    own = sums[::-1][::step].astype(np.float64)  # from the end, so that the total is among them
    return float(np.abs(own / exact[: len(sums)][::-1][::step] - 1).max())


def _rank(sums: np.ndarray, gamma: float) -> int:
    """k = min{r : share of the first r ≥ γ}, in the sums' own precision."""
    if sums.dtype == np.float64:
        return min(int(np.searchsorted(sums, gamma * sums[-1])) + 1, len(sums))
    share = sums / sums[-1]
    return min(int(np.searchsorted(share, np.asarray(gamma, dtype=sums.dtype))) + 1, len(sums))
