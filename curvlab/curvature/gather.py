"""Sums over the data: the one loop behind every fit, which can be interrupted, continued and shared by processes.

A fit keeps its statistics in a dictionary of tensors that passes add to. That they are sums is all that saving,
continuing and adding them up over processes need to know.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab import distributed
from curvlab.capture import Batch, Data, Pass, as_batch, columns, passes
from curvlab.curvature.checkpoint import Checkpoint, update
from curvlab.curvature.origin import Origin, origin_of
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Labels, Loss, Scale, as_loss
from curvlab.memory import announce, bytes_of

TURNS = 4  # batches for each process, below which they are cut finer
Sums = dict[str, Tensor]  # by "layer/statistic"; counts are int64
Vectors = Iterator[Tensor]  # of `capture.columns`; none where no labels were asked for
Add = Callable[[Sums, Pass, Vectors], None]


@dataclass(frozen=True)
class Work:
    """What every fit is asked; see `KFAC.fit` for the meaning of the arguments."""

    model: nn.Module
    loss: Loss
    data: Data
    layers: list[MatrixLayer]
    labels: Labels | None
    draws: int
    seed: int
    first_example: int
    micro_batch: int | None
    checkpoint: Path | None
    distributed: bool

    @classmethod
    def of(
        cls, model: nn.Module, loss: Any, data: Data, layers: str | Sequence[str], labels: Labels | None, draws: int,
        seed: int, bias: bool, first_example: int, micro_batch: int | None, checkpoint: str | Path | None,
        distributed: bool,
    ) -> "Work":  # fmt: skip
        """The arguments of a fit, checked."""
        if labels not in (None, "exact", "model", "data"):
            raise ValueError(f"labels must be 'exact', 'model' or 'data', got {labels!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        chosen = find_layers(model, layers, bias)
        path = None if checkpoint is None else Path(checkpoint)
        return cls(
            model, as_loss(loss), data, chosen, labels, draws, seed, first_example, micro_batch, path, distributed
        )

    @cached_property
    def origin(self) -> Origin:
        """What the statistics will say of where they come from; reads all weights, once."""
        return origin_of(self.model, self.layers, self.draws, self.seed)

    def zeros(self, what: str, shapes: Callable[[MatrixLayer], dict[str, tuple[int, ...]]]) -> Sums:
        """Empty sums, on each layer's own device, in float32 or better whatever the model's dtype.

        Raises:
            MemoryError: what a device has left cannot hold them.
        """
        needed: dict[torch.device, int] = {}
        for layer in self.layers:
            size = sum(bytes_of(*shape, dtype=sum_dtype(layer)) for shape in shapes(layer).values())
            needed[layer.device] = needed.get(layer.device, 0) + size
        for device, size in needed.items():
            announce(f"{what} of {len(self.layers)} layers", size, "fewer layers at a time", device)
        sums: Sums = {}
        for layer in self.layers:
            for name, shape in shapes(layer).items():
                sums[f"{layer.name}/{name}"] = torch.zeros(shape, dtype=sum_dtype(layer), device=layer.device)
            sums[f"{layer.name}/scale"] = torch.zeros(2, dtype=torch.int64)
        return sums


def sum_dtype(layer: MatrixLayer) -> torch.dtype:
    return torch.promote_types(layer.parameters()[0].dtype, torch.float32)


def count(sums: Sums, layer: MatrixLayer, scale: Scale) -> None:
    """Add the terms and positions of a pass."""
    sums[f"{layer.name}/scale"] += torch.tensor([scale.terms, scale.positions])


def scale_of(sums: Sums, name: str) -> Scale:
    return Scale(*sums[f"{name}/scale"].tolist())


def gather(
    work: Work,
    sums: Sums,
    add: Add,
    *,
    desc: str,
    identity: dict[str, Any],
    finish: Callable[[Sums], None] = lambda sums: None,
) -> None:
    """One pass over the data: `add(sums, pass, vectors)` for each micro-batch, then the sum over processes.

    Args:
        work: what to run.
        sums: zeros, added to in place; `add` may put in more tensors ("layer/…").
        identity: what distinguishes this fit from others besides `work`; a checkpoint of another is refused.
        finish: called on the sums of this process before they are added up.
    """
    rank, world = distributed.turn() if work.distributed else (0, 1)
    if world > 1:
        distributed.agree("weights, layers or arguments of the fit", str((identity, _identity(work), work.origin)))
    data = work.data
    if world > 1 and _length(data) < TURNS * world:
        data = _cut_finer(data, world)  # few large batches would leave processes without work
    seen = hashlib.sha256()
    checkpoint: Checkpoint | None = None
    if work.checkpoint is not None:
        path = work.checkpoint if world == 1 else work.checkpoint.with_name(f"{work.checkpoint.name}.{rank}of{world}")
        weights = {"weights": work.origin.checksum, "process": f"{rank} of {world}"}
        checkpoint = Checkpoint(path, _identity(work) | identity | weights)
        checkpoint.restore(sums)

    def select(number: int, batch: Batch) -> bool:
        if world > 1:
            update(seen, batch)
        known = checkpoint is not None and checkpoint.known(number, batch)
        return number % world == rank and not known

    for pass_ in passes(
        work.model, work.loss, data, work.layers, desc=desc, first_example=work.first_example,
        micro_batch=work.micro_batch, backward=work.labels is not None, select=select,
    ):  # fmt: skip
        vectors: Vectors = iter(())
        if work.labels is not None:
            vectors = columns(pass_, work.loss, work.labels, work.draws, work.seed)
        add(sums, pass_, vectors)
        del pass_, vectors  # not two passes in memory while the next one runs
        if checkpoint is not None:
            checkpoint.tick(sums)
    if checkpoint is not None:
        checkpoint.finish(sums)
    finish(sums)
    if world > 1:
        distributed.agree("the data (a DataLoader that shuffles, each by its own seed?)", seen.hexdigest())
        distributed.add_up(sums)


def _identity(work: Work) -> dict[str, Any]:
    return {
        "layers": [asdict(layer.shape) for layer in work.layers],
        "loss": repr(work.loss) if hasattr(work.loss, "__dataclass_fields__") else type(work.loss).__qualname__,
        "labels": work.labels,
        "draws": work.draws,
        "seed": work.seed,
        "first_example": work.first_example,
    }


def _length(data: Data) -> int:
    """Batches in `data`; 0 where that is not known."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _cut_finer(data: Data, world: int) -> Iterator[Batch]:
    """Every batch in as many parts as there are processes."""
    for item in data:
        batch = as_batch(item)
        size = -(-len(batch) // world)
        yield from (batch[start : start + size] for start in range(0, len(batch), size))
