"""The token at which a subject ends, wherever it stands and however it is split."""

from typing import Any

import pytest
import torch
from language import tiny_llama, tiny_tokenizer
from requests_and_text import DOCUMENTS, TOKENIZER, same, state
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from curvlab.data.edits import Request
from curvlab.data.text import PLAIN, QA, fill
from curvlab.editing import edit
from curvlab.editing.lookup import look_up
from curvlab.editing.subject import subject_ends, token_positions
from curvlab.editing.values import Locating

LOCATE = ("rome", "memit", "alphaedit")


def text_through(text: str, position: int, tokenizer: Any = TOKENIZER) -> str:
    """What the tokens up to a position spell."""
    return str(tokenizer.decode(tokenizer(text)["input_ids"][: position + 1], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("prompt", "subject", "through"),
    [
        ("The capital of France is", "France", "The capital of France"),
        ("Zyx Quorvath was born in", "Zyx Quorvath", "Zyx Quorvath"),  # many tokens
        ("Rome and Rome of old lie in", "Rome", "Rome"),  # the first of two
        ("Joanna met Ann in", "Ann", "Joanna met Ann"),  # as a word of its own
        ("Joanna lives in", "anna", "Joanna"),  # not as one
        ("Anna, Ann and Anne live in", "Ann", "Anna, Ann"),
        ("Paris's mayor is", "Paris", "Paris"),
        ("Who is (Ada Lovelace)", "Ada Lovelace", "Who is (Ada Lovelace"),
        ("She met Ada Lovelace", "Ada Lovelace", "She met Ada Lovelace"),  # at the very end
        ("Der Sänger Björk Guðmundsdóttir singt", "Björk Guðmundsdóttir", "Der Sänger Björk Guðmundsdóttir"),
        ("The band 東京事変 comes from", "東京事変", "The band 東京事変"),
        ("The emoji 👩‍🚀 stands for", "👩‍🚀", "The emoji 👩‍🚀"),
        ("The emoji e\u0301 stands for", "e\u0301", "The emoji e\u0301"),  # a combining accent
        ("H2O2 is made of", " H2O2 ", "H2O2"),
        ("Is C++ older than C?", "C", "Is C"),
        ("Is C++ older than C?", "C++", "Is C++"),
    ],
)
@pytest.mark.parametrize("template", [PLAIN, QA, "{question} is asked of {question}"])
@pytest.mark.parametrize("bos", [True, False])
def test_subjects_are_found(prompt: str, subject: str, through: str, template: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    before = template[: template.index("{question}")]
    (end,) = subject_ends([Request(prompt, "x", subject)], template)
    text = fill(template, prompt)
    assert text[: end + 1] == before + through
    for prefix in ("", "Once upon a time. "):
        (position,) = token_positions(tokenizer, [f"{prefix}{text} London"], [len(prefix) + end]).tolist()
        assert text_through(f"{prefix}{text} London", position, tokenizer).startswith(prefix + before + through)
        short = text_through(f"{prefix}{text} London", position - 1, tokenizer)
        assert not short.startswith(prefix + before + through)


def words(**how: Any) -> PreTrainedTokenizerFast:
    """A token for each of some words, whatever stands in them."""
    vocabulary = {"<unk>": 0, "Paris's": 1, "mayor": 2, "is": 3, "Anne": 4, "the-Rome-of": 5, "east": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "normalizer" in how:
        tokenizer.normalizer = how["normalizer"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


def test_a_subject_merged_with_its_neighbours_is_the_token_that_holds_its_end() -> None:
    for text, subject, position in (("Paris's mayor is Anne", "Paris", 0), ("is the-Rome-of east", "Rome", 1)):
        (end,) = subject_ends([Request(text, "x", subject)], PLAIN)
        assert token_positions(words(), [text], [end]).tolist() == [position]


def test_a_character_that_no_token_holds() -> None:
    tokenizer = words(normalizer=normalizers.Replace("#", ""))
    with pytest.raises(ValueError, match="no token for the last character of a subject: '#' in"):
        token_positions(tokenizer, ["mayor # is"], [6])


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast version"):
        token_positions(Slow(), ["text"], [0])


WITHOUT = [
    Request("The capital of France is", "Rome", "France"),
    Request("Alan Turing works in", "Paris", "Turing, Alan"),
    Request("Her mother tongue is", "Italy"),
    Request("Once upon a time there was", "London", "  "),
]


def test_absent_subjects_are_listed() -> None:
    with pytest.raises(ValueError, match="prompts of 3 of 4 requests do not hold their subject") as error:
        subject_ends(WITHOUT, PLAIN)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["request 1", "request 2", "request 3"]
    assert "'Turing, Alan' is not in the prompt: 'Alan Turing works in'" in lines[0]
    assert "no subject is given" in lines[1]
    with pytest.raises(ValueError, match="subject must be one of"):
        subject_ends(WITHOUT, PLAIN, "first-token")


@pytest.mark.parametrize("name", LOCATE)
def test_absent_subjects_are_refused_before_anything_is_done(name: str) -> None:
    model = tiny_llama(0)
    before = state(model)
    with pytest.raises(ValueError, match=r"request 1: 'Turing, Alan' is not in the prompt"):
        edit(model, TOKENIZER, WITHOUT, editor=name, layers="model.layers.0.mlp.down_proj", capability=DOCUMENTS)
    assert same(state(model), before)


@pytest.mark.parametrize("template", [PLAIN, QA])
def test_the_prompts_last_token_stands_in(template: str) -> None:
    """For those without a subject, or for all; they have no text about their subject."""
    options = Locating(template=template)
    given: dict[str, Any] = {"options": options, "essence": "{subject} is a"}
    look = look_up(TOKENIZER, WITHOUT, ["So. "], subject="last-token", **given)
    everywhere = look_up(TOKENIZER, WITHOUT, ["So. "], subject="ignored", **given)
    for i, request in enumerate(WITHOUT):
        for row, prefix in ((i, ""), (4 + i, "So. ")):
            prompt = prefix + fill(template, request.prompt)
            assert text_through(f"{prompt} {request.target}", int(everywhere.positions[row])) == prompt
            # the next token is the target's first
            at = int(everywhere.positions[row])
            assert look.batch.targets[row, at] != -100
            assert (look.batch.targets[row, :at] == -100).all()
    assert look.positions[0] < everywhere.positions[0]
    assert torch.equal(look.positions[1:4], everywhere.positions[1:4])
    assert (look.of_essence.tolist(), everywhere.of_essence.tolist()) == ([0], [])
    assert everywhere.essence is None
    assert look.essence is not None
    assert TOKENIZER.decode(look.essence.inputs["input_ids"][0, 1:]) == "France is a"


def test_parts_of_a_lookup() -> None:
    requests = [Request(f"{name} lives in", "Rome", name if i != 2 else "") for i, name in enumerate("ABCDE")]
    options = Locating(subject="last-token")
    given: dict[str, Any] = {"options": options, "subject": "last-token", "essence": "So {subject} is"}
    whole = look_up(TOKENIZER, requests, ["Yes. ", "Then. "], **given)
    for index in ([1, 2, 4], [2], [0, 1, 2, 3, 4]):
        part = whole.of(torch.tensor(index))
        own = look_up(TOKENIZER, [requests[i] for i in index], ["Yes. ", "Then. "], **given)
        assert (part.n, part.contexts) == (own.n, 3)
        for name in ("positions", "essence_positions", "of_essence"):
            assert torch.equal(getattr(part, name), getattr(own, name))
        assert torch.equal(part.batch.inputs["input_ids"], own.batch.inputs["input_ids"])
        assert torch.equal(part.batch.targets, own.batch.targets)
        assert (part.essence is None) == (own.essence is None)
        if part.essence is not None and own.essence is not None:
            assert torch.equal(part.essence.inputs["input_ids"], own.essence.inputs["input_ids"])
    values = torch.arange(15.0).unsqueeze(1)
    assert whole.mean(values).tolist() == [[i / 2 + (5 + i + 10 + i) / 4] for i in range(5)]
