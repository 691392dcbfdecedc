"""What the studies of editing share: a model with its requests, documents and questions; one edit and its measures."""

import copy
import logging
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch

from curvlab.batches import output_width
from curvlab.capture import check_exact
from curvlab.data.edits import Request, check_requests, load_edits
from curvlab.data.text import PLAIN, QA, fill, read_documents, shuffled_documents
from curvlab.data.world import Size, Source, Split, World, make_world
from curvlab.data.world_tasks import Item
from curvlab.editing import Capability, EditedModel, default_layers, edit, output_projections
from curvlab.editing.job import longest
from curvlab.evaluation.capability import TokenMeans, answers_right, kl_from, nll
from curvlab.evaluation.editing import answers, evaluate_edits, prompts_of
from curvlab.evaluation.generation import MAX_NEW_TOKENS, check_prompts
from curvlab.evaluation.intervals import Interval, bootstrap
from curvlab.layers import Matrices, find_layers
from curvlab.memory import peak
from curvlab.models.language import EMBEDDED, embedded_model, embedded_record, load_language_model
from curvlab.records import Row

_log = logging.getLogger("curvlab")

# what the printed tables show; NaN of an edit that diverged
MEASURED = (
    "edit_success", "reliability", "generalisation", "specificity", "reliability_qa", "reliability_teacher_forced",
    "nll", "perplexity",
)  # fmt: skip
LEARNT = 0.5  # held-out accuracy from which on a task counts as a capability


@dataclass(frozen=True)
class Setup:
    """What one edit starts from; what it names is drawn from `seed` alone.

    Attributes:
        model: a name in `EMBEDDED`, or a Hugging Face name or path.
        size: of the embedded world.
        edits: a source of the world ("all", "generated", and with `data` "counterfact" or "zsre"), a set known by
            name, or a file.
        n_edits, n_capability: requests, and documents that curvature is taken on.
        n_asked: items asked of each capability, and requests asked about in the QA context.
        split: the half of the facts (or of the file) that requests are drawn from.
        capability: documents that curvature is taken on: "world" (all that the model was taught), "stories" (none of
            its facts and tasks), or a text file, one half to take curvature on and the other to measure on.
        layers: names or patterns; None takes those at the paper's depth, and of the shallow embedded models every MLP
            output projection.
        data: a folder whose real facts and stories are in the embedded world.
        folder: where named sets lie.
    """

    model: str
    size: Size
    edits: str
    n_edits: int
    n_capability: int
    n_asked: int
    seed: int
    split: Split = "all"
    capability: str = "world"
    layers: tuple[str, ...] | None = None
    labels: Literal["model", "data", "exact"] = "model"
    data: Path | None = None
    folder: Path | None = None
    device: str = "cpu"

    @property
    def embedded(self) -> bool:
        return self.model in EMBEDDED


@dataclass(frozen=True)
class Bench:
    """What every edit of one setup shares.

    Attributes:
        requests: the edits.
        capability: the documents that curvature is taken on.
        held_out: documents that the perplexity is measured on.
        questions: by capability, what the edits should leave alone.
        ending: what follows an answer in the model's own documents.
        base: the unedited model, where a second copy is small.
    """

    setup: Setup
    model: Any
    tokenizer: Any
    layers: list[str]
    requests: list[Request]
    capability: Capability
    held_out: list[str]
    questions: dict[str, list[Item]]
    ending: str
    base: Any


@lru_cache(maxsize=2)
def _world(size: Size, data: Path | None) -> World:
    return make_world(size, data=data)


def world_of(setup: Setup) -> World | None:
    """The embedded world, for a model that was taught it."""
    return _world(setup.size, setup.data) if setup.embedded else None


@lru_cache(maxsize=1)
def _loaded(model: str, size: Size, data: Path | None, device: str) -> tuple[Any, Any]:
    if model in EMBEDDED:
        found, tokenizer = embedded_model(_world(size, data), EMBEDDED[model])
    else:
        found, tokenizer = load_language_model(model, device=device)
    return found.to(device), tokenizer  # type: ignore[arg-type]


