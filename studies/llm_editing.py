"""Editing a language model without breaking it: CrispEdit and the gradient-based editors of the paper's Table 1.

    python studies/llm_editing.py --preset smoke --out results/editing

Edits a causal language model by every editor, asks it by autoregressive generation what it learnt and what else it
still knows, and writes DIR/results.csv and DIR/llm_editing.pdf/.png. `--model embedded` (the default) is a small
Llama trained on a generated world, on first use and without a network; a name or a path takes any Hugging Face
model. A run that was interrupted continues where it stopped when it is started again with the same arguments.
"""

import logging
import math
import os
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import editing_bench
import joblib
import pandas as pd
import tyro
from editing_bench import Bench, Setup, edit_and_measure, prepare, with_kept, world_of
from tqdm import tqdm

from curvlab.curvature.origin import weights_checksum
from curvlab.data.text import encode_documents
from curvlab.editing import editors
from curvlab.editing.footprint import Plan, announced
from curvlab.evaluation.tradeoff import best_at
from curvlab.memory import human
from curvlab.models.language import EMBEDDED
from curvlab.records import Row, cached_rows, fingerprint, provenance, write_table
from curvlab.refusal import refuse, refuse_unusable
from figures.llm_editing import draw

# what is varied of each editor; the others run once a seed
KNOBS = {
    "crispedit": "gamma", "crispedit-ekfac": "gamma", "crispedit-covariance": "gamma", "crispedit-eps": "epsilon",
    "crispedit-seq": "gamma", "crispedit-seq-eps": "epsilon", "kfac-penalty": "strength", "ewc": "strength",
    "replay": "strength", "adam-nscl": "ratio", "ft": "lr", "lora": "lr",
}  # fmt: skip
CURVES = ("crispedit", "crispedit-ekfac", "crispedit-covariance", "crispedit-eps")
STRENGTHS = {"kfac-penalty": (1e1, 1e2, 1e3), "ewc": (1e2, 1e3, 1e4), "replay": (1.0,)}
RATIOS = (10.0, 30.0)  # of Adam-NSCL, the authors'


@dataclass(frozen=True)
class Preset:
    """What the presets set; any of it can be given on the command line.

    Attributes:
        size: of the embedded world and its model.
        n_edits, n_capability: requests, and documents that curvature is taken on.
        n_asked: items asked of each capability, and requests asked about in the QA context.
        epochs, lr: of every editor but LoRA, whose settings are the paper's.
        batch_size: requests a step.
        seq_gammas, seq_epsilons: of CrispEdit-Seq.
        ft_lrs, lora_lrs: learning rates of FT, which trace how much it learns and breaks, and of LoRA (5e-3: paper's).
        chunk: requests a round of the sequential editors.
    """

    size: Literal["tiny", "smoke", "default"]
    editors: tuple[str, ...]
    n_edits: int
    n_capability: int
    n_asked: int
    seeds: tuple[int, ...]
    gammas: tuple[float, ...]
    epsilons: tuple[float, ...]
    seq_gammas: tuple[float, ...]
    seq_epsilons: tuple[float, ...]
    ft_lrs: tuple[float, ...]
    lora_lrs: tuple[float, ...]
    epochs: int
    lr: float
    batch_size: int
    chunk: int


