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
from matplotlib.scale import LogTransform
from matplotlib.ticker import LogFormatterSciNotation

# method → (name in the legend, colour, marker); told apart in grey by marker and line as well
STYLE = {
    "hessian": ("Hessian", "#000000", "s"),
    "ggn": ("GGN", "#0072b2", "o"),
    "kfac": ("K-FAC", "#d55e00", "^"),
    "ekfac": ("EK-FAC", "#009e73", "v"),
    "covariance": ("activation covariance", "#cc79a7", "D"),
}

LINES = {"hessian": "-", "ggn": "--", "kfac": "-.", "ekfac": ":", "covariance": (0, (5, 1, 1, 1, 1, 1))}


DPI = 160
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class PlainPowers(LogFormatterSciNotation):
    """Powers at the ticks as text, 10⁻³: as formulas, parsed one by one, they are a third of a figure's time."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        formula = super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$")
        number, _, exponent = formula.replace(r"\times", " × ").partition("^")
        return number + exponent.strip("{}").translate(SUPERSCRIPTS)


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PDF and PNG, the endings put in turn (only PNG where `path` ends so), and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ax in figure.axes:
        ax.minorticks_off()  # thousands of marks that take most of the time
        for axis in (ax.xaxis, ax.yaxis):
            transform, formatter = axis.get_transform(), axis.get_major_formatter()
            if isinstance(transform, LogTransform) and isinstance(formatter, LogFormatterSciNotation):
                axis.set_major_formatter(PlainPowers(transform.base))
    # the layout once, not for each file, and by the renderer of the PNG, which keeps the sizes of texts
    figure.dpi = DPI
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)
    files = [path] if path.suffix == ".png" else [path.with_suffix(".pdf"), path.with_suffix(".png")]
    for file in reversed(files):
        figure.savefig(file, dpi=DPI)
    plt.close(figure)
    return files


def from_checks(draw: Callable[[list[dict[str, Any]], Path], list[Path]], name: str, usage: str | None) -> None:
    """`main` of a figure of the theory study: draw it from the checks.json on the command line, beside that file."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), source.with_name(name)), sep="\n")
