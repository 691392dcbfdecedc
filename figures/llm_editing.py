"""Edit success against capability kept, from the records of `studies/llm_editing.py`; computes no result.

python figures/llm_editing.py results/results.csv
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from figures.style import STYLE, save

# editor → (name in the legend, colour, marker, line)
CURVES = {
    "crispedit": ("CrispEdit, K-FAC (γ)", STYLE["kfac"][1], "^", "-"),
    "crispedit-ekfac": ("CrispEdit, EK-FAC (γ)", STYLE["ekfac"][1], "v", "-"),
    "crispedit-covariance": ("activation covariance (γ)", STYLE["covariance"][1], "D", "-"),
    "crispedit-eps": ("CrispEdit-ε, K-FAC ellipsoid", STYLE["kfac"][1], "o", "--"),
    "kfac-penalty": ("K-FAC penalty (λ)", "#0072b2", "s", ":"),
    "ewc": ("EWC (λ)", "#56b4e9", "P", ":"),
    "crispedit-seq": ("CrispEdit-Seq (γ)", "#7a3b00", "<", "-."),
    "crispedit-seq-eps": ("CrispEdit-Seq-ε", "#7a3b00", ">", "-."),
    "adam-nscl": ("Adam-NSCL (ratio)", "#999999", "d", "-."),
    "ft": ("FT (learning rate)", "#000000", "*", "-"),
    "lora": ("LoRA (learning rate)", "#8a8a8a", "h", "--"),
}
POINTS = {
    "ft-seq": ("FT-Seq", "X"), "locbf-ft": ("LocBF-FT", "p"), "lora-seq": ("LoRA-Seq", "8"), "replay": ("replay", "+"),
}  # fmt: skip
SUCCESS = "edit success (mean of reliability and generalisation), %"


def draw(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: edit success against capability kept (all of it, and where most is kept) and
    against specificity; a curve over γ, ε, λ or the learning rate, points for the others."""
    figure, axes = plt.subplots(1, 3, figsize=(14.2, 4.6), layout="constrained", sharey=True)
    panels = (
        ("capability_kept", "capability kept, % of the unedited model's"),
        ("capability_kept", "the same, where most is kept"),
        ("specificity", "specificity (neighbours' answers that stay), %"),
    )
    for ax, (measure, label) in zip(axes, panels, strict=True):
        for editor, (name, colour, marker, line) in CURVES.items():
            c = _means(table[table["editor"] == editor], measure)
            _errors(ax, c, color=colour, marker=marker, linestyle=line, label=name, markersize=4.5, linewidth=1.3)
        for editor, (name, marker) in POINTS.items():
            c = _means(table[table["editor"] == editor], measure)
            _errors(ax, c, color="0.2", marker=marker, linestyle="", label=name, markersize=7)
        if (table["editor"] == "none").any():
            ax.axvline(100, color="0.6", linewidth=0.8, linestyle="-.", label="unedited")
        ax.set_xlabel(label)
        ax.grid(alpha=0.25, linewidth=0.5)
    kept = 100 * table[table["editor"] != "none"]["capability_kept"].dropna()
    if len(kept):
        axes[1].set_xlim(max(kept.min(), min(kept.median() - 5, 85)), max(100.5, kept.max() + 0.5))
    axes[0].set_ylabel(SUCCESS)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7.5)
    first, seeds = table.iloc[0], table["seed"].nunique()
    spread = "1 seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation"
    what = f"{first['model']}, {first['n_edits']} edits ({first['edits']})"
    diverged = int(table["diverged"].sum()) if "diverged" in table else 0
    if diverged:
        what += f"; {diverged} of {len(table)} edits diverged and are left out"
    figure.suptitle(f"{what}, generated answers, {spread}", fontsize=10)
    return save(figure, path)


def _means(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Means and standard deviations over seeds of a measure and of edit success (%), one line a setting."""
    rows = rows.assign(x=100 * rows[measure], y=100 * rows["edit_success"]).dropna(subset=["x", "y"])
    grouped = rows.groupby(["gamma", "epsilon", "strength"], dropna=False)[["x", "y"]]
    return grouped.mean().join(grouped.std().fillna(0.0).add_suffix("_std"))


def _errors(ax: Any, c: pd.DataFrame, **style: Any) -> None:
    if len(c):
        ax.errorbar(c["x"], c["y"], xerr=c["x_std"], yerr=c["y_std"], elinewidth=0.7, capsize=1.5, alpha=0.9, **style)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*draw(pd.read_csv(source), source.with_name("llm_editing.pdf")), sep="\n")
