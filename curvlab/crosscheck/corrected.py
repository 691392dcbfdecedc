"""Eigenvalues of a layer, (d_out, d_in): EK-FAC's mean squares, held against the products of the factors' own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlab.crosscheck import spectra
from curvlab.crosscheck.evidence import usable
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Part

CLEARLY = 0.2  # by which a cosine in another order must exceed that as they lie


def layer_values(part: Part) -> Iterator[Finding]:
    """EK-FAC's corrected eigenvalues: non-negative, and laid out like W."""
    values = part.tensor("eigenvalues")
    if values is None or values.dim() != 2 or not usable(values) or not values.is_floating_point():
        return
    subject = part.subject("eigenvalues")
    values = values.double()
    top = max(float(values.abs().max()), 1e-300)
    if float(values.min()) < -1e-6 * top:
        cause = f"eigenvalues of the layer go down to {float(values.min()):.2g}: mean squares cannot be negative"
        remedy = "accumulate squares of rotated gradients: E[(U_outᵀ g aᵀ U_in)²]"
        yield Finding(
            "eigenvalues", "error", subject, float(values.min()) / top, 0.0, cause, remedy, "eigenvalues-disagree"
        )
        return
    inner, outer = spectra.side(part, "in"), spectra.side(part, "out")
    if inner is None or outer is None or not (inner.ordered and outer.ordered and inner.fits and outer.fits):
        cause = "eigenvalues of the layer, not negative"
        yield Finding("eigenvalues", "ok", subject, float(values.min()), 0.0, cause)
        return
    products = torch.outer(outer.values, inner.values)
    own = _alike(values, products)
    turned = _alike(values.mT, products) if values.shape[0] == values.shape[1] else -1.0
    flipped = max(_alike(values.flip(dims), products) for dims in ((0,), (1,), (0, 1)))
    cause = f"eigenvalues of the layer: cosine {own:.3f} with the factors' products"
    if own > 1 - 1e-6:
        yield Finding("eigenvalues", "ok", subject, own, None, f"{cause}: K-FAC's own")
    elif turned > own + CLEARLY or (turned > 1 - 1e-5 and 1 - own > 100 * (1 - turned)):
        cause = f"{cause}, {turned:.3f} when transposed: rows and columns are exchanged"
        remedy = "lay eigenvalues out like W: (d_out, d_in)"
        yield Finding("eigenvalues", "error", subject, own, turned, cause, remedy, "transposed-eigenvalues")
    elif flipped > own + CLEARLY:
        cause = f"{cause}, {flipped:.3f} in the opposite order: they do not lie as the eigenvectors do"
        remedy = "square gradients in the basis that is stored, or turn eigenvalues and eigenvectors round together"
        yield Finding("eigenvalues", "error", subject, own, flipped, cause, remedy, "unsorted-eigenvalues")
    else:
        yield Finding("eigenvalues", "ok", subject, own, None, f"{cause}: EK-FAC's corrected ones")


def _alike(values: Tensor, products: Tensor) -> float:
    return float((values * products).sum() / (values.norm() * products.norm()).clamp_min(1e-300))
