"""Two tasks seen from the one layer that is edited: what fine-tuning on the second keeps of the first."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from curvlab.capture import split_at
from curvlab.data import ImagePair, subset
from curvlab.evaluation.classification import accuracy, kl_divergence
from curvlab.layers import device_of


@dataclass(frozen=True)
class Transfer:
    """What every run of one seed shares: the head, its inputs (and labels), the capability set, where it starts.

    Attributes:
        head: the model from the edited layer on.
        finetune, pretrain_test, finetune_test: inputs of the head (N, …) and labels (N,).
        capability: the part of the pre-training data that the curvature is taken on.
        base_accuracy: on pretrain_test, before any edit.
    """

    head: nn.Sequential
    finetune: tuple[Tensor, Tensor]
    pretrain_test: tuple[Tensor, Tensor]
    finetune_test: tuple[Tensor, Tensor]
    capability: tuple[Tensor, Tensor]
    base_accuracy: float

    @classmethod
    @torch.no_grad()
    def of(
        cls, pair: ImagePair, model: nn.Sequential, layer: str, *, capability: int, finetune: int, seed: int
    ) -> "Transfer":
        """Run the frozen layers below `layer` once, on everything.

        Args:
            model: in the dtype and on the device to compute with.
            layer: the edited one, a direct child of `model`.
            capability, finetune: how many images to take of either task; all where there are no more.
            seed: of both choices.
        """
        body, head = split_at(model, layer)
        parameter = next(head.parameters())

        def through(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = x.to(parameter.dtype)
            parts = [body(part.to(device_of(head))) for part in x.split(2000)]
            return torch.cat(parts), y.to(device_of(head))

        known = subset(pair.pretrain_train, min(capability, len(pair.pretrain_train)), seed + 1000)
        new = pair.finetune_train
        if finetune < len(new):
            new = subset(new, finetune, seed)
        pretrain_test = through(pair.pretrain_test.x, pair.pretrain_test.y)
        return cls(
            head,
            through(new.x, new.y),
            pretrain_test,
            through(pair.finetune_test.x, pair.finetune_test.y),
            through(known.x, known.y),
            accuracy(head, *pretrain_test),
        )

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        return _logits(self.head, self.pretrain_test[0]), _logits(self.head, self.capability[0])

    def remember(self) -> None:
        """Keep the outputs at the head's present weights: `measures` compares with them."""
        self.__dict__.pop("_before", None)
        _ = self._before

    def measures(self) -> dict[str, float]:
        """What the head, at its present weights, kept and learnt since `remember`; accuracies in [0, 1], KL in nats."""
        before, capability = self._before
        after = _logits(self.head, self.pretrain_test[0])
        y = self.pretrain_test[1]
        return {
            "pretrain_accuracy": accuracy(self.head, *self.pretrain_test),
            "finetune_accuracy": accuracy(self.head, *self.finetune_test),
            "base_accuracy": self.base_accuracy,
            "pretrain_loss_increase": _mean_loss(after, y) - _mean_loss(before, y),
            "measured_kl": kl_divergence(capability, _logits(self.head, self.capability[0])),
            "measured_kl_test": kl_divergence(before, after),
        }


@torch.no_grad()
def _logits(head: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([head(part) for part in x.split(5000)]).double()


def _mean_loss(outputs: Tensor, y: Tensor) -> float:
    return float(nn.functional.cross_entropy(outputs, y))
