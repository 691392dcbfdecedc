"""Claim 17, positions without a loss: they still carry curvature."""

from typing import Any

import torch
from torch import Tensor, nn

from curvlab.curvature import KFAC, GaussNewton
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import CrossEntropy, Loss
from curvlab.theory import explicit
from curvlab.theory.check import Case, Findings, claim, control, relative, roundoff
from curvlab.theory.curvatures import estimate, matrix, plain
from curvlab.theory.factors import kfac_factors, output_jacobian


@claim(17, "ours")
def ignored_positions_count(
    model: nn.Module, data: Any, layer: str, *, ignored: int = 1, ignore_index: int = -100, seed: int = 0
) -> Findings:
    """In a causal sequence model positions without a loss carry curvature: factors and GGN run over all positions.

    Later predictions attend to them. So the GGN's gradients pass through the weight's use at ignored positions, A
    and S sum over them, and what is null for the inputs of *all* positions leaves every prediction as it is.

    Control: the GGN through the uses at labelled positions alone; and, where such exist, a ΔW that is null for the
    inputs of labelled positions only.

    Args:
        model: (N, T, d) → (N, T, C), positions mixed after `layer`.
        data: inputs and class indices (N, T).
        ignored: labels taken away at the start of each sequence.
        ignore_index: the label that says so.
    """
    (chosen,) = find_layers(model, layer)
    loss = CrossEntropy(ignore_index)
    masked = _masked(data, ignored, ignore_index)
    truths = plain(model, loss, masked, chosen)
    G = truths["ggn"]
    size, bound = float(torch.linalg.matrix_norm(G, 2)), roundoff(chosen.matrix().dtype, len(G))
    if size == 0:
        return Findings([])
    fitted = {name: matrix(estimate(name, model, loss, masked, layer)) for name in truths}
    cases = [Case(f"{n}: library against plain", relative(fitted[n], C), bound) for n, C in truths.items()]
    q = explicit.loss_gradients(model, loss, masked, [chosen])
    E, terms = q.mT @ q, explicit.terms(model, loss, masked, [chosen])
    given = GaussNewton.fit(model, loss, masked, layer, labels="data").dense("rows")
    cases.append(Case("empirical Fisher: library against plain", relative(given, E / terms), bound))
    unseen, part = _unseen(model, chosen, masked, 0), _unseen(model, chosen, masked, ignored)
    for N, kind in ((unseen, "all"), (part, "labelled")):
        if not N.shape[1]:
            continue
        Q = _random_in(N, chosen, seed).to(chosen.matrix())
        numbers = {
            "change of the predictions": _change(model, chosen, masked, Q, ignored),
            "‖G vec ΔW‖ / ‖G‖‖ΔW‖": float((fitted["ggn"] @ Q.flatten().double()).norm() / (size * Q.norm())),
        }
        make = Case if kind == "all" else control
        cases += [make(f"null for the inputs of {kind} positions: {n}", m, bound) for n, m in numbers.items()]
    through = _through(model, loss, masked, chosen, ignored)
    cases.append(control("GGN through labelled positions alone", relative(through, G), bound))
    return Findings(cases, {"share of the GGN elsewhere": relative(through, G), "ignored": ignored})


@claim(17, "ours")
def labelled_inputs_suffice(
    model: nn.Module, data: Any, layer: str, *, ignored: int = 1, should: bool = False, seed: int = 0
) -> Findings:
    """A ΔW that is null for a layer's inputs at the labelled positions alone changes no prediction at them.

    True of the last layer, whose output at a position is the prediction there; refuted for any layer below, from
    which the ignored positions reach the labelled ones.

    Control: a random ΔW of the same norm.

    Args:
        ignored: positions without a label, at the start.
        should: whether it is expected: of the last layer.
    """
    (chosen,) = find_layers(model, layer)
    N = _unseen(model, chosen, data, ignored)
    if not N.shape[1]:
        return Findings([])
    Q = _random_in(N, chosen, seed).to(chosen.matrix())
    wrong = _random_in(torch.eye(chosen.d_in), chosen, seed + 1).to(Q)
    bound = roundoff(Q.dtype, chosen.size)
    return Findings(
        [
            Case("change of the predictions", _change(model, chosen, data, Q, ignored), bound, should),
            control("random ΔW", _change(model, chosen, data, wrong, ignored), bound),
        ]
    )


