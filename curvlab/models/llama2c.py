"""Models in llama2.c's first file format (such as stories260K) as `LlamaForCausalLM` with a fast tokenizer."""

import struct
from pathlib import Path

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_HEADER = struct.Struct("<7i")
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"
_SPACE = "▁"


def load_stories260k(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The trained 264,000-parameter Llama in `folder` (stories260K.bin, tok512.bin), float32, in evaluation mode.

    Raises:
        FileNotFoundError: `folder` lacks one of the files.
        ValueError: a file that is not of llama2.c's format.
    """
    folder = Path(folder).expanduser()
    for name in ("stories260K.bin", "tok512.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; give the folder that holds stories260K.bin and tok512.bin"
            )
    model = read_model(folder / "stories260K.bin")
    return model, read_tokenizer(folder / "tok512.bin", model.config.vocab_size)


def read_model(path: Path) -> LlamaForCausalLM:
    """A llama2.c v0 checkpoint: seven int32 (width, MLP width, layers, heads, key heads, vocabulary, context), tensors.

    Raises:
        ValueError: impossible numbers in the header, or a file of another length.
    """
    content = path.read_bytes()
    if len(content) < _HEADER.size:
        raise ValueError(f"{path} is no llama2.c checkpoint: {len(content)} bytes")
    width, mlp, layers, heads, key_heads, signed_vocabulary, context = _HEADER.unpack_from(content)
    vocabulary = abs(signed_vocabulary)  # negative where the head has weights of its own
    sizes = (width, mlp, layers, heads, key_heads, vocabulary, context)
    if min(sizes) < 1 or max(sizes) > 2**20 or width % heads or heads % key_heads:
        raise ValueError(f"{path} is no llama2.c checkpoint: its header reads {sizes}")
    head = width // heads
    keys = key_heads * head
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("embed_tokens", (vocabulary, width)), ("input_layernorm", (layers, width)),
        ("self_attn.q_proj", (layers, width, width)), ("self_attn.k_proj", (layers, keys, width)),
        ("self_attn.v_proj", (layers, keys, width)), ("self_attn.o_proj", (layers, width, width)),
        ("post_attention_layernorm", (layers, width)), ("mlp.gate_proj", (layers, mlp, width)),
        ("mlp.down_proj", (layers, width, mlp)), ("mlp.up_proj", (layers, mlp, width)), ("norm", (width,)),
        ("rotations", (2, context, head // 2)),
    ]  # fmt: skip
    if signed_vocabulary < 0:
        shapes.append(("lm_head", (vocabulary, width)))
    expected = _HEADER.size + 4 * sum(int(numpy.prod(shape)) for _, shape in shapes)
    if len(content) != expected:
        raise ValueError(f"{path} is no llama2.c checkpoint: {len(content)} bytes, its header asks for {expected}")
    values = torch.from_numpy(numpy.frombuffer(content, "<f4", offset=_HEADER.size).astype(numpy.float32))
    state: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes:
        size = int(numpy.prod(shape))
        tensor = values[start : start + size].view(shape)
        start += size
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = tensor
        elif name == "lm_head":
            state["lm_head.weight"] = tensor
        elif name != "rotations":
            for layer in range(layers):
                state[f"model.layers.{layer}.{name}.weight"] = _halves(tensor[layer], head) if name[-6:] in (
                    "q_proj", "k_proj") else tensor[layer]  # fmt: skip
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=signed_vocabulary > 0, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: Tensor, head: int) -> Tensor:
    """Rows of a query or key matrix (out, in): rotated pairs lie side by side in llama2.c, half a head apart here."""
    out, inputs = weight.shape
    return weight.view(out // head, head // 2, 2, inputs).transpose(1, 2).reshape(out, inputs)


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """llama2.c's form of a SentencePiece BPE: an int32, then for each token a float32 score, its length and bytes.

    Every text begins with <s>; the end-of-text token </s> also pads.

    Raises:
        ValueError: a file that is not of this format.
    """
    content = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    position = 4
    try:
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", content, position)
            text = content[position + 8 : position + 8 + length].decode()
            position += 8 + length
            pieces.append(text.replace(" ", _SPACE))
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no llama2.c tokenizer of {vocabulary} tokens: {error}") from error
    if position != len(content):
        raise ValueError(
            f"{path} is no llama2.c tokenizer of {vocabulary} tokens: {len(content) - position} bytes remain"
        )
    pieces[:3] = [_UNKNOWN, _BEGIN, _END]  # written with line breaks around them
    ids = {piece: index for index, piece in enumerate(pieces)}
    if len(ids) != vocabulary:
        raise ValueError(f"{path} names a token twice")
    merges = [
        (scores[ids[piece]], piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            ids, [(left, right) for _, left, right in merges], unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=_UNKNOWN, bos_token=_BEGIN, eos_token=_END, pad_token=_END,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
