"""The paper's figures from the records of `studies/paper_tables.py`, its numbers beside ours; computes no result.

python figures/paper_figures.py results/paper_tables
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures.paper_rows import KEPT, SUCCESS, edit_sets, lines_of, over_seeds, paper_source, paper_values
from figures.paper_tables import read
from figures.style import save

# method → (colour, marker); the constrained ones in colour, all told apart by their marker and name
METHODS = {
    "CrispEdit": ("#d55e00", "^"), "CrispEdit-Seq": ("#7a3b00", "<"), "CrispEdit (EK-FAC)": ("#009e73", "v"),
    "CrispEdit-ε": ("#e69f00", "o"), "K-FAC penalty": ("#0072b2", "s"), "EWC": ("#56b4e9", "P"),
    "AlphaEdit": ("#cc79a7", "D"), "MEMIT": ("#8a5a83", "d"), "ROME": ("#b3a2c7", "p"), "UltraEdit": ("#666666", "X"),
    "Adam-NSCL": ("#999999", "h"), "MEND": ("#333333", "1"), "FT": ("#000000", "*"), "FT Sequential": ("#000000", "+"),
    "LocBF-FT": ("#000000", "x"), "LoRA": ("#555555", "8"), "LoRA Sequential": ("#555555", "2"),
    "replay": ("#117733", ">"),
}  # fmt: skip
ROUNDS = ("FT Sequential", "LoRA Sequential", "AlphaEdit", "UltraEdit", "CrispEdit-Seq")
LABELS = {
    SUCCESS: "edit success, %", KEPT: "capability kept, %", "reliability": "reliability, %",
    "generalisation": "generalisation, %", "specificity": "specificity, %",
}  # fmt: skip


def draw_all(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure that the records hold, as PDF and PNG; the paths of the PNGs."""
    drawn = []
    for name, draw in (
        ("table1", fig1), ("table1", fig4), ("table1", fig7), ("table3", table3), ("table4", table4),
        ("table5", table5), ("table6", table6), ("table7", fig5), ("table8", table8), ("merge", merge),
    ):  # fmt: skip
        for edits in edit_sets(table, "table1" if name == "table3" else name):
            drawn.append(draw(table, edits, folder / f"{draw.__name__}_{Path(edits).stem}.pdf")[-1])  # (may be a file)
    return drawn


def fig1(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Edit success against capability kept: ours, and the paper's Table 1."""
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained", sharey=True)
    lines = lines_of(table, "table1", edits)
    success, kept = (paper_values("table1", edits, measure) for measure in (SUCCESS, KEPT))
    for method, (colour, marker) in METHODS.items():
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "", "markersize": 8, "label": method}
        if method in lines:
            _cross(axes[0], lines[method], KEPT, SUCCESS, **style)
        if method in success:
            axes[1].plot(kept[method], success[method], **style)
    axes[0].set_title(_what(table, "table1", edits), fontsize=9)
    axes[1].set_title(f"paper: {paper_source('table1', edits)}, 3000 edits", fontsize=9)
    axes[0].set_ylabel("edit success (mean of Rel and Gen, generated, no context), %")
    for ax in axes:
        ax.axvline(100, color="0.6", linewidth=0.8, linestyle="-.")
        _finish(ax, "capability kept, % of the unedited model's")
    seen = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(seen.values(), seen.keys(), loc="outside right upper", fontsize=7.5)
    return save(figure, path)


def fig4(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Time an edit took, with and without the curvature that is kept for the next one; and the paper's minutes."""
    lines = {row: rows for row, rows in lines_of(table, "table1", edits).items() if row != "base"}
    lines = dict(sorted(lines.items(), key=lambda item: item[1]["edit_seconds"].mean()))
    published = paper_values("table1", edits, "time_s")
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 0.9 + 0.28 * len(lines)), layout="constrained", sharey=True)
    y = np.arange(len(lines))
    edit = np.array([rows["edit_seconds"].mean() for rows in lines.values()])
    curvature = np.array([rows["curvature_seconds"].max() for rows in lines.values()])
    axes[0].barh(y, edit, color="0.35", label="edit")
    axes[0].barh(y, curvature, left=edit, color="0.8", label="curvature (once)")
    axes[0].set_yticks(y, list(lines))
    axes[0].legend(fontsize=7.5)
    axes[1].barh(y, [published.get(row, math.nan) / 60 for row in lines], color="0.35")
    _finish(axes[0], f"seconds, {_what(table, 'table1', edits)}", log=True)
    _finish(axes[1], "minutes in the paper (3000 edits, one A40)", log=True)
    return save(figure, path)


