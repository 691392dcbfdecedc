"""The capability set: documents whose predictions an edit should leave alone, and their curvature at θ0."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from curvlab.capture import Batch
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.curvature.origin import weights_checksum
from curvlab.data.text import encode_documents
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy, Labels
from curvlab.spectrum import Spectrum

CurvatureName = Literal["kfac", "ekfac", "covariance"]
Statistics = KFAC | EKFAC | Covariance
T = TypeVar("T")


class Capability:
    """Documents, and the curvature of their next-token loss, computed once for each state of the weights.

    Args:
        documents: text, one string a document.
        max_length: tokens at which a document is cut.
        batch_size: documents a forward pass.
        labels: of the pseudo-gradients, "model" (drawn), "data" (the authors' empirical Fisher) or "exact".
        seed: of the drawn labels.

    Raises:
        ValueError: no documents.
    """

    def __init__(
        self,
        documents: Sequence[str],
        *,
        max_length: int = 512,
        batch_size: int = 8,
        labels: Labels = "model",
        seed: int = 0,
    ) -> None:
        if isinstance(documents, str) or not documents:
            raise ValueError("the capability set needs at least one document, as a list of strings")
        if labels not in ("model", "data", "exact"):
            raise ValueError(f"labels must be 'model', 'data' or 'exact', got {labels!r}")
        if max_length < 2 or batch_size < 1:
            raise ValueError(f"max_length must be at least 2 and batch_size 1, got {max_length}, {batch_size}")
        self.documents = list(documents)
        self.max_length, self.batch_size, self.labels, self.seed = max_length, batch_size, labels, seed
        self._weights = ""  # of the model that the following are of
        self._kept: dict[str, Any] = {}

    def batches(self, tokenizer: Any) -> list[Batch]:
        """The documents, encoded."""
        return encode_documents(tokenizer, self.documents, max_length=self.max_length, batch_size=self.batch_size)

    def check(self, tokenizer: Any, room: int | None) -> None:
        """Refuse documents that, cut at `max_length`, are longer than the `room` of a model; None is no limit."""
        if room is None or self.max_length <= room:
            return
        longest = max(batch.targets.shape[1] for batch in self.batches(tokenizer))
        if longest > room:
            raise ValueError(
                f"documents of {longest} tokens, but the model takes {room}: Capability(…, max_length={room})"
            )

    def fit(
        self,
        model: nn.Module,
        tokenizer: Any,
        layers: Sequence[str],
        curvature: CurvatureName,
        *,
        kfac: KFAC | None = None,
    ) -> Statistics:
        """K-FAC factors, EK-FAC or the activation covariance of the layers at the weights as they stand.

        `kfac`: factors at these weights, where EK-FAC need not compute them.
        """
        batches = self.batches(tokenizer)
        return fit_statistics(model, batches, layers, curvature, labels=self.labels, seed=self.seed, kfac=kfac)

    def statistics(
        self, model: nn.Module, tokenizer: Any, layers: Sequence[str], curvature: CurvatureName = "kfac"
    ) -> Statistics:
        """What `fit` gives, kept for later edits that start from the same weights."""
        self._belong_to(model)
        return self._statistics(model, tokenizer, layers, curvature)

    def spectrum(
        self, model: nn.Module, tokenizer: Any, layers: Sequence[str], curvature: CurvatureName = "kfac"
    ) -> Spectrum:
        """Its eigenvalues and eigenvectors, kept likewise."""

        def decomposed() -> Spectrum:
            return self._statistics(model, tokenizer, layers, curvature).spectrum()

        return self.keep(model, layers, f"{curvature} spectrum", decomposed)

    def keep(self, model: nn.Module, layers: Sequence[str], what: str, make: Callable[[], T]) -> T:
        """`make()`, or what it gave before for these layers and weights of the whole model.

        What belongs to other weights is dropped: of a large model it takes gigabytes.
        """
        self._belong_to(model)
        return self._kept_or(model, layers, what, make)

    def forget(self) -> None:
        """Drop what was computed."""
        self._kept.clear()

    def _belong_to(self, model: nn.Module) -> None:
        """Forget what is of other weights. Once a question: the checksum takes a pass over the whole model."""
        weights = weights_checksum(model)
        if weights != self._weights:
            self.forget()
            self._weights = weights

    def _kept_or(self, model: nn.Module, layers: Sequence[str], what: str, make: Callable[[], T]) -> T:
        names = [layer.name for layer in find_layers(model, layers)]
        key = f"{what} {self.labels} {self.seed} {self.max_length} {names}"
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _statistics(
        self, model: nn.Module, tokenizer: Any, layers: Sequence[str], curvature: CurvatureName
    ) -> Statistics:
        def fitted() -> Statistics:
            kfac = self._statistics(model, tokenizer, layers, "kfac") if curvature == "ekfac" else None
            assert kfac is None or isinstance(kfac, KFAC)
            return self.fit(model, tokenizer, layers, curvature, kfac=kfac)

        return self._kept_or(model, layers, curvature, fitted)


def fit_statistics(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[str],
    curvature: CurvatureName,
    *,
    labels: Labels = "model",
    seed: int = 0,
    kfac: KFAC | None = None,
) -> Statistics:
    """K-FAC factors, EK-FAC or the activation covariance of the layers for the next-token loss on `batches`.

    Args:
        labels, seed: of the pseudo-gradients, and of labels that are drawn; a covariance needs neither.
        kfac: factors at these weights, where EK-FAC need not compute them.

    Raises:
        ValueError: an unknown curvature.
    """
    loss = CrossEntropy()
    if curvature == "covariance":
        return Covariance.fit(model, loss, batches, layers)
    if curvature == "kfac":
        return KFAC.fit(model, loss, batches, layers, labels=labels, seed=seed)
    if curvature == "ekfac":
        return EKFAC.fit(model, loss, batches, layers, labels=labels, seed=seed, kfac=kfac)
    raise ValueError(f"curvature must be 'kfac', 'ekfac' or 'covariance', got {curvature!r}")
