"""What null space, ellipsoid and soft penalty learn at equal measured KL, from claim 18; computes no result.

python figures/budget.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from figures.style import from_checks, save

KINDS = {
    "null space": ("null space (γ)", "#0072b2", "o", "-"),
    "ellipsoid": ("ellipsoid (ε)", "#d55e00", "^", "--"),
    "soft penalty": ("soft penalty (λ)", "#009e73", "v", ":"),
    "ellipsoid, damped": ("ellipsoid, damped", "#cc79a7", "s", "-."),
    "random cut": ("cut along random directions", "0.5", "x", (0, (1, 3))),
}


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: edit loss against measured KL, a panel a regime and curvature."""
    rows = [row for row in rows if row["claim"] == 18 and row["name"] == "learning_at_equal_kl"]
    if not rows:
        return []
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.0 * lines), squeeze=False, layout="constrained"
    )
    for ax, row in zip(axes.flat, sorted(rows, key=lambda row: row["series"]["regime"]), strict=False):
        series = row["series"]
        for kind, (label, colour, marker, line) in KINDS.items():
            curves = np.array(series["curves"].get(kind, []))  # (edit sets, knobs, 3)
            if not len(curves):
                continue
            kl, loss = np.log(np.maximum(curves[..., 1], 1e-12)), curves[..., 2]
            ax.errorbar(
                np.exp(kl.mean(0)), loss.mean(0), yerr=loss.std(0), color=colour, marker=marker, linestyle=line,
                markersize=4.5, capsize=2, elinewidth=0.7, label=label,
            )  # fmt: skip
        measured = np.array(series["curves"]["null space"] + series["curves"]["ellipsoid"])[..., 1]
        ax.set(xscale="log", xlabel="measured KL, nats", ylabel="edit loss at the end, nats")
        ax.set_xlim(max(1e-5, measured.min() / 2), measured.max() * 2)
        name = {"kfac": "K-FAC", "ggn": "GGN"}.get(series["curvature"], series["curvature"])
        ax.set_title(f"{name}, {series['regime']}", fontsize=9)
        ax.grid(alpha=0.25, linewidth=0.5)
    shown = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
    figure.legend(shown.values(), shown.keys(), fontsize=8, ncol=len(shown), loc="outside lower center")
    for ax in axes.flat[len(rows) :]:
        ax.set_visible(False)
    sets = len(rows[0]["series"]["curves"]["null space"])
    spread = "one edit set" if sets == 1 else f"{sets} edit sets: mean ± standard deviation"
    figure.suptitle(f"{rows[0]['setting'].split(', fc')[0]}; {spread}", fontsize=9)
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "budget.pdf", __doc__)
