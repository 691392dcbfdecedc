"""Predicted against measured KL along edits, and their ratio as edits grow, from claim 15; computes no result.

python figures/prediction.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from figures.style import LINES, STYLE, from_checks, save


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: a row of two panels for one layer, another for all layers."""
    rows = [row for row in rows if row["claim"] == 15 and row["name"] == "prediction_along_edits"]
    rows = [row for row in rows if "converged" in row["setting"]] or rows
    settings = list(dict.fromkeys(row["setting"] for row in rows))[:2]
    if not settings:
        return []
    figure, axes = plt.subplots(
        len(settings), 2, figsize=(10.4, 4.2 * len(settings)), squeeze=False, layout="constrained"
    )
    for (one, two), setting in zip(axes, settings, strict=True):
        own = [row["series"] for row in rows if row["setting"] == setting]
        points = [[q for q in series["points"] if q["path"] != "random"] for series in own]
        for name, (label, colour, marker) in STYLE.items():
            usable = [q for each in points for q in each if q["predicted"][name] > 0]
            one.plot(
                [q["predicted"][name] for q in usable], [q["measured"] for q in usable], linestyle="", color=colour,
                marker=marker, markersize=4, markerfacecolor="none", alpha=0.8,
                label=f"{label}: {np.mean([s['agreement'][name]['spearman'] for s in own]):.3f}",
            )  # fmt: skip
            # one point a step of the free path, over edit sets
            free = [[q for q in each if q["path"] == "free"] for each in points]
            sizes = np.array([[q["size"] for q in each] for each in free])
            ratios = np.array([[_ratio(q, name) for q in each] for each in free])
            two.errorbar(
                sizes.mean(0), ratios.mean(0), yerr=ratios.std(0), color=colour, marker=marker, label=label,
                linestyle=LINES[name], markersize=4, capsize=2, elinewidth=0.7,
            )  # fmt: skip
        limits = [f(q["measured"] for each in points for q in each) for f in (min, max)]
        one.plot(limits, limits, color="0.4", linewidth=1)
        one.set(xscale="log", yscale="log", xlabel="predicted ½ δᵀCδ, nats", ylabel="measured KL, nats")
        one.set_title("on edit paths; Spearman's ρ in the legend", fontsize=9)
        two.axhline(1, color="0.4", linewidth=1)
        two.axhline(2, color="0.4", linewidth=0.8, linestyle="-.")
        two.axvline(0.25, color="0.4", linewidth=0.8, linestyle=":")
        two.annotate("the paper's drift rule", (0.25, 1.0), (3, -4), xycoords=two.get_xaxis_transform(),
                     textcoords="offset points", rotation=90, va="top", fontsize=8)  # fmt: skip
        two.set(xscale="log", xlabel="‖δ‖ / ‖W‖", ylabel="measured / predicted")
        two.set_xlim(right=max(0.4, two.get_xlim()[1]))
        two.set_title("the unconstrained edit as it grows", fontsize=9)
        one.legend(fontsize=7.5)
        two.legend(fontsize=7.5, loc="upper left")
        for ax in (one, two):
            ax.grid(alpha=0.25, linewidth=0.5)
        one.annotate(setting, (0, 1.1), xycoords="axes fraction", fontsize=8.5)
    return save(figure, path)


def _ratio(point: dict[str, Any], name: str) -> float:
    predicted = point["predicted"][name]
    return float(point["measured"] / predicted) if predicted > 0 else float("nan")


if __name__ == "__main__":
    from_checks(draw, "prediction.pdf", __doc__)
