"""Losses ℓ(ŷ, y), convex in the network's output ŷ, and the one definition of scale.

A loss is a class with the methods of `Loss`; to add one, write the same methods (`CrossEntropy` is thirty lines).
Outputs come as (N, T, C): N examples, T loss positions (1 for classification), C outputs.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.draws import categorical, normals, uniforms

Labels = Literal["exact", "model", "data"]


class Loss(Protocol):
    """What the curvature code asks of a loss; all per loss term, without reduction."""

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ of each term: (N, T, C), targets → (N, T)."""

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which positions carry a loss: bool (N, T)."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∂ℓ/∂ŷ: (N, T, C); zero where a position carries no loss."""

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """H_ŷ v: (N, T, C)."""

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """L (N, T, C, K) with L Lᵀ = H_ŷ = ∂²ℓ/∂ŷ²."""

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, seed: int, draw: int, examples: Tensor) -> Tensor:
        """∂ℓ/∂ŷ (N, T, C) at labels drawn from the model, so that its second moment is H_ŷ."""

    def bregman(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """d(ŷ, ŷ_0) = ℓ(ŷ) − ℓ(ŷ_0) − ⟨∇ℓ(ŷ_0), ŷ − ŷ_0⟩ of each term: (N, T) (paper, eq. for d)."""


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy in the logits, −log softmax(ŷ)_y; targets are class indices (N, T).

    `ignore_index` marks positions without a loss. Its Bregman distance is KL(p_0 ‖ p), free of labels.
    """

    ignore_index: int = -100

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows = outputs.flatten(0, -2)  # classes last and contiguous: a fifth of the time of (N, C, T)
        value = F.cross_entropy(rows, targets.flatten(), ignore_index=self.ignore_index, reduction="none")
        return value.view(targets.shape)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets != self.ignore_index

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        terms = self.terms(outputs, targets)
        p = outputs.softmax(-1)
        # in place: over a vocabulary every pass counts, and a one-hot of int64 is twice the logits
        p.scatter_add_(-1, targets.where(terms, 0).unsqueeze(-1), p.new_full((*targets.shape, 1), -1.0))
        return p.masked_fill_(~terms.unsqueeze(-1), 0.0)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        p = outputs.softmax(-1) * self.terms(outputs, targets).unsqueeze(-1)
        return p * (vectors - (p * vectors).sum(-1, keepdim=True))

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The Cholesky factor of diag(p) − p pᵀ in closed form, C − 1 columns.

        Column j contrasts class j with the classes after it: √(p_j t_j / t_{j−1}) (e_j − p_{>j} / t_j),
        t_j = Σ_{i>j} p_i. No difference of near-equal numbers, so confident predictions keep their digits.
        """
        # ascending classes: the tails t_j stay of the size of the largest p, and no quotient underflows
        p, order = outputs.softmax(-1).sort(dim=-1)
        tail_from = p.flip(-1).cumsum(-1).flip(-1)  # t_{j−1}
        tail = tail_from[..., 1:]
        weight = (p[..., :-1] * tail / tail_from[..., :-1]).sqrt() * self.terms(outputs, targets).unsqueeze(-1)
        share = p.unsqueeze(-1) / tail.unsqueeze(-2)  # p_i / t_j
        columns = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)[:, :-1] - share.tril(-1)
        factor = columns * weight.unsqueeze(-2)
        return torch.zeros_like(factor).scatter_(-2, order.unsqueeze(-1).expand_as(factor), factor)

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, seed: int, draw: int, examples: Tensor) -> Tensor:
        drawn = categorical(outputs, uniforms(seed, draw, examples, outputs.shape[1]).squeeze(-1))
        return self.gradient(outputs, drawn.where(self.terms(outputs, targets), self.ignore_index))

    def bregman(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        log_p0, log_p = reference.log_softmax(-1), outputs.log_softmax(-1)
        kl = (log_p0.exp() * (log_p0 - log_p)).sum(-1)
        return kl * self.terms(outputs, targets)


@dataclass(frozen=True)
class SquaredError:
    """½ · scale · ‖ŷ − y‖², summed over the C outputs; targets like the outputs. H_ŷ = scale · I.

    Labels "drawn from the model" are ŷ + N(0, I/scale). `nn.MSELoss()`, which also averages over the
    outputs and has no ½, is `SquaredError(scale=2 / C)`.
    """

    scale: float = 1.0

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape[-1] != outputs.shape[-1] or targets.dim() != outputs.dim():
            raise ValueError(f"targets {tuple(targets.shape)} must be shaped like the outputs {tuple(outputs.shape)}")
        return 0.5 * self.scale * (outputs - targets).square().sum(-1)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (outputs - targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return self.scale * vectors

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (self.scale**0.5 * eye).expand(*outputs.shape, -1)

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, seed: int, draw: int, examples: Tensor) -> Tensor:
        noise = normals(seed, draw, examples, outputs.shape[1], outputs.shape[2])
        return self.scale**0.5 * noise.to(outputs.dtype)

    def bregman(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self.scale * (outputs - reference).square().sum(-1)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Logistic loss softplus(ŷ) − y ŷ, summed over the C outputs; targets in [0, 1], like the outputs.

    H_ŷ = diag(p (1 − p)), p = sigmoid(ŷ): several labels at once. Its Bregman distance is the sum of the
    outputs' KL divergences, free of labels.
    """

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ValueError(f"targets {tuple(targets.shape)} must be shaped like the outputs {tuple(outputs.shape)}")
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid() * vectors

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.diag_embed((outputs.sigmoid() * (-outputs).sigmoid()).sqrt())

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, seed: int, draw: int, examples: Tensor) -> Tensor:
        p = outputs.double().sigmoid()
        drawn = uniforms(seed, draw, examples, outputs.shape[1], outputs.shape[2]) < p
        return (p - drawn.to(p)).to(outputs.dtype)

    def bregman(self, outputs: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        p0 = reference.sigmoid()
        on, off = F.logsigmoid(reference) - F.logsigmoid(outputs), F.logsigmoid(-reference) - F.logsigmoid(-outputs)
        return (p0 * on + (-reference).sigmoid() * off).sum(-1)


def as_loss(loss: Any) -> Loss:
    """`loss` itself, or our equivalent of a torch loss module with its default settings.

    Raises:
        ValueError: a torch loss whose settings (class weights, label smoothing) we do not reproduce.
        TypeError: anything that is no loss.
    """
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None or loss.label_smoothing or loss.reduction != "mean":
            raise ValueError(
                "CrossEntropyLoss with class weights, label smoothing or a reduction other than 'mean' is not "
                "supported; write a loss with the methods of curvlab.losses.Loss"
            )
        return CrossEntropy(ignore_index=loss.ignore_index)
    if isinstance(loss, nn.MSELoss):
        raise ValueError("nn.MSELoss averages over outputs; say which scale is meant: SquaredError(scale=2 / C)")
    if isinstance(loss, type) or not all(
        hasattr(loss, name) for name in ("value", "hessian_factor", "sampled_gradient", "bregman")
    ):
        raise TypeError(
            f"{loss!r} is no loss; use CrossEntropy(), SquaredError(), BinaryCrossEntropy() or a class with the "
            "methods of losses.Loss"
        )
    return loss


@dataclass(frozen=True)
class Scale:
    """What a statistic was summed over; the one place where sums become means.

    Attributes:
        terms: loss terms (examples, or tokens with a label); means of the loss divide by it.
        positions: positions at which a layer's weight was used (pixels, tokens; padding excluded).
    """

    terms: int = 0
    positions: int = 0

    def __add__(self, other: "Scale") -> "Scale":
        return Scale(self.terms + other.terms, self.positions + other.positions)
