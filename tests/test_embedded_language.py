"""Small language models: packing changes no loss, training goes on where it was killed, files are safe to read."""

import itertools
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from curvlab.data.text import IGNORE
from curvlab.data.world import World, make_world
from curvlab.data.world_tasks import Item
from curvlab.evaluation.capability import perplexity
from curvlab.layers import find_layers
from curvlab.models import language, language_training
from curvlab.models.language import embedded_folder, embedded_model, embedded_record, load_language_model
from curvlab.models.language_measures import exact_share
from curvlab.models.language_recipes import RECIPES, build_model, train_tokenizer
from curvlab.models.language_training import Document, Schedule, pack, packed_inputs, train
from curvlab.models.llama2c import load_stories260k, read_model, read_tokenizer

PAD = 0


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def trained(world: World, cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return embedded_model(world, cache=cache)


def _documents(count: int = 30, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 15, (count,), generator=generator).tolist()
    return [
        Document(tuple(torch.randint(3, 60, (length,), generator=generator).tolist()), prompt=length // 3)
        for length in lengths
    ]


# --- packing and training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packing_changes_no_prediction(build: Any) -> None:
    """Losses of packed rows are those of each document alone, from position 0, in float64."""
    model = build(dtype=torch.float64)
    documents = _documents()
    ids, owners, _ = pack(documents, length=24, pad=PAD)
    inputs, targets = packed_inputs(ids, owners, PAD)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        packed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        alone = [
            F.cross_entropy(
                model(input_ids=torch.tensor([d.ids])).logits[0, :-1], torch.tensor(d.ids[1:]), reduction="none"
            )
            for d in documents
        ]
    torch.testing.assert_close(packed[targets.flatten() != IGNORE], torch.cat(alone), rtol=1e-10, atol=1e-12)
    assert ids.shape[0] < len(documents)


def test_rows_hold_whole_documents_in_order_and_mark_prompts() -> None:
    documents = _documents()
    ids, owners, prompts = pack(documents, length=24, pad=PAD)
    assert ids.shape == owners.shape == prompts.shape
    real = ids != PAD
    assert ids[real].tolist() == [token for d in documents for token in d.ids]
    assert prompts[real].tolist() == [i < d.prompt for d in documents for i in range(len(d.ids))]
    assert not prompts[~real].any()
    long, _, _ = pack([Document(tuple(range(1, 50)))], length=24, pad=PAD)
    assert long.tolist() == [list(range(1, 25))]


def test_the_loss_weighs_prompts_as_the_schedule_says(tmp_path: Path) -> None:
    """One step's reported loss against a plain sum over documents."""
    documents, model = _documents(6), tiny_llama()
    terms, weights = 0.0, 0.0
    for document in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([document.ids])).logits[0].double()
        for t, token in enumerate(document.ids[1:], start=1):
            weight = 0.25 if t < document.prompt else 1.0
            terms -= weight * float(logits[t - 1].log_softmax(-1)[token])
            weights += weight
    schedule = Schedule(steps=1, rows=8, length=64, lr=1e-3, prompt_weight=0.25)
    took = train(model, documents, schedule, pad=PAD, seed=0, checkpoint=tmp_path / "c.safetensors")
    assert took["loss"] == pytest.approx(terms / weights, rel=1e-5)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_killed_training_goes_on_to_the_same_weights(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(steps=30, rows=2, length=24, lr=1e-2)
    documents, checkpoint = _documents(), tmp_path / "c.safetensors"
    whole = build()
    before = whole.state_dict()["lm_head.weight"].clone()
    expected = train(whole, documents, schedule, pad=PAD, seed=3, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert not torch.equal(before, whole.state_dict()["lm_head.weight"])

    save = language_training._save

    def save_then_die(model: Any, optimizer: Any, path: Path, step: int, *spent: float) -> None:
        save(model, optimizer, path, step, *spent)
        if step == 17:
            raise _KilledError

    monkeypatch.setattr(language_training, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(language_training, "_save", save_then_die)
    with pytest.raises(_KilledError):
        train(build(), documents, schedule, pad=PAD, seed=3, checkpoint=checkpoint)
    monkeypatch.setattr(language_training, "_save", save)
    resumed = build()
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", _counting(torch.optim.AdamW.step, steps))
    took = train(resumed, documents, schedule, pad=PAD, seed=3, checkpoint=checkpoint)
    assert len(steps) == 13
    assert took["loss"] == expected["loss"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def _counting(step: Any, calls: list[int]) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return step(self, *args, **kwargs)

    return counted


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 0"):
        train(model, _documents(), Schedule(2, 2, 24, 1e-3), pad=PAD, seed=0, checkpoint=tmp_path / "c.safetensors")


# --- the embedded models --------------------------------------------------------------------------------------------


def test_the_tiny_model_knows_its_facts_and_the_record_says_so(world: World, cache: Path, trained: Any) -> None:
    model, tokenizer = trained
    record = embedded_record(world, cache=cache)
    assert record["recall_trained"] > 0.9
    items = [Item(prompt, fact.answer) for fact in world.facts for prompt in fact.train_prompts]
    assert record["recall_trained"] == exact_share(model, tokenizer, items)
    assert record["perplexity"] == pytest.approx(perplexity(model, tokenizer, world.stories).mean, rel=1e-5)
    assert record["seconds"] > 0
    assert record["world_fingerprint"] == world.fingerprint
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"task_successor", "task_repetition", "task_last", "torch", "commit"} <= record.keys()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(cache.glob(".*training*"))


def test_exact_share_is_that_of_greedy_decoding(world: World, trained: Any) -> None:
    """Token by token, each prompt alone: no padding, no teacher."""
    model, tokenizer = trained
    items = [Item(f.held_out_prompts[0], f.answer) for f in world.facts] + world.tasks["successor"][:20]
    right = 0
    for item in items:
        ids = tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        wanted = f" {item.answer}."
        for _ in range(len(tokenizer(wanted)["input_ids"])):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        right += tokenizer.decode(ids[0]) == item.prompt + wanted
    assert 0 < right < len(items)
    assert exact_share(model, tokenizer, items) == right / len(items)


def test_a_trained_model_comes_from_the_cache(
    world: World, cache: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(language, "_train", refuse)
    again, _ = embedded_model(world, cache=cache)
    for a, b in zip(trained[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="trained again"):
        embedded_model(world, seed=1, cache=cache)


def test_everything_a_model_depends_on_is_in_its_folder_s_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [embedded_folder(world), embedded_folder(world, "gpt2"), embedded_folder(world, seed=1),
               embedded_folder(world, size="smoke"), embedded_folder(make_world("tiny", seed=1))]  # fmt: skip
    recipe = RECIPES["tiny"]
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, schedule=replace(recipe.schedule, lr=1e-3)))
    folders.append(embedded_folder(world))
    assert len(set(folders)) == len(folders)


def test_gpt2_learns_the_same_world_with_conv1d_mlps(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["tiny"]
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, schedule=replace(recipe.schedule, steps=40)))
    model, tokenizer = embedded_model(world, "gpt2", cache=tmp_path)
    layers = find_layers(model, "transformer.h.*.mlp.c_proj")
    assert [type(layer.module).__name__ for layer in layers] == ["Conv1D"] * recipe.layers
    untrained = build_model("gpt2", recipe, tokenizer, seed=0)
    learnt, random = (perplexity(m, tokenizer, world.stories).mean for m in (model, untrained))
    assert learnt < random / 3
    assert embedded_record(world, "gpt2", cache=tmp_path)["family"] == "gpt2"


def test_families_and_sizes_have_the_parameters_they_should() -> None:
    world = make_world("default")
    tokenizer = train_tokenizer(world.training, RECIPES["default"].vocabulary)
    counts = [sum(p.numel() for p in build_model(f, RECIPES["default"], tokenizer, 0).parameters())
              for f in ("llama", "gpt2")]  # fmt: skip
    assert all(2e6 <= count <= 6e6 for count in counts)
    assert abs(counts[0] - counts[1]) < 0.1 * counts[0]


def test_the_tokenizer_keeps_digits_apart_and_encodes_any_text(trained: Any) -> None:
    _, tokenizer = trained
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 + 345")["input_ids"])[-4:] == ["Ġ", "3", "4", "5"]
    assert not any(sum(c.isdigit() for c in token) > 1 for token in tokenizer.get_vocab())
    text = "Ünïcode, 世界 \U0001f30d and\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_prompts_are_where_the_training_says_they_are(world: World, trained: Any) -> None:
    _, tokenizer = trained
    for item, document in zip(world.statements, language._encode(world, tokenizer), strict=False):
        assert tokenizer.decode(list(document.ids[: document.prompt])) == item.prompt
        assert tokenizer.decode(list(document.ids[document.prompt : -1])) == f" {item.answer}."
        assert document.ids[-1] == tokenizer.eos_token_id


def test_bad_arguments_of_embedded_models(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family 'mamba'; choose of llama, gpt2"):
        embedded_model(world, "mamba")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        embedded_model(world, size="huge")
    with pytest.raises(FileNotFoundError, match="call embedded_model first"):
        embedded_record(world, cache=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="cannot write into the cache folder"):
        embedded_model(world, cache=tmp_path / "file")


# --- any model by path ----------------------------------------------------------------------------------------------


def test_a_saved_model_loads_in_any_dtype_with_something_to_pad(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(dtype=torch.bfloat16), tiny_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = load_language_model(str(tmp_path))
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert again.pad_token == again.eos_token
    assert load_language_model(str(tmp_path), dtype="float32")[0].dtype == torch.float32
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pickles_missing_folders_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder; give a folder written by save_pretrained"):
        load_language_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose of auto, float32"):
        load_language_model(str(tmp_path), dtype="int8")
    with pytest.raises(ValueError, match="could not be loaded as a causal language model"):
        load_language_model(str(tmp_path))
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds its weights as pickles only \(pytorch_model.bin\)"):
        load_language_model(str(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tiny_llama(vocabulary=100).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens, the model embeds 100"):
        load_language_model(str(tmp_path))


# --- llama2.c -------------------------------------------------------------------------------------------------------

_SIZES = {"width": 16, "mlp": 24, "layers": 2, "heads": 4, "keys": 2, "vocabulary": 270, "context": 20}


def _write_llama2c(path: Path, *, own_head: bool) -> dict[str, np.ndarray]:
    """A checkpoint with random weights, and its tensors under llama2.c's names."""
    s = _SIZES
    d, head = s["width"], s["width"] // s["heads"]
    kv = s["keys"] * head
    shapes = {
        "embedding": (s["vocabulary"], d), "attention_norm": (s["layers"], d), "wq": (s["layers"], d, d),
        "wk": (s["layers"], kv, d), "wv": (s["layers"], kv, d), "wo": (s["layers"], d, d),
        "mlp_norm": (s["layers"], d), "w1": (s["layers"], s["mlp"], d), "w2": (s["layers"], d, s["mlp"]),
        "w3": (s["layers"], s["mlp"], d), "norm": (d,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype("<f4") * 0.5 for name, shape in shapes.items()}
    angles = np.outer(np.arange(s["context"]), 10000.0 ** (-np.arange(0, head, 2) / head))
    tensors["cos"], tensors["sin"] = np.cos(angles).astype("<f4"), np.sin(angles).astype("<f4")
    if own_head:
        tensors["head"] = rng.normal(size=shapes["embedding"]).astype("<f4")
    header = [s[k] for k in ("width", "mlp", "layers", "heads", "keys", "vocabulary", "context")]
    if own_head:
        header[5] *= -1
    path.write_bytes(struct.pack("<7i", *header) + b"".join(t.tobytes() for t in tensors.values()))
    return {name: tensor.astype(float) for name, tensor in tensors.items()}


def _llama2c(t: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """llama2.c's forward pass (run.c), position by position in float64: pairs that lie side by side are rotated."""
    s = _SIZES
    head, group = s["width"] // s["heads"], s["heads"] // s["keys"]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-5) * weight

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        pairs = x.reshape(-1, head // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (t["cos"][position] + 1j * t["sin"][position])
        return np.stack([turned.real, turned.imag], -1).reshape(-1, head)

    keys: list[list[np.ndarray]] = [[] for _ in range(s["layers"])]
    values: list[list[np.ndarray]] = [[] for _ in range(s["layers"])]
    logits = []
    for position, token in enumerate(ids):
        x = t["embedding"][token]
        for layer in range(s["layers"]):
            h = norm(x, t["attention_norm"][layer])
            q = rotate(t["wq"][layer] @ h, position)
            keys[layer].append(rotate(t["wk"][layer] @ h, position))
            values[layer].append((t["wv"][layer] @ h).reshape(-1, head))
            heads = []
            for i in range(s["heads"]):
                scores = np.array([q[i] @ k[i // group] for k in keys[layer]]) / head**0.5
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(sum(w * v[i // group] for w, v in zip(weights, values[layer], strict=True)))
            x = x + t["wo"][layer] @ np.concatenate(heads)
            h = norm(x, t["mlp_norm"][layer])
            gate = t["w1"][layer] @ h
            x = x + t["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (t["w3"][layer] @ h))
        logits.append(t.get("head", t["embedding"]) @ norm(x, t["norm"]))
    return np.array(logits)


@pytest.mark.parametrize("own_head", [False, True])
def test_a_llama2c_model_computes_what_llama2c_does(tmp_path: Path, own_head: bool) -> None:
    tensors = _write_llama2c(tmp_path / "model.bin", own_head=own_head)
    ids = [1, 5, 200, 17, 17, 3, 99, 260]
    model = read_model(tmp_path / "model.bin").double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, _llama2c(tensors, ids), rtol=1e-5, atol=1e-5)  # transformers' RoPE is float32


def _write_tokenizer(path: Path) -> None:
    special = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    pieces = [b" a", b"b", b"ab", b" ab", b" ", b"a", b"bb", b" abbb", b"bbb", b"1", b"2"]
    content = struct.pack("<i", 8)
    for index, piece in enumerate(special + pieces):
        content += struct.pack("<fi", -float(max(0, index - 259)), len(piece)) + piece
    path.write_bytes(content)


def _llama2c_encode(pieces: list[str], scores: list[float], text: str) -> list[str]:
    """run.c's encode: merge the pair whose merged piece scores best until none is a piece."""
    parts = list(" " + text)
    while True:
        merged = [(scores[pieces.index(a + b)], -i) for i, (a, b) in enumerate(itertools.pairwise(parts))
                  if a + b in pieces]  # fmt: skip
        if not merged:
            return parts
        i = -max(merged)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_a_llama2c_tokenizer_merges_as_llama2c_does(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path / "tok.bin")
    tokenizer = read_tokenizer(tmp_path / "tok.bin", 270)
    pieces = [" a", "b", "ab", " ab", " ", "a", "bb", " abbb", "bbb", "1", "2"]
    scores = [-float(i) for i in range(len(pieces))]
    for text in ("ab", "abbb abb", "bbbb", "a12ab bb", "abababbb"):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert [token.replace("▁", " ") for token in tokens] == ["<s>", *_llama2c_encode(pieces, scores, text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    unseen = tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"])
    assert unseen == ["<s>", "▁", "<0xC3>", "<0xA9>"]


def test_damaged_llama2c_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no stories260K.bin"):
        load_stories260k(tmp_path)
    _write_llama2c(tmp_path / "stories260K.bin", own_head=False)
    _write_tokenizer(tmp_path / "tok512.bin")
    model, tokenizer = load_language_model(str(tmp_path))
    assert model.config.vocab_size == len(tokenizer) == 270
    content = (tmp_path / "stories260K.bin").read_bytes()
    (tmp_path / "stories260K.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"is no llama2.c checkpoint: .* its header asks for"):
        load_stories260k(tmp_path)
    (tmp_path / "stories260K.bin").write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(ValueError, match=r"is no llama2.c checkpoint: its header reads"):
        load_stories260k(tmp_path)
    content = (tmp_path / "tok512.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"is no llama2.c tokenizer of 270 tokens"):
        read_tokenizer(tmp_path / "cut.bin", 270)
