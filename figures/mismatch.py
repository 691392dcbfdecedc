"""What null spaces from small or other capability sets let through, from claim 17; computes no result.

python figures/mismatch.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from figures.style import LINES, STYLE, from_checks, save

OTHERS = ("classes 0 to 4", "classes 5 to 9", "0 to 4, for 5 to 9", "the other task")
STAGES = ("random", "converged")


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: energy let through against examples, and for other classes and another task."""
    rows = [row for row in rows if row["claim"] == 17 and row["name"] == "no_estimate_beats_the_whole_set"]
    stages = [stage for stage in STAGES if any(f"{stage}," in row["setting"] for row in rows)]
    if not stages:
        return []
    figure, axes = plt.subplots(
        1, len(stages), figsize=(4.6 * len(stages), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, stage in zip(axes[0], stages, strict=True):
        own = [row for row in rows if f"{stage}," in row["setting"]]
        parts = sorted((row for row in own if "the first" in row["setting"]), key=lambda row: row["series"]["examples"])
        sizes = [row["series"]["examples"] for row in parts]
        others = {label: row for label in OTHERS for row in own if row["setting"].endswith(label)}
        # the other sets stand to the right of the sizes, at even distances on the logarithmic axis
        places = [sizes[-1] * 3.2 ** (i + 1) for i in range(len(others))]
        for name, (label, colour, marker) in STYLE.items():
            if not parts or name not in parts[0]["series"]:
                continue
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5}
            let = [100 * row["series"][name]["let through"] for row in parts]
            ax.plot(sizes, let, linestyle=LINES[name], linewidth=1.2, label=label, **style)
            shifted = [100 * row["series"][name]["let through"] for row in others.values()]
            ax.plot(places, shifted, linestyle="none", **style)
            whole = 100 * parts[0]["series"][name]["by the whole set"]
            ax.axhline(whole, color=colour, linewidth=0.8, linestyle=LINES[name], alpha=0.6)
        ax.axvline(sizes[-1] * 1.8, color="0.6", linewidth=0.8)
        ax.set(xscale="log", ylim=(0, 100), title=stage)
        ax.minorticks_off()
        ax.set_xticks([*sizes, *places], [*(f"{n:,}" for n in sizes), *others], rotation=45, ha="right", fontsize=8)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.set_xlabel("examples of the capability set | other sets")
    axes[0][0].set_ylabel("% of the energy of G let through\n(thin: by the whole set)")
    axes[0][0].legend(fontsize=8, loc="upper center")
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "mismatch.pdf", __doc__)
