"""What all figures share: how each curvature is drawn, and how a figure is saved."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# method → (name in the legend, colour, marker); told apart in grey by marker and line as well
STYLE = {
    "hessian": ("Hessian", "#000000", "s"),
    "ggn": ("GGN", "#0072b2", "o"),
    "kfac": ("K-FAC", "#d55e00", "^"),
    "ekfac": ("EK-FAC", "#009e73", "v"),
    "covariance": ("activation covariance", "#cc79a7", "D"),
}

LINES = {"hessian": "-", "ggn": "--", "kfac": "-.", "ekfac": ":", "covariance": (0, (5, 1, 1, 1, 1, 1))}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PDF and PNG, the endings put in turn, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ax in figure.axes:
        ax.minorticks_off()  # thousands of marks that take most of the time
    figure.draw_without_rendering()  # the layout once, not for each file
    figure.set_layout_engine(None)
    files = [path.with_suffix(".pdf"), path.with_suffix(".png")]
    for file in files:
        figure.savefig(file, dpi=160)
    plt.close(figure)
    return files


def from_checks(draw: Callable[[list[dict[str, Any]], Path], list[Path]], name: str, usage: str | None) -> None:
    """`main` of a figure of the theory study: draw it from the checks.json on the command line, beside that file."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), source.with_name(name)), sep="\n")
