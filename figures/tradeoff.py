"""The trade-off of the paper's Fig. 3, from the records of `studies/mnist_tradeoff.py`; computes no result.

python figures/tradeoff.py results/results.csv
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from figures.style import STYLE, save

TASK_NAMES = {"mnist": ("MNIST", "Fashion-MNIST"), "embedded": ("digits", "letters")}


def curve(rows: pd.DataFrame, knob: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds of both accuracies (in %), one line a value of γ or ε."""
    grouped = rows.groupby(knob)[["pretrain_accuracy", "finetune_accuracy"]]
    return (100 * grouped.mean()).join((100 * grouped.std().fillna(0.0)).add_suffix("_std"))


def axis_start(table: pd.DataFrame) -> float:
    """Left end of the figure in %: 95 as in the paper, or lower where little would be seen (small presets)."""
    constrained = 100 * table[table["constraint"] != "none"]["pretrain_accuracy"]
    return 95.0 if len(constrained) == 0 or constrained.median() > 97 else math.floor(constrained.min() / 10) * 10.0


def draw(table: pd.DataFrame, path: Path, from_accuracy: float = 95.0) -> list[Path]:
    """Write `path` as PDF and PNG: pre-training accuracy against fine-tuning accuracy, a curve a method.

    Args:
        table: rows of the study.
        path: file name; the endings .pdf and .png are put in turn.
        from_accuracy: left end of the axis in per cent (the paper's plot keeps points from 95 %).
    """
    constraints = [c for c in ("null-space", "ellipsoid") if (table["constraint"] == c).any()]
    figure, axes = plt.subplots(
        1, len(constraints), figsize=(5.2 * len(constraints), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    titles = {"null-space": "null space (γ)", "ellipsoid": "ellipsoid ½ δᵀCδ ≤ ε"}
    reference = table[table["constraint"] == "none"]
    for ax, constraint in zip(axes[0], constraints, strict=True):
        knob = "gamma" if constraint == "null-space" else "epsilon"
        rows = table[(table["constraint"] == constraint) & (table["diverged"] == 0)]
        for method, (label, colour, marker) in STYLE.items():
            own = rows[rows["method"] == method]
            if own.empty:
                continue
            c = curve(own, knob)
            # the Hessian of a ReLU network is its GGN: draw it where it can be seen beneath
            wide = method == "hessian"
            ax.errorbar(
                c["pretrain_accuracy"], c["finetune_accuracy"],
                xerr=c["pretrain_accuracy_std"], yerr=c["finetune_accuracy_std"],
                color=colour, marker=marker, label=label, markersize=8 if wide else 4.5,
                markerfacecolor="none" if wide else colour, linewidth=2.2 if wide else 1.3,
                linestyle=":" if wide else ("-" if constraint == "null-space" else "--"),
                elinewidth=0.7, capsize=1.5, alpha=0.9,
            )  # fmt: skip
        if constraint == "ellipsoid" and ((table["constraint"] == "null-space") & (table["method"] == "ggn")).any():
            exact = table[(table["constraint"] == "null-space") & (table["method"] == "ggn") & (table["diverged"] == 0)]
            c = curve(exact, "gamma")
            ax.plot(
                c["pretrain_accuracy"], c["finetune_accuracy"], color="0.6", linewidth=3, alpha=0.6, zorder=0,
                label="GGN null space, for comparison",
            )  # fmt: skip
        if not reference.empty:
            kept, learnt = (100 * reference[f"{part}_accuracy"].mean() for part in ("pretrain", "finetune"))
            shown = max(kept, from_accuracy)
            label = "unconstrained" + ("" if shown == kept else f" (at {kept:.1f} %)")
            ax.plot(shown, learnt, marker="*", markersize=12, color="0.35", linestyle="", label=label,
                    clip_on=False)  # fmt: skip
        top = 100 * table["base_accuracy"].mean()
        ax.axvline(top, color="0.5", linewidth=0.8, linestyle="-.", label=f"before fine-tuning ({top:.2f} %)")
        ax.set_xlim(from_accuracy, top + 0.03 * (top - from_accuracy))
        ax.set_xlabel(f"{_task(table, 'pretrain')} (pre-training) test accuracy, %")
        ax.set_title(titles[constraint], fontsize=10)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.legend(fontsize=7.5, loc="lower left")
    axes[0][0].set_ylabel(f"{_task(table, 'finetune')} (fine-tuning) test accuracy, %")
    first = table.iloc[0]
    seeds = table["seed"].nunique()
    title = f"LeNet-5 ({first['activation']}), {first['layer']} edited with {first['optimizer']}, " + (
        "1 seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation"
    )
    note = str(first.get("dataset_note", "") or "")
    if note and note != "nan":
        title += "\nEMBEDDED DATA, not MNIST → Fashion-MNIST"
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _task(table: pd.DataFrame, part: str) -> str:
    return TASK_NAMES[str(table["dataset"].iloc[0])][part == "finetune"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*draw(pd.read_csv(source), source.with_suffix(".pdf")), sep="\n")
