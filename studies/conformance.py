"""Does the cross-check name every fault and keep silent on what is correct? A confusion matrix of made artefacts.

    python studies/conformance.py --preset default --out results/crosscheck

Over seeds, shapes, spectra and storage formats, artefacts of `curvlab.crosscheck.faults` are written and checked:
correct ones, on which any error or deviation is a false alarm, and ones with a fault (or two), which must be named at
one of the severities that the fault states. γ is told to the check only where the fault needs it, and on half of the
correct ones.

Writes DIR/conformance.json, conformance.md, conformance.pdf and .png. Exit status 1 on a single fault that was not
named, a false alarm, or a check that fails; pairs are counted only, as one fault may hide another.
"""

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro
from benchmark_curvature import markdown

from curvlab.crosscheck import Report, crosscheck
from curvlab.crosscheck.faults import FAULTS, KINDS, STORAGES, Artefact, Kind, NoDifference, Storage, make
from curvlab.progress import progress
from curvlab.records import Row, provenance
from curvlab.refusal import refuse
from curvlab.storage import replacing
from figures.conformance import draw

ALARMS = ("error", "deviation")
SHAPES = ((6, 9), (9, 6), (7, 7), (16, 24), (24, 16))
ODD = ((2, 3), (2, 2), (40, 3), (3, 40), (64, 48))  # of correct ones besides
LARGE = (32, 48)  # float32 sums lose energy only where there are many products


@dataclass(frozen=True)
class Sizes:
    """How much a preset tries.

    Attributes:
        each: artefacts with one fault, of each class.
        pairs: artefacts with two faults.
        correct: correct artefacts.
    """

    each: int
    pairs: int
    correct: int


PRESETS = {"tiny": Sizes(1, 0, 16), "smoke": Sizes(3, 20, 45), "default": Sizes(16, 120, 240)}


@dataclass(frozen=True)
class Config:
    """Command line of the study.

    Attributes:
        preset: tiny (seconds, for tests), smoke (a minute) or default (minutes).
        out: folder of the results.
        seed: of the first artefact.
        faults: only these classes; all by default.
        keep: a folder to leave the artefacts in that were judged wrongly.
    """

    preset: Literal["tiny", "smoke", "default"] = "default"
    out: Path = Path("results/crosscheck")
    seed: int = 0
    faults: tuple[str, ...] = ()
    keep: Path | None = None


@dataclass(frozen=True)
class Trial:
    """The arguments of `make`."""

    faults: tuple[str, ...]
    shape: tuple[int, int]
    seed: int
    spectrum: Kind
    storage: Storage

    def make(self, folder: Path, gamma: float | None = None) -> Artefact:
        return make(
            folder, shape=self.shape, seed=self.seed, spectrum=self.spectrum, fault=self.faults, storage=self.storage,
            gamma=gamma,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"make(folder, shape={self.shape}, seed={self.seed}, spectrum={self.spectrum!r}, "
            f"fault={list(self.faults)}, storage={self.storage!r})"
        )


def trials(config: Config) -> Iterator[list[Trial]]:
    """Alternatives for each artefact that is wanted: the first of them that the fault can be shown on is taken."""
    sizes, chosen = PRESETS[config.preset], list(config.faults or FAULTS)
    seeds = itertools.count(config.seed)
    for name in chosen:
        for _ in range(sizes.each):
            yield list(_alternatives((name,), next(seeds)))
    pairs = [p for p in itertools.combinations(chosen, 2) if _compatible(*p)]
    generator = torch.Generator().manual_seed(config.seed)
    for index in torch.randperm(len(pairs), generator=generator).tolist()[: sizes.pairs]:
        yield list(_alternatives(pairs[index], next(seeds)))
    shapes = SHAPES + ODD
    for i in range(0 if config.faults else sizes.correct):
        spectrum, storage = KINDS[i % len(KINDS)], STORAGES[i % len(STORAGES)]  # 9 and 5: every pair comes up
        first, seed = i + i // 10, next(seeds)
        yield [Trial((), shapes[(first + k) % len(shapes)], seed, spectrum, storage) for k in range(len(shapes))]


def _alternatives(names: tuple[str, ...], seed: int) -> Iterator[Trial]:
    """Spectra, shapes and storages in an order that the seed turns."""
    faults = [FAULTS[name] for name in names]
    kinds: list[Kind] = ["model"] if any(f.model for f in faults) else [kind for kind in KINDS if kind != "model"]
    storages = [storage for storage in STORAGES if all(storage in f.storages for f in faults)]
    shapes = [LARGE] if "float32-energy" in names else list(SHAPES)
    every = list(itertools.product(kinds, storages, shapes))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    for kind, storage, shape in (every[i] for i in order):
        yield Trial(names, shape, seed, kind, storage)


def _compatible(one: str, other: str) -> bool:
    """Whether two faults can be told apart: at different stages, in a common storage, neither hiding the other."""
    a, b = FAULTS[one], FAULTS[other]
    hiding = {"not-finite", "empty-tensor", "mismatched-shapes", "other-layer", "stale-factors", "stale-mask"}
    hiding |= {"asymmetric-factor", "indefinite-factor", "mask-all-kept", "mask-all-removed"}
    hiding |= {"bfloat16-factors", "float8-factors", "wrong-dtype", "no-count", "transposed-eigenvectors"}
    # what lies outside of a mask that is wrong itself, or of rounded eigenvectors, says little
    if {a.stage, b.stage} == {"cache", "update"} or {one, other} == {"bfloat16-eigenvectors", "update-adam-leak"}:
        return False
    apart = a.stage != b.stage and not (a.model or b.model) and not {one, other} & hiding
    return apart and bool({*a.storages} & {*b.storages})


