"""Spectra of the five curvatures over training, and the energy in their top 1 %, from claim 7; computes no result.

python figures/anisotropy.py results/verify_theory/checks.json
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from figures.style import LINES, STYLE, from_checks, save

STAGES = ("random", "half-trained", "converged")
SMALLEST = 1e-8  # of the energy in one direction: below is round-off, or nothing to see


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: a column a stage of training; spectra of one layer above, shares by size below."""
    rows = [row for row in rows if row["claim"] == 7 and row["name"] == "few_directions_hold_the_energy"]
    columns = {stage: [row for row in rows if stage in row["setting"] and row["series"]] for stage in STAGES}
    columns = {stage: sorted(found, key=_size) for stage, found in columns.items() if found}
    if not columns:
        return []
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.6 * len(columns), 6.2), sharex="row", sharey="row", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for (upper, lower), (stage, found) in zip(axes.T, columns.items(), strict=True):
        whole = [row for row in found if all(own["entropy rank"] for own in row["series"].values())]
        for curvature, (label, colour, marker) in STYLE.items():
            style: dict[str, Any] = {
                "color": colour, "marker": marker, "linestyle": LINES[curvature], "linewidth": 1.2, "label": label,
            }  # fmt: skip
            if whole and curvature in whole[-1]["series"]:
                spectrum = whole[-1]["series"][curvature]["spectrum"]
                points = [(i, v) for i, v in zip(spectrum["index"], spectrum["value"], strict=True) if v > SMALLEST]
                upper.plot(*zip(*points, strict=True), markersize=3.5, markevery=(0.08, 0.16), **style)
            shares = [(_size(row), 100 * row["series"][curvature]["top share"]) for row in found]
            lower.plot(*zip(*shares, strict=True), markersize=5, **style)
        upper.set(xscale="log", yscale="log", ylim=(SMALLEST, 1), xlabel="index of the direction")
        upper.set_title(stage + (f", {_size(whole[-1]):,} parameters" if whole else ""), fontsize=9)
        if whole:
            upper.axvline(0.01 * _size(whole[-1]), color="0.5", linewidth=0.8)
        lower.axhline(50, color="0.4", linewidth=0.8)
        lower.set(xscale="log", ylim=(0, 100), xlabel="parameters of the layer")
        lower.minorticks_off()
        sizes = [_size(row) for row in found]
        lower.set_xticks(sizes, [f"{size:,}" for size in sizes])
        for ax in (upper, lower):
            ax.grid(alpha=0.25, linewidth=0.5)
    axes[0][0].set_ylabel("share of the energy, |σ| / Σ|σ|\n(vertical line: the top 1 %)")
    axes[1][0].set_ylabel("% of the energy in the top 1 %\n(line: the bound)")
    axes[0][0].legend(fontsize=7.5, loc="lower left")
    return save(figure, path)


def _size(row: dict[str, Any]) -> int:
    return int(row["series"]["ggn"]["parameters"])


if __name__ == "__main__":
    from_checks(draw, "anisotropy.pdf", __doc__)
