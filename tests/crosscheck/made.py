"""Small artefacts as a production run leaves them, in memory: `Stored` files in the authors' format."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curvlab.crosscheck import bases, factors, masks, precision, projectors
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Part, Stored

LAYER = "model.layers.3.mlp.down_proj"


def spectrum(kind: str, d: int, generator: torch.Generator) -> Tensor:
    """Eigenvalues, descending."""
    n = torch.arange(1, d + 1, dtype=torch.float64)
    if kind == "power":
        values = n**-1.2
    elif kind == "flat":
        values = 1 + torch.rand(d, generator=generator, dtype=torch.float64)
    elif kind == "steep":
        values = 10 ** (-6 * (n - 1) / d)
    elif kind == "dominant":
        values = torch.where(n == 1, 1e4, 1.0 / n)
    elif kind == "repeated":
        values = 2.0 ** -((n - 1) // max(1, d // 3))
    else:
        raise ValueError(kind)
    return values.sort(descending=True).values


def second_moment(d: int, kind: str, samples: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Σ x xᵀ / n of vectors with that spectrum, as a run accumulates it; "exact": U diag(λ) Uᵀ itself."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = spectrum(kind, d, generator)
    if samples == 0 or kind == "repeated":
        return ((U * values) @ U.mT).to(dtype)
    x = ((torch.randn(samples, d, generator=generator, dtype=torch.float64) * values.sqrt()) @ U.mT).to(dtype)
    return x.mT @ x / samples


def authors_mask(la: Tensor, lb: Tensor, gamma: float) -> Tensor:
    """The authors' rule, (d_in, d_out)."""
    products = torch.outer(la, lb)
    ordered = products.flatten().sort(descending=True).values
    share = ordered.cumsum(0) / ordered.sum()
    rank = int(torch.searchsorted(share, gamma)) + 1
    return products < ordered[min(rank, len(ordered)) - 1]


@dataclass
class Made:
    """One layer's factors and cache, to be damaged before `files`."""

    A: Tensor
    B: Tensor
    N: int
    Ua: Tensor
    Ub: Tensor
    M: Tensor
    la: Tensor
    lb: Tensor
    gamma: float

    def files(self) -> list[Stored]:
        return [
            Stored(Path(f"{LAYER}_float32_kfac_100.npz"), "torch zip", {"A": self.A, "B": self.B}, {"N": self.N}),
            Stored(Path(f"cache_{LAYER}.pt"), "torch zip", {"Ua": self.Ua, "Ub": self.Ub, "M": self.M}),
        ]


def made(
    shape: tuple[int, int] = (10, 16),
    seed: int = 0,
    kind: str = "power",
    dtype: torch.dtype = torch.float32,
    gamma: float = 0.9,
    samples: int = 100,
) -> Made:
    """A correct artefact; shape is (d_out, d_in)."""
    d_out, d_in = shape
    A = second_moment(d_in, kind, samples, 2 * seed, dtype)
    B = second_moment(d_out, kind, samples, 2 * seed + 1, dtype)
    (la, Ua), (lb, Ub) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    return Made(
        A, B, 10**6 if kind == "repeated" else samples or 10**6, Ua, Ub, authors_mask(la, lb, gamma), la, lb, gamma
    )


def findings(files: list[Stored], gamma: float | None = None) -> list[Finding]:
    """All checks without a model."""
    found: list[Finding] = []
    for part in identify(files):
        found += of_part(part, gamma)
    return found


def of_part(part: Part, gamma: float | None = None) -> list[Finding]:
    found = list(part.assumed)
    for check in (factors.check, bases.check, masks.check, projectors.check, precision.check):
        found += check(part, gamma)
    return found


def alarms(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.severity in ("error", "deviation")]


def faults(found: list[Finding]) -> list[str]:
    return [finding.fault or finding.check for finding in alarms(found)]
