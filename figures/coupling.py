"""What layer-wise projection ignores: the GGN outside its diagonal blocks, from claim 14; computes no result.

python figures/coupling.py results/verify_theory/checks.json
"""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from figures.style import from_checks, save

STAGES = {"random": ("0.45", "s", "--"), "half-trained": ("#d55e00", "^", ":"), "converged": ("#0072b2", "o", "-")}
NEGLIGIBLE = 0.1  # the bound that claim 14 puts to it


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: share of ‖G‖_F² against depth and width, a line a stage of training."""
    rows = [row for row in rows if row["claim"] == 14 and row["name"] == "coupling_is_bounded"]
    rows = [row for row in rows if any(stage in row["setting"] for stage in STAGES)]
    if not rows:
        return []
    usual = {knob: Counter(row["series"][knob] for row in rows).most_common(1)[0][0] for knob in ("layers", "width")}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.5), sharey=True, layout="constrained")
    for ax, knob, other in ((axes[0], "layers", "width"), (axes[1], "width", "layers")):
        values = set()
        for stage, (colour, marker, line) in STAGES.items():
            own = [row for row in rows if stage in row["setting"] and row["series"][other] == usual[other]]
            points = sorted((row["series"][knob], 100 * row["series"]["squared share"]) for row in own)
            if points:
                ax.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=1.4,
                    markersize=5, label=stage,
                )  # fmt: skip
                values |= {x for x, _ in points}
        ax.axhline(100 * NEGLIGIBLE, color="0.3", linewidth=0.9, label=f"bound of “negligible”, {NEGLIGIBLE:.0%}")
        ax.grid(alpha=0.25, linewidth=0.5)
        if knob == "width" and len(values) > 1:
            ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(values), [str(v) for v in sorted(values)])
        ax.minorticks_off()
        ax.set_xlabel("layers" if knob == "layers" else "hidden width")
        fixed = f"width {usual['width']}" if knob == "layers" else f"{usual['layers']} layers"
        ax.set_title(fixed, fontsize=9)
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("% of ‖G‖² outside the diagonal blocks")
    axes[1].legend(fontsize=8)
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "coupling.pdf", __doc__)
