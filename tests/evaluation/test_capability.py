"""Likelihood, KL and right answers, document by document with torch's own losses, in float64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch.nn import functional as F

from curvlab.evaluation.capability import TokenMeans, answers_right, kl_from, nll, perplexity
from curvlab.evaluation.generation import generate
from curvlab.evaluation.intervals import bootstrap, paired_difference
from curvlab.evaluation.judging import Reply

DOCUMENTS = [
    "Once upon a time there was a little girl named Lily.",
    "Ada",
    "The capital of France is Paris. The capital of Italy is Rome. é",
    "She liked to play in the garden with her friend, and then they went home again to see her mother.",
]


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_nll_document_by_document(make: Any, batch_size: int) -> None:
    model, tokenizer = make(1, dtype=torch.float64), tiny_tokenizer()
    found = nll(model, tokenizer, DOCUMENTS, max_length=20, batch_size=batch_size)
    for document, value, tokens in zip(DOCUMENTS, *found, strict=True):
        ids = tokenizer(document)["input_ids"][:20]
        expected = F.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(ids[1:]))
        assert value == pytest.approx(float(expected), rel=1e-12)
        assert tokens == len(ids) - 1


def test_perplexity_is_over_all_tokens() -> None:
    model, tokenizer = tiny_llama(1, dtype=torch.float64), tiny_tokenizer()
    total, count = 0.0, 0
    for document in DOCUMENTS:
        ids = tokenizer(document)["input_ids"]
        total += float(F.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    found = perplexity(model, tokenizer, DOCUMENTS)
    assert found.mean == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-6)
    assert found.low < found.mean < found.high
    losses = nll(model, tokenizer, DOCUMENTS)
    assert losses.interval(seed=3) == bootstrap(losses.values, weights=losses.tokens, seed=3)


def test_half_precision_is_summed_in_float32() -> None:
    tokenizer = tiny_tokenizer()
    exact = nll(tiny_llama(1, dtype=torch.float64), tokenizer, DOCUMENTS).values
    half = nll(tiny_llama(1, dtype=torch.bfloat16), tokenizer, DOCUMENTS).values
    assert half == pytest.approx(exact, rel=0.03)
    assert all(value != float(torch.tensor(value, dtype=torch.bfloat16)) for value in half)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_kl_document_by_document(batch_size: int) -> None:
    before, after = tiny_llama(1, dtype=torch.float64), tiny_llama(2, dtype=torch.float64)
    tokenizer = tiny_tokenizer()
    found = kl_from(before, after, tokenizer, DOCUMENTS, batch_size=batch_size)
    for document, value, tokens in zip(DOCUMENTS, *found, strict=True):
        ids = tokenizer(document)["input_ids"]
        p, q = (F.log_softmax(logits_of(model, ids)[:-1], -1) for model in (before, after))
        assert value == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-10)
        assert tokens == len(ids) - 1
    assert kl_from(before, before, tokenizer, DOCUMENTS) == TokenMeans([0.0] * 4, found.tokens)


def test_small_divergences_keep_their_digits() -> None:
    before, after, tokenizer = tiny_llama(1), tiny_llama(1), tiny_tokenizer()
    with torch.no_grad():
        after.lm_head.weight[:, 0] += 1e-4 * torch.randn(320, generator=torch.Generator().manual_seed(0))
    found = kl_from(before, after, tokenizer, DOCUMENTS).values
    exact = kl_from(before.double(), after.double(), tokenizer, DOCUMENTS).values
    assert max(exact) < 1e-6
    assert found == pytest.approx(exact, rel=0.05)


@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str


def test_answers_right() -> None:
    model, tokenizer = tiny_llama(5, dtype=torch.float64), tiny_tokenizer()
    prompts = ["Ada", "The capital of France is", "Once upon a time"]
    said = generate(model, tokenizer, prompts, stop=("\n",), max_new_tokens=5)
    items = [Item(prompt, text) for prompt, text in zip(prompts, said, strict=True)]
    items.insert(1, Item("Alan Turing works in", "Manchester"))
    asked: list[Reply] = []

    def judge(replies: Any) -> list[float]:
        asked.extend(replies)
        return [float(text == answer) for _, answer, text in replies]

    found = answers_right(model, tokenizer, items, stop=("\n",), max_new_tokens=5, judge=judge)
    assert found == [1, 0, 1, 1]
    assert [reply.question for reply in asked] == [item.prompt for item in items]


def test_measures_of_two_models_pair_up() -> None:
    tokenizer = tiny_tokenizer()
    first, second = (nll(tiny_llama(seed), tokenizer, DOCUMENTS) for seed in (1, 2))
    found = paired_difference(first.values, second.values, weights=first.tokens)
    assert found.mean == pytest.approx(first.interval().mean - second.interval().mean)


def test_mode_is_handed_back() -> None:
    model, tokenizer = tiny_llama(0), tiny_tokenizer()
    model.train()
    nll(model, tokenizer, DOCUMENTS)
    assert model.training


def test_refusals() -> None:
    model, tokenizer = tiny_llama(0), tiny_tokenizer(bos=False)
    with pytest.raises(ValueError, match="no documents"):
        nll(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least 2"):
        nll(model, tokenizer, ["a"])
    with pytest.raises(ValueError, match="no items"):
        answers_right(model, tokenizer, [])
    with pytest.raises(ValueError, match="320 and 300 tokens"):
        kl_from(model, tiny_llama(0, vocabulary=300), tiny_tokenizer(), ["A b"])
