"""Causal language models: the small ones trained on the embedded world, and any by name or path."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from curvlab.data.world import World
from curvlab.models.language_measures import measure
from curvlab.models.language_recipes import Family, Recipe, build_model, find_recipe, train_tokenizer
from curvlab.models.language_training import Document, train
from curvlab.models.llama2c import load_stories260k
from curvlab.records import fingerprint, provenance
from curvlab.storage import cache_folder

__all__ = [
    "EMBEDDED",
    "embedded_folder",
    "embedded_model",
    "embedded_record",
    "load_language_model",
    "load_stories260k",
    "source_of",
]

EMBEDDED: dict[str, Family] = {"embedded": "llama", "embedded-gpt2": "gpt2"}  # names of the embedded models in studies
FORMAT = 1  # raised when models of the same recipe would come out differently
RECORD = "curvlab.json"
_ANY_TEXT = "Once upon a time, 2 + 2 were 4."
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

_log = logging.getLogger("curvlab")


def embedded_model(
    world: World, family: Family = "llama", *, size: str | None = None, seed: int = 0, cache: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small language model trained on `world`, and its tokenizer: from the cache, else trained and put there.

    An interrupted training goes on where it stopped. What was measured after training lies beside the weights
    (`embedded_record`). The weights are float32, the model is in evaluation mode on the CPU.

    Args:
        size: that of the model, the world's own by default.
        seed: of the initial weights and the order of the documents.
        cache: a folder for trained models; by default one in `curvlab.storage.cache_folder()`.

    Raises:
        ValueError: an unknown family or size.
        PermissionError: the cache cannot be written.
    """
    folder = embedded_folder(world, family, size=size, seed=seed, cache=cache)
    if not (folder / RECORD).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.parent / f".{folder.name}.lock")
            lock.acquire()
        except OSError as error:
            raise PermissionError(
                f"cannot write into the cache folder {folder.parent} ({error}); set CURVLAB_CACHE to a writable folder"
            ) from error
        try:
            if not (folder / RECORD).is_file():  # another process may have trained it while this one waited
                _train(world, family, find_recipe(size or world.size), seed, folder)
        finally:
            lock.release()
    with _without_bars():
        return load_language_model(str(folder))


def embedded_record(world: World, family: Family = "llama", **options: Any) -> dict[str, Any]:
    """What the training of an embedded model took and measured; options as for `embedded_model`.

    Raises:
        FileNotFoundError: the model was not trained yet.
    """
    path = embedded_folder(world, family, **options) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: call embedded_model first, which trains it")
    return dict(json.loads(path.read_text()))


def embedded_folder(
    world: World, family: Family = "llama", *, size: str | None = None, seed: int = 0, cache: str | Path | None = None
) -> Path:
    """Where the trained model of these arguments is kept, named after all that it depends on."""
    if family not in get_args(Family):
        raise ValueError(f"unknown family {family!r}; choose of {', '.join(get_args(Family))}")
    recipe = asdict(find_recipe(size or world.size))
    parts = {"world": world.fingerprint, "family": family, "recipe": recipe, "seed": seed, "format": FORMAT}
    root = Path(cache).expanduser() if cache is not None else cache_folder() / "language"
    return root / f"{family}-{world.name}-{fingerprint(parts)}"


