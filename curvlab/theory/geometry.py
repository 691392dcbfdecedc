"""Claim 18 in a picture: edit gradient, its projection and capability contours on a real two-parameter slice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import GaussNewton
from curvlab.layers import find_layers
from curvlab.losses import Loss
from curvlab.theory import curvatures
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.paths import Measures, edit_gradient, flat, gradient


@claim(18, "paper, Fig. 2")
def two_parameter_slice(
    model: nn.Module, loss: Loss, data: Any, edits: Any, layers: str | Sequence[str] = "*", *,
    gamma: float = 0.99, size: float = 0.1, reach: float = 0.3, grid: int = 21, steps: int = 25, seed: int = 0,
) -> Findings:  # fmt: skip
    """A step along the edit gradient projected at γ = 0.99 raises the capability KL at least ten times less than a step
    of equal length along the edit gradient, and still lowers the edit loss (paper, Fig. 2).

    To second order the quotient is that of the Rayleigh quotients of G at the gradient and at its projection; the
    spectrum falls over orders of magnitude and the gradient has a part in sharp directions. The plane of the picture
    is spanned by the removed eigenvector of the GGN along which the raw step costs most and by the projected gradient,
    which are orthogonal; "in the plane" the raw step keeps only these two parts. Other γ are in the series.

    Control: the projection onto as many random directions does not spare the capability set by a factor of ten.

    Args:
        size: length of the step over ‖W‖.
        reach: of the plane along the projected gradient, over ‖W‖; a third of it along the other axis.
        grid: points a side; steps: of the descent in the plane.
    """
    found = find_layers(model, layers)
    fit = GaussNewton.fit(model, loss, data, layers).spectrum()
    (block,) = fit.blocks
    U, values = curvatures.eigenvectors(block), block.values.double()
    P, W = curvatures.cut(fit, gamma), float(flat(found).norm())
    g = edit_gradient(model, loss, edits, found).double()
    flat_part = P @ g
    if not float(fit.blocks[0].total) > 0 or float(flat_part.norm()) <= 1e-9 * float(g.norm()):
        return Findings([])  # nothing is sharp, or all of the gradient is removed
    sharp = U[:, int((values * (U.mT @ (g - flat_part)).square()).argmax())]
    plane = torch.stack([-sharp * torch.sign(sharp @ g), -flat_part / flat_part.norm()])
    measures, edit = Measures(model, loss, data, found), Measures(model, loss, edits, found)

    def after(direction: Tensor, measure: Measures, kind: str) -> float:
        return measure(size * W * direction / direction.norm())[kind]

    random, _ = torch.linalg.qr(
        torch.randn(len(g), round(float(P.trace())), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    kl = {
        name: after(direction, measures, "distance")
        for name, direction in {
            "raw": -g, "projected": -flat_part, "raw in the plane": plane.mT @ (plane @ -g),
            "random": -(random @ (random.mT @ g)),
        }.items()
    }  # fmt: skip
    if not kl["projected"] > 0:  # nor does it move any output on the capability set
        return Findings([])
    cases = [
        Case("KL of the raw step / of the projected step", kl["raw"] / kl["projected"], 10.0, relation=">="),
        Case("the same within the plane", kl["raw in the plane"] / kl["projected"], 10.0, relation=">="),
        Case(
            "projected step: edit loss over that at the start",
            after(-flat_part, edit, "loss") / edit.start["loss"], 1.0,
        ),
        control("KL of the raw step / of a random projection", kl["raw"] / kl["random"], 10.0, ">="),
    ]  # fmt: skip
    flats = (torch.linspace(-0.5, 1.0, grid, dtype=torch.float64) * reach).tolist()
    sharps = (torch.linspace(-1.0, 1.0, grid, dtype=torch.float64) * reach / 3).tolist()
    surface = {"KL": measures, "edit loss": edit}
    values_of = {
        name: [[measure(W * (a * plane[0] + b * plane[1]))[kind] for b in flats] for a in sharps]
        for (name, measure), kind in zip(surface.items(), ("distance", "loss"), strict=True)
    }
    descent = {
        name: _descend(model, loss, edits, found, plane, W, reach / steps, steps, along)
        for name, along in (("raw", slice(0, 2)), ("projected", slice(1, 2)))
    }
    others = {other: -curvatures.cut(fit, other) @ g for other in (0.5, 0.9, 0.99, 0.999)}
    costs = {o: after(d, measures, "distance") for o, d in others.items() if float(d.norm()) > 1e-9 * float(g.norm())}
    quotients = {str(other): kl["raw"] / cost for other, cost in costs.items() if cost > 0}
    series = {
        "gamma": gamma, "quotient over γ": quotients, "sharp axis": sharps, "flat axis": flats,
        "surface": values_of, "descent": descent, "kl": kl, "gradient": (plane @ -g / g.norm()).tolist(), "step": size,
    }  # fmt: skip
    return Findings(cases, series)


def _descend(
    model: nn.Module,
    loss: Loss,
    edits: Any,
    layers: Any,
    plane: Tensor,
    W: float,
    length: float,
    steps: int,
    along: slice,
) -> list[list[float]]:
    """Descent on the edit loss within the plane, steps of one length, moving along some of its axes; over ‖W‖."""
    start = [layer.matrix().clone() for layer in layers]
    at, path = torch.zeros(2, dtype=torch.float64), [[0.0, 0.0]]
    try:
        for _ in range(steps):
            delta = (W * at @ plane).split([layer.size for layer in layers])
            for layer, M, part in zip(layers, start, delta, strict=True):
                layer.write(M + part.view_as(M).to(M))
            slope = plane @ gradient(model, loss, edits, layers).double()
            move = torch.zeros_like(at)
            move[along] = -slope[along]
            at = at + length * move / move.norm()
            path.append(at.tolist())
    finally:
        for layer, M in zip(layers, start, strict=True):
            layer.write(M)
    return path
