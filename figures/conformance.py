"""The confusion matrix of the cross-check: faults made against faults named; computes no result.

python figures/conformance.py results/crosscheck/conformance.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from figures.style import save

NONE = "nothing"
CORRECT = "(correct)"
ALARMS = ("error", "deviation")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Write `path` as PDF and PNG from the rows of `studies/conformance.py`; artefacts with two faults are left out."""
    rows = [row for row in rows if len(row["made"]) <= 1 and not row["failed"]]
    made = list(dict.fromkeys(row["made"][0] if row["made"] else CORRECT for row in rows))
    made.sort(key=lambda name: name != CORRECT)
    known = [name for name in made if name != CORRECT]
    columns = [NONE, *known, *sorted({name for row in rows for name in _names(row)} - {*known, NONE})]
    counts = np.zeros((len(made), len(columns)), int)
    totals = np.zeros(len(made), int)
    for row in rows:
        i = made.index(row["made"][0] if row["made"] else CORRECT)
        totals[i] += 1
        for name in _names(row):
            counts[i, columns.index(name)] += 1
    side = 2.6 + 0.21 * max(len(columns), 12)
    figure, ax = plt.subplots(figsize=(side, 2.2 + 0.21 * max(len(made), 6)), layout="constrained")
    share = counts / np.maximum(totals, 1)[:, None]
    ax.imshow(share, cmap="Greys", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    for i, j in zip(*counts.nonzero(), strict=True):
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=5.5, color="white" if share[i, j] > 0.5 else "k")
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6.5)
    ax.set_yticks(range(len(made)), [f"{name} ({n})" for name, n in zip(made, totals, strict=True)], fontsize=6.5)
    ax.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    ax.set(xlabel="named by the cross-check", ylabel="made (artefacts)")
    ax.set_title("every fault on the diagonal, every correct artefact under “nothing”", fontsize=8)
    return save(figure, path)


def _names(row: dict[str, Any]) -> list[str]:
    """Faults that were named: those made at any of their severities, others as an error or a deviation."""
    right = {*row["made"]} - {*row["missed"]}
    found = right | {name for name, severity in row["named"] if severity in ALARMS}
    return sorted(found) or ([NONE] if not row["alarms"] else ["an unnamed alarm"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text(encoding="utf-8"))["rows"], source.with_suffix(".pdf")), sep="\n")
