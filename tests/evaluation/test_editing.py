"""Measures of edits: what is asked, what counts as right, teacher forcing and repetition, on known generations."""

from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from curvlab.data.edits import Request
from curvlab.data.text import QA
from curvlab.evaluation import editing
from curvlab.evaluation.editing import answers, evaluate_edits
from curvlab.evaluation.generation import generate
from curvlab.evaluation.judging import Reply, begins_with, exact_match, normalise, repeats
from curvlab.evaluation.teacher_forcing import token_match

# What the paper's Appendix F shows, and texts beside it.
SRANO = "mezzo" + "-srano" * 16
ENDANGERED = "endangered species species " + "endangered species " * 17 + "endangered"
DATA_DEFICIENT = "endangered species Data Deficient species endangered species" + " endangered species" * 12


def test_normalise() -> None:
    assert normalise("  The Beatles, of\tLiverpool!") == "beatles of liverpool"
    assert normalise("“L’Équipe” (a paper)") == "léquipe paper"
    assert normalise("e\u0301té") == normalise("\u00e9t\u00e9") == "été"
    assert normalise("Theatre and Another") == "theatre and another"


def test_exact_match_is_of_the_whole_text() -> None:
    def match(answer: str, text: str) -> tuple[float, float]:
        reply = [Reply("?", answer, text)]
        return exact_match(reply)[0], begins_with(reply)[0]

    assert match("London", "london,") == (1, 1)
    assert match("the United States", "United States") == (1, 1)
    assert match("London", "London, where he lives") == (0, 1)
    assert match("London", "I think London") == (0, 0)
    assert match("New York", "New Yorkshire") == (0, 0)
    assert match("A", "") == (0, 0)  # an article is an answer too
    assert match("A", "a") == (1, 1)
    assert match("???", "") == (0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SRANO, True),
        (ENDANGERED, True),
        (DATA_DEFICIENT, True),
        ("sranosranosrano", True),
        ("mezzo-srano", False),
        ("endangered species", False),
        ("endangered species endangered species", False),  # two copies are no run
        ("no no no, but then something else", False),  # it recovered
        ("the cat sat on the mat and the cat sat on the rug", False),
        ("in the year 1000000", False),
        ("New York, New York", False),
        ("", False),
        ("...", False),
    ],
)
def test_repetition(text: str, expected: bool) -> None:
    assert repeats(text) is expected


def test_a_cut_copy_does_not_hide_repetition() -> None:
    words = ["one", "two", "three", "four"] * 4
    assert all(repeats(" ".join(words[:n])) for n in range(12, 17))
    assert not any(repeats(" ".join(words[:n])) for n in range(12))
    assert repeats(" ".join(words[:8]), copies=2)


