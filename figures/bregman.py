"""Claim 2: how the remainder of ½ δᵀGδ vanishes, from the checks.json of `studies/verify_theory.py`.

python figures/bregman.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures.style import from_checks, save

STAGES = {  # stage → colour, marker, line
    "random": ("#000000", "o", "-"),
    "half-trained": ("#0072b2", "^", "--"),
    "converged": ("#d55e00", "s", "-."),
}
MATRICES = {  # key in the series → name, colour, marker, line
    "GGN": ("Bregman, G", "#000000", "o", "-"),
    "1.1 GGN": ("Bregman, 1.1 G (wrong)", "#009e73", "v", "--"),
    "empirical Fisher": ("Bregman, empirical Fisher", "#cc79a7", "D", "-."),
}


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: the remainder at the stages of training, and against wrong matrices at the last.

    Nothing is drawn ([]) where there is no trained network among the rows.
    """
    found = {
        stage: row
        for row in rows
        for stage in STAGES
        if row["name"] == "remainder_order" and f"tanh, {stage}," in row["setting"]
    }
    if not found:
        return []
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), sharey=True, sharex=True, layout="constrained")
    for stage, (colour, marker, line) in STAGES.items():
        if stage in found:
            series = found[stage]["series"]
            left.loglog(
                series["size"], series["remainder"]["GGN"], color=colour, marker=marker, linestyle=line, markersize=5,
                label=f"{stage} (exponent {_exponent(found[stage]):.2f})",
            )  # fmt: skip
    last = next(stage for stage in reversed(STAGES) if stage in found)
    series = found[last]["series"]
    right.loglog(
        series["size"], series["loss difference"], color="#e69f00", marker="x", linestyle=":", markersize=5,
        label="plain loss difference, G",
    )  # fmt: skip
    for key in ("empirical Fisher", "1.1 GGN", "GGN"):
        name, colour, marker, line = MATRICES[key]
        right.loglog(
            series["size"],
            series["remainder"][key],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            label=name,
        )
    right.fill_between(
        series["size"], 1e-300, series["rounding"], color="0.85", linewidth=0, label="below rounding", zorder=0
    )
    size, value = np.array(series["size"]), np.array(series["remainder"]["GGN"])
    _reference(left, size, value[-1] / 40, 3)
    _reference(right, size, value[-1] / 40, 3)
    _reference(right, size, series["remainder"]["1.1 GGN"][-1] / 6, 2)
    _reference(right, size, series["loss difference"][0] * size[-1] / size[0] * 6, 1, above=True)
    everything = [v for row in found.values() for v in row["series"]["remainder"]["GGN"]]
    left.set_ylim(min(*everything, *series["rounding"]) / 5, 30 * max(*series["loss difference"], *everything))
    left.set_title("at every stage of training", fontsize=10)
    right.set_title(f"{last}: G, wrong matrices, and the loss itself", fontsize=10)
    left.set_ylabel("|distance − ½ δᵀGδ| (r.m.s. over directions)")
    for ax in (left, right):
        ax.set_xlabel("‖δ‖")
        ax.grid(alpha=0.25, linewidth=0.5)
    left.legend(fontsize=8, loc="upper left")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False)
    figure.suptitle(found[last]["setting"].replace(f", {last},", ","), fontsize=10)
    return save(figure, path)


def _exponent(row: dict[str, Any]) -> float:
    """As it was measured."""
    return next(float(case["measured"]) for case in row["cases"] if case["name"] == "exponent of the remainder")


def _reference(ax: Axes, size: np.ndarray, end: float, slope: int, above: bool = False) -> None:
    """A line of a given slope that ends at (size[-1], end), named at its middle."""
    ax.loglog(size, end * (size / size[-1]) ** slope, color="0.55", linewidth=0.9)
    middle = len(size) * (2 if slope == 2 else 5) // 8
    ax.annotate(
        f"∝ ‖δ‖{'' if slope == 1 else '²³'[slope - 2]}", (size[middle], end * (size[middle] / size[-1]) ** slope),
        xytext=(-12, 7) if above else (5, -10), textcoords="offset points", fontsize=8, color="0.4",
    )  # fmt: skip


if __name__ == "__main__":
    from_checks(draw, "bregman.pdf", __doc__)
