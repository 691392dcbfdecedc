"""Batched greedy generation against an argmax loop, one prompt at a time and without a cache, in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from curvlab.evaluation.generation import generate

PROMPTS = [
    "Ada",
    "The capital of France is",
    "Once upon a time there was a little girl named Lily. She liked to play in the garden",
    "Q: Where was Ada Lovelace born?\nA:",
    "é ü 語",
    "Ada",
    "Alan Turing works in Manchester, where",
]
MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int, stop: Sequence[str], ends: set[int]) -> str:
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in ends:
                break
            new.append(token)
    text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [text.index(string) for string in stop if string in text]
    return text[: min(cuts, default=len(text))].strip()


@pytest.mark.parametrize("stop", [(".", "\n"), ("e", "nd", "é"), ()])
@pytest.mark.parametrize("family", MAKERS)
def test_equals_the_argmax_loop(family: str, stop: tuple[str, ...]) -> None:
    model, tokenizer = MAKERS[family](5, dtype=torch.float64), tiny_tokenizer()
    expected = [continuation(model, tokenizer, prompt, 16, stop, {2}) for prompt in PROMPTS]
    for batch_size in (1, 3, 32):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=16, stop=stop, batch_size=batch_size) == expected
    assert len(set(expected)) > 3  # the models say different things


@pytest.mark.parametrize("family", MAKERS)
def test_company_changes_nothing(family: str) -> None:
    """A short prompt beside a long one is padded by most of its row."""
    model, tokenizer = MAKERS[family](1, dtype=torch.float64), tiny_tokenizer()
    long = "Once upon a time there was a little girl named Lily. " * 8
    assert generate(model, tokenizer, ["Ada", long])[0] == generate(model, tokenizer, ["Ada"])[0] != ""


def test_the_models_own_sampling_is_switched_off() -> None:
    model, tokenizer = tiny_llama(2, dtype=torch.float64), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p = True, 5.0, 7, 0.9
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams, own.max_new_tokens = 3.0, 1, 2, 3
    assert generate(model, tokenizer, PROMPTS) == expected


def test_nor_does_anything_else_of_its_defaults_count(capfd: pytest.CaptureFixture[str]) -> None:
    """Llama-3 names a max_length; others suppress tokens, or force or forbid an early end."""
    model, tokenizer = tiny_llama(2, dtype=torch.float64), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS)
    spoken = [token for text in expected for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    model.generation_config = own = GenerationConfig(
        max_length=4096, suppress_tokens=spoken, min_new_tokens=39, min_p=0.5, eos_token_id=[2]
    )
    capfd.readouterr()
    assert generate(model, tokenizer, PROMPTS) == expected
    assert model.generation_config is own
    assert "max_length" not in capfd.readouterr().err  # a warning a batch


def test_every_token_that_ends_a_text_does() -> None:
    """Llama-3 ends turns and texts with different tokens, named in its generation config."""
    model, tokenizer = tiny_llama(3, dtype=torch.float64), tiny_tokenizer()
    with torch.no_grad():
        ids = tokenizer("Ada")["input_ids"]
        first = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        second = int(model(input_ids=torch.tensor([[*ids, first]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [2, second]
    assert second != first
    text = generate(model, tokenizer, ["Ada"], stop=())[0]
    assert text == continuation(model, tokenizer, "Ada", 40, (), {2, second}) == tokenizer.decode([first]).strip()


def test_who_has_ended_costs_no_more() -> None:
    """A batch ends when all its rows have, and a row that goes on does not keep the others at work."""
    model, tokenizer = tiny_llama(5, dtype=torch.float64), tiny_tokenizer()
    rows: list[int] = []

    def remember(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        rows.append(len(keywords["input_ids"]))

    def steps(prompts: list[str], stop: tuple[str, ...] = ("e", "nd", "ar")) -> int:
        rows.clear()
        generate(model, tokenizer, prompts, stop=stop)
        return len(rows)

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    alone = {prompt: steps([prompt]) for prompt in PROMPTS}
    short = [prompt for prompt, n in alone.items() if n < 10]
    long = max(PROMPTS, key=alone.__getitem__)
    assert len(short) > 1
    assert steps(short) == max(alone[prompt] for prompt in short)
    assert steps([*short, long]) == alone[long] > 10
    assert sum(rows) == (len(short) + 1) * 10 + alone[long] - 10
    assert steps(PROMPTS[:1], ()) == 40
    handle.remove()


def test_similar_lengths_share_a_batch() -> None:
    model, tokenizer = tiny_llama(0), tiny_tokenizer()
    prompts = ["Ada", "Once upon a time there was a little girl named Lily"] * 4
    shapes = []

    def remember(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        shapes.append(tuple(keywords["input_ids"].shape))

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    generate(model, tokenizer, prompts, max_new_tokens=1, batch_size=4)
    handle.remove()
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert shapes == [(4, max(lengths)), (4, min(lengths))]


def test_tokenizer_without_a_padding_token() -> None:
    model, tokenizer = tiny_gpt2(4, dtype=torch.float64), tiny_tokenizer(bos=False)
    expected = generate(model, tokenizer, PROMPTS)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS) == expected


def test_mode_is_handed_back() -> None:
    model, tokenizer = tiny_llama(0), tiny_tokenizer()
    model.train()
    generate(model, tokenizer, ["Ada"], max_new_tokens=1)
    assert model.training
    assert generate(model, tokenizer, []) == []


def test_refusals() -> None:
    model, tokenizer = tiny_llama(0), tiny_tokenizer(bos=False)
    with pytest.raises(ValueError, match="no token"):
        generate(model, tokenizer, ["Ada", ""])
    with pytest.raises(ValueError, match="exceed the model's 512"):
        generate(model, tokenizer, ["Ada " * 500])
    with pytest.raises(ValueError, match="stop string"):
        generate(model, tokenizer, ["Ada"], stop=("",))
    with pytest.raises(ValueError, match="at least 1"):
        generate(model, tokenizer, ["Ada"], max_new_tokens=0)
