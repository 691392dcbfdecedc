"""What each of the authors' conventions does to Fig. 3, from the records of `studies/authors_protocol.py`.

python figures/authors_protocol.py results/authors_protocol/results.csv
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from figures.style import STYLE, save
from figures.tradeoff import TASK_NAMES, axis_start, curve

# title, the right curvature, and what is drawn against it: (variant, label)
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("K-FAC: labels of the data", "kfac", [("kfac-labels", "labels of the data")]),
    ("EK-FAC: labels of the data", "ekfac", [("ekfac-labels", "labels of the data")]),
    (
        "EK-FAC: squares of batches",
        "ekfac",
        [("ekfac-batch-labels", "of batches, labels of the data"), ("ekfac-batch", "of batches, drawn labels")],
    ),
    ("GGN: through probabilities", "ggn", [("ggn-probabilities", "through probabilities")]),
    ("K-FAC: everything at once", "kfac", [("kfac-all", "all deviations"), ("kfac-relu", "ReLU on the logits alone")]),
    (
        "EK-FAC: everything at once",
        "ekfac",
        [("ekfac-all", "all deviations"), ("ekfac-relu", "ReLU on the logits alone")],
    ),
    ("GGN: everything at once", "ggn", [("ggn-all", "all deviations"), ("ggn-relu", "ReLU on the logits alone")]),
]
LOOKS = [("--", "D", "black"), (":", "s", "0.5")]  # of the deviations; the right one is drawn in its method's colour


def draw(table: pd.DataFrame, path: Path, from_accuracy: float = 95.0) -> list[Path]:
    """Write `path` as PDF and PNG: a panel a deviation, the authors' convention against the right one.

    Args:
        table: rows of the study.
        path: file name; the endings .pdf and .png are put in turn.
        from_accuracy: left end of the axis in per cent (the authors' plot keeps points from 95 %).
    """
    present = set(table["variant"])
    panels = [panel for panel in PANELS if panel[1] in present and any(name in present for name, _ in panel[2])]
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3.1 * lines + 0.6), squeeze=False, layout="constrained"
    )
    rows = table[table["diverged"] == 0]
    seen = rows[100 * rows["pretrain_accuracy"] >= from_accuracy]["finetune_accuracy"]
    top = 100 * table["base_accuracy"].max()
    for ax, (title, right, others) in zip(axes.flat, panels, strict=False):
        label, colour, marker = STYLE[right]
        _line(ax, rows[rows["variant"] == right], f"{label}, correct", "-", marker, colour, colour, from_accuracy)
        for (name, what), (line, shape, shade) in zip(others, LOOKS, strict=False):
            _line(ax, rows[rows["variant"] == name], what, line, shape, shade, "white", from_accuracy)
        ax.axvline(top, color="0.6", linewidth=0.8, linestyle="-.")
        ax.set_xlim(from_accuracy, top + 0.03 * (top - from_accuracy))
        if len(seen):
            ax.set_ylim(100 * seen.min() - 3, 100 * seen.max() + 3)
        ax.set_title(title, fontsize=9.5)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(fontsize=7, loc="lower left")
    _energies(axes.flat[len(panels)], table)
    for ax in axes.flat[len(panels) + 1 :]:
        ax.set_axis_off()
    kept, learnt = TASK_NAMES[str(table["dataset"].iloc[0])]
    figure.supxlabel(f"{kept} (pre-training) test accuracy, %; dash-dotted: before fine-tuning", fontsize=9)
    figure.supylabel(f"{learnt} (fine-tuning) test accuracy, %", fontsize=9)
    first, seeds = table.iloc[0], table["seed"].nunique()
    heading = (
        f"LeNet-5, {first['layer']}: the authors' conventions against the correct ones (epochs: {first['epochs']}, "
        + (f"lr {first['lr']:g}, " + ("1 seed)" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation)"))
    )
    note = str(first.get("dataset_note", "") or "")
    if first["dataset"] == "embedded" or (note and note != "nan"):
        heading += "\nEMBEDDED DATA, not MNIST → Fashion-MNIST"
    figure.suptitle(heading, fontsize=10)
    return save(figure, path)


def _line(
    ax: plt.Axes, rows: pd.DataFrame, label: str, line: str, marker: str, colour: str, fill: str, start: float
) -> None:
    if rows.empty:
        return
    c = curve(rows, "gamma")
    shown = bool((c["pretrain_accuracy"] >= start).any())
    if not shown:
        label += f"\n(left of the axis: at most {c['pretrain_accuracy'].max():.1f} %)"
    ax.errorbar(
        c["pretrain_accuracy"], c["finetune_accuracy"],
        xerr=c["pretrain_accuracy_std"], yerr=c["finetune_accuracy_std"],
        color=colour, linestyle=line, marker=marker, markersize=4.5, markerfacecolor=fill, markeredgewidth=0.9,
        linewidth=1.2, elinewidth=0.6, capsize=1.2, label=label,
    )  # fmt: skip


def _energies(ax: plt.Axes, table: pd.DataFrame, gamma: float = 0.9) -> None:
    """What γ of a variant's own spectrum takes from the right GGN of the same network."""
    names = list(dict.fromkeys(table["variant"]))
    shares = 100 * table.groupby("variant")[f"ggn_energy_removed_at_{gamma}"].mean()
    for i, name in enumerate(reversed(names)):
        _, colour, marker = STYLE[name.split("-")[0]]
        ax.plot(
            shares[name],
            i,
            marker=marker,
            color=colour,
            markersize=5,
            markerfacecolor="none" if "-" in name else colour,
        )
    ax.axvline(100 * gamma, color="0.6", linewidth=0.8, linestyle="-.")
    ax.set_yticks(range(len(names)), list(reversed(names)), fontsize=6.5)
    ax.set_xlabel(f"energy of the correct GGN removed, %, at γ = {gamma:g}", fontsize=8)
    ax.set_title("what γ means", fontsize=9.5)
    ax.grid(alpha=0.25, linewidth=0.5)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    records = pd.read_csv(source)
    print(*draw(records, source.with_name("authors_protocol.pdf"), axis_start(records)), sep="\n")