def fig5(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """The size of the capability set: none (drawn at the left edge), more and more, and another text."""
    lines = lines_of(table, "table7", edits)
    sizes = {row: rows for row, rows in lines.items() if row.startswith("n = ")}
    left = min(rows["value"].iloc[0] for rows in sizes.values()) / 3
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for ax, measure in zip(axes, (SUCCESS, KEPT), strict=True):
        x = [rows["value"].iloc[0] for rows in sizes.values()]
        _curve(
            ax, x, list(sizes.values()), measure, color="#d55e00", marker="^", linestyle="-", label="CrispEdit, γ = 0.9"
        )
        if "No Projection (FT)" in lines:
            _curve(
                ax,
                [left],
                [lines["No Projection (FT)"]],
                measure,
                color="0.1",
                marker="*",
                label="no projection (n = 0)",
            )
        if "stories only" in lines:
            rows = lines["stories only"]
            _curve(
                ax,
                [rows["value"].iloc[0]],
                [rows],
                measure,
                color="#0072b2",
                marker="s",
                label="mismatched: stories only",
            )
        said = paper_values("table7", edits, measure, "n")
        ax.plot(list(said), list(said.values()), color="0.55", marker="D", markersize=4, linestyle="--", label="paper")
        ax.set_ylabel(LABELS[measure])
        _finish(ax, "capability documents n", log=True)
    axes[0].legend(fontsize=7.5)
    figure.suptitle(_what(table, "table7", edits), fontsize=9)
    return save(figure, path)


def fig7(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Reliability of each round's edits once all rounds are over."""
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for row, rows in lines_of(table, "table1", edits).items():
        if row in ROUNDS and rows["learnt"].notna().all():
            shares = np.array(
                [by_round(str(learnt), int(chunk)) for learnt, chunk in zip(rows["learnt"], rows["chunk"], strict=True)]
            )
            colour, marker = METHODS[row]
            mean, spread = 100 * shares.mean(0), 100 * shares.std(0)
            errors = spread if len(shares) > 1 else None
            ax.errorbar(
                np.arange(1, len(mean) + 1), mean, yerr=errors, color=colour, marker=marker, label=row, capsize=2
            )
    ax.set_ylabel("reliability after the last round, %")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(ax, f"round in which the fact was edited ({_what(table, 'table1', edits)})")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=7.5)
    return save(figure, path)


def by_round(learnt: str, chunk: int) -> list[float]:
    """Shares of ones in consecutive stretches of a string of 0 and 1."""
    return [learnt[i : i + chunk].count("1") / len(learnt[i : i + chunk]) for i in range(0, len(learnt), chunk)]


def table3(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Teacher-forced reliability against what is generated."""
    lines = {row: rows for row, rows in lines_of(table, "table1", edits).items() if row != "base"}
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.28 * len(lines)), layout="constrained")
    for y, rows in enumerate(lines.values()):
        said, forced = (over_seeds(rows, m).mean for m in ("reliability", "reliability_teacher_forced"))
        ax.plot([said, forced], [y, y], color="0.7", linewidth=2, zorder=1)
        ax.plot(said, y, "o", color="#d55e00", label="generated" if not y else None)
        ax.plot(forced, y, "s", color="0.2", label="teacher-forced" if not y else None)
    ax.set_yticks(range(len(lines)), list(lines))
    _finish(ax, f"reliability, % ({_what(table, 'table1', edits)})")
    ax.legend(fontsize=7.5)
    return save(figure, path)


def table4(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Three times the edits beside Table 1's, where the records hold both; and the paper's 10,000."""
    return _bars(table, "table4", edits, path)


def table5(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Another model family; and the paper's Qwen-2.5-1.5B."""
    return _bars(table, "table5", edits, path)


def table6(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """What the edits' factors are taken from."""
    return _bars(table, "table6", edits, path)


def table8(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Edit success, specificity and capability kept over γ, and the paper's."""
    lines = {row: rows for row, rows in lines_of(table, "table8", edits).items() if row != "base"}
    x = [rows["value"].iloc[0] for rows in lines.values()]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained", sharey=True)
    for measure, colour, marker in ((SUCCESS, "#d55e00", "^"), ("specificity", "0.5", "o"), (KEPT, "#0072b2", "s")):
        _curve(
            axes[0], x, list(lines.values()), measure, color=colour, marker=marker, linestyle="-", label=LABELS[measure]
        )
        said = paper_values("table8", edits, measure, "gamma")
        axes[1].plot(list(said), list(said.values()), color=colour, marker=marker, label=LABELS[measure])
    axes[0].set_title(_what(table, "table8", edits), fontsize=9)
    axes[1].set_title(f"paper: {paper_source('table8', edits)}, 3000 edits", fontsize=9)
    axes[0].set_ylabel("%")
    axes[0].legend(fontsize=7.5)
    for ax in axes:
        _finish(ax, "γ")
    return save(figure, path)


def merge(table: pd.DataFrame, edits: str, path: Path) -> list[Path]:
    """Merge weights of CrispEdit-Seq."""
    return _bars(table, "merge", edits, path)


def _bars(table: pd.DataFrame, name: str, edits: str, path: Path) -> list[Path]:
    """Edit success, specificity and capability kept of each line of a table, with the paper's where it has the line."""
    lines = {row: rows for row, rows in lines_of(table, name, edits).items() if row != "base"}
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 1.1 + 0.32 * len(lines)), layout="constrained", sharey=True)
    for ax, measure in zip(axes, (SUCCESS, "specificity", KEPT), strict=True):
        said = paper_values(name, edits, measure)
        for y, (row, rows) in enumerate(lines.items()):
            found = over_seeds(rows, measure)
            ax.barh(y, found.mean, color="0.75", edgecolor="0.3", label="ours" if not y else None)
            ax.plot([found.low, found.high], [y, y], color="0.1", linewidth=1.2)
            if row in said:
                ax.plot(said[row], y, "D", color="#d55e00", markersize=5, label="paper")
        _finish(ax, LABELS[measure])
        ax.set_xlim(0, 105)
    axes[0].set_yticks(range(len(lines)), list(lines))
    axes[0].invert_yaxis()
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    axes[0].legend(labels.values(), labels, fontsize=7.5)
    source = paper_source(name, edits)
    beside = f"; paper: {source}" if labels.keys() >= {"paper"} else ""
    figure.suptitle(_what(table, name, edits) + beside, fontsize=9)
    return save(figure, path)


def _cross(ax: Axes, rows: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """A point with its two intervals."""
    a, b = over_seeds(rows, x), over_seeds(rows, y)
    sides: dict[str, Any] = {
        "xerr": [[a.mean - a.low], [a.high - a.mean]],
        "yerr": [[b.mean - b.low], [b.high - b.mean]],
    }
    ax.errorbar(a.mean, b.mean, **sides, elinewidth=0.7, capsize=1.5, **style)


def _curve(ax: Axes, x: Sequence[float], lines: Sequence[pd.DataFrame], measure: str, **style: Any) -> None:
    found = [over_seeds(rows, measure) for rows in lines]
    y = [m.mean for m in found]
    sides = [[m.mean - m.low for m in found], [m.high - m.mean for m in found]]
    style = {"linestyle": ""} | style
    ax.errorbar(x, y, yerr=sides, elinewidth=0.7, capsize=2, markersize=6, **style)


def _what(table: pd.DataFrame, name: str, edits: str) -> str:
    own = table[(table["table"] == name) & (table["edits"] == edits)]
    models, n, seeds = ", ".join(dict.fromkeys(own["model"])), int(own["n_edits"].max()), own["seed"].nunique()
    return f"{models}, {n} edits ({edits}), {seeds} seed{'s' * (seeds > 1)}, 95 % intervals"


def _finish(ax: Axes, label: str, log: bool = False) -> None:
    ax.set_xlabel(label)
    ax.grid(alpha=0.25, linewidth=0.5)
    if log:
        ax.set_xscale("log")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(*draw_all(read(Path(sys.argv[1]))[0], Path(sys.argv[1])), sep="\n")
