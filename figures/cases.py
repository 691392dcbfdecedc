"""One claim at a glance: every case of a checks.json as measured over bound; computes no result.

python figures/cases.py results/verify_theory/checks.json
"""

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from figures.style import save

EDGE = 1e16  # ratios beyond are drawn at the edge (exact zeros among them)


def ratio(case: dict[str, Any]) -> float:
    """Measured over bound, the other way round for a lower bound: at most one where the case holds."""
    measured, bound = float(case["measured"]), float(case["bound"])
    top, bottom = (measured, bound) if case["relation"] == "<=" else (bound, measured)
    if math.isfinite(top) and top > 0 and bottom > 0:
        return min(max(top / bottom, 1 / EDGE), EDGE)
    return 1 / EDGE if case["holds"] else EDGE


KINDS = {
    "expected to hold": ("o", "#0072b2", "#0072b2"),
    "measured, either way": ("s", "none", "#0072b2"),
    "expected to fail": ("X", "#d55e00", "#d55e00"),
    "control, to be rejected": ("^", "none", "0.35"),
}


def kind(case: dict[str, Any]) -> str:
    if case["control"]:
        return "control, to be rejected"
    if case["should"] is None:
        return "measured, either way"
    return "expected to hold" if case["should"] else "expected to fail"


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: one line a function, one mark a case, left of 1 where it holds."""
    if not rows:
        return []
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, ax = plt.subplots(figsize=(6.4, 1.1 + 0.45 * len(names)), layout="constrained")
    for what, (marker, face, edge) in KINDS.items():
        shift = {"o": 0.0, "s": 0.08, "X": 0.16, "^": -0.16}[marker]
        points = [
            (ratio(case), len(names) - 1 - names.index(row["name"]) + shift)
            for row in rows
            for case in row["cases"]
            if kind(case) == what
        ]
        if points:
            ax.plot(
                *zip(*points, strict=True), marker, markerfacecolor=face, markeredgecolor=edge, markersize=5,
                alpha=0.7, linestyle="", label=what,
            )  # fmt: skip
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlim(0.3 / EDGE, 3 * EDGE)
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in reversed(names)], fontsize=8)
    ax.set_xlabel("measured / bound (left of 1: holds; lower bounds inverted)", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.grid(axis="x", alpha=0.25, linewidth=0.5)
    figure.legend(fontsize=7, loc="outside upper center", ncols=2, frameon=False)
    return save(figure, path)


if __name__ == "__main__":
    import json

    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    everything = json.loads(source.read_text())
    for number in sorted({row["claim"] for row in everything}):
        own = [row for row in everything if row["claim"] == number]
        print(*draw(own, source.with_name(f"claim_{number:02}.pdf")), sep="\n")