def load_language_model(
    name_or_path: str, *, device: str = "cpu", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Any causal language model of the hub or of a folder, in evaluation mode, and its tokenizer.

    Only safetensors are read (pickles can run code), and no code of the model's repository is run. A tokenizer
    without a padding token pads with its end-of-text token.

    Args:
        name_or_path: a name on the hub, or a folder; one with `stories260K.bin` is read by `load_stories260k`.
        device: a torch device, or "auto", which spreads the model over what there is (accelerate's device_map).
        dtype: "auto" (as stored), "float32", "bfloat16", "float16" or "float64".

    Raises:
        FileNotFoundError: no such folder, or no model of this name can be had.
        ValueError: not a causal language model, no safetensors, weights that are missing or not finite, no tokens to
            pad with, or an unknown dtype.
    """
    path, source = source_of(name_or_path, dtype)
    model: Any  # transformers' own annotations do not hold
    loaded: Any
    tokenizer: Any
    if (path / "stories260K.bin").is_file():
        model, tokenizer = load_stories260k(path)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
        return model.to("cpu" if device == "auto" else device), tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, device_map="auto" if device == "auto" else None,
            output_loading_info=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        kind = ValueError if path.is_dir() else FileNotFoundError
        raise kind(
            f"{name_or_path} could not be loaded as a causal language model with safetensors weights: {error}"
        ) from error
    model, report = loaded
    if lacking := sorted(report["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"{name_or_path} lacks {len(lacking)} of the model's weights, such as {lacking[0]}")
    for name, parameter in model.named_parameters():  # (those on the meta device accelerate reads when they are used)
        if parameter.is_floating_point() and not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ValueError(f"{name_or_path}: {name} holds numbers that are not finite")
    if not tokenizer(_ANY_TEXT)["input_ids"]:  # where its files are missing, transformers may make an empty one
        raise ValueError(f"the tokenizer of {name_or_path} knows no tokens; is its tokenizer.json missing?")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name_or_path} has neither a padding nor an end-of-text token: set one")
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"{name_or_path}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}")
    return (model if device == "auto" else model.to(device)).eval(), tokenizer


def source_of(name_or_path: str, dtype: str) -> tuple[Path, str]:
    """The folder that `name_or_path` may be, and what transformers is to load; the errors of `load_language_model`."""
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose of {', '.join(_DTYPES)}")
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        if path.exists() or path.is_absolute() or name_or_path.startswith((".", "~")):
            raise FileNotFoundError(
                f"{name_or_path} is no folder; give a folder written by save_pretrained, or a hub name"
            )
        return path, name_or_path
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickles and "stories260K.bin" not in pickles and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{path} holds its weights as pickles only ({', '.join(pickles[:3])}), which can run code when read; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    return path, str(path)


def _train(world: World, family: Family, recipe: Recipe, seed: int, folder: Path) -> None:
    tokenizer = train_tokenizer(world.training, recipe.vocabulary)
    model = build_model(family, recipe, tokenizer, seed)
    size = sum(p.numel() for p in model.parameters())
    _log.warning(
        "training a %s of %.1f million parameters on the world %s, once (%d steps); it will be kept in %s",
        family, size / 1e6, world.name, recipe.schedule.steps, folder,
    )  # fmt: skip
    checkpoint = folder.parent / f".{folder.name}.training.safetensors"
    documents = _encode(world, tokenizer)
    took = train(model, documents, recipe.schedule, pad=tokenizer.pad_token_id, seed=seed, checkpoint=checkpoint)
    record: dict[str, Any] = {"world": world.name, "world_fingerprint": world.fingerprint, "facts": len(world.facts)}
    record |= {"family": family, "parameters": size, "recipe": asdict(recipe), "seed": seed}
    record |= took | measure(model, tokenizer, world) | provenance()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as name, _without_bars():
        staged = Path(name) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / RECORD).write_text(json.dumps(record, indent=1))
        if folder.exists():
            shutil.rmtree(folder)  # without a record: not one of ours that is whole
        os.rename(staged, folder)
    checkpoint.unlink(missing_ok=True)


def _encode(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """The training documents as tokens, each with its end, and how many of them are a prompt."""
    prompts = [len(ids) for ids in tokenizer([item.prompt for item in world.statements])["input_ids"]]
    prompts += [0] * len(world.texts)
    encoded = tokenizer(list(world.training))["input_ids"]
    end = tokenizer.eos_token_id
    return [Document((*ids, end), prompt) for ids, prompt in zip(encoded, prompts, strict=True)]


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows bars of its own for files that are read in milliseconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
