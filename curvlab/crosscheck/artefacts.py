"""What a run holds in memory between its stages (factors, eigenvectors, mask, projector, update) and how it is stored.

The stages are written out in plain torch, apart from `curvlab.projector` and `curvlab.spectrum`, which they test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from curvlab.crosscheck.production import Choices, Corpus
from curvlab.storage import replacing

Kind = Literal["power", "tail", "ties", "low-rank", "spike", "one-sample", "tiny", "huge", "model"]
Storage = Literal["authors", "edit", "rome", "alphaedit", "kronfluence"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STORAGES: tuple[Storage, ...] = get_args(Storage)
MODEL, CORPUS = "llama", "wiki"  # in file names


@dataclass
class Run:
    """A run's state; faults change it between two stages.

    Attributes:
        shape: (d_out, d_in) of W.
        A, S: as the run computed them, float64; stored in `dtype`.
        count: the samples that its files claim.
        u_in, u_out, values_in, values_out: eigenpairs, in ascending order unless `descending`.
        kept: true where a direction is allowed, like W.
        P: the projector onto allowed input directions.
        base, gradient, edited: weights around an edit.
        lambdas: EK-FAC's sums of squares, like W, over `examples`.
        corpus, choices: the model and data behind the factors, where they are real.
    """

    layer: str
    shape: tuple[int, int]
    gamma: float
    A: Tensor
    S: Tensor
    count: int
    generator: torch.Generator
    corpus: Corpus | None = None
    choices: Choices | None = None
    single: bool = False  # eigenvectors by a float32 solver
    descending: bool = False  # order of the eigenvectors in the files
    tied: bool = False  # eigenvalues repeat, and the solver's values of one eigenspace differ by rounding
    u_in: Tensor = field(init=False)
    u_out: Tensor = field(init=False)
    values_in: Tensor = field(init=False)
    values_out: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    P: Tensor = field(init=False)
    base: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    edited: Tensor = field(init=False)
    lambdas: Tensor = field(init=False)
    examples: int = 1

    @property
    def products(self) -> Tensor:
        """λ_out λ_inᵀ, like W."""
        return self.values_out[:, None] * self.values_in[None, :]

    def decompose(self) -> None:
        """Eigenpairs of the factors as they are stored (float32)."""
        dtype = torch.float32 if self.single else torch.float64
        self.values_in, self.u_in = (t.double() for t in torch.linalg.eigh(self.A.float().to(dtype)))
        self.values_out, self.u_out = (t.double() for t in torch.linalg.eigh(self.S.float().to(dtype)))
        if self.descending:
            self.values_in, self.u_in = self.values_in.flip(0), self.u_in.flip(1)
            self.values_out, self.u_out = self.values_out.flip(0), self.u_out.flip(1)

    def cut(self) -> None:
        """The mask and the projector at γ."""
        self.kept = self.products < threshold(self.products, self.gamma) * (1 - (1e-5 if self.tied else 0.0))
        self.P = projector(self.u_in, self.values_in, self.gamma)

    def edit(self) -> None:
        """Twenty steps of projected gradient descent on targets that the weights do not meet."""
        d_out, d_in = self.shape
        self.base = torch.randn(d_out, d_in, generator=self.generator, dtype=torch.float64) / d_in**0.5
        if self.corpus is not None:
            self.base = self.corpus.model.get_submodule(self.corpus.layer).weight.detach().double()  # type: ignore
        noise = torch.randn(2, d_out, d_in, generator=self.generator, dtype=torch.float64)
        # a sum of g aᵀ: mostly along the sharp directions, the rest anywhere
        aligned = self.u_out @ (self.products.clamp_min(0).sqrt() * noise[0]) @ self.u_in.mT
        self.gradient = aligned / aligned.norm() + 0.3 * noise[1] / noise[1].norm()
        self.gradient *= 0.2 * self.base.norm() / self.gradient.norm()  # less than the 25 % at which curvature is refit
        target = self.base - self.gradient
        W = self.base.clone()
        for _ in range(20):
            W -= 0.05 * self.project(W - target)
        self.edited = W

    def project(self, Q: Tensor) -> Tensor:
        """U_out ((U_outᵀ Q U_in) ⊙ M) U_inᵀ (Proposition 3)."""
        return self.u_out @ ((self.u_out.mT @ Q @ self.u_in) * self.kept) @ self.u_in.mT

    def correct(self) -> None:
        """EK-FAC's sums of squares; without a model 0.5 to 1.5 times what K-FAC has in their place."""
        if self.corpus is not None and self.choices is not None:
            self.lambdas, self.examples = self.corpus.squares(self.choices, self.u_out, self.u_in)
        else:
            noise = torch.rand(self.shape, generator=self.generator, dtype=torch.float64)
            self.lambdas, self.examples = self.products.clamp_min(0) * self.count * (0.5 + noise), self.count


def threshold(products: Tensor, gamma: float) -> float:
    """The smallest product that is removed, the k-th: k = min{r : Σ_{i≤r} σ_i ≥ γ Σ_i σ_i}."""
    ordered = products.flatten().sort(descending=True).values
    share = ordered.cumsum(0) / ordered.sum()
    rank = int(torch.searchsorted(share, gamma).clamp(max=len(ordered) - 1)) + 1
    return float(ordered[rank - 1])


