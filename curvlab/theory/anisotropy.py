"""Claim 7: sharp in few directions, flat in others."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import find_layers
from curvlab.losses import Loss, SquaredError
from curvlab.models import MLP
from curvlab.spectrum import Spectrum
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.curvatures import both, fitted, five_spectra, matrix

DENSE = 1600  # parameters up to which the whole spectrum is computed; above, what the Hessian's and GGN's top needs


def top_share(magnitudes: Tensor, top: float = 0.01) -> float:
    """Share of Σ|σ| in the ⌈top · p⌉ largest of p magnitudes."""
    ordered = magnitudes.double().flatten().sort(descending=True).values
    return float(ordered[: math.ceil(top * len(ordered))].sum() / ordered.sum())


def entropy_rank(magnitudes: Tensor) -> float:
    """exp(−Σ q log q), q = |σ| / Σ|σ|: r for r equal magnitudes beside zeros."""
    q = magnitudes.double().flatten() / magnitudes.double().sum()
    return math.exp(float(torch.special.entr(q).sum()))


def participation(magnitudes: Tensor) -> float:
    """(Σ|σ|)² / Σσ², which weighs the large ones more: at most `entropy_rank`."""
    m = magnitudes.double().flatten()
    return float(m.sum().square() / m.square().sum())


@claim(7, "paper, introduction; review")
def few_directions_hold_the_energy(
    model: nn.Module, loss: Loss, data: Any, layer: str, *, top: float = 0.01, share: float = 0.5,
    should: bool | None = None,
) -> Findings:  # fmt: skip
    """The top 1 % of a layer's directions hold at least half of the energy Σ|σ| of each of its five curvatures.

    Empirical. The rank of the GGN is bounded by examples and classes, not by the layer's size, so that it should
    hold of large layers: 1 % of a small one is fewer directions than there are classes. For the covariance I ⊗ A it
    cannot be expected: each eigenvalue comes d_out times, and m ≤ d_out directions hold at most m / d_out.

    Control: an isotropic curvature, the GGN of a linear model under squared error whose inputs are orthonormal.

    Args:
        top: share of the directions, rounded up.
        share: of the energy that they should hold.
        should: whether it is expected.
    """
    (chosen,) = find_layers(model, layer)
    m = math.ceil(top * chosen.size)
    complete = chosen.size <= DENSE
    cases, series = [], {}
    for name, spectrum in five_spectra(model, loss, data, layer, None if complete else m).items():
        (block,) = spectrum.blocks
        if block.total == 0:
            continue
        ordered = magnitudes(spectrum).sort(descending=True).values
        held = float(ordered[:m].sum()) / block.total
        cases.append(Case(f"{name}: energy in the top {top:.0%}", held, share, should, ">="))
        known = len(ordered) == chosen.size
        series[name] = {
            "parameters": chosen.size, "top share": held, "entropy rank": entropy_rank(ordered) if known else None,
            "participation": participation(ordered) if known else None,
            "spectrum": _thinned(ordered / block.total),
        }  # fmt: skip
    if cases:
        flat = magnitudes(_isotropic(20, 20))
        cases.append(control("isotropic: energy in the top directions", top_share(flat, top), share, ">="))
    return Findings(cases, series)


@claim(7, "ours: Schur and Horn")
def ekfac_is_never_sharper(model: nn.Module, loss: Loss, data: Any, layer: str) -> Findings:
    """EK-FAC is never more anisotropic than the GGN: no m directions hold more of its energy, for any m.

    Its eigenvalues are the diagonal of the GGN in an orthonormal basis, and a diagonal is majorised by the
    eigenvalues; the traces agree. Both effective ranks are Schur-concave, so that EK-FAC's are the larger ones.
    The other approximations promise nothing of the kind.

    Control: the GGN against an isotropic spectrum, which is less sharp.
    """
    diagonal = magnitudes(fitted("ekfac", model, loss, data, layer))
    (chosen,) = find_layers(model, layer)
    exact = torch.linalg.eigvalsh(explicit.gauss_newton(model, loss, data, [chosen]).double()).clamp_min(0)
    if float(exact.sum()) == 0:
        return Findings([])
    bound = roundoff(explicit.zero([chosen]).dtype, len(exact))
    ranks = [
        (entropy_rank(exact), entropy_rank(diagonal), "entropy"),
        (participation(exact), participation(diagonal), "participation"),
    ]
    return Findings(
        [
            Case("largest excess of EK-FAC's share of energy over the GGN's", _excess(diagonal, exact), bound),
            Case("‖tr EKFAC − tr G‖ / tr G", abs(float(diagonal.sum() / exact.sum()) - 1), bound),
            *(Case(f"effective rank ({name}): GGN / EK-FAC", a / b, 1 + bound) for a, b, name in ranks),
            control("the GGN against an isotropic spectrum", _excess(exact, torch.ones_like(exact)), bound),
        ],
        {"effective ranks": {name: {"ggn": a, "ekfac": b} for a, b, name in ranks}},
    )


@claim(7, "ours")
def spectra_are_right(model: nn.Module, loss: Loss, data: Any, layer: str) -> Findings:
    """The library's five spectra are those of the curvatures as plainly computed: U diag(σ) Uᵀ = C for each.

    C from the Jacobian of the whole model, the loss differentiated twice, and explicit Kronecker products.

    Control: the GGN of a loss without its ½.
    """
    chosen = find_layers(model, layer)
    bound = roundoff(explicit.zero(chosen).dtype, chosen[0].size)
    cases = []
    for name, spectrum, C in both(model, loss, data, chosen):
        if float(C.abs().max()) == 0:
            continue
        found = matrix(spectrum)
        cases.append(Case(f"{name}: ‖U diag(σ) Uᵀ − C‖ / ‖C‖", relative(found, C), bound))
        if name == "ggn":
            cases.append(control("twice the GGN", relative(found, 2 * C), bound))
    return Findings(cases + _layouts(model, loss, data, layer) if cases else [])


def magnitudes(spectrum: Spectrum) -> Tensor:
    """All |σ| of a spectrum (p,)."""
    return torch.cat([block.magnitudes.flatten() for block in spectrum.blocks])


def _layouts(model: nn.Module, loss: Loss, data: Any, layer: str) -> list[Case]:
    """The GGN with the bias as a column of W, in the library's three orders of parameters."""
    (chosen,) = find_layers(model, layer, bias=True)
    C = explicit.gauss_newton(model, loss, data, [chosen])
    rows = torch.arange(len(C)).view(chosen.d_out, chosen.d_in)
    weight = rows[:, :-1] if chosen.bias else rows
    torch_order = torch.cat([weight.flatten(), rows[:, -1]]) if chosen.bias else weight.flatten()
    orders = {"rows": rows.flatten(), "vec": explicit.vec(rows), "parameters": torch_order}
    G, bound = GaussNewton.fit(model, loss, data, layer, bias=True), roundoff(C.dtype, len(C))
    return [
        Case(f"ggn with bias, order {name!r}", relative(G.dense(name), C[order][:, order]), bound)  # type: ignore[arg-type]
        for name, order in orders.items()
    ]


def _excess(first: Tensor, second: Tensor) -> float:
    """max over m of the share of the m largest of `first` minus that of `second`."""
    one, two = ((m / m.sum()).sort(descending=True).values.cumsum(0) for m in (first.double(), second.double()))
    return float((one - two).max())


def _isotropic(d_in: int, d_out: int) -> Spectrum:
    """A = I and H_ŷ = I, so G = I (over d_in, the mean of d_in examples)."""
    with torch.random.fork_rng(devices=[]):
        model = MLP([d_in, d_out]).double()
    data = [(torch.eye(d_in).double(), torch.zeros(d_in, d_out).double())]
    return GaussNewton.fit(model, SquaredError(), data, "fc1").spectrum()


def _thinned(values: Tensor, points: int = 60) -> dict[str, list[float]]:
    """Some of the values, evenly in the logarithm of their index, for a figure."""
    index = torch.logspace(0, math.log10(len(values)), points).round().long().clamp(1, len(values)).unique()
    return {"index": index.tolist(), "value": values[index - 1].tolist()}
