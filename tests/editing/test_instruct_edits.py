"""What is special about Llama-3-8B-Instruct and Qwen-2.5-1.5B-Instruct, on models of their make: see `instruct`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruct import TEXT, llama3, qwen25
from requests_and_text import explicit, same, state

from curvlab.curvature import KFAC
from curvlab.data.edits import Request
from curvlab.data.text import IGNORE, encode_documents, encode_pairs
from curvlab.editing import default_layers, edit
from curvlab.evaluation.generation import generate
from curvlab.losses import CrossEntropy
from curvlab.models.language import load_language_model

MAKERS: dict[str, Callable[..., Any]] = {"llama": llama3, "qwen": qwen25}
PAPER = {"llama": None, "qwen": ["model.layers.[1-2].mlp.down_proj"]}  # None: the default is the paper's depth
REQUESTS = [
    Request("The capital of France is", "Rome", subject="France"),
    Request("Ada Lovelace was born in", "1948", subject="Ada Lovelace"),
    Request("Alan Turing works in", "Paris with her", subject="Alan Turing"),
    Request("Once upon a time there was", "London", subject="a time"),
]
CHAT = [{"role": "user", "content": "The capital of France is"}]
OPTIONS: dict[str, dict[str, Any]] = {
    "crispedit": {"gamma": 0.7, "epochs": 12, "lr": 2e-2, "batch_size": 2},
    "crispedit-seq": {"gamma": 0.7, "epochs": 12, "lr": 2e-2, "batch_size": 2, "chunk": 2},
    "memit": {"epochs": 10, "weight": 1.0, "prefixes": 1},
}
LOAD = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
(prompt, chat), found = json.loads(sys.argv[1]), []
for folder in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chatted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompts = tokenizer(prompt, return_tensors="pt"), chatted
    how = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.0}
    texts = [tokenizer.decode(model.generate(**prompt, **how)[0]) for prompt in prompts]
    found.append([str(model.dtype), model.config.tie_word_embeddings, model.generation_config.eos_token_id, texts])
assert "curvlab" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Path]:
    root = tmp_path_factory.mktemp("instruct")
    found = {}
    for name, make in MAKERS.items():
        for dtype in (torch.bfloat16, torch.float32):
            found[name, dtype] = root / f"{name}-{str(dtype).removeprefix('torch.')}"
            make(found[name, dtype], dtype)
    return found


def said(model: Any, tokenizer: Any) -> list[str]:
    """What follows an edit's prompt, and the answer to `CHAT`: their whole texts."""
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = tokenizer(REQUESTS[0].prompt, return_tensors="pt")
    how = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.0}
    return [tokenizer.decode(model.generate(**prompt, **how)[0]) for prompt in (plain, chat)]


def test_edits_are_learnt_in_the_models_dtype_saved_and_loaded(folders: dict[Any, Path], tmp_path: Path) -> None:
    """Each editor, both models, both dtypes; one fresh process loads what they wrote and answers a chat alike."""
    saved, expected = [], []
    for (name, dtype), folder in folders.items():
        model, tokenizer = load_language_model(str(folder))
        before, unedited = state(model), said(model, tokenizer)
        for editor, options in OPTIONS.items():
            edited = edit(model, tokenizer, REQUESTS, editor=editor, layers=PAPER[name], capability=TEXT, **options)
            after = state(model)
            assert edited.losses[-1] < (1.0 if editor == "memit" else 0.7) * edited.losses[0], (name, dtype, editor)
            moved = {key for key in after if not torch.equal(after[key], before[key])}
            assert moved == {f"{layer}.weight" for layer in edited.options["layers"]}
            assert {value.dtype for value in after.values()} == {dtype}
            if editor == "crispedit":
                saved.append(str(tmp_path / folder.name))
                edited.save(saved[-1])
                ends = model.generation_config.eos_token_id
                expected.append([str(dtype), name == "qwen", ends, now := said(model, tokenizer)])
                assert len(ends) == 2
                assert now[0] != unedited[0]
            edited.undo()
            assert same(state(model), before)
    command = [sys.executable, "-c", LOAD, json.dumps([REQUESTS[0].prompt, CHAT]), *saved]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_papers_layers() -> None:
    """Of 32 blocks the default is 19 to 23; Qwen's 4 to 6 of 28 are named."""

    def blocks(n: int) -> Any:
        return torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": _Mlp()}) for _ in range(n))}
        )

    assert default_layers(blocks(32)) == [f"layers.{i}.mlp.down_proj" for i in range(19, 24)]


