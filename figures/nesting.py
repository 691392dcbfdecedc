"""How much of one γ-null space lies in another, for all pairs of curvatures, from claim 9; computes no result.

python figures/nesting.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from figures.style import LINES, STYLE, from_checks, save


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: a panel a first curvature, a line a second one; below it, what chance gives."""
    rows = [row for row in rows if row["claim"] == 9 and row["name"] == "overlap_is_the_share"]
    rows = [row for row in rows if "converged" in row["setting"]] or rows
    if not rows:
        return []
    row = max(rows, key=lambda row: len(row["series"]["pairs"]))
    pairs = row["series"]["pairs"]
    figure, axes = plt.subplots(2, 5, figsize=(12.5, 5.3), sharex=True, sharey="row", layout="constrained")
    for (upper, lower), (first, (title, _, _)) in zip(axes.T, STYLE.items(), strict=True):
        for second, (label, colour, marker) in STYLE.items():
            own = sorted((p for p in pairs if (p["first"], p["second"]) == (first, second)), key=lambda p: p["gamma"])
            if not own or first == second:
                continue
            left = [1 - p["gamma"] for p in own]
            style: dict[str, Any] = {
                "color": colour, "linestyle": LINES[second], "marker": marker, "markersize": 4, "linewidth": 1.2,
            }  # fmt: skip
            upper.plot(left, [p["share"] for p in own], label=f"in {label}", **style)
            upper.plot(left, [p["by chance"] for p in own], color=colour, linewidth=0.7, alpha=0.5)
            lower.plot(left, [p["directions outside"] / p["kept"] for p in own], **style)
        upper.set_title(f"null space of {title}", fontsize=9)
        upper.set(xscale="log", ylim=(0, 1.03))
        lower.set(xlabel="1 − γ", ylim=(-0.03, 1.03))
        for ax in (upper, lower):
            ax.grid(alpha=0.25, linewidth=0.5)
    axes[0][0].invert_xaxis()
    axes[0][0].set_ylabel("share inside\n(thin: of a random subspace)")
    axes[1][0].set_ylabel("share of directions\nnot wholly inside")
    handles = {h.get_label(): h for ax in axes[0] for h in ax.get_lines() if not str(h.get_label()).startswith("_")}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle(f"{row['setting']} (lines end where the first null space is empty)", fontsize=9)
    return save(figure, path)


if __name__ == "__main__":
    from_checks(draw, "nesting.pdf", __doc__)
