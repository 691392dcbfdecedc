"""The paper's Fig. 2 on a real two-parameter slice, from claim 18; computes no result.

python figures/geometry.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from figures.style import from_checks, save


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: capability KL (filled), edit loss (lines), both steps and both descents."""
    rows = [row for row in rows if row["claim"] == 18 and row["name"] == "two_parameter_slice"]
    if not rows:
        return []
    row = rows[0]
    s = row["series"]
    flats, sharps = np.array(s["flat axis"]), np.array(s["sharp axis"])
    kl, edit = np.array(s["surface"]["KL"]), np.array(s["surface"]["edit loss"])
    figure, ax = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    # the sharp direction is drawn upwards, the flat one to the right
    floor = max(float(kl[kl > 0].min()), float(kl.max()) * 1e-4)
    levels = np.geomspace(floor, float(kl.max()), 13)
    filled = ax.contourf(flats, sharps, np.maximum(kl, floor), levels=levels, norm=LogNorm(), cmap="Greys", alpha=0.75)
    bar = figure.colorbar(filled, ax=ax, label="capability KL(p_θ0 ‖ p_θ), nats")
    bar.ax.set_yticks([10.0**k for k in range(-8, 3) if levels[0] <= 10.0**k <= levels[-1]])
    lines = ax.contour(flats, sharps, edit, levels=10, colors="#0072b2", linewidths=0.9, linestyles="--")
    ax.clabel(lines, fontsize=7, fmt="%.2f")
    sharp, flat = s["gradient"]
    length = s["step"] / np.hypot(sharp, flat)
    for (x, y), colour, label in (
        ((length * flat, length * sharp), "#d55e00", "edit gradient step"),
        ((s["step"], 0.0), "#009e73", "projected, equal length"),
    ):
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.2})
        ax.plot([], [], color=colour, linewidth=2.2, label=label)
    for name, colour, marker, label in (
        ("raw", "#d55e00", "o", "descent on the edit"), ("projected", "#009e73", "s", "projected descent"),
    ):  # fmt: skip
        path_ = np.array(s["descent"][name])
        inside = (path_[:, 1] <= flats.max()) & (np.abs(path_[:, 0]) <= sharps.max())
        ax.plot(path_[inside, 1], path_[inside, 0], color=colour, marker=marker, markersize=3.5, linewidth=0.8,
                markerfacecolor="white", label=label, alpha=0.9)  # fmt: skip
    ax.plot(0, 0, marker="*", markersize=13, color="k", linestyle="", label="θ0")
    ax.plot([], [], color="#0072b2", linestyle="--", linewidth=0.9, label="edit loss, nats")
    ax.set(xlabel="along the projected gradient, ‖δ‖ / ‖W‖", ylabel="along a sharp eigenvector of the GGN, ‖δ‖ / ‖W‖")
    ax.set_xlim(flats.min(), flats.max())
    ax.set_ylim(sharps.min(), sharps.max())
    ax.legend(fontsize=7.5, loc="upper left", framealpha=0.9)
    quotient = s["kl"]["raw in the plane"] / s["kl"]["projected"]
    ax.set_title(f"{row['setting']}; γ = {s['gamma']:g}\nKL of the two steps: a factor of {quotient:.0f}", fontsize=9)
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "geometry.pdf", __doc__)
