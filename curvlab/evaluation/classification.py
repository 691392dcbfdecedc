"""Accuracy and mean KL divergence of classifiers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.evaluation.mode import evaluating


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Share in [0, 1] of inputs x (N, ...) whose largest logit is the label y (N,).

    The model is run in evaluation mode and handed back in the mode it came in. Raises ValueError for an empty
    set, for labels that do not match the inputs, and for a batch size below one.
    """
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"accuracy needs N > 0 inputs and labels of shape (N,), got {len(x)} and {tuple(y.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with evaluating(model):
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in batches)
    return hits / len(x)


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> float:
    """Mean KL(p₀ ‖ p) in nats between the softmaxes of two sets of logits (..., classes).

    p₀ belongs to `reference_logits`. Computed in float64 from log-probabilities, so that small divergences
    and confident predictions keep their digits. Raises ValueError for shapes that differ or an empty set.
    """
    if reference_logits.shape != logits.shape or logits.ndim == 0 or logits.numel() == 0:
        raise ValueError(
            "kl_divergence needs two non-empty sets of logits of one shape (..., classes), "
            f"got {tuple(reference_logits.shape)} and {tuple(logits.shape)}"
        )
    log_p0 = F.log_softmax(reference_logits.detach().double(), dim=-1)
    log_p = F.log_softmax(logits.detach().double(), dim=-1)
    return float((log_p0.exp() * (log_p0 - log_p)).sum(-1).mean())
