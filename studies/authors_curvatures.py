"""Curvatures as the authors' LeNet code takes them where it departs from the paper; for `authors_protocol` alone.

They are wrong on purpose, so they are no part of curvlab.curvature; each ends in what the right ones end in.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from curvlab.capture import columns, passes
from curvlab.curvature import GaussNewton
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.spectrum import Block, KroneckerBasis, Spectrum

LOSS = CrossEntropy()
Reduction = Literal["mean", "sum"]


def batch_squares(
    head: nn.Module,
    data: tuple[Tensor, Tensor],
    layer: str,
    basis: KroneckerBasis,
    *,
    labels: Literal["model", "data"],
    batch: int,
    reduction: Reduction = "mean",
    seed: int = 0,
) -> Spectrum:
    """EK-FAC's eigenvalues from batches: E_b[(U_outᵀ Q_b U_in)²_ij], Q_b the gradient of a whole batch's loss.

    EK-FAC asks for E_n[(U_outᵀ q_n U_in)²] of per-example gradients q_n. With g_b = Σ_n q_n over B examples,
    E[g_b²] = B Var(q) + B² (E q)². At labels drawn from the model E q = 0: the expectation is right up to the factor
    B (1/B for the mean), and only B times fewer samples are averaged. At the data's labels the gradient of the
    mean loss enters, weighted by B.

    Args:
        data: inputs of the head (N, d_in …) and labels (N,), cut into batches in this order; the last may be smaller.
        basis: a complete one, as K-FAC gives it.
        labels: "data", as the authors have it, or "model": one draw an example, keyed by `seed`. (The columns of H_ŷ
            that "exact" takes have no common sign over examples, so that their sum means nothing.)
        reduction: of the batch's loss. They differ in scale, which no null space sees, and in a smaller last batch:
            the mean gives its larger variance the weight of a whole batch.

    Raises:
        ValueError: a batch size below one, another reduction, or a weight used more than once an example.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    chosen = find_layers(head, layer)
    u_in, u_out = basis.u_in.double(), basis.u_out
    rotate = torch.eye(basis.layer.d_out, dtype=u_in.dtype, device=u_in.device) if u_out is None else u_out.double()
    total, batches = torch.zeros(basis.shape, dtype=torch.float64, device=u_in.device), 0
    parts = list(zip(*(t.split(batch) for t in data), strict=True))
    for pass_ in passes(head, LOSS, parts, chosen, desc="squares of batches", micro_batch=batch):
        a = pass_.inputs(chosen[0])
        if a.shape[1] != 1:
            raise ValueError(f"layer {layer!r} uses its weight {a.shape[1]} times an example, expected once")
        for by_layer in pass_.gradients(columns(pass_, LOSS, labels, seed=seed)):
            Q = (by_layer[layer][:, 0].double().mT @ a[:, 0].double()) / (len(a) if reduction == "mean" else 1)
            total += (rotate.mT @ Q @ u_in).square()
        batches += 1
    values = total / batches
    return Spectrum((Block(basis, values, float(values.sum()), precision=torch.finfo(data[0].dtype).eps),))


def through_probabilities(head: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> GaussNewton:
    """The Gauss–Newton matrix of the loss −log p_y with the softmax probabilities p as the network's output.

    H_p = ∂²(−log p_y)/∂p² is zero but for 1/p_y² at the label, and J_p = (diag(p) − p pᵀ) J, so that
    J_pᵀ H_p J_p = Jᵀ (p − e_y)(p − e_y)ᵀ J: exactly the empirical Fisher, labels of the data, of rank ≤ N. It is taken
    as such, from the logits: 1/p_y² would overflow where p_y is small, and the two are one matrix.
    """
    return GaussNewton.fit(head, LOSS, [data], layer, labels="data")
