"""An edited model on disk: whole, loadable by transformers alone, and saying what it says here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama
from requests_and_text import DOCUMENTS, REQUESTS, TOKENIZER, same, state

from curvlab.editing import edit

PROMPTS = [request.prompt for request in REQUESTS]
LOAD = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, found = json.loads(sys.argv[1]), []
for folder in sys.argv[2:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    texts = [tokenizer.decode(model.generate(**i, max_new_tokens=6, do_sample=False)[0]) for i in ids]
    found.append([str(model.dtype), type(model).__name__, texts])
assert "curvlab" not in sys.modules
print(json.dumps(found))
"""


def said(model: Any) -> list[str]:
    texts = []
    for prompt in PROMPTS:
        out = model.generate(**TOKENIZER(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        texts.append(TOKENIZER.decode(out[0]))
    return texts


def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    folders, expected = [], []
    for model, editor in ((tiny_llama(0, dtype=torch.bfloat16), "crispedit"), (tiny_gpt2(0), "lora")):
        before = said(model)
        options = {"capability": DOCUMENTS, "epochs": 15, "lr": 1e-2, "batch_size": 5}
        edited = edit(model, TOKENIZER, REQUESTS, editor=editor, **options)
        now = said(model)
        assert now != before
        folders.append(str(tmp_path / editor / "model"))
        edited.save(folders[-1])
        expected.append([str(model.dtype), type(model).__name__, now])
    command = [sys.executable, "-c", LOAD, json.dumps(PROMPTS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_what_is_written(tmp_path: Path) -> None:
    model = tiny_llama(0)
    edited = edit(model, TOKENIZER, REQUESTS, editor="crispedit", capability=DOCUMENTS, epochs=2, gamma=0.7)
    edited.save(tmp_path)
    edited.save(tmp_path)  # over an earlier one
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))]
    record = json.loads((tmp_path / "curvlab_edit.json").read_text())
    assert record["editor"] == "crispedit"
    assert record["options"] | {"gamma": 0.7, "epochs": 2, "seed": 0} == record["options"]
    assert record["losses"] == edited.losses
    assert record["counts"] == edited.counts
    assert type(model).from_pretrained(tmp_path).config.vocab_size == model.config.vocab_size
    assert same(state(type(model).from_pretrained(tmp_path)), state(model))


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    edited = edit(model, TOKENIZER, REQUESTS, editor="ft", epochs=2)
    edited.save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)

    def fail(*args: Any, **how: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        edited.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_weights_of_an_earlier_model_do_not_stay(tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "factors.safetensors").write_bytes(b"")  # not a model's
    assert len(list(tmp_path.glob("model*"))) > 2
    edit(model, TOKENIZER, REQUESTS, editor="ft", epochs=2).save(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "factors.safetensors").exists()
    assert same(state(type(model).from_pretrained(tmp_path)), state(model))


def test_an_edit_that_was_undone_is_not_saved(tmp_path: Path) -> None:
    edited = edit(tiny_llama(0), TOKENIZER, REQUESTS, editor="ft", epochs=2)
    edited.undo()
    with pytest.raises(ValueError, match="undone"):
        edited.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
