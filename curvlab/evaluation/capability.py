"""What a model could do before: answer questions, continue text; and how far its predictions have moved."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from curvlab.capture import Batch, run, to_device
from curvlab.data.text import IGNORE, PLAIN, encode_documents
from curvlab.evaluation.editing import answers
from curvlab.evaluation.generation import MAX_NEW_TOKENS, STOP
from curvlab.evaluation.intervals import Interval, bootstrap
from curvlab.evaluation.judging import Judge, Reply, exact_match
from curvlab.evaluation.mode import evaluating
from curvlab.progress import progress


class Item(Protocol):
    """A question and its right answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


def answers_right(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    template: str = PLAIN,
    judge: Judge = exact_match,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    batch_size: int = 32,
) -> list[float]:
    """For each item, in order, whether the model generates its answer: recall of facts, or accuracy on a task.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("no items were given")
    pairs = [(item.prompt, item.answer) for item in items]
    texts = answers(
        model, tokenizer, pairs, template=template, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size
    )
    return judge([Reply(*pair, text) for pair, text in zip(pairs, texts, strict=True)])


class TokenMeans(NamedTuple):
    """For each document the mean over its predicted tokens, and how many these are."""

    values: list[float]
    tokens: list[int]

    def interval(self, *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Interval:
        """The mean over all tokens; documents are drawn whole."""
        return bootstrap(self.values, weights=self.tokens, seed=seed, draws=draws, level=level)


def nll(
    model: PreTrainedModel, tokenizer: Any, documents: Sequence[str], *, max_length: int = 512, batch_size: int = 8
) -> TokenMeans:
    """Negative log-likelihood in nats of each document's next tokens, cut at `max_length` tokens.

    The first token is not predicted; padding counts nowhere. Documents keep their order.

    Raises:
        ValueError: no documents, or one of fewer than two tokens.
    """
    batches = encode_documents(tokenizer, documents, max_length=max_length, batch_size=batch_size)
    values, tokens = [], []
    for batch, logits in _logits(model, batches, "likelihood"):
        for row, target in zip(logits, batch.targets.to(logits.device), strict=True):
            asked = target != IGNORE
            exact = row[asked].to(torch.promote_types(row.dtype, torch.float32))  # half precision would lose digits
            values.append(float(F.cross_entropy(exact, target[asked])))
            tokens.append(int(asked.sum()))
    return TokenMeans(values, tokens)


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> Interval:
    """exp(mean NLL a token over all documents) with its bootstrap interval over documents."""
    found = nll(model, tokenizer, documents, max_length=max_length, batch_size=batch_size).interval(seed=seed)
    return Interval(*(float(torch.tensor(x, dtype=torch.float64).exp()) for x in found))


def kl_from(
    original: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> TokenMeans:
    """KL(p_original ‖ p_model) in nats of the next-token predictions on each document, a mean over its tokens.

    Both models must be in memory; they may stand on different devices.

    Raises:
        ValueError: no documents, one of fewer than two tokens, or models with different vocabularies.
    """
    batches = encode_documents(tokenizer, documents, max_length=max_length, batch_size=batch_size)
    values, tokens = [], []
    for (batch, before), (_, after) in zip(
        _logits(original, batches, "KL divergence"), _logits(model, batches), strict=True
    ):
        if before.shape != after.shape:
            raise ValueError(f"the models predict {before.shape[-1]} and {after.shape[-1]} tokens")
        for p, q, target in zip(before, after.to(before.device), batch.targets.to(before.device), strict=True):
            asked = target != IGNORE
            log_p, log_q = F.log_softmax(p[asked].double(), -1), F.log_softmax(q[asked].double(), -1)
            values.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            tokens.append(int(asked.sum()))
    return TokenMeans(values, tokens)


def _logits(model: PreTrainedModel, batches: Sequence[Batch], desc: str = "") -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its logits (N, T, V), in evaluation mode; a bar where `desc` names one."""
    with evaluating(model):
        for batch in progress(batches, desc) if desc else batches:
            with torch.no_grad():
                logits = run(model, to_device(batch.inputs, model.device))
            yield batch, logits
