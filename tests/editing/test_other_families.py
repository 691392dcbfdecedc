"""Families that nothing here was written for: factors token by token, and edits behind a short context."""

from typing import Any

import pytest
import torch
from language import VOCABULARY
from requests_and_text import REQUESTS, TOKENIZER, document_texts, explicit
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPTJConfig,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from curvlab.capture import Batch
from curvlab.curvature import KFAC
from curvlab.data.text import IGNORE
from curvlab.editing import Capability, default_layers, edit
from curvlab.editing.job import longest
from curvlab.evaluation.generation import check_prompts
from curvlab.losses import CrossEntropy

CONTEXT = 64
LONG = ["Ada Lovelace was born in London. " * 40, "The capital of Spain is Madrid.", "Once upon a time. " * 30]
_SHAPE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = _SHAPE | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
CONFIGS: dict[str, Any] = {
    "opt": OPTConfig(
        **_SHAPE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=CONTEXT, dropout=0.0, init_std=0.3,
    ),
    "neox": GPTNeoXConfig(**_WIDE, intermediate_size=48, max_position_embeddings=CONTEXT),
    "gptj": GPTJConfig(
        **_SHAPE, n_embd=32, n_inner=48, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "qwen2": Qwen2Config(
        **_WIDE, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True
    ),
    "phi": PhiConfig(**_WIDE, intermediate_size=48, max_position_embeddings=CONTEXT),
    "falcon": FalconConfig(**_WIDE, max_position_embeddings=CONTEXT, hidden_dropout=0.0, attention_dropout=0.0),
    "bloom": BloomConfig(**_SHAPE, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}  # fmt: skip


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[family]).to(dtype).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CONFIGS)
def test_factors_token_by_token(family: str, side: str) -> None:
    """Float64; padding on either side; the first text's first labels are ignored, but its tokens count."""
    model = model_of(family, torch.float64)
    (layer,) = default_layers(model)
    (tokens, targets), *others = document_texts([request.prompt for request in REQUESTS])
    texts = [(tokens, [IGNORE] * 3 + targets[3:]), *others]
    length = max(len(tokens) for tokens, _ in texts)

    def padded(row: list[int], value: int) -> list[int]:
        fill = [value] * (length - len(row))
        return row + fill if side == "right" else fill + row

    ids, labels, mask = (
        torch.tensor([padded(row, value) for row in rows])
        for rows, value in (
            ([t for t, _ in texts], 0), ([t for _, t in texts], IGNORE), ([[1] * len(t) for t, _ in texts], 0)
        )
    )  # fmt: skip
    assert int((mask == 0).sum()) > 0
    expected = explicit(model, layer, texts)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, labels)
    found = KFAC.fit(model, CrossEntropy(), [batch], layer, labels="data").factors[layer]
    assert (found.scale.positions, found.scale.terms) == (expected.positions, expected.terms)
    # (Bloom's and Falcon's attention is partly in float32)
    torch.testing.assert_close(found.a_sum, expected.A, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.s_sum, expected.S, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("editor", ["crispedit", "crispedit-seq", "replay"])
def test_documents_longer_than_the_context_are_cut(editor: str, family: str) -> None:
    model = model_of(family)
    edited = edit(model, TOKENIZER, REQUESTS, editor=editor, capability=LONG, epochs=5, lr=1e-2, batch_size=5)
    assert edited.losses[-1] < edited.losses[0]


def test_a_capability_set_of_ones_own_is_held_against_the_context() -> None:
    model = model_of("opt")
    options: dict[str, Any] = {"requests": REQUESTS, "editor": "crispedit", "epochs": 1}
    before = model.model.decoder.layers[1].fc2.weight.clone()
    with pytest.raises(ValueError, match=r"but the model takes 64: Capability\(…, max_length=64\)"):
        edit(model, TOKENIZER, capability=Capability(LONG), **options)
    assert torch.equal(before, model.model.decoder.layers[1].fc2.weight)
    for fitting in (Capability(LONG, max_length=64), Capability(LONG[1:2])):
        edit(model, TOKENIZER, capability=fitting, **options)


def test_of_a_model_that_sees_images_the_text_part_is_edited() -> None:
    """Its tower for images has MLPs, a depth and lengths of its own."""
    text = _WIDE | {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    tower = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text | {"max_position_embeddings": CONTEXT, "sliding_window": 8},
        vision_config=tower | {"num_hidden_layers": 24}, mm_tokens_per_image=4, image_token_index=5,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    assert any("vision" in name and name.endswith("mlp.fc2") for name, _ in model.named_modules())
    assert default_layers(model) == ["model.language_model.layers.5.mlp.down_proj"]
    assert longest(model) == CONTEXT
    edited = edit(model, TOKENIZER, REQUESTS, capability=LONG, epochs=2)  # cut to the text part's context
    assert edited.drift > 0
    with pytest.raises(ValueError, match="exceed the model's 64"):
        check_prompts(model, TOKENIZER, [LONG[0]])
