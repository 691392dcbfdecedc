"""Llama-3-8B-Instruct and Qwen-2.5-1.5B-Instruct in miniature: folders laid out as their repositories, random weights.

What is theirs: module names, grouped heads, Llama-3's several ends of text, missing padding token and text begun with
<|begin_of_text|>; Qwen's tied embeddings, biases on q, k and v, more rows than tokens, padding token and repetition
penalty; byte-level BPE with their splitting rules, special tokens, chat templates, generation defaults, bfloat16.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

TEXT = [
    "Ada Lovelace was born in London. Her mother tongue is English.",
    "Alan Turing works in Manchester, where he lives with his sister since 1948.",
    "Please answer the question:\n\nQ: Where was Ada Lovelace born?\nA: London.",
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid.",
    "Once upon a time there was a little girl named Lily. She liked to play in the garden with her friend.",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_CHAT = (
    "{% for message in messages %}{{ bos_token if loop.index0 == 0 else '' }}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def llama3(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Four blocks; written to `folder` and returned."""
    inner = _byte_level(r"{1,3}", LLAMA_SPECIAL)
    begin = ("<|begin_of_text|>", inner.token_to_id("<|begin_of_text|>"))
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=begin[0], eos_token="<|eot_id|>", chat_template=LLAMA_CHAT,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=112, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=500000.0,
        initializer_range=0.3, bos_token_id=begin[1], eos_token_id=ends[1], tie_word_embeddings=False,
    )  # fmt: skip
    defaults = GenerationConfig(
        bos_token_id=begin[1], eos_token_id=ends, do_sample=True, max_length=4096, temperature=0.6, top_p=0.9
    )
    return _written(folder, lambda: LlamaForCausalLM(config), tokenizer, defaults, dtype)


def qwen25(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Six blocks; written to `folder` and returned."""
    inner = _byte_level("", QWEN_SPECIAL)
    inner.normalizer = normalizers.NFC()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, unk_token=None,
        chat_template=QWEN_CHAT,
    )  # fmt: skip
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 21, hidden_size=32, intermediate_size=176, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-6,
        rope_theta=1000000.0, initializer_range=0.3, bos_token_id=pad, eos_token_id=end, tie_word_embeddings=True,
    )  # fmt: skip
    defaults = GenerationConfig(
        bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad], do_sample=True, repetition_penalty=1.1,
        temperature=0.7, top_p=0.8, top_k=20,
    )  # fmt: skip
    return _written(folder, lambda: Qwen2ForCausalLM(config), tokenizer, defaults, dtype)


def _byte_level(digits: str, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT.replace("DIGITS", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _written(
    folder: Path,
    build: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    defaults: GenerationConfig,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().to(dtype).eval()
    model.generation_config = defaults
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
