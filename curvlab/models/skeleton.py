"""A language model without its weights: all that its configuration says of it, before anything large is read."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from curvlab.models.language import load_stories260k, source_of


def skeleton(name_or_path: str, *, dtype: str = "auto") -> Any:
    """The model on the meta device: modules, shapes, dtypes, tied weights, and no numbers.

    Its attention is the plain one, which can be traced on that device. Of a model on the hub only the configuration
    is fetched; one that names no dtype counts as float32.

    Raises:
        FileNotFoundError, ValueError: as `curvlab.models.language.load_language_model`.
    """
    path, source = source_of(name_or_path, dtype)
    if (path / "stories260K.bin").is_file():
        tiny: Any = load_stories260k(path)[0]
        tiny.set_attn_implementation("eager")
        tiny = tiny.to("meta").requires_grad_(False)
        tiny.tie_weights()  # the move took tied ones apart
        return tiny
    try:
        config = AutoConfig.from_pretrained(source)
        own = config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=own if dtype == "auto" else getattr(torch, dtype), attn_implementation="eager"
            )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        kind = ValueError if path.is_dir() else FileNotFoundError
        raise kind(f"{name_or_path} has no configuration of a causal language model: {error}") from error
    return model.requires_grad_(False).eval()
