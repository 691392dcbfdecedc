"""What the embedded language models are made of: their shapes, how they are trained, and their tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from curvlab.models.language_training import Schedule

Family = Literal["llama", "gpt2"]
PAD, END = "<pad>", "<end>"
_HEAD = 32  # width of an attention head


@dataclass(frozen=True)
class Recipe:
    """Shape and training of an embedded model; a Llama's MLPs are `mlp` wide, GPT-2's as many weights large."""

    vocabulary: int
    width: int
    layers: int
    mlp: int
    schedule: Schedule
    context: int = 512


# Found by trial: at equal time, wide models of few layers in many small steps learn facts fastest.
RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(320, 64, 1, 128, Schedule(steps=200, rows=4, length=96, lr=1e-2)),
    "smoke": Recipe(768, 128, 2, 352, Schedule(steps=1500, rows=4, length=96, lr=5e-3)),
    "default": Recipe(2048, 256, 2, 704, Schedule(steps=8500, rows=4, length=96, lr=3e-3)),
}


def find_recipe(size: str) -> Recipe:
    """The recipe of a size.

    Raises:
        ValueError: an unknown size.
    """
    if size not in RECIPES:
        raise ValueError(f"unknown size {size!r}; choose of {', '.join(RECIPES)}")
    return RECIPES[size]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be encoded) of at most `vocabulary` tokens, which keeps digits apart."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def build_model(family: Family, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A model with random weights from `seed`; neither family ties its embeddings to its head."""
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    heads = recipe.width // _HEAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(
                n_embd=recipe.width, n_layer=recipe.layers, n_head=heads, n_positions=recipe.context,
                n_inner=recipe.mlp * 3 // 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            ))  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=recipe.width, num_hidden_layers=recipe.layers, intermediate_size=recipe.mlp,
            num_attention_heads=heads, max_position_embeddings=recipe.context, **common,
        ))  # fmt: skip