ALL = (
    "none", "ft", "ft-seq", "locbf-ft", "lora", "lora-seq", "ewc", "kfac-penalty", "replay", "adam-nscl", "crispedit",
    "crispedit-ekfac", "crispedit-covariance", "crispedit-eps", "crispedit-seq", "crispedit-seq-eps",
)  # fmt: skip
FEW = ("none", "ft", "crispedit", "crispedit-eps", "crispedit-seq")
PRESETS = {
    "tiny": Preset(
        "tiny", FEW, 4, 6, 10, (0,), (0.9,), (1e-2,), (0.9,), (1e-2,), (1e-3,), (5e-3,), 3, 1e-3, 2, 2
    ),
    "smoke": Preset(
        "smoke", ALL, 60, 200, 60, (0,), (0.5, 0.8, 0.95), (1e-2, 1e-1), (0.9,), (1e-2,), (2e-3, 1e-2), (1e-3, 5e-3),
        30, 1e-2, 8, 20,
    ),
    "default": Preset(
        "default", ALL, 300, 1000, 200, (0, 1), (0.8, 0.95, 0.99, 0.999), (1e-3, 3e-3, 1e-2, 3e-2), (0.95, 0.99),
        (1e-2,), (1e-3, 2e-3, 5e-3), (1e-3, 5e-3), 25, 5e-3, 32, 100,
    ),
    "paper": Preset(
        "default", ALL, 3000, 10000, 200, (0,), (0.7, 0.9), (1e-3, 1e-2), (0.999,), (1e-3,), (5e-4,), (5e-3,),
        25, 5e-4, 32, 100,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Command line of the study; None means: as the preset says.

    Attributes:
        preset: tiny (for tests), smoke, default, paper (the paper's amounts, for a real model).
        out: folder of the results.
        model: embedded (a small Llama), embedded-gpt2, or a Hugging Face name or path.
        edits: world (the embedded world's own), counterfact, zsre, wikibigedit, or a file; None takes world for an
            embedded model and counterfact for others.
        capability: a text file whose documents are to be left alone (half of them to measure on); None takes the
            world's, or WikiText for other models.
        layers: names or patterns of the edited layers; None takes those at the paper's depth, and of the shallow
            embedded models every MLP output projection.
        editors: of `curvlab.editing.editors()`. Those beyond the gradient-based ones (`ALL`) run with their own options
            (`studies/paper_tables.py` tunes them); one that cannot do these edits has a row that says "refused".
        gammas, epsilons: of the null spaces and ellipsoids.
        seq_gammas, seq_epsilons: of CrispEdit-Seq.
        constraint: editors with null spaces, with ellipsoids, or both.
        project: what is projected; None is the paper's gradient (an ellipsoid takes the update).
        labels: of K-FAC and EK-FAC.
        data: folder with edits/ and text/ (else CURVLAB_DATA); the embedded world mixes real facts and stories in
            if it is given.
        harness: also run lm-evaluation-harness' base capabilities (the paper's tasks and shots).
        jobs: processes; 0 takes one a core on the CPU. Rows do not depend on it.
    """

    preset: Literal["tiny", "smoke", "default", "paper"] = "default"
    out: Path = Path("results/llm_editing")
    model: str = "embedded"
    edits: str | None = None
    n_edits: int | None = None
    editors: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    gammas: tuple[float, ...] | None = None
    epsilons: tuple[float, ...] | None = None
    seq_gammas: tuple[float, ...] | None = None
    seq_epsilons: tuple[float, ...] | None = None
    constraint: Literal["both", "null-space", "ellipsoid"] = "both"
    project: Literal["gradient", "update", "eigenbasis"] | None = None
    capability: Path | None = None
    n_capability: int | None = None
    labels: Literal["model", "data", "exact"] = "model"
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    lr: float | None = None
    data: Path | None = None
    device: str = "cpu"
    harness: bool = False
    jobs: int = 0

    @property
    def embedded(self) -> bool:
        return self.model.startswith("embedded")

    @property
    def folder(self) -> Path | None:
        """Where data lie."""
        return self.data or (Path(os.environ["CURVLAB_DATA"]) if os.environ.get("CURVLAB_DATA") else None)


def resolve(config: Config) -> tuple[Config, Preset]:
    """Fill in the preset and check everything that can be checked before work begins."""
    preset = PRESETS[config.preset]
    numbers = ("gammas", "epsilons", "seq_gammas", "seq_epsilons")
    for name in ("n_edits", "n_capability", "editors", *numbers, "seeds", "epochs", "lr"):
        if getattr(config, name) is not None:
            preset = replace(preset, **{name: getattr(config, name)})
    if config.lr is not None:
        preset = replace(preset, ft_lrs=(config.lr,))
    unknown = sorted(set(preset.editors) - set(editors()))
    if unknown or not preset.editors:
        refuse(f"--editors: unknown {unknown}; choose from {', '.join(editors())}")
    if any(not 0 < g < 1 for g in (*preset.gammas, *preset.seq_gammas)):
        refuse(f"--gammas must lie strictly between 0 and 1, got {[*preset.gammas, *preset.seq_gammas]}")
    for name in (*numbers, "editors"):
        if len(set(getattr(preset, name))) < len(getattr(preset, name)):
            refuse(f"--{name.replace('_', '-')} must be distinct, got {list(getattr(preset, name))}")
    if any(not (math.isfinite(e) and e > 0) for e in (*preset.epsilons, *preset.seq_epsilons)):
        refuse(f"--epsilons must be positive and finite, got {[*preset.epsilons, *preset.seq_epsilons]}")
    if not preset.seeds or len(set(preset.seeds)) < len(preset.seeds):
        refuse(f"--seeds must be distinct and at least one, got {list(preset.seeds)}")
    if min(preset.n_edits, preset.n_capability, preset.epochs) < 1 or not 0 < preset.lr < math.inf or config.jobs < 0:
        refuse("--n-edits, --n-capability, --epochs and --lr must be positive, --jobs not negative")
    if config.embedded and config.model not in EMBEDDED:
        refuse(f"--model {config.model}: choose {', '.join(EMBEDDED)}, or a Hugging Face name or path")
    if not config.embedded and config.edits == "world":
        refuse("--edits world: the world's facts are known to the embedded models only")
    if not config.embedded and config.folder is None and (config.capability is None or config.edits is None):
        refuse("give --data (or CURVLAB_DATA), or both --edits FILE and --capability FILE")
    refuse_unusable(config.device, config.out)
    default_edits = "world" if config.embedded else "counterfact"
    return replace(config, edits=config.edits or default_edits), preset


@dataclass(frozen=True)
class Unit:
    """One edit: an editor, the value of its knob (NaN where it has none), a seed."""

    seed: int
    editor: str
    value: float


def units(config: Config, preset: Preset) -> list[Unit]:
    """All edits, those that take longest first."""
    values = {name: preset.gammas if knob == "gamma" else preset.epsilons for name, knob in KNOBS.items()}
    values |= {"crispedit-seq": preset.seq_gammas, "crispedit-seq-eps": preset.seq_epsilons, "adam-nscl": RATIOS}
    values |= STRENGTHS | {"ft": preset.ft_lrs, "lora": preset.lora_lrs}
    wanted = {"null-space": "gamma", "ellipsoid": "epsilon"}.get(config.constraint)
    found = [
        Unit(seed, name, value)
        for name in preset.editors
        if not (name.startswith("crispedit") and wanted and KNOBS[name] != wanted)
        for seed in preset.seeds
        for value in values.get(name, (math.nan,))
    ]
    slow = ("lora-seq", "lora", "crispedit-ekfac")
    return sorted(found, key=lambda unit: slow.index(unit.editor) if unit.editor in slow else len(slow))


def setup_of(config: Config, preset: Preset, seed: int) -> Setup:
    """What the edits of a seed start from."""
    return Setup(
        config.model, preset.size, "all" if config.edits == "world" else str(config.edits), preset.n_edits,
        preset.n_capability, preset.n_asked, seed, capability=str(config.capability or "world"),
        layers=config.layers, labels=config.labels, data=config.data, folder=config.folder, device=config.device,
    )  # fmt: skip


def options_of(config: Config, preset: Preset, unit: Unit, bench: Bench) -> dict[str, Any]:
    """Options of the editor, as far as the preset, the command line or the unit say."""
    if unit.editor == "none":
        return {}
    options: dict[str, Any] = {"ending": bench.ending, "batch_size": preset.batch_size}
    if not unit.editor.startswith("lora"):
        options |= {"epochs": preset.epochs, "lr": preset.lr}
    if "seq" in unit.editor:
        options["chunk"] = preset.chunk
    knob = KNOBS.get(unit.editor)
    if knob:
        options[knob] = unit.value
    if unit.editor.startswith("crispedit") and config.project:
        options["project"] = "update" if (knob, config.project) == ("epsilon", "gradient") else config.project
    known = {field.name for field in fields(editors()[unit.editor].options)}
    return {name: value for name, value in options.items() if name in known}


def run_unit(config: Config, preset: Preset, unit: Unit, origin: Row) -> list[Row]:
    """One edit and what it did; `origin` are the columns of provenance."""
    bench = prepare(setup_of(config, preset, unit.seed))
    knob, settings = KNOBS.get(unit.editor), options_of(config, preset, unit, bench)
    row: Row = {
        "study": "llm_editing", "model": config.model, "editor": unit.editor,
        "gamma": unit.value if knob == "gamma" else math.nan,
        "epsilon": unit.value if knob == "epsilon" else math.nan,
        "strength": unit.value if knob in ("strength", "ratio", "lr") else math.nan,
        "seed": unit.seed,
        **edit_and_measure(
            bench, unit.editor, settings, harness=config.harness, refusals=unit.editor not in ALL,
            layers=bench.layers if unit.editor in ALL or config.layers else None,
        ),
        "edits": config.edits, "batch_size": preset.batch_size, "chunk": preset.chunk, "preset": config.preset,
    }  # fmt: skip
    return [row | origin]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, %, one line an editor and setting."""
    shown = ["reliability", "generalisation", "specificity", "reliability_qa", "reliability_teacher_forced"]
    shown += ["capability_kept"] + [c for c in map(str, table) if re.fullmatch("recall|task_(?!.*_(low|high)$).*", c)]
    lines = []
    for key, rows in table.groupby(["editor", "gamma", "epsilon", "strength"], dropna=False, sort=False):
        name, *values = cast(tuple[str, float, float, float], key)
        value = next((v for v in values if not math.isnan(v)), math.nan)
        line: Row = {"editor": name, "setting": "" if math.isnan(value) else f"{KNOBS[name]} {value:g}"}
        line |= {_short(c): f"{100 * rows[c].mean():.0f}".replace("nan", "–") for c in shown}
        line["perplexity"] = f"{rows['perplexity'].mean():.2f}".replace("nan", "–")
        line["s"] = f"{rows['edit_seconds'].mean():.0f}"
        if table["diverged"].any():  # means are over the others
            line["diverged"] = f"{rows['diverged'].sum()} of {len(rows)}"
        lines.append(line)
    return pd.DataFrame(lines)


def _short(name: str) -> str:
    full = {"reliability": "rel", "generalisation": "gen", "specificity": "spec", "capability_kept": "kept"}
    stem, _, rest = name.partition("_") if name != "capability_kept" else (name, "", "")
    tail = {"": "", "qa": " QA", "teacher_forced": " forced"}.get(rest, f" {rest}")
    return (full.get(stem, stem) + tail).removeprefix("task ")


def at_capability(rows: pd.DataFrame, knob: str, target: float) -> float:
    """Edit success where a curve over its knob keeps `target` of the capability; the best such point."""
    rows = rows.sort_values(knob)
    return best_at(rows["capability_kept"].to_numpy(), rows["edit_success"].to_numpy(), target)


def at_equal_capability(table: pd.DataFrame, targets: tuple[float, ...] = (0.98, 0.95, 0.9)) -> pd.DataFrame:
    """Edit success (%), mean ± sd over seeds, of each editor at equal capability kept."""
    lines = []
    for name, rows in table[table["editor"] != "none"].groupby("editor", sort=False):
        knob = KNOBS.get(str(name), "gamma")
        knob = knob if knob in ("gamma", "epsilon") else "strength"
        line: Row = {"editor": name}
        for target in targets:
            each = pd.Series([100 * at_capability(own, knob, target) for _, own in rows.groupby("seed")]).dropna()
            spread, seeds = f" ± {each.std():.1f}" if len(each) > 1 else "", rows["seed"].nunique()
            some = f" ({len(each)} of {seeds} seeds)" if len(each) < seeds else ""
            line[f"at {100 * target:.0f} %"] = f"{each.mean():.1f}{spread}{some}" if len(each) else "not reached"
        lines.append(line)
    return pd.DataFrame(lines)


def main(config: Config) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    started = time.perf_counter()
    config, preset = resolve(config)
    try:
        if not config.embedded:  # before weights are read
            plan = Plan(preset.editors, preset.n_edits, preset.batch_size, project=config.project)
            print(f"{config.model}: {announced(config.model, config.layers, plan, config.device)}", flush=True)
        drawn = {}  # of every seed, so that what cannot be run is said now, and files that changed are noticed
        for seed in reversed(preset.seeds):
            bench = prepare(setup_of(config, preset, seed))  # trains the embedded model on its first use
            drawn[seed] = [bench.requests, bench.capability.documents, bench.held_out, weights_checksum(bench.model)]
    except (FileNotFoundError, ValueError, OSError, MemoryError) as error:
        refuse(error)
    world = world_of(bench.setup)
    data = {"dataset": world.name, "dataset_checksum": world.fingerprint} if world else {"dataset": config.model}
    tokens = sum(
        int(b.inputs["attention_mask"].sum()) for b in encode_documents(bench.tokenizer, bench.capability.documents)
    )
    origin = data | provenance(__file__, str(editing_bench.__file__))
    todo = units(config, preset)
    if not todo:
        refuse("no edit to make: --editors, --constraint and --gammas or --epsilons leave none")
    print(
        f"{config.model}: {sum(p.numel() for p in bench.model.parameters()) / 1e6:.1f} M parameters, edits in "
        f"{', '.join(bench.layers)}; {preset.n_edits} requests, {len(bench.capability.documents)} capability documents "
        f"({tokens} tokens), {len(todo)} edits to make",
        flush=True,
    )
    skipped = (
        "out", "jobs", "preset", "editors", "seeds", "gammas", "epsilons", "seq_gammas", "seq_epsilons", "constraint",
    )  # fmt: skip
    me = asdict(
        replace(
            preset, editors=(), seeds=(), gammas=(), epsilons=(), seq_gammas=(), seq_epsilons=(), ft_lrs=(), lora_lrs=()
        )
    )
    me |= {name: value for name, value in asdict(config).items() if name not in skipped} | origin
    folders = {seed: config.out / "units" / fingerprint(me | {"drawn": parts}) for seed, parts in drawn.items()}
    jobs = min(config.jobs or (os.cpu_count() or 1 if config.device == "cpu" and config.embedded else 1), len(todo))
    if config.preset == "tiny" and not config.jobs:
        jobs = 1  # starting workers would take longer than the work

    def finish(unit: Unit) -> list[Row]:
        file = folders[unit.seed] / f"{unit.seed}-{unit.editor}-{unit.value!r}.json"
        return cached_rows(file, lambda: run_unit(config, preset, unit, origin))

    # by seed, so that a process fits its capability curvature once a seed
    todo = sorted(todo, key=lambda unit: unit.seed)
    with joblib.parallel_config(backend="loky" if jobs > 1 else "sequential", n_jobs=jobs):
        calls = joblib.Parallel(return_as="generator_unordered")(joblib.delayed(finish)(unit) for unit in todo)
        bar = tqdm(calls, desc="edits and their evaluation", total=len(todo), disable=None)
        try:
            rows: list[Row] = [row for finished in bar for row in finished]
        except (ValueError, FloatingPointError, MemoryError, OSError) as error:
            raise SystemExit(f"stopped, finished edits are kept in {config.out}: {error}") from error
    order = {name: i for i, name in enumerate(ALL)}
    rows.sort(key=lambda row: row["diverged"])  # the first row has all columns
    table = pd.DataFrame(rows)
    table = table.sort_values(
        ["editor", "gamma", "epsilon", "strength", "seed"], ignore_index=True,
        key=lambda column: column.map(lambda v: order.get(v, len(order))) if column.name == "editor" else column,
    )  # fmt: skip
    table = with_kept(table)
    write_table(table, config.out / "results.csv")
    files = draw(table, config.out / "llm_editing.pdf")

    print("\n%, means over seeds (rel, gen, spec by generation; forced: teacher-forced)")
    print(summary(table).to_string(index=False))
    if table["capability_kept"].notna().any():
        print(
            "\nedit success (mean of reliability and generalisation, %) at equal capability kept, mean ± sd over seeds"
        )
        print(at_equal_capability(table).to_string(index=False))
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(table)} edits, {minutes:.1f} min, peak {human(table['peak_bytes'].max())} a process")
    print(f"results: {config.out / 'results.csv'}\nfigure:  {files[1]} and {files[0]}")


if __name__ == "__main__":
    import llm_editing  # by name, so that worker processes import it too and keep what they have loaded

    llm_editing.main(tyro.cli(llm_editing.Config, description=__doc__))