def examine(artefact: Artefact, told: bool) -> Report:
    """The cross-check as its user runs it: with the model and data where there are some."""
    corpus = artefact.corpus
    given: dict[str, Any] = {} if corpus is None else {"model": corpus.model, "loss": corpus.loss, "data": corpus.data}
    return crosscheck(artefact.folder, gamma=artefact.gamma if told else None, **given)


def judge(alternatives: list[Trial], folder: Path) -> Row | None:
    """A row of the result; None where no alternative shows the fault."""
    for trial in alternatives:
        try:
            artefact = trial.make(folder)
        except NoDifference:
            continue
        told = any(FAULTS[name].gamma for name in trial.faults) or (not trial.faults and trial.seed % 2 == 0)
        return _judged(trial, artefact, told)
    return None


def _judged(trial: Trial, artefact: Artefact, told: bool) -> Row:
    start = time.perf_counter()
    row: Row = {
        "made": list(trial.faults), "shape": list(trial.shape), "seed": trial.seed, "spectrum": trial.spectrum,
        "storage": trial.storage, "gamma": artefact.gamma, "gamma_told": told, "again": str(trial), "failed": None,
    }  # fmt: skip
    try:
        report = examine(artefact, told)
    except Exception as error:  # one that fails is a result, too: the others go on
        return row | {
            "named": [],
            "missed": list(trial.faults),
            "alarms": [],
            "failed": f"{type(error).__name__}: {error}",
        }
    named = [[f.fault, f.severity] for f in report.findings if f.fault and f.severity != "ok"]
    missed = [
        name
        for name in trial.faults
        if not any(fault == name and severity in FAULTS[name].severities for fault, severity in named)
    ]
    alarms = [f"{f.severity}: {f.check}: {f.cause}" for f in report.findings if f.severity in ALARMS]
    return row | {
        "named": named, "missed": missed, "alarms": [] if trial.faults else alarms,
        "unreadable": list(report.unreadable), "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def run(config: Config) -> list[Row]:
    """All rows."""
    rows = []
    for alternatives in progress(list(trials(config)), "conformance"):
        with tempfile.TemporaryDirectory() as folder:
            row = judge(alternatives, Path(folder))
        if row is None:
            continue
        rows.append(row)
        if config.keep is not None and wrong(row):
            trial = next(t for t in alternatives if str(t) == row["again"])
            trial.make(config.keep / f"{'+'.join(row['made']) or 'correct'}-{row['seed']}")
    return rows


def wrong(row: Row) -> bool:
    return bool(row["missed"] or row["alarms"] or row["failed"] or (not row["made"] and row.get("unreadable")))


def summary(rows: list[Row]) -> pd.DataFrame:
    """One line a fault class: how often it was made alone, how often named, and which other names came up with it."""
    lines = []
    for name in ["(correct)", *FAULTS]:
        own = [row for row in rows if row["made"] == ([] if name == "(correct)" else [name])]
        if not own:
            continue
        if name == "(correct)":
            right, others = sum(not wrong(row) for row in own), Counter[str]()
        else:
            right = sum(not row["missed"] for row in own)
            others = Counter(f for row in own for f in {f for f, s in row["named"] if s in ALARMS} - {name})
        besides = ", ".join(f"{fault} {n}" for fault, n in others.most_common())
        lines.append(
            {"made": name, "artefacts": len(own), "right": right, "wrong": len(own) - right, "named besides": besides}
        )
    pairs = [row for row in rows if len(row["made"]) > 1]
    if pairs:
        right = sum(not row["missed"] for row in pairs)
        line = {"made": "(two at once)", "artefacts": len(pairs), "right": right, "wrong": len(pairs) - right}
        lines.append(line | {"named besides": ""})
    return pd.DataFrame(lines)


def main(config: Config) -> int:
    unknown = [name for name in config.faults if name not in FAULTS]
    if unknown:
        refuse(f"no faults {unknown}; there are {', '.join(FAULTS)}")
    torch.set_num_threads(1)
    rows = run(config)
    table = summary(rows)
    with pd.option_context("display.width", 200, "display.max_colwidth", 80, "display.max_rows", None):
        print(table.to_string(index=False))
    bad = [row for row in rows if wrong(row)]
    for row in bad:
        what = row["failed"] or "; ".join(row["alarms"]) or f"missed {row['missed']}, named {row['named']}"
        print(f"{row['again']}, gamma {'told' if row['gamma_told'] else 'not told'}: {what}")
    about = provenance(__file__) | {"preset": config.preset, "seed": config.seed}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    sentences = "\n".join(f"- **{name}**: {fault.does}" for name, fault in FAULTS.items())
    for name, content in (("conformance.json", text), ("conformance.md", f"{markdown(table)}\n\n{sentences}\n")):
        with replacing(config.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    files = draw(rows, config.out / "conformance.pdf")
    print(f"\n{len(rows) - len(bad)} of {len(rows)} artefacts judged rightly; {config.out / 'conformance.json'}")
    print(*files, sep="\n")
    return 1 if any(len(row["made"]) < 2 for row in bad) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
