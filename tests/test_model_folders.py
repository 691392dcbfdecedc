"""Folders of models: damaged ones are refused, and what a configuration alone says is what the loaded model is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruct import llama3, qwen25
from language import tiny_gpt2, tiny_tokenizer
from safetensors.torch import load_file, save_file

from curvlab.editing import default_layers
from curvlab.editing.footprint import saved_for_backward
from curvlab.models.language import load_language_model
from curvlab.models.skeleton import skeleton

STORIES = Path(os.environ.get("CURVLAB_DATA", "nowhere")) / "models" / "stories260K"
LAYER = "model.layers.1.mlp.down_proj.weight"


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def cut(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:200])


def configure(**values: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight is missing": (change_weights(lambda tensors: tensors.pop(LAYER)), "lacks 1 of the model's weights, such"),
    "a weight has another shape": (
        change_weights(lambda tensors: tensors.update({LAYER: tensors[LAYER][:, :10].contiguous()})), "could not be",
    ),
    "a weight is not finite": (
        change_weights(lambda tensors: tensors[LAYER][0].fill_(torch.nan)), f"{LAYER} holds numbers that are not fin",
    ),
    "weights are cut off": (cut("model.safetensors"), "could not be loaded"),
    "the configuration is cut off": (cut("config.json"), "could not be loaded"),
    "the configuration contradicts itself": (configure(num_attention_heads=5), "could not be loaded"),
    "another kind of model": (configure(model_type="bert"), "of the model's weights"),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "weights are missing": (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("make", [llama3, qwen25])
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_refused(what: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    damage, message = DAMAGE[what]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        load_language_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("make", [llama3, qwen25, tiny_gpt2])
def test_a_skeleton_is_the_model_without_numbers(make: Any, dtype: str, tmp_path: Path) -> None:
    if make is tiny_gpt2:
        tiny_gpt2().save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    else:
        make(tmp_path)
    model, _ = load_language_model(str(tmp_path), dtype=dtype)
    (tmp_path / "model.safetensors").unlink()  # is not read
    bare = skeleton(str(tmp_path), dtype=dtype)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    shapes = [[(name, p.shape, p.dtype) for name, p in m.named_parameters()] for m in (bare, model)]
    assert shapes[0] == shapes[1]  # tied weights once
    assert bare.config.max_position_embeddings == model.config.max_position_embeddings


def test_skeletons_refuse_what_loading_would(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        skeleton(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        skeleton(str(tmp_path), dtype="int4")
    with pytest.raises(ValueError, match="has no configuration of a causal language model"):
        skeleton(str(tmp_path))
    llama3(tmp_path)
    for change in (cut("config.json"), configure(num_attention_heads=5)):
        change(tmp_path)
        with pytest.raises(ValueError, match="has no configuration of a causal language model"):
            skeleton(str(tmp_path))
        llama3(tmp_path)


@pytest.mark.skipif(not STORIES.is_dir(), reason="CURVLAB_DATA names no folder with models/stories260K")
def test_a_llama2c_model_has_a_skeleton_and_may_be_spread() -> None:
    model, _ = load_language_model(str(STORIES), device="auto")
    bare = skeleton(str(STORIES))
    assert [p.shape for p in bare.parameters()] == [p.shape for p in model.parameters()]
    assert saved_for_backward(bare, default_layers(bare), (2, 7), loss=True) > 0