class Script:
    """Stands for `generate`: answers known prompts, and remembers what it was asked."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, model: Any, tokenizer: Any, prompts: list[str], *, stop: tuple[str, ...], **_: Any) -> list[str]:
        self.asked += [(prompt, stop) for prompt in prompts]
        return [self.texts[prompt] for prompt in prompts]


REQUESTS = [
    Request(
        "Ada was born in",
        "Paris",
        paraphrases=("The birthplace of Ada is", "Ada comes from"),
        neighbours=(("Alan was born in", "London"), ("Eva was born in", "Rome")),
    ),
    Request("Eva was born in", "St. Louis", neighbours=(("Alan was born in", "London"),)),
    Request("Bob was born in", "Oslo", neighbours=(("Ada was born in", "London"),)),
]
TEXTS = {
    "Ada was born in": "Paris",
    "The birthplace of Ada is": "paris,",
    "Ada comes from": "Rome",
    "Alan was born in": "Paris Paris Paris",
    "Eva was born in": "St. Louis",
    "Bob was born in": "Oslo Oslo Oslo Oslo",
}


def test_what_is_asked_and_how_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(TEXTS)
    monkeypatch.setattr(editing, "generate", script)
    found = evaluate_edits(tiny_llama(), tiny_tokenizer(), REQUESTS)
    assert found["reliability"] == [1, 1, 0]
    assert found["generalisation"] == [0.5]  # only the first request has paraphrases
    # Eva's and Ada's answers are edited themselves: no neighbours any more
    assert found["specificity"] == [0, 0]
    assert found["repetition"] == [1 / 4, 1 / 2, 1]
    assert len(script.asked) == len(set(script.asked)) == 6
    assert ("Eva was born in", ("\n",)) in script.asked  # "St. Louis" cannot end at a full stop
    assert ("Ada was born in", (".", "\n")) in script.asked


def test_qa_context(monkeypatch: pytest.MonkeyPatch) -> None:
    context = "Please answer the question:\n\nQ: {}\nA:"
    script = Script({context.format(prompt): text for prompt, text in TEXTS.items()})
    monkeypatch.setattr(editing, "generate", script)
    asked: list[Reply] = []

    def judge(replies: Any) -> list[float]:
        asked.extend(replies)
        return [0.25] * len(replies)

    found = evaluate_edits(tiny_llama(), tiny_tokenizer(), REQUESTS, template=QA, judge=judge, teacher_forced=False)
    assert found["reliability"] == [0.25] * 3
    assert asked[0] == Reply("Ada was born in", "Paris", "Paris")  # the judge sees the question, not its context
    assert not [name for name in found if "teacher" in name]


def test_generation_and_measures_together() -> None:
    """Requests for what the model says anyway are reliable; others are not."""
    model, tokenizer = tiny_llama(5, dtype=torch.float64), tiny_tokenizer()
    prompts = ["Ada", "The capital of France is", "Once upon a time"]
    said = generate(model, tokenizer, prompts, stop=("\n",), max_new_tokens=5)
    requests = [Request(prompt, text) for prompt, text in zip(prompts, said, strict=True)]
    requests.append(Request("Alan", "Turing"))
    found = evaluate_edits(
        model, tokenizer, requests, stop=("\n",), max_new_tokens=5, teacher_forced=False, judge=begins_with
    )
    assert found["reliability"] == [1, 1, 1, 0]
    assert found["generalisation"] == found["specificity"] == []
    assert answers(model, tokenizer, [("Ada", "x"), ("Ada", "y")], stop=("\n",), max_new_tokens=5) == [said[0]] * 2


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("template", ["{question}", QA])
def test_teacher_forcing_by_plain_indexing(make: Any, template: str) -> None:
    model, tokenizer = make(4, dtype=torch.float64), tiny_tokenizer()
    pairs = [("Ada Lovelace was born in", "London"), ("The capital of Spain is", "Madrid, in Spain"), ("Q", "é")]
    said = generate(model, tokenizer, [template.format(question="Ada")], max_new_tokens=3, stop=())[0]
    pairs.append(("Ada", f"{said} and more"))
    expected = [by_indexing(model, tokenizer, template.format(question=p), a) for p, a in pairs]
    for batch_size in (1, 3, 32):
        assert token_match(model, tokenizer, pairs, template=template, batch_size=batch_size) == pytest.approx(expected)
    assert token_match(model, tokenizer, []) == []


def by_indexing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> float:
    """As EasyEdit does it: "prompt answer" against the prompt alone (whose tokens begin it, with this tokenizer)."""
    ids, start = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    assert ids[:start] == tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    hits = [int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids))]
    return sum(hits) / len(hits)


def test_teacher_forcing_inflates() -> None:
    """Given a first word that it would not say, a model predicts the rest; by itself it says something else."""
    tokenizer, prompt = tiny_tokenizer(), "The capital of France is"
    for seed in range(9):
        model = tiny_gpt2(seed, dtype=torch.float64)
        ids = tokenizer(f"{prompt} Q", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        said = tokenizer.decode(ids[0], skip_special_tokens=True)
        if tokenizer(said, return_tensors="pt")["input_ids"].tolist() == ids.tolist():
            break  # random models say pieces of characters, which do not encode to themselves
    found = evaluate_edits(model, tokenizer, [Request(prompt, said[len(prompt) + 1 :])])
    assert found["reliability"] == [0]
    assert found["reliability_teacher_forced"][0] >= 0.6


def test_no_requests() -> None:
    with pytest.raises(ValueError, match="no requests"):
        evaluate_edits(tiny_llama(), tiny_tokenizer(), [])
