"""What a language model says: greedy continuations of prompts, in batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from curvlab.batches import context_length
from curvlab.evaluation.mode import evaluating
from curvlab.progress import progress

STOP = (".", "\n")  # the paper's, with the end of text
MAX_NEW_TOKENS = 40  # the paper's
_FIRST = 10  # tokens after which the texts that go on are batched anew: most answers are short, and
# one text that never ends would keep its whole batch at work


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    batch_size: int = 32,
) -> list[str]:
    """The greedy continuation of each prompt, up to the first stop string, the end of text or `max_new_tokens`.

    Prompts of similar length share a batch, padded on the left and masked, so that neither the padding nor the
    batch changes a result beyond round-off; a batch ends when all its rows have. A model's own generation defaults
    (Llama-3's temperature, Qwen's repetition penalty, suppressed tokens) are switched off; its ends of text count.

    Returns:
        The text after each prompt, in the order given, without the stop string and surrounding white space; "" where
        the model stops at once.

    Raises:
        ValueError: a prompt without a token, or too long for the model with its continuation.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    if any(not string for string in stop):
        raise ValueError("a stop string is empty")
    rows = [_ids(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    new: list[list[int]] = [[] for _ in rows]
    ends = _ends(model, tokenizer)
    pending = list(range(len(rows)))
    with evaluating(model), _without_defaults(model):
        for tokens in (min(_FIRST, max_new_tokens), max_new_tokens - _FIRST):
            if tokens < 1:
                break
            # the longest first, so that a lack of memory shows at once
            order, pending = sorted(pending, key=lambda i: len(rows[i]), reverse=True), []
            for start in progress(range(0, len(order), batch_size), "generation"):
                chosen = order[start : start + batch_size]
                begun = [torch.tensor(rows[i] + new[i]) for i in chosen]
                for i, (ids, ended) in zip(chosen, _batch(model, tokenizer, begun, tokens, stop, ends), strict=True):
                    new[i] += ids
                    if not ended:
                        pending.append(i)
    return [_text(tokenizer, ids, ends, stop) for ids in new]


def check_prompts(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS
) -> None:
    """Raise the ValueError that `generate` would, before anything is generated."""
    for prompt in prompts:
        _ids(model, tokenizer, prompt, max_new_tokens)


def _ids(model: PreTrainedModel, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text themselves
        ids = ids[:-1]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no token")
    limit = context_length(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {limit}: {prompt[:60]!r}…"
        )
    return ids


def _batch(
    model: PreTrainedModel, tokenizer: Any, rows: list[Tensor], tokens: int, stop: Sequence[str], ends: list[int]
) -> list[tuple[list[int], bool]]:
    """At most `tokens` new tokens for each row (padding behind its end included), and whether it has ended."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    length = ids.shape[1]
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=pad, eos_token_id=ends or None)
    stopped = _Stopped(tokenizer, length, stop)
    with torch.no_grad():
        outputs = cast(Any, model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
    found: list[list[int]] = outputs[:, length:].tolist()
    return [(ids, hit or any(token in ends for token in ids)) for ids, hit in zip(found, stopped.rows, strict=True)]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation configuration, from which `generate` would fill in whatever is unset."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, and the model's own (Llama-3 has several)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


def _text(tokenizer: Any, row: list[int], ends: list[int], stop: Sequence[str]) -> str:
    cut = next((i for i, token in enumerate(row) if token in ends), len(row))
    text = _decode(tokenizer, row[:cut])
    for string in stop:
        text = text.split(string, 1)[0]
    return text.strip()


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Stopped(StoppingCriteria):
    """Which rows hold a stop string in their new text."""

    def __init__(self, tokenizer: Any, length: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.length, self.stop = tokenizer, length, tuple(stop)
        self.rows: list[bool] = []
        # a stop string ends within the newest token, and a token may be as little as one byte
        self.tail = max((len(string.encode()) for string in stop), default=0) + 4

    def __call__(self, input_ids: LongTensor, scores: Any, **_: Any) -> Tensor:
        tails = input_ids[:, max(self.length, input_ids.shape[1] - self.tail) :].tolist()
        texts = (_decode(self.tokenizer, tail) for tail in tails)
        hit = [any(string in text for string in self.stop) for text in texts]
        self.rows = [before or now for before, now in zip(self.rows or [False] * len(hit), hit, strict=True)]
        return torch.tensor(self.rows, device=input_ids.device)
