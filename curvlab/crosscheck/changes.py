"""What moved: an update as stored, or edited weights against base weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Part, Role
from curvlab.layers import MatrixLayer

STEPS = 2.0  # roundings of the weights that a bound grants, in units of eps·‖W‖: some fifty steps of a random walk


@dataclass(frozen=True)
class Change:
    """δ (d_out, d_in), float64; `rounding`: the norm of what its storage may have added; `base` where it is known."""

    delta: Tensor
    rounding: float
    base: Tensor | None
    roles: tuple[Role, ...]
    eps: float


def change_of(part: Part, layer: MatrixLayer | None) -> Change | Finding | None:
    """What moved; None where nothing says."""
    base, edited, update = part.tensor("base"), part.tensor("edited"), part.tensor("update")
    if edited is not None:
        roles: tuple[Role, ...] = ("base", "edited")
        if base is None and layer is not None and edited.shape == (layer.d_out, layer.d_in):
            base, roles = layer.matrix(), ("edited",)
        if base is not None:
            if base.shape != edited.shape:
                return _misshapen(part, roles, base, edited)
            base64, edited64 = base.double().cpu(), edited.double().cpu()
            eps = max(torch.finfo(t.dtype).eps for t in (base, edited) if t.is_floating_point())
            delta = edited64 - base64
            # only entries that moved were rounded anew
            rounding = STEPS * eps * float(edited64[delta != 0].norm()) if bool((delta != 0).any()) else 0.0
            return Change(delta, rounding, base64, roles, eps)
    if update is not None:
        own = base if base is not None else (layer.matrix() if layer is not None else None)
        if own is not None and own.shape != update.shape:
            return _misshapen(part, ("update",), own, update)
        eps = torch.finfo(update.dtype).eps if update.is_floating_point() else 0.0
        delta = update.double().cpu()
        before = None if own is None else own.double().cpu()
        return Change(delta, eps * float(delta.norm()), before, ("update",), eps)
    return None


def _misshapen(part: Part, roles: tuple[Role, ...], base: Tensor, other: Tensor) -> Finding:
    shapes = f"{tuple(base.shape)} and {tuple(other.shape)}"
    return Finding(
        "update", "error", part.subject(*roles), shapes, None, f"base weights and update have shapes {shapes}",
        "give weights of one layer, d_out × d_in", "mismatched-shapes",
    )  # fmt: skip
