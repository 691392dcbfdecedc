"""What a cross-check saw, layer by layer: spectra, the mask as a staircase, overlap of subspaces; computes no result.

python figures/crosscheck.py results/crosscheck/curves.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from figures.style import save

LAYERS = 6  # in one figure; what is left out is said in the title
SIDES = {"A": ("inputs (A)", "#0072b2", "-"), "S": ("outputs (S)", "#d55e00", "--")}


def draw(curves: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG: a row a layer, from the records of `curvlab.crosscheck.curves`."""
    shown = [own for own in curves if own["spectra"] or own["mask"] or own["overlaps"]][:LAYERS]
    rows = max(1, len(shown))
    figure, axes = plt.subplots(rows, 3, figsize=(11.5, 0.4 + 3.1 * rows), layout="constrained", squeeze=False)
    for (left, middle, right), own in zip(axes, shown, strict=False):
        _spectra(left, own)
        _mask(middle, own["mask"])
        _overlaps(right, own["overlaps"])
    if not shown:
        for ax in axes[0]:
            _empty(ax, "nothing to draw")
    more = f" ({len(curves) - len(shown)} more not drawn)" if len(curves) > len(shown) else ""
    figure.suptitle(f"cross-check of {len(curves)} layer{'s' * (len(curves) != 1)}{more}", fontsize=10)
    return save(figure, path)


def _spectra(ax: plt.Axes, own: dict[str, Any]) -> None:
    ax.set_title(own["layer"] or own["source"], fontsize=8.5, loc="left")
    if not own["spectra"]:
        return _empty(ax, "no factors or eigenvalues")
    for side, points in own["spectra"].items():
        label, colour, line = SIDES[side]
        index, value = np.array(points).T
        positive = value > 0
        ax.plot(index[positive], value[positive], color=colour, linestyle=line, linewidth=1.4, label=label)
        if (value < 0).any():
            ax.plot(index[value < 0], -value[value < 0], color=colour, marker="x", linestyle="", markersize=4,
                    label=f"{label}, negative")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="index", ylabel="eigenvalue")
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(fontsize=7)
    return None


def _mask(ax: plt.Axes, mask: dict[str, Any] | None) -> None:
    if mask is None:
        return _empty(ax, "no mask, or no eigenvalues to sort it by")
    d_out, d_in = mask["shape"]
    # eigenvalues fall to the right and downwards: what is removed sits in the upper left corner
    ax.imshow(
        np.array(mask["kept"]), cmap="Greys_r", vmin=-0.6, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0.5, d_in + 0.5, d_out + 0.5, 0.5),
    )  # fmt: skip
    if mask["rule"]:
        edges, rows = np.array(mask["rule"]).T
        ax.step(edges, rows, where="post", color="#d55e00", linewidth=1.4, label=f"rule at γ = {mask['gamma']:.4g}")
        ax.legend(fontsize=7, loc="lower right")
    ax.set(xlabel="input eigenvalue, descending", ylabel="output eigenvalue, descending")
    ax.set_title("mask (dark: removed)", fontsize=8.5)
    return None


def _overlaps(ax: plt.Axes, overlaps: dict[str, Any]) -> None:
    if not overlaps:
        return _empty(ax, "no reference to compare subspaces with")
    for side, own in overlaps.items():
        label, colour, line = SIDES[side]
        rank, share = np.array(own["points"]).T
        ax.plot(rank, 100 * share, color=colour, linestyle=line, marker="o", markersize=3, label=label)
        ax.plot(rank, 100 * rank / own["dimension"], color=colour, linewidth=0.7, alpha=0.6)
    ax.set(xscale="log", ylim=(0, 103), xlabel="leading eigenvectors r")
    ax.set_ylabel("overlap of their spans, %")
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(fontsize=7, loc="lower right")
    against = next(iter(overlaps.values()))["against"]
    ax.set_title(f"against {against} (thin: by chance)", fontsize=8.5)
    return None


def _empty(ax: plt.Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, color="0.4", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), source.with_name("crosscheck.pdf")), sep="\n")
