"""Text as batches of a causal language model: documents, and prompts with their targets.

`targets` are the next tokens, so that position t carries the loss of predicting token t + 1; a position whose
prediction is not asked for (padding, the last one, a masked prompt) holds `IGNORE`. Padding is on the right.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlab.capture import Batch
from curvlab.data.edit_formats import lone_surrogate, read_records, read_text

IGNORE = -100
PLAIN = "{question}"
QA = "Please answer the question:\n\nQ: {question}\nA:"  # the paper's QA context


_TITLE = re.compile(r"^ = [^=](?:.*[^=])? = $", re.MULTILINE)


def fill(template: str, question: str) -> str:
    """The prompt that a question makes in a template, such as `PLAIN` or `QA`."""
    if "{question}" not in template:
        raise ValueError(f"a template must contain {{question}}, got {template!r}")
    return template.replace("{question}", question)


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file.

    .json and .jsonl: a list, or a value a line, of strings or of objects with a string "text". Else plain text, cut
    at <|endoftext|>, at " = Title = " lines (WikiText) or at blank lines, whichever the file has first in this order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no document in it, no UTF-8, damaged JSON, or a record (which is named) without a text or with half
            a character in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    parts = _recorded(path) if path.suffix.lower() in (".json", ".jsonl") else _parts(read_text(path))
    documents = [part.strip() for part in parts if part.strip()]
    if not documents:
        raise ValueError(f"{path} holds no document")
    return documents


def _recorded(path: Path) -> list[str]:
    texts = []
    for where, record in read_records(path):
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise ValueError(f'{path}, {where}: expected a string, or an object with a string "text"')
        if half := lone_surrogate(text):
            raise ValueError(f"{path}, {where}: the text holds the lone surrogate {half!r}")
        texts.append(text)
    return texts


def _parts(text: str) -> list[str]:
    if "<|endoftext|>" in text:
        return text.split("<|endoftext|>")
    return _TITLE.split(text) if _TITLE.search(text) else text.split("\n\n")


def shuffled_documents(path: str | Path, tokenizer: Any, seed: int) -> list[str]:
    """The documents of a text file that have a token to predict (two or more), in an order drawn from `seed`.

    Raises:
        FileNotFoundError, ValueError: as `read_documents`, or no such document in it.
    """
    documents = [text for text in read_documents(path) if len(tokenizer(text)["input_ids"]) > 1]
    if not documents:
        raise ValueError(f"{path} holds no document of at least two tokens")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[i] for i in order.tolist()]


def encode_documents(
    tokenizer: Any, documents: Sequence[str], *, max_length: int = 512, batch_size: int = 8
) -> list[Batch]:
    """Documents cut at `max_length` tokens, in their order, every next token a target.

    Raises:
        ValueError: no documents, or one of fewer than two tokens (nothing to predict) or with half a character.
    """
    if not documents:
        raise ValueError("no documents were given")
    for index, text in enumerate(documents):
        if half := lone_surrogate(text):
            raise ValueError(f"document {index} holds the lone surrogate {half!r}: {text!r}")
    ids = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in documents]
    for index, tokens in enumerate(ids):
        if len(tokens) < 2:
            raise ValueError(f"document {index} has {len(tokens)} tokens, at least 2 are needed: {documents[index]!r}")
    labels = [[*tokens[1:], IGNORE] for tokens in ids]
    starts = range(0, len(ids), batch_size)
    return [_collate(ids[i : i + batch_size], labels[i : i + batch_size], tokenizer) for i in starts]


def encode_pairs(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str = PLAIN,
    mask_prompt: bool = True,
    end: bool = True,
    batch_size: int | None = None,
) -> list[Batch]:
    """(prompt, target) pairs as "prompt target": the loss is on the target's tokens and the end of text.

    Args:
        mask_prompt: no loss on the prompt's own tokens; False counts every next token.
        end: the target is followed by the end-of-text token.
        batch_size: None gives one batch of all.

    Raises:
        ValueError: no pairs, a pair whose target has no token or that holds half a character, a tokenizer that gives
            no character offsets or (with `end`) has no end-of-text token.
    """
    if not pairs:
        raise ValueError("no prompts with targets were given")
    if end and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token): set one, or use end=False")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("prompts are told from targets by character offsets: load the tokenizer's fast version")
    ids, labels = [], []
    for question, target in pairs:
        prompt = fill(template, question)
        if half := lone_surrogate(f"{prompt} {target}"):
            raise ValueError(f"prompt {question!r} or its target {target!r} holds the lone surrogate {half!r}")
        encoded = tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
        tokens, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if (
            tokens and tokens[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]
        ):  # some tokenizers end every text themselves
            tokens, offsets = tokens[:-1], offsets[:-1]
        # a space that is a token of its own (before digits, in Llama-3) is for the model to say, too
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)), len(tokens))
        if first == len(tokens) or not target.strip():
            raise ValueError(f"the target {target!r} of prompt {question!r} has no token")
        if end:
            tokens = [*tokens, tokenizer.eos_token_id]
        following = [*tokens[1:], IGNORE]
        if mask_prompt:
            following = [IGNORE if i + 1 < first else token for i, token in enumerate(following)]
        ids.append(tokens)
        labels.append(following)
    size = batch_size or len(ids)
    return [_collate(ids[i : i + size], labels[i : i + size], tokenizer) for i in range(0, len(ids), size)]


def select(batch: Batch, index: Tensor) -> Batch:
    """The examples `index` (n,) of a batch of texts, cropped to the longest of them."""
    length = int(batch.inputs["attention_mask"][index].sum(1).max())
    inputs = {key: value[index, :length] for key, value in batch.inputs.items()}
    mask = None if batch.mask is None else batch.mask[index, :length]
    return Batch(inputs, batch.targets[index, :length], mask)


def _collate(ids: Sequence[list[int]], labels: Sequence[list[int]], tokenizer: Any) -> Batch:
    length = max(map(len, ids))
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any will do: padding is masked
    pad = next(token for token in known if token is not None)
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
    targets = torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return Batch({"input_ids": tokens, "attention_mask": mask}, targets, mask.bool())
