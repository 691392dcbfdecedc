"""Every editor and every table of the paper, on the embedded world or on a real model.

    python studies/paper_tables.py --tables table1 table8 --preset smoke --out results/paper_tables

Tunes every method on a half of the facts that is not edited afterwards, by the same budget, edits the other half, and
writes DIR/results.csv (one row a table, method, setting, edit set and seed), DIR/tuning.csv, DIR/cases.json, the tables
with the paper's numbers beside ours (DIR/tables.md), the figures, and DIR/verdicts.md: what reproduces and what does
not, of the tables asked for. Edits that several tables ask for are made once, and kept: an interrupted run continues
where it stopped when it is started again with the same arguments, and more --tables cost only what they add.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import editing_bench
import joblib
import pandas as pd
import paper_plan
import tyro
from editing_bench import Bench, Setup, available, draw_requests, edit_and_measure, prepare, with_kept, world_of
from paper_plan import (
    AUTHORS,
    GRIDS,
    IN_ROUNDS,
    LOCATING,
    NAMES,
    PAPER_NAMES,
    PLANS,
    TRAINED,
    Base,
    Options,
    Wanted,
    describe,
    plans_of,
)
from tqdm import tqdm

from curvlab.curvature.origin import weights_checksum
from curvlab.data.edits import Request
from curvlab.data.world import Size
from curvlab.editing.footprint import Plan, announced
from curvlab.memory import human
from curvlab.models.language import EMBEDDED
from curvlab.records import Row, cached_rows, fingerprint, provenance, write_table
from curvlab.refusal import refuse, refuse_unusable
from curvlab.storage import replacing
from figures import paper_figures, paper_tables, paper_verdicts

MINUTES = 0.5  # of one core, an edit of the default preset with its evaluation, a mean over the methods
CASES = 5  # requests of each edit whose generated answers are kept, for Appendix F


@dataclass(frozen=True)
class Preset:
    """What the presets set; any of it but the size can be given on the command line.

    Attributes:
        size: of the embedded world and its model.
        n_edits: of Tables 1 and 3 to 8; Table 4 makes three times as many.
        n_capability: documents that curvature is taken on.
        n_asked: items asked of each capability, and requests asked about in the QA context.
        seeds: of requests, documents and draws.
        epochs, batch_size, chunk: of the editors that train, and of the sequential ones.
        grid: settings that each method is tuned over.
        mend_steps: of the training of MEND's network.
        editors: that are run; the others' rows are missing from the tables.
    """

    size: Size
    n_edits: int
    n_capability: int
    n_asked: int
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    chunk: int
    grid: int
    mend_steps: int
    editors: tuple[str, ...]
    seq_documents: int | None = None  # of n_capability, for CrispEdit-Seq (the paper's 30); None takes all


PRESETS = {
    "tiny": Preset("tiny", 4, 10, 5, (0,), 3, 2, 2, 1, 2, ("none", "ft", "ultraedit", "crispedit", "crispedit-seq")),
    "smoke": Preset("smoke", 32, 200, 40, (0,), 25, 8, 8, 1, 50, tuple(NAMES)),
    "default": Preset("default", 160, 1000, 200, (0,), 25, 32, 40, 4, 600, tuple(NAMES)),
    "paper": Preset(
        "default", 3000, 10000, 200, (0,), 25, 32, 100, 0, 1000, tuple(n for n in PAPER_NAMES if n != "mend"), 30
    ),
}


@dataclass(frozen=True)
class Config:
    """Command line of the study; None means: as the preset says.

    Attributes:
        tables: of table1, table3 … table8, fig1, fig4, fig5, fig7, merge, cases; or all.
        preset: tiny (for tests), smoke, default, paper (the paper's amounts and settings, untuned, for real models).
        out: folder of the results.
        model: embedded (a small Llama), or a Hugging Face name or path.
        second: the other model family, of Table 5; none leaves that table out.
        edits: sets to edit: generated (the embedded world's own), counterfact, zsre, wikibigedit, or files.
        capability: a text file whose documents are to be left alone (half of them to measure on); None takes the
            world's, or WikiText for other models.
        tune: choose each method's setting on the other half of the facts; --no-tune takes the first of its grid.
        data: folder with edits/ and text/ (else CURVLAB_DATA); the embedded world mixes real facts and stories in if
            there is one.
        harness: also run lm-evaluation-harness' base capabilities (the paper's tasks and shots).
        jobs: processes; 0 takes one a core on the CPU. Rows do not depend on it.
    """

    tables: tuple[str, ...] = ("table1",)
    preset: Literal["tiny", "smoke", "default", "paper"] = "default"
    out: Path = Path("results/paper_tables")
    model: str = "embedded"
    second: str = "embedded-gpt2"
    edits: tuple[str, ...] = ("generated",)
    n_edits: int | None = None
    n_capability: int | None = None
    n_asked: int | None = None
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    chunk: int | None = None
    grid: int | None = None
    editors: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    capability: Path | None = None
    tune: bool = True
    data: Path | None = None
    device: str = "cpu"
    harness: bool = False
    jobs: int = 0

    @property
    def folder(self) -> Path | None:
        """Where data lie."""
        return self.data or (Path(os.environ["CURVLAB_DATA"]) if os.environ.get("CURVLAB_DATA") else None)


def resolve(config: Config) -> tuple[Config, Preset, list[str]]:
    """Fill in the preset and check everything that can be checked before work begins."""
    preset = PRESETS[config.preset]
    for name in ("n_edits", "n_capability", "n_asked", "seeds", "epochs", "chunk", "grid", "editors"):
        if getattr(config, name) is not None:
            preset = replace(preset, **{name: getattr(config, name)})
    if not config.tune:
        preset = replace(preset, grid=min(preset.grid, 1))
    try:
        plans = plans_of(config.tables)
    except ValueError as error:
        refuse(error)
    unknown = sorted(set(preset.editors) - set(NAMES))
    if unknown or not preset.editors:
        refuse(f"--editors: unknown {unknown}; choose from {', '.join(NAMES)}")
    if not preset.seeds or len(set(preset.seeds)) < len(preset.seeds):
        refuse(f"--seeds must be distinct and at least one, got {list(preset.seeds)}")
    if not config.edits or len(set(config.edits)) < len(config.edits):
        refuse(f"--edits must be distinct and at least one, got {list(config.edits)}")
    if min(preset.n_edits, preset.n_capability, preset.n_asked, preset.epochs, preset.chunk) < 1 or config.jobs < 0:
        refuse("--n-edits, --n-capability, --n-asked, --epochs and --chunk must be positive, --jobs not negative")
    if not 0 <= preset.grid <= 4:
        refuse(f"--grid must be 1 to 4 settings a method (0: the authors' own), got {preset.grid}")
    for name in (config.model, *(() if config.second == "none" or "table5" not in plans else (config.second,))):
        if name.startswith("embedded") and name not in EMBEDDED:
            refuse(f"--model {name}: choose {', '.join(EMBEDDED)}, or a Hugging Face name or path")
        if name not in EMBEDDED and "generated" in config.edits:
            refuse("--edits generated: the world's facts are known to the embedded models only")
        if name not in EMBEDDED and config.folder is None and config.capability is None:
            refuse(
                f"--model {name}: give --data (or CURVLAB_DATA), where its capability text lies, or --capability FILE"
            )
    refuse_unusable(config.device, config.out)
    return config, replace(preset, editors=tuple(dict.fromkeys(("none", *preset.editors)))), plans


def setup_of(config: Config, preset: Preset, edits: str, seed: int) -> Setup:
    """One edit set and seed. A small set gives two thirds of a half of it: the other half is tuned on by as many edits,
    and what these leave trains MEND. Where nothing is tuned or trained, the whole set is there to be edited."""
    setup = Setup(
        config.model, preset.size, edits, preset.n_edits, preset.n_capability, preset.n_asked, seed, split="test",
        capability=str(config.capability or "world"), layers=config.layers, data=config.folder, folder=config.folder,
        device=config.device,
    )  # fmt: skip
    if not preset.grid and "mend" not in preset.editors:
        setup = replace(setup, split="all")
        return replace(setup, n_edits=min(preset.n_edits, available(setup)))
    half = min(available(setup), available(replace(setup, split="train")))
    return replace(setup, n_edits=min(preset.n_edits, max(1, 2 * half // 3)))


@dataclass(frozen=True)
class Trial:
    """One edit, whatever tables it stands in."""

    setup: Setup
    editor: str
    options: Options


def settings_of(preset: Preset, bench: Bench, trial: Trial) -> dict[str, Any]:
    """All options of the editor: the trial's, and what the preset says of all."""
    if trial.editor == "none":
        return {}
    settings: dict[str, Any] = {"ending": bench.ending} | dict(trial.options)
    if trial.editor in TRAINED:
        settings.setdefault("batch_size", preset.batch_size)
        if not trial.editor.startswith("lora"):  # which needs more passes, EasyEdit's
            settings.setdefault("epochs", preset.epochs)
    if trial.editor == "rome":
        settings.setdefault("batch_size", preset.batch_size // 4 or 1)  # values found at the same weights
    if trial.editor in IN_ROUNDS:
        settings.setdefault("chunk", preset.chunk)
    if trial.editor in LOCATING:
        settings.setdefault("subject", "last-token")  # real prompts do not always hold their subject
    if trial.editor == "mend":
        settings |= {"train_requests": to_train_on(bench), "steps": preset.mend_steps}
        settings["group"] = min(10, len(settings["train_requests"]))
        settings["chunk"] = settings["group"]
    return settings


def to_train_on(bench: Bench) -> list[Request]:
    """What MEND's network is trained on: requests of the half that is tuned on, but those the tuning edits."""
    setup = replace(bench.setup, split="train")
    tuned = {(r.subject, r.truth) for r in draw_requests(setup)}
    every = draw_requests(replace(setup, n_edits=available(setup), seed=setup.seed + 1_000_000))
    return [r for r in every if (r.subject, r.truth) not in tuned]


def run_trial(config: Config, preset: Preset, trial: Trial, origin: Row) -> list[Row]:
    """One edit and what it did."""
    setup = trial.setup
    bench = prepare(setup)
    layers = None if trial.editor in LOCATING else bench.layers
    settings = settings_of(preset, bench, trial)
    measured = edit_and_measure(
        bench, trial.editor, settings, layers=layers, harness=config.harness, cases=CASES, refusals=True
    )
    row: Row = {
        "study": "paper_tables", "model": setup.model, "editor": trial.editor, "settings": describe(trial.options),
        "split": setup.split, "capability_set": setup.capability, "seed": setup.seed, **measured,
        "preset": config.preset, "epochs": preset.epochs, "batch_size": preset.batch_size, "chunk": preset.chunk,
    }  # fmt: skip
    return [row | origin]


def content_of(setup: Setup) -> str:
    """A hash of what a setup's world and files hold."""
    world, folder = world_of(setup), setup.folder or Path()
    files = [Path(setup.capability), Path(setup.edits)]
    if world is None or setup.edits not in world.sources:
        files += [*folder.glob("edits/*.json*"), *folder.glob("text/*")]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.is_file()]
    return fingerprint({"world": world.fingerprint if world else "", "files": hashes})


class Runner:
    """Runs trials in processes, each once: finished ones lie in DIR/units."""

    def __init__(self, config: Config, preset: Preset, origin: Row, weights: dict[str, str]) -> None:
        self.config, self.preset, self.origin = config, preset, origin
        self.weights = weights  # a checksum of each model's
        self.contents: dict[Setup, str] = {}
        on_cpu = config.device == "cpu" and config.model in EMBEDDED
        self.jobs = 1 if config.preset == "tiny" and not config.jobs else config.jobs or (os.cpu_count() or 1) ** on_cpu

    def file(self, trial: Trial) -> Path:
        """Where the trial's rows are kept, named after all that they depend on."""
        setup = trial.setup
        if setup not in self.contents:
            self.contents[setup] = content_of(setup)
        told = ("epochs", "batch_size", "chunk", "mend_steps")
        lying = replace(setup, data=None, folder=None)  # where files lie is not what they hold
        parts: Row = {"trial": asdict(replace(trial, setup=lying)), "harness": self.config.harness}
        parts |= {"content": self.contents[setup], "weights": self.weights[setup.model]}
        parts |= {name: getattr(self.preset, name) for name in told} | self.origin
        return self.config.out / "units" / f"{trial.editor}-{fingerprint(parts)}.json"

    def __call__(self, trials: list[Trial], desc: str) -> dict[Trial, Row]:
        """The row of each trial.

        Raises:
            SystemExit: one could not be run; finished ones are kept.
        """
        config, preset, origin = self.config, self.preset, self.origin
        slow = ("mend", "lora-seq", "lora", "crispedit-ekfac", "rome")
        # by setup, so that a process prepares it and fits its curvature once; the longest first
        order = list(dict.fromkeys(trial.setup for trial in trials))
        todo = sorted(
            dict.fromkeys(trials),
            key=lambda t: (order.index(t.setup), slow.index(t.editor) if t.editor in slow else len(slow)),
        )

        def finish(trial: Trial, file: Path) -> tuple[Trial, Row]:
            return trial, cached_rows(file, lambda: run_trial(config, preset, trial, origin))[0]

        jobs = min(self.jobs, max(len(todo), 1))
        with joblib.parallel_config(backend="loky" if jobs > 1 else "sequential", n_jobs=jobs):
            calls = joblib.Parallel(return_as="generator_unordered")(
                joblib.delayed(finish)(trial, self.file(trial)) for trial in todo
            )
            try:
                return dict(tqdm(calls, desc=desc, total=len(todo), disable=None))
            except (ValueError, FloatingPointError, MemoryError, OSError) as error:
                raise SystemExit(f"stopped, finished edits are kept in {config.out}: {error}") from error


def untuned(preset: Preset, editor: str) -> Options:
    """What a method takes where it is not tuned."""
    return GRIDS[editor][0] if preset.grid else AUTHORS[editor]


def score(table: pd.DataFrame) -> pd.Series:
    """ROME's editing score, and what is kept: the harmonic mean of reliability, generalisation, specificity and
    capability kept; NaN of an edit that diverged. (A measure that an edit set has not is left out.)"""
    parts = [
        table["reliability"],
        table["generalisation"],
        table["specificity"],
        table["capability_kept"].clip(upper=1.0),
    ]
    measured = pd.concat([part for part in parts if part.notna().any()], axis=1)
    return len(measured.columns) / (1 / measured.clip(lower=1e-3)).sum(axis=1, skipna=False)


def tune(run: Runner, wanted: list[Wanted], seed: int) -> tuple[dict[tuple[str, str, str], Options], pd.DataFrame]:
    """Each method's setting by (model, edit set, editor), and the tuning's rows.

    Of a method's grid the setting with the largest `score` is taken, for as many edits as it will make, of facts of the
    other half, at the first seed.
    """
    grid = run.preset.grid
    asked = dict.fromkeys((w.setup.model, w.setup.edits, w.editor) for w in wanted if w.options is None)
    chosen = {key: untuned(run.preset, key[2]) for key in asked}
    open_ = [key for key in asked if grid > 1 and len(GRIDS[key[2]]) > 1]
    if not open_:
        return chosen, pd.DataFrame()
    setups: dict[tuple[str, str], Setup] = {}
    for w in wanted:
        key = (w.setup.model, w.setup.edits)
        if w.options is None and w.setup.seed == seed:
            fewest = min(w.setup.n_edits, setups[key].n_edits) if key in setups else w.setup.n_edits
            setups[key] = replace(w.setup, split="train", n_edits=fewest)
    trials = [Trial(setup, "none", ()) for setup in setups.values()]
    for model, edits, name in open_:
        trials += [Trial(setups[model, edits], name, options) for options in GRIDS[name][:grid]]
    rows = run(trials, "tuning: edits and their evaluation")
    table = pd.DataFrame([{k: v for k, v in rows[trial].items() if k != "cases"} for trial in trials])
    table = with_kept(table, ["model", "edits"])
    table["score"] = score(table)
    best: dict[tuple[str, str, str], float] = {}
    for trial, value in zip(trials, table["score"].fillna(-1.0), strict=True):  # an edit that diverged has no score
        asked_for = (trial.setup.model, trial.setup.edits, trial.editor)
        if value > best.get(asked_for, -2.0) and trial.editor != "none":
            best[asked_for], chosen[asked_for] = value, trial.options
    table["chosen"] = [
        chosen.get((trial.setup.model, trial.setup.edits, trial.editor)) == trial.options for trial in trials
    ]
    return chosen, table


def announce(config: Config, preset: Preset, setups: list[Setup], todo: int, tuning: int) -> None:
    """What is about to be run, and how long it takes."""
    line = f"{todo} edits for the tables and {tuning} for tuning, those made before among them"
    if config.preset == "default" and config.model in EMBEDDED:
        minutes = (todo + tuning) * MINUTES * preset.n_edits / PRESETS["default"].n_edits
        line += f"; about {minutes / min(2, os.cpu_count() or 1):.0f} min on two cores"
    else:
        line += "; the bar tells how long it takes"
    for edits, n in {(s.edits, s.n_edits) for s in setups if s.n_edits < preset.n_edits}:
        line += f"\n{edits}: {n} edits and not {preset.n_edits}, as many as the set holds"
    print(line, flush=True)


def main(config: Config) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    started = time.perf_counter()
    config, preset, plans = resolve(config)
    second = "" if config.second == "none" else config.second
    wanted: list[Wanted] = []
    try:
        for edits in config.edits:
            for seed in preset.seeds:
                setup = setup_of(config, preset, edits, seed)
                documents = min(preset.seq_documents or preset.n_capability, preset.n_capability)
                firsts = untuned(preset, "crispedit"), untuned(preset, "crispedit-seq")
                base = Base(setup, available(setup), second, documents, *firsts)
                wanted += [w for name in plans for w in PLANS[name](base) if w.editor in preset.editors]
        for model in dict.fromkeys(w.setup.model for w in wanted):
            if model not in EMBEDDED:  # before weights are read
                memory = Plan(preset.editors, preset.n_edits, preset.batch_size)
                print(f"{model}: {announced(model, config.layers, memory, config.device)}", flush=True)
        weights: dict[str, str] = {}
        for setup in dict.fromkeys(w.setup for w in reversed(wanted)):
            if setup.seed == preset.seeds[0]:
                bench = prepare(setup)  # trains the embedded models, and says now what cannot be run
                weights[setup.model] = weights.get(setup.model) or weights_checksum(bench.model)
    except (FileNotFoundError, ValueError, OSError, MemoryError) as error:
        refuse(error)
    if not wanted:
        refuse("no edit to make: --tables and --editors leave none (Table 4 needs three times --n-edits facts)")
    world = world_of(bench.setup)
    origin = {"dataset": world.name if world else config.model, "dataset_checksum": world.fingerprint if world else ""}
    origin |= provenance(__file__, str(editing_bench.__file__), str(paper_plan.__file__))
    run = Runner(config, preset, origin, weights)
    grids = {(w.setup.model, w.setup.edits, w.editor) for w in wanted if w.options is None and w.editor != "none"}
    tuning = sum(preset.grid for _ in grids) if preset.grid > 1 else 0
    todo = len({(w.setup, w.editor, w.options) for w in wanted})
    announce(config, preset, [w.setup for w in wanted], todo, tuning)
    chosen, tuned = tune(run, wanted, preset.seeds[0])
    if len(tuned):
        write_table(tuned, config.out / "tuning.csv")
    trials = [
        Trial(w.setup, w.editor, chosen[w.setup.model, w.setup.edits, w.editor] if w.options is None else w.options)
        for w in wanted
    ]
    rows = run(trials, "edits and their evaluation")
    lines, cases = [], []
    for w, trial in zip(wanted, trials, strict=True):
        row = dict(rows[trial])
        told = {
            "table": w.table,
            "row": w.row,
            "value": w.value,
            "model": trial.setup.model,
            "edits": trial.setup.edits,
        }
        for case in row.pop("cases", []):
            if w.table == "table1":
                cases.append(told | {"seed": trial.setup.seed} | case)
        lines.append(told | row)
    table = with_kept(pd.DataFrame(lines), ["table", "model", "edits", "n_edits", "seed"])
    write_table(table, config.out / "results.csv")
    with replacing(config.out / "cases.json") as temporary:
        temporary.write_text(json.dumps(cases, indent=1))
    files = [paper_tables.write(table, tuned, cases, config.out)]
    files += paper_figures.draw_all(table, config.out)
    files += [paper_verdicts.write(table, config.out)]
    print("\n" + paper_tables.summary(table))
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(set(trials))} edits, {minutes:.1f} min, peak {human(table['peak_bytes'].max())} a process")
    print("\n".join(f"written: {file}" for file in [config.out / "results.csv", *files]))


if __name__ == "__main__":
    import paper_tables as study  # by name, so that worker processes import it too and keep what they have loaded

    study.main(tyro.cli(study.Config, description=__doc__))