def available(setup: Setup) -> int:
    """How many edits `draw_requests` can make."""
    world = world_of(setup)
    if world is not None and setup.edits in world.sources:
        return world.editable(cast(Source, setup.edits), setup.split)
    whole = len(load_edits(setup.edits, data=setup.folder))
    return {"all": whole, "train": whole // 2, "test": whole - whole // 2}[setup.split]


def draw_requests(setup: Setup) -> list[Request]:
    """The edits of a setup.

    Raises:
        ValueError: more than there are.
    """
    world = world_of(setup)
    if world is not None and setup.edits in world.sources:
        return world.requests(setup.n_edits, setup.seed, source=cast(Source, setup.edits), split=setup.split)
    if setup.split == "all":
        return load_edits(setup.edits, setup.n_edits, seed=setup.seed, data=setup.folder)
    # halves of one order of the whole set, the same for every seed
    both = load_edits(setup.edits, len(load_edits(setup.edits, data=setup.folder)), seed=0, data=setup.folder)
    half = both[: len(both) // 2] if setup.split == "train" else both[len(both) // 2 :]
    if setup.n_edits > len(half):
        raise ValueError(f"cannot take {setup.n_edits} edits of the {len(half)} in one half of {setup.edits}")
    order = torch.randperm(len(half), generator=torch.Generator().manual_seed(setup.seed))
    return [half[index] for index in order[: setup.n_edits].tolist()]


@lru_cache(maxsize=1)
def prepare(setup: Setup) -> Bench:
    """Requests, documents and questions; trains the embedded model on its first use.

    Raises:
        ValueError: requests that cannot be edited as they stand, more than there are, prompts too long for the model.
        FileNotFoundError: a model, a set or a text that is not there.
    """
    world = world_of(setup)
    requests = draw_requests(setup)
    file: Path | None = None
    if world is None or setup.capability not in ("world", "stories"):
        named = setup.capability not in ("world", "stories")
        file = Path(setup.capability) if named else Path(str(setup.folder)) / "text" / "wikitext2_valid.txt"
        read_documents(file)  # what cannot be read is said before a model is loaded or trained
    model, tokenizer = _loaded(setup.model, setup.size, setup.data, setup.device)
    check_requests(requests, tokenizer, max_length=longest(model))
    beyond = [r for r in requests if len(tokenizer(r.target, add_special_tokens=False)["input_ids"]) > MAX_NEW_TOKENS]
    if beyond:
        _log.warning(
            "%d targets have more tokens than the %d that are generated, and count as never said: %r…",
            len(beyond), MAX_NEW_TOKENS, beyond[0].target[:60],
        )  # fmt: skip
    questions: dict[str, list[Item]] = {}
    if file is not None:
        texts = shuffled_documents(file, tokenizer, setup.seed)
        half = (len(texts) + 1) // 2  # one half to take curvature on, the other to measure on
        documents = texts[:half][: setup.n_capability]
        held_out = texts[half:][: setup.n_asked] or documents
        if len(texts) == 1:
            _log.warning("%s holds one document: its likelihood is measured on what curvature is taken on", file)
    if world is not None:
        questions["recall"] = world.recall(setup.n_asked, setup.seed, without=requests)
        if setup.capability in ("world", "stories"):
            # what is asked is not in the text that curvature is taken on
            held: list[Request | Item] = [*requests, *questions["recall"]]
            if setup.capability == "stories":
                documents = list(world.texts[: setup.n_capability])
            else:
                documents = world.capability(setup.n_capability, setup.seed, without=held)
            held_out = list(world.stories[: setup.n_asked])
        able = embedded_record(world, EMBEDDED[setup.model])  # what the model never learnt, no edit can destroy
        questions |= {
            f"task_{name}": items[: setup.n_asked]
            for name, items in world.tasks.items()
            if able[f"task_{name}"] >= LEARNT or setup.size == "tiny"
        }
    asked = prompts_of(requests) + [fill(QA, prompt) for prompt in prompts_of(requests[: setup.n_asked])]
    check_prompts(model, tokenizer, asked + [item.prompt for items in questions.values() for item in items])
    base = copy.deepcopy(model) if setup.embedded else None
    capability = Capability(documents, max_length=min(512, longest(model)), labels=setup.labels, seed=setup.seed)
    if setup.labels == "exact":
        check_exact(max(batch.targets.shape[1] for batch in capability.batches(tokenizer)), output_width(model))
    patterns = setup.layers or (output_projections(model) if setup.embedded else default_layers(model))
    layers = [layer.name for layer in find_layers(model, list(patterns))]
    ending = "." if world else ""
    return Bench(setup, model, tokenizer, layers, requests, capability, held_out, questions, ending, base)


def edit_and_measure(
    bench: Bench,
    editor: str,
    settings: dict[str, Any],
    *,
    layers: list[str] | None,
    harness: bool = False,
    cases: int = 0,
    refusals: bool = False,
) -> Row:
    """One edit, what it did, and undone again. An edit that diverges has no measures.

    Args:
        layers: those edited; None takes the editor's own.
        harness: also run lm-evaluation-harness' base capabilities.
        cases: what the model generates for so many of the requests is written down, as `cases`.
        refusals: an editor that cannot do this (no free direction, say) has a row without measures, too, instead of
            ending all the others.

    Raises:
        ValueError: options or requests that the editor refuses.
    """
    setup = bench.setup
    if setup.device == "cpu":
        torch.set_num_threads(1 if setup.embedded else torch.get_num_threads())
    row: Row
    started = time.perf_counter()
    try:
        edited = edit(
            bench.model, bench.tokenizer, bench.requests, editor=editor, layers=layers,
            capability=bench.capability, seed=setup.seed, **settings,
        )  # fmt: skip
    except (FloatingPointError, ValueError) as error:  # (the weights are put back)
        how = "diverged" if isinstance(error, FloatingPointError) else "refused"
        told = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        if how == "refused" and not refusals:
            raise
        _log.warning("%s, %s: %s; recorded as %s", editor, told, error, how)
        row = dict.fromkeys(MEASURED, math.nan) | {"diverged": 1, "stopped": how}
        row |= {"edit_seconds": time.perf_counter() - started, "peak_bytes": peak(setup.device)}
        options = settings
    else:
        moved = edited.displacement()
        try:
            row = measure(bench, harness=harness)
            if cases:
                row["cases"] = generated(bench, cases)
        finally:
            edited.undo()
        row |= {"predicted_kl": predicted(bench, moved) if setup.embedded else math.nan} | of_the_edit(edited)
        row["diverged"] = int(not math.isfinite(cast(float, row["nll"])))
        options = edited.options
    return row | {
        "edits": setup.edits, "n_edits": len(bench.requests), "n_asked": setup.n_asked,
        "n_capability": len(bench.capability.documents), "layers": " ".join(options.get("layers", bench.layers)),
        "labels": setup.labels, "project": str(options.get("project", "")), "lr": options.get("lr", math.nan),
        "device": setup.device,
    }  # fmt: skip


def measure(bench: Bench, *, harness: bool = False) -> Row:
    """What the model says: the edits with and without QA context, and its capabilities; intervals of 95 %.

    Losses are NaN where the model's outputs are.
    """
    model, tokenizer = bench.model, bench.tokenizer
    values: dict[str, list[float]] = evaluate_edits(model, tokenizer, bench.requests, template=PLAIN)
    by_request = values["reliability"]
    asked = bench.requests[: bench.setup.n_asked]
    in_context = evaluate_edits(model, tokenizer, asked, template=QA, teacher_forced=False)
    values |= {f"{name}_qa": found for name, found in in_context.items()}
    correct = {name: answers_right(model, tokenizer, pairs) for name, pairs in bench.questions.items()}
    values |= correct
    asked_of = [values[name] for name in ("reliability", "generalisation") if values[name]]
    row: Row = _mean_of("edit_success", asked_of) | (_mean_of("capability", list(correct.values())) if correct else {})
    for name, found in values.items():
        row |= _columns(name, bootstrap(found))  # (NaN where nothing was asked)
    row["learnt"] = "".join(str(int(value)) for value in by_request)  # request by request, in the order of the edits
    room = bench.capability.max_length
    row |= _losses("nll", nll(model, tokenizer, bench.held_out, max_length=room))
    for name in ("nll", "nll_low", "nll_high"):
        row[name.replace("nll", "perplexity")] = math.exp(min(row[name], 700.0))
    if bench.base is not None:
        row |= _losses("kl", kl_from(bench.base, model, tokenizer, bench.held_out, max_length=room))
    if harness:
        from curvlab.evaluation.harness import base_capabilities

        for task, score in base_capabilities(model, tokenizer).items():
            row |= _columns(f"harness_{task}", score.interval)
    return row


def generated(bench: Bench, n: int) -> list[dict[str, str]]:
    """What the model says to the first requests, as in the paper's Appendix F."""
    requests = bench.requests[:n]
    pairs = [(request.prompt, request.target) for request in requests]
    texts = answers(bench.model, bench.tokenizer, pairs)
    return [{"prompt": r.prompt, "target": r.target, "text": text} for r, text in zip(requests, texts, strict=True)]


def predicted(bench: Bench, moved: Matrices) -> float:
    """½ δᵀCδ with K-FAC at θ0 (nats a capability token), to hold against the measured KL; the model is at θ0."""
    layers = find_layers(bench.model, bench.layers)
    if set(moved) != {name for layer in layers for name in layer.parameter_names}:
        return math.nan  # other layers were edited, or none
    delta = {layer.name: layer.matrix([moved[name] for name in layer.parameter_names]) for layer in layers}
    spectrum = bench.capability.spectrum(bench.model, bench.tokenizer, bench.layers)
    return float(spectrum.quadratic_form(delta)) / 2


def of_the_edit(edited: EditedModel) -> Row:
    """How the edit went."""
    counted = {name: count for name, count in edited.counts.items() if name.startswith("edits_")}
    return counted | {
        "edit_loss": edited.losses[-1] if edited.losses else math.nan, "stopped": edited.stopped,
        "epochs_run": edited.counts.get("epochs", 0), "refits": edited.counts.get("refits", 0),
        "leak": edited.counts.get("leak", math.nan), "drift": edited.drift, "edit_seconds": edited.seconds,
        "curvature_seconds": edited.curvature_seconds, "peak_bytes": edited.peak_bytes,
    }  # fmt: skip


def with_kept(table: pd.DataFrame, by: str | list[str] = "seed") -> pd.DataFrame:
    """Columns capability_kept, …_low and …_high: capability as a share of the unedited model's (without tasks: e^−Δnll
    of the held-out text, at most 1: a text that became likelier is no gain of capability). The interval is that of the
    edited model's measure; the unedited one's value on the same items counts as exact.

    `by`: columns that tell what an edit's unedited model (editor "none") is.
    """
    keys = [by] if isinstance(by, str) else by
    base = table[table["editor"] == "none"].drop_duplicates(keys).set_index(keys)
    known = len(base) > 0
    index = pd.MultiIndex.from_frame(table[keys]) if len(keys) > 1 else pd.Index(table[keys[0]])

    def of(column: str) -> pd.Series:
        return pd.Series(base[column].reindex(index).to_numpy(), table.index)

    kept = {}
    for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
        if not known:
            kept[f"capability_kept{end}"] = pd.Series(math.nan, table.index)
        elif "capability" in table:
            kept[f"capability_kept{end}"] = table[f"capability{end}"] / of("capability")
        else:  # the higher the loss the less is kept
            kept[f"capability_kept{end}"] = (of("nll") - table[f"nll{other}"]).clip(upper=0.0).map(math.exp)
    return table.assign(**kept)


def _columns(name: str, interval: Interval) -> Row:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _losses(name: str, means: TokenMeans) -> Row:
    finite = all(map(math.isfinite, means.values))
    return _columns(name, means.interval() if finite else Interval(math.nan, math.nan, math.nan))


def _mean_of(name: str, groups: list[list[float]]) -> Row:
    """The mean of several measures' means with its interval; each measure is resampled, and weighs alike."""
    size = sum(map(len, groups))
    items = [(value, size / len(group)) for group in groups for value in group]
    alike = len(set(map(len, groups))) == 1  # then without weights, which keeps the exact interval of equal values
    return _columns(name, bootstrap([v for v, _ in items], weights=None if alike else [w for _, w in items]))
