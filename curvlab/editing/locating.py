"""What ROME, MEMIT and AlphaEdit share: blocks that can be edited, and MEMIT's rounds over requests and layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from curvlab.data.edits import Request
from curvlab.data.text import fill
from curvlab.editing.job import Job
from curvlab.editing.lookup import Lookup, look_up, sample_prefixes
from curvlab.editing.reading import read
from curvlab.editing.subject import subject_ends
from curvlab.editing.training import Curve
from curvlab.editing.values import Locating, Site, Values, find_values
from curvlab.layers import MatrixLayer, find_layers


@dataclass(frozen=True)
class Place:
    """Where a layer lies in the model's list of blocks."""

    stem: str
    index: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.stem}.{self.index}"

    @property
    def above(self) -> str:
        """A name in the next block, for `Prefix`: all up to this block's output runs once."""
        return f"{self.stem}.{self.index + 1}."


def place_of(model: nn.Module, layer: str) -> Place:
    """The block that holds `layer`.

    Raises:
        ValueError: a layer in no block of a `ModuleList`.
    """
    parts = layer.split(".")
    modules = dict(model.named_modules())
    for i in range(1, len(parts)):
        stem = modules.get(".".join(parts[:i]))
        if isinstance(stem, nn.ModuleList):
            return Place(".".join(parts[:i]), int(parts[i]), len(stem))
    raise ValueError(f"{layer} lies in no block of the model; edit output projections of its blocks' MLPs")


def usable_layers(job: Job, options: Locating) -> list[str]:
    """The job's layers without those of the last block: only its own position reads what that writes at a subject.

    They stay where every subject ends its prompt.

    Raises:
        ValueError: requests without a subject in their prompt (`subject_ends`), or no layer is left.
    """
    ends = subject_ends(job.requests, options.template, options.subject)
    prompts = [fill(options.template, request.prompt).rstrip() for request in job.requests]
    if all(end == len(prompt) - 1 for end, prompt in zip(ends, prompts, strict=True)):
        return job.layers
    places = {name: place_of(job.model, name) for name in job.layers}
    usable = [name for name, place in places.items() if place.index < place.count - 1]
    if not usable:
        raise ValueError(
            f"{', '.join(job.layers)}: what the last block writes at a subject, no later prediction reads; edit lower "
            "layers (layers=…)"
        )
    return usable


def descend_on_values(job: Job, site: Site, look: Lookup, options: Locating) -> Values:
    """`find_values` batch by batch; their curve is the job's."""
    found: list[Values] = []
    with tqdm(total=look.n, desc=f"{job.desc}: values", delay=1.0, leave=False, disable=None) as bar:
        for some in torch.arange(look.n).split(options.batch_size):
            found.append(find_values(job.model, site, look.of(some), options))
            bar.update(len(some))
    losses = [each for values in found for each in values.losses]
    job.curves.append(_curve(losses, max(options.stop_below, options.skip_below)))
    return Values(torch.cat([v.shifts for v in found]), torch.cat([v.before for v in found]), losses)


def _curve(losses: Sequence[list[float]], stop: float) -> Curve:
    """The mean loss at each step, of requests that were done the last one; `skipped` counts these requests."""
    steps = range(max(len(each) for each in losses))
    means = [sum(each[min(t, len(each) - 1)] for each in losses) / len(losses) for t in steps]
    done = [sum(t >= len(each) or each[t] < stop for each in losses) for t in steps]
    return Curve(means, done, "loss" if done[-1] == len(losses) else "epochs")


def edit_in_rounds(
    job: Job,
    options: Locating,
    layers: Sequence[MatrixLayer],
    chunk: int | None,
    update: Callable[[MatrixLayer, Tensor, Tensor], Tensor],
    after_round: Callable[[MatrixLayer, Tensor], None] | None = None,
) -> None:
    """MEMIT's loop (arXiv 2210.07229, Alg. 1): values at the highest layer's block, then weights layer by layer.

    Args:
        chunk: requests a round; None takes all at once.
        update: (layer, K (d_in, n), R (d_out, n)) → ΔW (d_out, d_in), where R is the layer's share of what the block's
            output still lacks, (z − h)/(layers left), at the weights as they stand.
        after_round: (layer, K) with the keys after the round, for every layer.
    """
    prefixes = sample_prefixes(job.model, job.tokenizer, options.prefixes, options.prefix_length, job.seed)
    place = place_of(job.model, layers[-1].name)
    block = job.model.get_submodule(place.name)
    size = chunk or len(job.requests)
    for start in range(0, len(job.requests), size):
        look = lookup_of(job, job.requests[start : start + size], prefixes, options)
        values = descend_on_values(job, Site(block, place.above), look, options)
        wanted = (values.before + values.shifts).double()
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            inputs, hidden = read(job.model, look.batch, look.positions, [layer], block)
            assert hidden is not None
            K = look.mean(inputs[layer.name]).T
            R = ((wanted - hidden[: look.n]).T / left).to(K.device)
            layer.write(layer.matrix().double() + update(layer, K, R).to(layer.device))
        if after_round is not None:
            inputs, _ = read(job.model, look.batch, look.positions, layers)
            for layer in layers:
                after_round(layer, look.mean(inputs[layer.name]).T)


def lookup_of(job: Job, requests: Sequence[Request], prefixes: Sequence[str], options: Locating) -> Lookup:
    """`look_up` with the job's tokenizer and the options."""
    return look_up(job.tokenizer, requests, prefixes, options, options.subject, options.essence)


def trained_layers(job: Job, names: Sequence[str]) -> list[MatrixLayer]:
    """The layers, their weights in float32 or better and without gradients, which no closed form needs."""
    job.parameters(names)
    job.model.requires_grad_(False)
    return find_layers(job.model, list(names))


def damped(A: Tensor, damping: float) -> Tensor:
    """A + damping · mean eigenvalue · I, in float64."""
    C = A.double().clone()
    C.diagonal().add_(damping * float(C.diagonal().mean()))
    return C


def cholesky(M: Tensor) -> Tensor:
    """L with L Lᵀ = M.

    Raises:
        ValueError: M is singular, up to rounding.
    """
    L, failed = torch.linalg.cholesky_ex(M)
    if int(failed):
        raise ValueError(
            "the capability set's keys do not span the layer's inputs: give more documents, or a larger damping"
        )
    return L
