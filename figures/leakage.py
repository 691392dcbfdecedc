"""How far each optimiser leaves the null space, and what that costs, from claim 13; computes no result.

python figures/leakage.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from figures.style import from_checks, save

# way → (name, line); optimiser → (colour, marker)
WAYS: dict[str, tuple[str, Any]] = {
    "gradient": ("projected gradient", "-"),
    "update": ("projected update", "--"),
    "eigenbasis": ("eigenbasis", ":"),
}
OPTIMISERS = {
    "SGD": ("#0072b2", "o"), "momentum": ("#009e73", "v"), "Adam": ("#d55e00", "^"),
    "SGD, weight decay": ("#cc79a7", "D"),
}  # fmt: skip
SHOWN = (
    ("Adam", "free"),
    ("Adam", "gradient"),
    ("Adam", "update"),
    ("SGD, weight decay", "gradient"),
    ("SGD", "gradient"),
)


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: leakage against γ, and curvature along the path, for K-FAC's null space."""
    rows = [row for row in rows if row["claim"] == 13 and row["name"] == "descent_in_the_null_space"]
    found = [row["series"] for row in rows if row["setting"].startswith("MLP") and row["series"]["curvature"] == "kfac"]
    if not found:
        return []
    gammas = sorted({s["gamma"] for s in found})
    left = [1 - gamma for gamma in gammas]
    figure, (one, two) = plt.subplots(1, 2, figsize=(10.4, 4.3), layout="constrained")
    for optimiser, (colour, marker) in OPTIMISERS.items():
        for way, (_, line) in WAYS.items():
            leaks = [[s["leakage"][f"{optimiser} | {way}"] for s in found if s["gamma"] == gamma] for gamma in gammas]
            values = np.array([np.exp(np.mean(np.log(np.maximum(own, 1e-18)))) for own in leaks])
            spread = (
                np.array([[v - min(own), max(own) - v] for v, own in zip(values, leaks, strict=True)]).clip(min=0).T
            )
            one.errorbar(
                left, values, yerr=spread, color=colour, marker=marker, linestyle=line, markersize=4.5, capsize=2,
                elinewidth=0.7, markerfacecolor=colour if way == "gradient" else "white",
            )  # fmt: skip
    one.axhline(found[0]["bound"], color="0.5", linewidth=0.9, linestyle="-.")
    one.annotate("bound of round-off", (max(left), found[0]["bound"]), (2, 3), textcoords="offset points", fontsize=8)
    one.set(xscale="log", yscale="log", xlabel="1 − γ", ylabel="leakage ‖(I − P)Δ‖ / ‖Δ‖", title="left the null space?")
    one.invert_xaxis()
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in OPTIMISERS.items()
    ] + [plt.Line2D([], [], color="0.2", linestyle=line, label=name) for name, line in WAYS.values()]
    one.legend(handles=handles, fontsize=7.5, ncol=2, loc="center", bbox_to_anchor=(0.5, 0.52))
    middle = min(gammas, key=lambda gamma: abs(gamma - 0.9))
    for optimiser, way in SHOWN:
        colour, marker = OPTIMISERS[optimiser]
        paths = np.array([s["energy"][f"{optimiser} | {way}"] for s in found if s["gamma"] == middle])
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
        if "decay" in optimiser:  # where it hides what lies beneath
            style |= {"markersize": 8, "markerfacecolor": "none"}
        if way == "free":
            style |= {"color": "0.35", "marker": "x"}
        two.errorbar(
            range(1, paths.shape[1] + 1), paths.mean(0), yerr=paths.std(0), capsize=2, elinewidth=0.7,
            linestyle=WAYS.get(way, ("", "-."))[1], label=f"{optimiser}, {WAYS.get(way, ('free',))[0]}", **style,
        )  # fmt: skip
    two.set(
        yscale="log", xlabel="step", ylabel="δᵀGδ, nats (twice the predicted KL)", title=f"curvature, γ = {middle:g}"
    )
    two.legend(fontsize=7.5)
    for ax in (one, two):
        ax.grid(alpha=0.25, linewidth=0.5)
    setting = next(row["setting"] for row in rows if row["setting"].startswith("MLP"))
    figure.suptitle(f"{setting}; K-FAC", fontsize=9)
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "leakage.pdf", __doc__)
