"""Spectra, kept shares over γ and overlaps of an LLM's layers, from `studies/llm_spectra.py`; computes no result.

python figures/llm_spectra.py results/results.csv
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from figures.style import LINES, STYLE, save

PAIRS = (("ekfac", "kfac"), ("kfac", "covariance"), ("covariance", "kfac"), ("covariance", "ekfac"))
SMALLEST = 1e-10  # of the energy in one direction: below is round-off


def draw(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: spectra, kept shares over γ (mean and range over layers), overlaps by layer."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.2, 4.3), layout="constrained")
    _spectra(left, table[table["record"] == "spectrum"])
    _kept(middle, table[table["record"] == "null space"])
    _overlaps(right, table[table["record"] == "overlap"])
    for ax in (left, middle, right):
        ax.grid(alpha=0.25, linewidth=0.5)
    first, layers = table.iloc[0], table["layer"].nunique()
    name = Path(str(first["model"])).name
    figure.suptitle(
        f"{name}: {layers} layer{'s' * (layers > 1)}, {first['documents']} documents ({first['dataset']}), "
        f"{first['positions']} tokens, labels={first['labels']}",
        fontsize=10,
    )
    return save(figure, path)


def _spectra(ax: plt.Axes, rows: pd.DataFrame) -> None:
    """Each layer a thin line, over the share of its directions so that sizes compare."""
    for method, (label, colour, _) in STYLE.items():
        own = rows[(rows["method"] == method) & (rows["share"] > SMALLEST)]
        for i, (_, line) in enumerate(own.groupby("layer", sort=False)):
            of = line["d_out"] * line["d_in"]
            ax.plot(
                100 * line["index"] / of, line["share"] * of, color=colour, linestyle=LINES[method],
                linewidth=0.9, alpha=0.7, label=label if i == 0 else None,
            )  # fmt: skip
    ax.axvline(1, color="0.5", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="directions, % of the layer's (line: the top 1 %)")
    ax.set_ylabel("energy of a direction, times the mean")
    ax.legend(fontsize=7.5, loc="lower left")
    ax.set_title("spectra", fontsize=10)


def _kept(ax: plt.Axes, rows: pd.DataFrame) -> None:
    for method, (label, colour, marker) in STYLE.items():
        own = rows[rows["method"] == method]
        if own.empty:
            continue
        kept = 100 * own.groupby("gamma")["kept"].agg(["mean", "min", "max"])
        x = 1 - kept.index.to_numpy()
        ax.plot(x, kept["mean"], color=colour, marker=marker, markersize=4.5, linestyle=LINES[method], label=label)
        ax.fill_between(x, kept["min"], kept["max"], color=colour, alpha=0.12, linewidth=0)
    ax.set(xscale="log", ylim=(0, 100), xlabel="1 − γ (energy left in the null space)")
    ax.invert_xaxis()
    ax.set_ylabel("dimensions kept, %")
    ax.legend(fontsize=7.5, loc="lower left")
    ax.set_title("null spaces (mean and range over layers)", fontsize=10)


def _overlaps(ax: plt.Axes, rows: pd.DataFrame) -> None:
    gamma = min(rows["gamma"].unique(), key=lambda g: abs(g - 0.9))
    rows = rows[rows["gamma"] == gamma]
    names = list(dict.fromkeys(rows["layer"]))
    for (one, other), shade in zip(PAIRS, (1.0, 1.0, 0.85, 0.5), strict=True):
        own = rows[(rows["method"] == one) & (rows["other"] == other)]
        label, colour, marker = STYLE[one]
        at = [names.index(name) for name in own["layer"]]
        style: dict[str, Any] = {"color": colour, "alpha": shade, "linewidth": 1.2}
        ax.plot(
            at, 100 * own["overlap"], marker=marker, markersize=4.5, linestyle=LINES[other],
            label=f"{label} in {STYLE[other][0]}", **style,
        )  # fmt: skip
        ax.plot(at, 100 * own["by_chance"], linestyle="", marker="_", markersize=7, **style)
    step = -(-len(names) // 16)
    ax.set_xticks(range(0, len(names), step), [_short(name) for name in names[::step]], rotation=60, ha="right")
    ax.tick_params(axis="x", labelsize=7)
    ax.set_ylim(top=101)
    ax.set_ylabel("share of one null space inside the other, %")
    ax.legend(fontsize=7, loc="best")
    ax.set_title(f"overlaps at γ = {gamma:g} (dashes: of random subspaces)", fontsize=10)


def _short(name: str) -> str:
    """layers.3.down of model.layers.3.mlp.down_proj."""
    parts = [part for part in name.split(".") if part not in ("model", "transformer", "mlp", "layers", "h")]
    return ".".join(parts).replace("_proj", "")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*draw(pd.read_csv(source), source.with_name("llm_spectra.pdf")), sep="\n")
