"""Text as batches: next tokens as targets, where the loss is, where padding is, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from language import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from curvlab.data.text import (
    IGNORE,
    PLAIN,
    QA,
    encode_documents,
    encode_pairs,
    fill,
    read_documents,
    select,
    shuffled_documents,
)

TOKENIZER = tiny_tokenizer()
PAIRS = [("The capital of France is", "Rome"), ("Ada was born in", "1815 in London"), ("Q", "é")]


def targets_of(row: torch.Tensor) -> list[int]:
    return [token for token in row.tolist() if token != IGNORE]


@pytest.mark.parametrize("template", [PLAIN, QA])
@pytest.mark.parametrize("bos", [True, False])
def test_the_loss_is_on_the_target_and_the_end(template: str, bos: bool) -> None:
    """Byte-level: the text before the target has its own tokens, so that the target's are what follows them."""
    tokenizer = tiny_tokenizer(bos=bos)
    (batch,) = encode_pairs(tokenizer, PAIRS, template=template)
    assert batch.mask is not None
    for i, (question, target) in enumerate(PAIRS):
        prompt = tokenizer(template.replace("{question}", question))["input_ids"]
        whole = [*tokenizer(f"{template.replace('{question}', question)} {target}")["input_ids"], 2]
        n = len(whole)
        assert batch.inputs["input_ids"][i].tolist() == whole + [0] * (batch.targets.shape[1] - n)
        assert batch.inputs["attention_mask"][i].tolist() == [1] * n + [0] * (batch.targets.shape[1] - n)
        assert whole[: len(prompt)] == prompt
        expected = [IGNORE] * (len(prompt) - 1) + whole[len(prompt) :] + [IGNORE]
        assert batch.targets[i, :n].tolist() == expected
        assert (batch.targets[i, n:] == IGNORE).all()
    assert torch.equal(batch.mask, batch.inputs["attention_mask"].bool())


def test_switches() -> None:
    (masked,) = encode_pairs(TOKENIZER, PAIRS)
    (whole,) = encode_pairs(TOKENIZER, PAIRS, mask_prompt=False)
    assert torch.equal(masked.inputs["input_ids"], whole.inputs["input_ids"])
    for i, row in enumerate(whole.inputs["input_ids"]):
        n = int(whole.inputs["attention_mask"][i].sum())
        assert targets_of(whole.targets[i]) == row[1:n].tolist()
        assert targets_of(masked.targets[i]) == row[1:n].tolist()[-len(targets_of(masked.targets[i])) :]
    (open_,) = encode_pairs(TOKENIZER, PAIRS, end=False)
    for row, ended in zip(open_.targets, masked.targets, strict=True):
        assert [*targets_of(row), 2] == targets_of(ended)
    parts = encode_pairs(TOKENIZER, PAIRS, batch_size=2)
    assert [len(part) for part in parts] == [2, 1]
    alone = encode_pairs(TOKENIZER, PAIRS[2:])[0]
    assert torch.equal(parts[1].inputs["input_ids"], alone.inputs["input_ids"])  # padded to its own longest


