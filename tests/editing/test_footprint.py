"""Memory known before weights are read: what autograd keeps, what curvature takes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from instruct import llama3, qwen25
from language import tiny_gpt2, tiny_llama
from requests_and_text import DOCUMENTS, TOKENIZER
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from curvlab.editing import Capability, default_layers, editors
from curvlab.editing.footprint import Footprint, Plan, announced, footprint, kept_by, saved_for_backward
from curvlab.layers import find_layers

GIB = 2**30
LLAMA = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
QWEN = Qwen2Config(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip


def bare(config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.requires_grad_(False).eval()


def tensors_in(value: Any, seen: dict[int, Tensor]) -> dict[int, Tensor]:
    """All tensors below a value, by their storage."""
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value
    elif isinstance(value, dict):
        for part in value.values():
            tensors_in(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            tensors_in(part, seen)
    elif type(value).__module__.startswith("curvlab"):
        tensors_in(vars(value), seen)
    return seen


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_activations_are_what_autograd_keeps(make: Any) -> None:
    """Of the model itself with fused attention, within a tenth."""
    model = make().requires_grad_(False)
    names = [layer.name for layer in find_layers(model, ["*.mlp.down_proj", "*.mlp.c_proj"][make is tiny_gpt2])][1:]
    for layer in find_layers(model, names):
        layer.module.weight.requires_grad_(True)
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def remember(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.zeros(3, 29, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    found = saved_for_backward(bare(model.config, torch.float32), names, (3, 29), loss=True)
    assert found == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("editor", ["crispedit", "crispedit-ekfac", "crispedit-covariance", "alphaedit", "memit"])
def test_curvature_is_what_the_capability_set_keeps(editor: str) -> None:
    """No more than estimated, and at least two thirds of it."""
    model, capability = tiny_llama(), Capability(DOCUMENTS)
    names = [layer.name for layer in find_layers(model, "*.mlp.down_proj")]
    curvature = kept_by(editors()[editor])[-1].split()[0]
    capability.statistics(model, TOKENIZER, names, curvature)  # type: ignore[arg-type]
    if editor != "memit":
        capability.spectrum(model, TOKENIZER, names, curvature).null_space(0.9)  # type: ignore[arg-type]
    held = sum(t.untyped_storage().nbytes() for t in tensors_in(capability._kept, {}).values())
    found = footprint(bare(model.config, torch.float32), names, Plan([editor], 4))
    estimated = found.stages["evaluation"]["curvature"]
    assert 2 / 3 * estimated <= held <= 1.02 * estimated  # vectors of length d are not counted


def test_every_editor_has_its_stage() -> None:
    model = bare(tiny_llama().config, torch.float32)
    for name in editors():
        found = footprint(model, None, Plan([name], 4))
        assert name in found.stages or name == "none"
        assert all(value >= 0 for parts in found.stages.values() for value in parts.values())
    sizes = [
        footprint(model, None, Plan(names, 4)).stages["evaluation"]["curvature"]
        for names in (["crispedit"], ["crispedit-ekfac"], ["crispedit", "crispedit-ekfac", "crispedit-eps"])
    ]
    assert max(sizes[:2]) < sizes[2] < sum(sizes[:2])  # curvature that several use is kept once
    with pytest.raises(ValueError, match="unknown editors"):
        footprint(model, None, Plan(["crispedt"], 4))
    with pytest.raises(ValueError, match="did you mean"):
        footprint(model, "model.layers.7.mlp.down_proj", Plan(["ft"], 4))


def test_at_the_papers_shapes() -> None:
    """Llama-3-8B and Qwen-2.5-1.5B in bfloat16: what fits one large GPU, and what dominates."""
    llama, qwen = bare(LLAMA, torch.bfloat16), bare(QWEN, torch.bfloat16)
    assert default_layers(llama) == [f"model.layers.{i}.mlp.down_proj" for i in range(19, 24)]
    found = footprint(llama, None, Plan(["crispedit"], 3000))
    assert found.stages["evaluation"]["weights"] == 2 * 8_030_261_248
    statistics, spectra = 4 * 5 * (14336**2 + 4096**2), 8 * 5 * (14336**2 + 4096**2 + 2 * 14336 * 4096)
    assert found.stages["factors"]["curvature"] == statistics + spectra
    assert 40 * GIB < found.peak < 80 * GIB
    small = footprint(qwen, "model.layers.[4-6].mlp.down_proj", Plan(["crispedit"], 3000))
    assert small.stages["evaluation"]["weights"] == 2 * 1_543_714_304  # tied embeddings once
    assert 8 * GIB < small.peak < 24 * GIB
    half = footprint(qwen, "model.layers.[4-6].mlp.down_proj", Plan(["crispedit"], 3000, batch_size=16))
    assert half.stages["crispedit"]["activations"] < small.stages["crispedit"]["activations"]


def test_what_takes_most_is_named_with_a_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"weights": 3 * GIB, "curvature": 5 * GIB, "activations": GIB}
    found = Footprint({"edits": parts, "evaluation": {"weights": 3 * GIB}}, {"a refit": {"curvature": 99 * GIB}})
    assert (found.peak, found.largest) == (9 * GIB, "edits")
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": 9 * GIB)
    found.require("cpu")
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": 8 * GIB)
    with pytest.raises(
        MemoryError, match=r"edits: curvature 5.0 GiB, weights 3.0 GiB, activations 1.0 GiB\) needs 9.0 GiB, 8.0 GiB"
    ) as refused:
        found.require("cpu")
    assert "instead: fewer or narrower layers, or one editor" in str(refused.value)


@pytest.mark.parametrize("make", [llama3, qwen25])
def test_said_before_any_weight_is_read(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    text = announced(str(tmp_path), None, Plan(["crispedit", "ft"], 4, request_tokens=8, document_tokens=32))
    assert "estimated memory, at most" in text
    for stage in ("factors", "eigenvectors", "crispedit", "crispedit, should a layer drift", "ft", "evaluation"):
        assert f"  {stage}: " in text
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": 1000)
    with pytest.raises(MemoryError, match="instead"):
        announced(str(tmp_path), None, Plan(["crispedit"], 4))


def test_a_model_that_cannot_be_traced_is_no_error() -> None:
    model = bare(tiny_llama().config, torch.float32)
    model.model.layers[0].register_forward_hook(lambda module, args, output: float(output.sum()))
    assert saved_for_backward(model, default_layers(model), (2, 5), loss=True) == 0