def projector(U: Tensor, values: Tensor, gamma: float) -> Tensor:
    """Onto the eigenvectors below an absolute threshold, halfway (in log) below the last that γ removes (AlphaEdit)."""
    ordered = values.clamp_min(0).sort(descending=True).values
    rank = min(int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), gamma)) + 1, len(ordered) - 1)
    level = max(float(ordered[rank - 1]) * 0.5, math.sqrt(float(ordered[rank - 1]) * float(ordered[rank])))
    small = U[:, values < level]
    return small @ small.mT


def synthetic(shape: tuple[int, int], kind: Kind, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """A (d_in, d_in), S (d_out, d_out) of a prescribed spectrum in random eigenvectors, and a count that allows it."""
    count = int(torch.randint(2000, 20000, (), generator=generator))
    (d_out, d_in), factors = shape, []
    for d in (d_in, d_out):
        i = torch.arange(1, d + 1, dtype=torch.float64)
        values = {
            "power": i**-1.2,
            "tail": torch.where(i == 1, 1.0, 1e-4 * (1.6 - i / d)),  # products of 1e-8, which a float32 sum of 1 loses
            "ties": 4.0 ** -((i - 1) // 2),
            "low-rank": i**-0.8 * (i <= max(1, d // 3)),
            "spike": torch.where(i == 1, 1.0, 1e-3 / i),
            "one-sample": (i == 1).double(),
            "tiny": 1e-12 * i**-1.2,
            "huge": 1e12 * i**-1.2,
        }[kind]
        if kind not in ("ties", "one-sample"):  # no accidental ties
            values = values * (1 + 0.1 * torch.rand(d, generator=generator, dtype=torch.float64))
        U = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        factors.append((U * values) @ U.mT)
    if kind == "low-rank":
        count = max(1, d_in // 3, d_out // 3) + 1
    A, S = factors
    return A, S, 1 if kind == "one-sample" else count


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file to be: a torch zip of `content`, a NumPy archive or safetensors of its tensors."""

    kind: Literal["torch", "numpy", "safetensors"]
    content: Any

    def write(self, path: Path) -> None:
        with replacing(path) as temporary:
            if self.kind == "torch":
                torch.save(self.content, temporary)
            elif self.kind == "numpy":
                arrays = {k: v.numpy() if isinstance(v, Tensor) else np.array(v) for k, v in self.content.items()}
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            else:
                save_file({k: v.clone().contiguous() for k, v in self.content.items()}, temporary, {"format": "pt"})


Files = dict[str, File]  # by path inside the folder


def authors(run: Run) -> Files:
    """A factor file and a projection cache, torch zips both; M is (d_in, d_out), true where a direction is kept."""
    factors = {"A": run.A.float(), "B": run.S.float(), "N": run.count}
    cache = {"Ua": run.u_in.float(), "Ub": run.u_out.float(), "M": run.kept.mT.contiguous()}
    return {
        f"{MODEL}/{CORPUS}_stats/{run.layer}_float32_kfac_{run.count}.npz": File("torch", factors),
        f"{MODEL}/{CORPUS}_cache/{run.layer}.weight.pt": File("torch", cache),
    }


def edit(run: Run) -> Files:
    """The same with the weights before and after an edit under that cache."""
    weights = {"base": run.base, "edited": run.edited}
    saved = {
        f"{name}/model.safetensors": File("safetensors", {f"{run.layer}.weight": W.float()})
        for name, W in weights.items()
    }
    return authors(run) | saved


def rome(run: Run) -> Files:
    """layer_stats of ROME and MEMIT: a NumPy archive with the sum Σ a aᵀ and its count."""
    moments = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": run.count}
    content = moments | {"mom2.mom2": (run.A * run.count).float(), "sample_size": run.count}
    return {f"{MODEL}/{CORPUS}_stats/{run.layer}_float32_mom2_{run.count}.npz": File("numpy", content)}


def alphaedit(run: Run) -> Files:
    """A bare stack of projectors (one layer here) beside the layer_stats that it came from."""
    return rome(run) | {"null_space_project.pt": File("torch", run.P.float()[None])}


def kronfluence(run: Run) -> Files:
    """Sums of the factors with their counts, eigenpairs, and EK-FAC's sums of squares: a file a statistic."""
    number = torch.tensor([run.count])
    tensors = {
        "activation_covariance": (run.A * run.count).float(),
        "gradient_covariance": (run.S * run.count).float(),
        "num_activation_covariance_processed": number,
        "num_gradient_covariance_processed": number,
        "activation_eigenvectors": run.u_in.float(),
        "activation_eigenvalues": run.values_in.float(),
        "gradient_eigenvectors": run.u_out.float(),
        "gradient_eigenvalues": run.values_out.float(),
        "lambda_matrix": run.lambdas.float(),
        "num_lambda_processed": torch.tensor([run.examples]),
    }
    return {f"factors_ekfac/{name}.safetensors": File("safetensors", {run.layer: t}) for name, t in tensors.items()}


LAYOUTS: dict[Storage, Callable[[Run], Files]] = {
    "authors": authors, "edit": edit, "rome": rome, "alphaedit": alphaedit, "kronfluence": kronfluence,
}  # fmt: skip