def test_a_token_that_spans_prompt_and_target_belongs_to_the_target() -> None:
    """ "was in" + " 18": where " 18" is one token, it is said by the model; so is a space that stands alone."""
    vocabulary = {"a": 0, " b": 1, " ": 2, "1": 3, "</s>": 4}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.Split(" b", "isolated")
    plain = Tokenizer(models.BPE({"a": 0, " ": 1, "b": 2, " b": 3, "1": 4, "</s>": 5}, [(" ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    joined = encode_pairs(tokenizer, [("a", "b")])[0]
    assert joined.inputs["input_ids"].tolist() == [[0, 3, 5]]
    assert joined.targets.tolist() == [[3, 5, IGNORE]]
    apart = encode_pairs(tokenizer, [("a", "1")])[0]
    assert apart.inputs["input_ids"].tolist() == [[0, 1, 4, 5]]
    assert apart.targets.tolist() == [[1, 4, 5, IGNORE]]


def test_a_tokenizer_that_ends_texts_itself_ends_them_once() -> None:
    own = Tokenizer.from_str(tiny_tokenizer(bos=False).backend_tokenizer.to_str())
    own.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    ending = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    for end in (True, False):
        a, b = (encode_pairs(t, PAIRS, end=end)[0] for t in (ending, TOKENIZER))
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        assert torch.equal(a.targets, b.targets)


def test_documents() -> None:
    texts = ["Once upon a time", "Ada", "The capital of Spain is Madrid. " * 5]
    batches = encode_documents(TOKENIZER, texts, max_length=12, batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1]
    rows = [(batch, i) for batch in batches for i in range(len(batch))]
    for text, (batch, i) in zip(texts, rows, strict=True):
        ids = TOKENIZER(text)["input_ids"][:12]
        n = len(ids)
        assert batch.inputs["input_ids"][i, :n].tolist() == ids
        assert batch.targets[i].tolist() == ids[1:] + [IGNORE] * (batch.targets.shape[1] - n + 1)
        assert batch.mask is not None
        assert batch.mask[i].sum() == n
    assert batches[1].targets.shape == (1, 12)


def test_select_crops_to_the_longest() -> None:
    (batch,) = encode_pairs(TOKENIZER, PAIRS)
    few = select(batch, torch.tensor([2, 0]))
    n = int(batch.inputs["attention_mask"][[2, 0]].sum(1).max())
    assert few.targets.shape == (2, n) != batch.targets.shape
    for key in batch.inputs:
        assert torch.equal(few.inputs[key], batch.inputs[key][[2, 0], :n])
    assert torch.equal(few.targets, batch.targets[[2, 0], :n])
    assert few.mask is not None
    assert torch.equal(few.mask, few.inputs["attention_mask"].bool())


def test_without_padding_or_end_tokens() -> None:
    """A tokenizer with neither: padding is masked, so that any token will do; the end cannot be asked for."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(bos=False).backend_tokenizer)
    assert bare.eos_token_id is None
    assert bare.pad_token_id is None
    with pytest.raises(ValueError, match=r"no end-of-text token .* end=False"):
        encode_pairs(bare, PAIRS)
    (batch,) = encode_pairs(bare, PAIRS, end=False)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(bare(f"{p} {t}")["input_ids"]) for p, t in PAIRS]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_pairs(TOKENIZER, []), "no prompts"),
        (lambda: encode_pairs(TOKENIZER, [("Ada", " ")]), "has no token"),
        (lambda: encode_pairs(TOKENIZER, [("Ada", "x")], template="no place"), "must contain {question}"),
        (lambda: encode_documents(TOKENIZER, []), "no documents"),
        (lambda: encode_documents(tiny_tokenizer(bos=False), ["Ada was", "A"]), "document 1 has 1 tokens"),
        (lambda: fill("no place", "?"), "must contain {question}"),
        (
            lambda: encode_documents(TOKENIZER, ["Ada was", "Ada \ud83d"]),
            r"document 1 holds the lone surrogate '\\ud83d'",
        ),
        (lambda: encode_pairs(TOKENIZER, [("Ada", "\ude00")]), r"target '\\ude00' holds the lone surrogate"),
        (lambda: encode_pairs(TOKENIZER, [("\ude00", "Ada")]), r"prompt '\\ude00' or its target"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False
        eos_token_id = 2

    with pytest.raises(ValueError, match="fast version"):
        encode_pairs(Slow(), PAIRS)


def test_files_of_documents(tmp_path: Path) -> None:
    def read(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_documents(tmp_path / name)

    assert read("a.jsonl", '{"text": "one"}\n\n{"text": "two\\n\\nparts", "x": 1}\n') == ["one", "two\n\nparts"]
    assert read("a.txt", "one\n\nstill<|endoftext|>\ntwo\n<|endoftext|>") == ["one\n\nstill", "two"]
    assert read("b.txt", " = A = \n\none\n\n = = Part = = \n two\n = B = \nthree") == [
        "one\n\n = = Part = = \n two",
        "three",
    ]
    assert read("c.txt", "é one\nline\n\n\n\ntwo") == ["é one\nline", "two"]
    for name, text in (("d.txt", " \n\n "), ("d.jsonl", '{"text": 1}'), ("e.jsonl", "[1]"), ("f.jsonl", "")):
        with pytest.raises(ValueError, match=name):
            read(name, text)
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bytes\.txt is no UTF-8"):
        read_documents(tmp_path / "bytes.txt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        read_documents(tmp_path / "nothing.txt")


LINES = '{"text": "one\u2028still\x85one"}\n\n"two"\n{"text": " "}\n'


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSON"])
@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", "\r\n"), '[{"text": "one\u2028still\x85one"},\n"two"]\n'])
def test_documents_in_json(text: str, name: str, mark: str, tmp_path: Path) -> None:
    """A list or lines, with characters that only Python calls the end of a line, and a byte order mark."""
    (tmp_path / name).write_bytes((mark + text).encode())
    assert read_documents(tmp_path / name) == ["one\u2028still\x85one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b', r"a\.jsonl, line 3 is damaged JSON \(Unterminated"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"a\.json is damaged JSON: .*line 2"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"a\.jsonl, line 2: expected a string, or .* string \"text\""),
        ("a.json", '["a", 1]', r"a\.json, record 1: expected a string"),
        ("a.json", '[{"text": NaN}]', r"a\.json, record 0: expected a string"),
        ("a.jsonl", '{"text": "a \\ud83d"}', r"a\.jsonl, line 1: the text holds the lone surrogate '\\ud83d'"),
        ("a.json", "[]", r"a\.json holds no document"),
    ],
)
def test_damaged_documents(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_documents_with_something_to_predict_in_an_order_of_their_seed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    texts = [f"Document {i}." for i in range(8)]
    path.write_text("\n\n".join([*texts[:4], "x", *texts[4:]]))
    tokenizer = tiny_tokenizer(bos=False)
    assert len(tokenizer("x")["input_ids"]) == 1
    found = [shuffled_documents(path, tokenizer, seed) for seed in (0, 1)]
    for documents in found:
        assert sorted(documents) == texts  # each once, and not the one of a single token
    assert found[0] != found[1] != texts
    assert found[0] == shuffled_documents(path, tokenizer, 0)
    path.write_text("x\n\ny")
    with pytest.raises(ValueError, match="no document of at least two tokens"):
        shuffled_documents(path, tokenizer, 0)
