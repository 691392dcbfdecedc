"""Claim 1 (Prop. 1): what the inputs cannot see, the Gauss–Newton matrix cannot see."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from curvlab.curvature import Covariance, GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import CrossEntropy, Loss, SquaredError
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff


@claim(1, "paper, Prop. 1")
def null_space_inclusion(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, seed: int = 0
) -> Findings:
    """Every ΔW with ΔW aⁱ = 0 for all inputs aⁱ of a layer lies in the null space of the layer's GGN.

    The outputs depend on W through W aⁱ alone, so such a ΔW changes no output at all: J vec ΔW = 0, hence
    G vec ΔW = 1/M Σ Jᵀ H_ŷ J vec ΔW = 0. With a shared weight the aⁱ are those of all positions.

    Control: a random ΔW of the same norm, which sees the inputs, is not null.
    """
    generator = torch.Generator().manual_seed(seed)
    cases, series = [], {}
    for layer in find_layers(model, layers):
        null, rank = _unseen(model, layer, data)
        G = GaussNewton.fit(model, loss, data, layer.name)
        dense = G.dense("rows")
        bound = roundoff(dense.dtype, layer.size)
        norm = float(torch.linalg.matrix_norm(dense, 2))
        if not rank or norm == 0:  # no input at all, or no output that depends on the layer
            continue
        range_, _ = explicit.range_and_null(dense, bound)
        series[layer.name] = {
            "null of the inputs": layer.d_out * null.shape[1],
            "null of the GGN": layer.size - range_.shape[1],
            "parameters": layer.size,
        }
        cases.append(Case(f"{layer.name}: rank G / (d_out · rank A)", range_.shape[1] / (layer.d_out * rank), 1.0))
        wrong = torch.randn(layer.d_out, layer.d_in, generator=generator).to(dense)
        if null.shape[1]:
            (block,) = Covariance.fit(model, loss, data, layer.name).spectrum().blocks
            seen = block.basis.rotate({layer.name: null.mT.to(block.basis.like)}).square() @ block.values[0]
            cases.append(
                Case(f"{layer.name}: covariance there / trace", float(seen.sum() / block.values[0].sum()), bound)
            )
            Q = torch.randn(layer.d_out, null.shape[1], generator=generator).to(dense) @ null.mT.to(dense)
            Q = Q * (torch.linalg.matrix_norm(wrong) / torch.linalg.matrix_norm(Q))
            seen = G.matmat(Q.flatten()[None])
            cases.insert(0, Case(f"{layer.name}: ‖G vec ΔW‖ / ‖G‖‖ΔW‖", _size(seen, norm, Q), bound))
        seen = G.matmat(wrong.flatten()[None])
        cases.append(control(f"{layer.name}: ΔW that sees the inputs", _size(seen, norm, wrong), bound))
    return Findings(cases, series)


@claim(1, "paper, Prop. 1")
def inclusion_strict_or_equal(model: nn.Module, data: Any, layer: str, *, classes: int, seed: int = 0) -> Findings:
    """For the last layer the inclusion of Prop. 1 is an equality under squared error and strict under cross-entropy.

    The last layer has J = I ⊗ aᵀ. Squared error has H_ŷ = I, so G = A ⊗ I and both null spaces are ℝ^d_out ⊗ Null(A).
    Softmax has H_ŷ 1 = 0: adding one number to all logits changes nothing, so every 1 vᵀ is in Null(G) as well,
    rank A dimensions more.

    Control: the equality is claimed of the layer under cross-entropy.

    Args:
        data: of any loss; only the inputs are used.
        layer: the model's last, whose outputs are the model's.
        classes: outputs of the model.
    """
    (last,) = find_layers(model, layer)
    excess, dims = {}, {}
    for name, loss in (("squared error", SquaredError()), ("cross-entropy", CrossEntropy())):
        batches = [(x, _targets(model, x, name, classes, seed)) for x, _ in data]
        dense = GaussNewton.fit(model, loss, batches, layer).dense("rows")
        tolerance = roundoff(dense.dtype, last.size)
        null, rank = _unseen(model, last, batches, math.sqrt(tolerance))  # eigenvalues of A are squares
        if not rank:  # no input at all: both null spaces are everything
            return Findings([])
        range_, _ = explicit.range_and_null(dense, tolerance)
        nullity = last.size - range_.shape[1]
        dims[name] = {"null of the inputs": last.d_out * null.shape[1], "null of the GGN": nullity, "rank A": rank}
        excess[name] = float(nullity - last.d_out * null.shape[1])
    return Findings(
        [
            Case("squared error: dimensions beyond Prop. 1", excess["squared error"], 0.0),
            Case("cross-entropy: dimensions beyond Prop. 1", excess["cross-entropy"], 1.0, relation=">="),
            control("equality under cross-entropy", excess["cross-entropy"], 0.0),
        ],
        dims,
    )


@claim(1, "paper, Prop. 1")
def unseen_updates_change_nothing(
    model: nn.Module, loss: Loss, data: Any, layers: str | Sequence[str] = "*", *, seed: int = 0
) -> Findings:
    """A ΔW with ΔW aⁱ = 0 changes no output on the data, at any size: its safety is not a matter of second order.

    W aⁱ is the only way in which W enters. The null space of G itself promises this to second order only.

    Control: a random ΔW of the same norm changes the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for layer in find_layers(model, layers):
        null, _ = _unseen(model, layer, data)
        W = layer.matrix()
        wrong = torch.randn(layer.d_out, layer.d_in, generator=generator).to(W)
        wrong *= torch.linalg.matrix_norm(W) / torch.linalg.matrix_norm(wrong)
        if not null.shape[1] or not explicit.responds(model, layer, data):
            continue
        Q = torch.randn(layer.d_out, null.shape[1], generator=generator).to(W) @ null.mT.to(W)
        Q *= torch.linalg.matrix_norm(W) / torch.linalg.matrix_norm(Q)
        bound = roundoff(W.dtype, layer.size)
        cases.insert(0, Case(f"{layer.name}: change of the outputs", _change(model, layer, data, Q), bound))
        cases.append(control(f"{layer.name}: random ΔW", _change(model, layer, data, wrong), bound))
    return Findings(cases)


def _unseen(
    model: nn.Module, layer: MatrixLayer, data: Any, tolerance: float | None = None
) -> tuple[torch.Tensor, int]:
    """Directions that no input of the layer has a component in (columns, float64), and the rank of the inputs.

    Singular values up to `tolerance` times the largest count as zero; None: up to rounding in float64.
    """
    small = roundoff(torch.float64, layer.d_in) if tolerance is None else tolerance
    a = explicit.layer_inputs(model, layer, data).double()
    _, values, vectors = torch.linalg.svd(a, full_matrices=True)
    rank = int((values > small * float(values.max())).sum())
    return vectors[rank:].mT, rank


def _size(seen: torch.Tensor, norm: float, Q: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(seen)) / (norm * float(torch.linalg.vector_norm(Q)))


def _targets(model: nn.Module, x: torch.Tensor, name: str, classes: int, seed: int) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    generator = torch.Generator().manual_seed(seed)
    if name == "squared error":
        return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return torch.randint(classes, y.shape[:-1], generator=generator)


def _change(model: nn.Module, layer: MatrixLayer, data: Any, Q: torch.Tensor) -> float:
    """Largest relative change of a batch's outputs under ΔW = Q."""
    changes = []
    for x, _ in data:
        f = explicit.outputs(model, [layer], x)
        with torch.no_grad():
            changes.append(relative(f(Q.flatten()), f(torch.zeros_like(Q.flatten()))))
    return max(changes)
