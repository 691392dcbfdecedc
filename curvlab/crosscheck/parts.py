"""What lies in files, and what it is taken to be: `Stored` as read, `Part` as understood, one a layer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from curvlab.crosscheck.findings import Finding

Role = Literal[
    "A",  # input-side factor E[a aᵀ] or second moment (d_in, d_in)
    "S",  # output-side factor E[g gᵀ] (d_out, d_out)
    "U_in",  # eigenvectors of A in columns (d_in, d_in)
    "U_out",  # eigenvectors of S in columns (d_out, d_out)
    "values_in",  # eigenvalues of A (d_in,)
    "values_out",  # eigenvalues of S (d_out,)
    "eigenvalues",  # of the layer: products or EK-FAC's corrected ones, (d_out, d_in) or its transpose
    "mask",  # true where a direction is kept, (d_out, d_in) or its transpose
    "projector",  # onto the allowed input directions (d_in, d_in)
    "base",  # the weight before an edit (d_out, d_in)
    "edited",  # the weight after it
    "gradient",  # a gradient of the weight, before any projection
    "update",  # a step or displacement of the weight
]


@dataclass(frozen=True)
class Stored:
    """A file as read; nothing in it is interpreted yet, and nothing of it was executed.

    Attributes:
        path: of the file.
        format: in words: "torch zip", "NumPy archive", "safetensors", "curvlab K-FAC", …
        tensors: by key; keys of nested dictionaries are joined by "/", a bare tensor has the key "".
        numbers: scalars and strings beside them, header entries among them.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    numbers: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One tensor with the role that evidence gives it.

    Attributes:
        tensor: as stored.
        source: "file.npz: A".
        evidence: why it is taken for that: "its key; square; shape of d_in".
        transposed: stored (d_in, d_out) where W is (d_out, d_in); for eigenvectors: stored in rows.
    """

    role: Role
    tensor: Tensor = field(repr=False)
    source: str
    evidence: str
    transposed: bool = False

    @property
    def oriented(self) -> Tensor:
        """Like W, or with eigenvectors in columns."""
        return self.tensor.mT if self.transposed else self.tensor


@dataclass(frozen=True)
class Part:
    """What is known of one layer.

    Attributes:
        layer: its name; "" where nothing tells.
        items: by role.
        count: N, the samples behind the statistics, where a file says.
        shape: (d_out, d_in), where shapes of items or the model tell; with the bias joined d_in counts it.
        assumed: findings of the identification: what was assumed ("convention") and contradictions ("error").
    """

    layer: str
    items: dict[Role, Item]
    count: float | None = None
    shape: tuple[int, int] | None = None
    assumed: tuple[Finding, ...] = ()

    def tensor(self, role: Role) -> Tensor | None:
        """Oriented like W, in the dtype as stored; None where there is none."""
        return self.items[role].oriented if role in self.items else None

    def subject(self, *roles: Role) -> str:
        """For findings: the layer and the sources of these items."""
        sources = dict.fromkeys(self.items[role].source for role in roles if role in self.items)
        return " · ".join(filter(None, [self.layer, *sources]))
