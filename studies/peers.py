"""One model and its data by other libraries, each in its own scale: matrices by quantity and layer.

Matrices of several layers and of one are in torch's order of the parameters (a weight row by row, then its bias).
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from benchmark_curvature import nngeometry_kronecker
from torch import Tensor, nn

from curvlab.layers import MatrixLayer, find_layers

Quantity = Literal[
    "Hessian", "GGN", "K-FAC, exact labels", "K-FAC, labels of the data", "EK-FAC, exact labels",
    "EK-FAC, labels of the data", "covariance of inputs",
]  # fmt: skip
Matrices = dict[tuple[Quantity, str], Tensor]  # by quantity and layer; layer "" for all of them jointly


@dataclass(frozen=True)
class Case:
    """A model in float64 with data, mean cross-entropy over N examples × T loss terms.

    Attributes:
        inputs, targets: (N, …) and (N,) or (N, T); outputs are (N, C) or (N, T, C).
        batches: sizes of the batches; all libraries see the same.
        positions: by layer, at how many positions of an example its weight is used.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    classes: int
    batches: tuple[int, ...]
    positions: dict[str, int]
    bias: bool

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs.split(self.batches), self.targets.split(self.batches), strict=True))

    @property
    def layers(self) -> list[MatrixLayer]:
        return find_layers(self.model, list(self.positions), self.bias)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the layers, in their order."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    @property
    def sequences(self) -> bool:
        return self.targets.dim() == 2

    def counts(self, layer: str) -> dict[str, float]:
        """What a scale may be explained by."""
        counts: dict[str, float] = {
            "examples": len(self.targets), "batches": len(self.batches), "classes": self.classes,
        }  # fmt: skip
        if self.sequences:
            counts["loss terms an example"] = self.targets.shape[1]
        elif layer:
            counts["positions"] = self.positions[layer]
        return counts

    def blocks(self, C: Tensor) -> dict[str, Tensor]:
        """The diagonal blocks of a matrix over all parameters, by layer."""
        sizes = [layer.size for layer in self.layers]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return {l.name: C[e - n : e, e - n : e] for l, n, e in zip(self.layers, sizes, ends, strict=True)}


def kronecker(layer: MatrixLayer, A: Tensor, S: Tensor) -> Tensor:
    """A ⊗ S of the joint [W | bias], reordered as W row by row and then the bias."""
    return reordered(layer, torch.kron(S, A))


def reordered(layer: MatrixLayer, C: Tensor) -> Tensor:
    """A matrix over [W | bias] row by row, as W row by row and then the bias."""
    index = torch.arange(layer.size).view(layer.d_out, layer.d_in)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]]) if layer.bias else index.flatten()
    return C[order][:, order]


# --- curvlinops ------------------------------------------------------------------------------------------------------


class _ClassesFirst(nn.Module):
    """Outputs (N, T, C) as (N, C, T), which is how torch's cross-entropy wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out.mT if out.dim() == 3 else out


def by_curvlinops(case: Case) -> Matrices:
    """Hessian, GGN, K-FAC and EK-FAC as linear operators; its EK-FAC takes no sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import curvlinops

    model, loss, weights = _ClassesFirst(case.model), nn.CrossEntropyLoss(), case.parameters
    eye = torch.eye(sum(p.numel() for p in weights))
    options: dict[str, Any] = {"check_deterministic": False, "num_data": len(case.targets)}
    out: Matrices = {}
    for name, exact in (("Hessian", curvlinops.HessianLinearOperator), ("GGN", curvlinops.GGNLinearOperator)):
        out[name, ""] = (exact(model, loss, weights, case.data, **options) @ eye).detach()  # type: ignore[index]
    options |= {"separate_weight_and_bias": False, "num_per_example_loss_terms": case.targets[0].numel()}
    for labels, fisher in (
        ("exact labels", curvlinops.FisherType.TYPE2),
        ("labels of the data", curvlinops.FisherType.EMPIRICAL),
    ):
        kinds = {"K-FAC": curvlinops.KFACLinearOperator} | (
            {} if case.sequences else {"EK-FAC": curvlinops.EKFACLinearOperator}
        )
        for name, kind in kinds.items():
            operator = kind(model, loss, weights, case.data, fisher_type=fisher, **options)
            for layer, block in case.blocks((operator @ eye).detach()).items():
                out[f"{name}, {labels}", layer] = block  # type: ignore[index]
            if labels == "exact labels" and name == "K-FAC":
                for layer, A in operator._input_covariances.items():
                    out["covariance of inputs", layer.removeprefix("model.")] = A
    return out