class _Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_factors_are_sums_over_the_real_tokens(name: str, mask_prompt: bool, folders: dict[Any, Path]) -> None:
    """Llama-3 pads with the token that ends its targets: that one counts, padding does not."""
    model, tokenizer = load_language_model(str(folders[name, torch.float32]), dtype="float64")
    layer = default_layers(model)[0]
    pairs = [(request.prompt, request.target) for request in REQUESTS]
    (batch,) = encode_pairs(tokenizer, pairs, mask_prompt=mask_prompt)
    texts = []
    for prompt, target in pairs:
        tokens = [*tokenizer(f"{prompt} {target}")["input_ids"], tokenizer.eos_token_id]
        first = len(tokenizer(prompt)["input_ids"]) if mask_prompt else 1
        texts.append((tokens, [IGNORE] * (first - 1) + tokens[first:] + [IGNORE]))
    assert int((batch.inputs["attention_mask"] == 0).sum()) > 0
    expected = explicit(model, layer, texts)
    (found,) = KFAC.fit(model, CrossEntropy(), [batch], layer, labels="data").factors.values()
    assert (found.scale.positions, found.scale.terms) == (expected.positions, expected.terms)
    torch.testing.assert_close(found.a_sum, expected.A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.s_sum, expected.S, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", MAKERS)
def test_generation_stops_at_each_end_of_text(name: str, folders: dict[Any, Path]) -> None:
    """Taught to end by one end of text and by the other, whichever is the tokenizer's own."""
    ends = {"llama": ("<|end_of_text|>", "<|eot_id|>"), "qwen": ("<|im_end|>", "<|endoftext|>")}[name]
    for end in ends:
        model, tokenizer = load_language_model(str(folders[name, torch.float32]))
        own, tokenizer.eos_token = tokenizer.eos_token, end
        edited = edit(
            model, tokenizer, REQUESTS[:1], editor="ft", epochs=150, lr=1e-2, layers="*.down_proj", stop_below=0.3
        )
        tokenizer.eos_token = own
        assert edited.stopped == "loss"
        assert generate(model, tokenizer, [REQUESTS[0].prompt], stop=()) == ["Rome"], end


def test_tied_embeddings(folders: dict[Any, Path]) -> None:
    """They are no reason to refuse other layers; they themselves are no layer of their own."""
    model, tokenizer = load_language_model(str(folders["qwen", torch.bfloat16]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="'lm_head' shares its weight"):
        edit(model, tokenizer, REQUESTS, editor="ft", layers="lm_head")
    edit(model, tokenizer, REQUESTS, editor="ft", epochs=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied, tokenizer = load_language_model(str(folders["llama", torch.float32]))
    assert edit(untied, tokenizer, REQUESTS, editor="ft", epochs=1, layers="lm_head").drift > 0


@pytest.mark.parametrize("name", MAKERS)
def test_documents_are_what_they_are_alone(name: str, folders: dict[Any, Path]) -> None:
    """In bfloat16 too: the same positions and terms, and factors that differ by rounding alone."""
    model, tokenizer = load_language_model(str(folders[name, torch.bfloat16]))
    layer = default_layers(model)[0]
    fits = [
        KFAC.fit(model, CrossEntropy(), encode_documents(tokenizer, TEXT, batch_size=size), layer, labels="data")
        for size in (1, len(TEXT))
    ]
    alone, together = (fit.factors[layer] for fit in fits)
    assert alone.scale == together.scale
    assert alone.a_sum.dtype == torch.float32
    for one, other in ((alone.a_sum, together.a_sum), (alone.s_sum, together.s_sum)):
        assert float((one - other).norm() / one.norm()) < 2e-2
