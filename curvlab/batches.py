"""Batches of data: their parts, the mask of real positions, and how they are cut to fit one forward pass."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Data = Iterable[Any]

# One forward pass takes no more than this; larger batches are cut (exactly: statistics are sums).
MICRO_BATCH = 128  # examples
MICRO_POSITIONS = 2**14  # loss positions: tokens, padding included
MICRO_OUTPUT_BYTES = 2**29  # of the outputs (N, T, C) in float32: two documents of 512 tokens, 128k words


@dataclass(frozen=True)
class Batch:
    """Inputs, targets and the mask of real positions, on one device."""

    inputs: Any
    targets: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.targets.shape[0]

    def __getitem__(self, index: slice) -> "Batch":
        if isinstance(self.inputs, dict):
            inputs: Any = {k: v[index] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        else:
            inputs = self.inputs[index]
        return Batch(inputs, self.targets[index], None if self.mask is None else self.mask[index])


def split(data: Data, micro_batch: int | None = None, model: nn.Module | None = None) -> Iterator[Batch]:
    """The batches of `data`, cut into at most `micro_batch` examples each, with their mask of real positions.

    Args:
        micro_batch: None takes as many as the bounds `MICRO_BATCH`, `MICRO_POSITIONS` and (where the number of the
            model's outputs is known) `MICRO_OUTPUT_BYTES` allow, and at least one.
        model: whose number of outputs counts, and which is asked to keep no cache of keys and values.

    Raises:
        ValueError: no data, or batches that are not inputs and targets of equal length.
    """
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    width = None if model is None else output_width(model)
    keeps_cache = model is not None and "use_cache" in inspect.signature(model.forward).parameters
    empty = True
    for item in data:
        batch = _padding_last(as_batch(item))
        if keeps_cache and isinstance(batch.inputs, dict):
            batch = replace(batch, inputs={**batch.inputs, "use_cache": False})
        size = micro_batch or examples_at_once(_positions(batch.targets), width)
        for start in range(0, len(batch), size):
            empty = False
            yield batch[start : start + size]
    if empty:
        raise ValueError("the data are empty: no batch with at least one example")


def as_batch(item: Any) -> Batch:
    """What `data` yields as a `Batch`, its mask taken from `attention_mask` where it has none; else ValueError."""
    if isinstance(item, (Tensor, Mapping)) or (not isinstance(item, Batch) and len(item) not in (2, 3)):
        raise ValueError(
            "data must yield (inputs, targets) or (inputs, targets, mask) batches; for a language model inputs are "
            "{'input_ids': …, 'attention_mask': …}, targets the next token at each position"
        )
    batch = item if isinstance(item, Batch) else Batch(*item)
    leading = batch.inputs
    if isinstance(batch.inputs, Mapping):
        batch = replace(batch, inputs=dict(batch.inputs))
        leading = next(iter(batch.inputs.values()))
        padding = batch.inputs.get("attention_mask")
        if batch.mask is None and padding is not None:
            if padding.dim() != 2:
                raise ValueError(
                    f"an attention_mask {tuple(padding.shape)} does not say which positions are padding; give the mask "
                    "(N, T) of real positions as a third part of the batch"
                )
            batch = replace(batch, mask=padding.bool())
    if len(leading) != len(batch):
        raise ValueError(f"a batch has {len(leading)} inputs but {len(batch)} targets")
    return batch


def _padding_last(batch: Batch) -> Batch:
    """Padding on the left moved to the right, where a causal model does not see it.

    So positions count from the first real token, for the model's position embeddings and for the draws of labels
    alike, and no token is left without another to attend to.
    """
    padding = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if padding is None or padding.dim() != 2:
        return batch
    start = padding.bool().int().argmax(1)
    if not bool(start.any()):
        return batch
    N, T = padding.shape
    index = (torch.arange(N)[:, None], (torch.arange(T) + start.cpu()[:, None]) % T)

    def moved(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.shape[:2] == (N, T) else value

    inputs = {key: moved(value) for key, value in batch.inputs.items()}
    return Batch(inputs, moved(batch.targets), moved(batch.mask))


def output_width(model: nn.Module) -> int | None:
    """Number of outputs C of a language model (its vocabulary); None where it is not known without running it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return None if weight is None else int(weight.shape[0])


def context_length(model: Any) -> int | None:
    """Tokens that a language model takes at once; None where its configuration sets no limit."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()  # of a model that also sees images: its text part
    return getattr(text, "max_position_embeddings", None) or None


def examples_at_once(positions: int, width: int | None) -> int:
    """Examples of one forward pass, of so many positions each, with `width` outputs at each (None: not known)."""
    size = min(MICRO_BATCH, MICRO_POSITIONS // max(positions, 1))
    if width is not None:
        size = min(size, MICRO_OUTPUT_BYTES // max(4 * positions * width, 1))
    return max(size, 1)


def _positions(targets: Tensor) -> int:
    return targets.shape[1] if targets.dim() > 1 + targets.is_floating_point() else 1


def count_examples(data: Data) -> int | None:
    """Examples in `data`, where that is known without a pass over it."""
    dataset = getattr(data, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__"):
        return len(dataset)
    if not isinstance(data, (list, tuple)):
        return None
    if all(isinstance(item, Batch) or (isinstance(item, (list, tuple)) and len(item) > 1) for item in data):
        return sum(len(item) if isinstance(item, Batch) else len(item[1]) for item in data)
    return None


def require_reiterable(data: Data) -> None:
    """Refuse an iterator, which a second pass would find empty.

    Raises:
        ValueError: `data` can be iterated only once.
    """
    if iter(data) is data:
        raise ValueError(
            "this needs several passes over the data: give a DataLoader or a list of batches, not an iterator"
        )


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