@claim(17, "ours")
def padding_counts_nothing(model: nn.Module, data: Any, layer: str, *, ignore_index: int = -100) -> Findings:
    """Sequences of different lengths, padded and masked, have the curvatures of the sequences one by one.

    A padded position has no loss term, and its input belongs to no sum: A and the mean over an example's positions
    count real positions alone, whatever stands in the others.

    Control: the same batches without the mask, in the curvatures that hold A.

    Args:
        model: causal, (N, T, d) → (N, T, C).
        data: inputs and class indices (N, T), T ≥ 2; every other sequence loses its last position.
    """
    (chosen,) = find_layers(model, layer)
    loss = CrossEntropy(ignore_index)
    single, padded = [], []
    for x, y in data:
        T = x.shape[1]
        mask = torch.arange(T) < T - torch.arange(1, len(x) + 1)[:, None] % 2
        single += [(x[i : i + 1, : int(n)], y[i : i + 1, : int(n)]) for i, n in enumerate(mask.sum(1))]
        padded.append((x.where(mask[..., None], 3.0), y.where(mask, ignore_index), mask))
    unmasked = [(x, y) for x, y, _ in padded]
    G = explicit.gauss_newton(model, loss, single, [chosen])
    if not bool(G.any()):
        return Findings([])
    truths = {"ggn": G}
    for sharing in ("expand", "reduce"):
        A, S = kfac_factors(model, loss, single, chosen, sharing)
        truths[f"kfac, {sharing}"] = torch.kron(S, A)
        if sharing == "expand":
            truths["covariance"] = torch.kron(torch.eye(len(S)).to(A), A)

    def fitted(name: str, batches: Any) -> Tensor:
        if name == "ggn":
            return GaussNewton.fit(model, loss, batches, layer).dense("rows")
        if name == "covariance":
            return matrix(estimate(name, model, loss, batches, layer))
        sharing: Any = name.removeprefix("kfac, ")
        return matrix(KFAC.fit(model, loss, batches, layer, labels="exact", sharing=sharing).spectrum())

    bound = roundoff(G.dtype, len(G))
    cases = [Case(name, relative(fitted(name, padded), C), bound) for name, C in truths.items()]
    wrong = [
        control(f"{name}, without the mask", relative(fitted(name, unmasked), truths[name]), bound)
        for name in truths
        if name != "ggn"
    ]
    return Findings(cases + wrong)


def _masked(data: Any, ignored: int, ignore_index: int) -> list[tuple[Tensor, Tensor]]:
    out = []
    for x, y in data:
        y = y.clone()
        y[:, :ignored] = ignore_index
        out.append((x, y))
    return out


def _inputs(model: nn.Module, layer: MatrixLayer, data: Any) -> list[Tensor]:
    """The layer's inputs, batch by batch: (N, T, d_in)."""
    return [explicit.layer_inputs(model, layer, [(x, y)]).unflatten(0, x.shape[:2]) for x, y in data]


def _unseen(model: nn.Module, layer: MatrixLayer, data: Any, start: int) -> Tensor:
    """Directions (columns, float64) in which no input at position `start` or later has a component."""
    a = torch.cat([a[:, start:].flatten(0, 1) for a in _inputs(model, layer, data)]).double()
    _, values, vectors = torch.linalg.svd(a, full_matrices=True)
    rank = int((values > roundoff(torch.float64, layer.d_in) * float(values.max())).sum())
    return vectors[rank:].mT


def _random_in(N: Tensor, layer: MatrixLayer, seed: int) -> Tensor:
    """A random ΔW = B Nᵀ of the norm of W."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(layer.d_out, N.shape[1], generator=generator, dtype=torch.float64) @ N.double().mT
    return Q * (float(torch.linalg.matrix_norm(layer.matrix())) / float(torch.linalg.matrix_norm(Q)))


def _change(model: nn.Module, layer: MatrixLayer, data: Any, Q: Tensor, start: int) -> float:
    """Largest relative change of a batch's outputs at positions from `start` on, under ΔW = Q."""
    changes = []
    for x, _ in data:
        f = explicit.outputs(model, [layer], x)
        with torch.no_grad():
            changes.append(relative(f(Q.flatten())[:, start:], f(torch.zeros_like(Q.flatten()))[:, start:]))
    return max(changes)


def _through(model: nn.Module, loss: Loss, data: Any, layer: MatrixLayer, start: int) -> Tensor:
    """The GGN whose gradients pass only through the weight's uses from position `start` on."""
    G: Any = 0.0
    for (x, y), a in zip(data, _inputs(model, layer, data), strict=True):
        J = torch.einsum("ntcpi,npj->ntcij", output_jacobian(model, layer, x)[..., start:, :], a[:, start:])
        J = J.flatten(3)
        H = explicit.output_hessian(loss, explicit.outputs(model, [layer], x)(explicit.zero([layer])), y)
        G = G + torch.einsum("ntcp,ntcd,ntdq->pq", J, H, J)
    return G / explicit.terms(model, loss, data, [layer])