# --- nngeometry ------------------------------------------------------------------------------------------------------


def by_nngeometry(case: Case) -> Matrices:
    """Its Hessian, the Fisher in the logits (both dense), K-FAC and EK-FAC; vectors as outputs only."""
    if case.sequences:
        return {}
    from nngeometry.hessian import Hessian
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDense, PMatKFAC
    from torch.utils.data import DataLoader, TensorDataset

    (batch,) = {*case.batches}
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=batch)
    out: Matrices = {
        ("Hessian", ""): Hessian(case.model, loader, PMatDense, function=F.cross_entropy).to_torch().detach(),
        ("GGN", ""): FIM(case.model, loader, PMatDense).to_torch().detach(),
    }
    eye = torch.eye(len(out["GGN", ""]))
    for name in ("K-FAC", "EK-FAC"):
        product = nngeometry_kronecker(case.model, name, case.inputs, case.targets, batch)
        for layer, block in case.blocks(torch.stack([product(v) for v in eye], dim=1)).items():
            out[f"{name}, exact labels", layer] = block  # type: ignore[index]
    factors = FIM(case.model, loader, PMatKFAC)
    for layer, (A, _) in zip(case.positions, factors.data.values(), strict=True):
        out["covariance of inputs", layer] = A.detach()
    return out


# --- kronfluence -----------------------------------------------------------------------------------------------------


def by_kronfluence(case: Case) -> Matrices:
    """Its covariance and lambda passes with labels of the data; products of what it stores, divided by its counts."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(case.positions)

    task, double = Summed(), torch.float64
    arguments = FactorArguments(
        use_empirical_fisher=True, activation_covariance_dtype=double, gradient_covariance_dtype=double,
        per_sample_gradient_dtype=double, lambda_dtype=double, eigendecomposition_dtype=double,
    )  # fmt: skip
    model, state, loader = prepare_model(copy.deepcopy(case.model), task), State(cpu=True), _list(case)
    _, factors = fit_covariance_matrices_with_loader(model, state, task, loader, arguments, disable_tqdm=True)
    sums = copy.deepcopy(factors)  # the next call divides them in place
    eigen = perform_eigendecomposition(factors, model, state, arguments, disable_tqdm=True)
    _, corrected = fit_lambda_matrices_with_loader(model, state, task, loader, arguments, eigen, disable_tqdm=True)
    out: Matrices = {}
    for layer in case.layers:
        name = layer.name
        A, S = sums["activation_covariance"][name], sums["gradient_covariance"][name]
        n_in = sums["num_activation_covariance_processed"][name]
        n_out = sums["num_gradient_covariance_processed"][name]
        out["covariance of inputs", name] = A
        out["K-FAC, labels of the data", name] = kronecker(layer, A / n_in, S / n_out)
        U = torch.kron(eigen["gradient_eigenvectors"][name], eigen["activation_eigenvectors"][name])
        values = (corrected["lambda_matrix"][name] / corrected["num_lambda_processed"][name]).flatten()
        out["EK-FAC, labels of the data", name] = reordered(layer, (U * values) @ U.mT)
    return out


def _list(case: Case) -> Any:
    """Batches as the loader that kronfluence iterates over; its hooks change inputs in place."""

    class Batches(list[Any]):
        def __iter__(self) -> Any:
            return iter([[x.clone(), y] for x, y in case.data])

    return Batches(case.data)


PEERS: dict[str, tuple[str, Callable[[Case], Matrices]]] = {  # module -> (package, call)
    "curvlinops": ("curvlinops-for-pytorch", by_curvlinops),
    "nngeometry": ("nngeometry", by_nngeometry),
    "kronfluence": ("kronfluence", by_kronfluence),
}

NOT_COMPARED = (
    "curvlinops' EK-FAC takes models with vectors as outputs only",
    "nngeometry takes no outputs at several positions",
    "kronfluence draws the model's labels from torch's own generator, so that its exact labels cannot be repeated: "
    "labels of the data are compared",
)


def installed(names: Sequence[str] = tuple(PEERS)) -> list[str]:
    """The peers that import."""
    from importlib.util import find_spec

    return [name for name in names if find_spec(name) is not None]
