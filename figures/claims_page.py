"""The page on every claim, and its figures, from the checks.json of `studies/verify_theory.py`; computes no result.

python figures/claims_page.py results/verify_theory/checks.json
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from figures import anisotropy, bregman, budget, cases, coupling, geometry, leakage, mismatch, nesting, prediction
from figures.cases import KINDS, kind, ratio

CONTROL = "control, to be rejected"
Row = dict[str, Any]
Draw = Callable[[list[Row], Path], list[Path]]

TITLES = {
    1: "What the inputs cannot see, the GGN cannot see (Prop. 1)",
    2: "The Bregman distance is ½ δᵀGδ, anywhere (Prop. 2)",
    3: "The matrix-free projector is the projector (Prop. 3)",
    4: "Fisher, GGN, and the empirical Fisher, which is neither",
    5: "Bytes and operations that the paper and its reviews state",
    6: "Arithmetic on the paper's tables",
    7: "Sharp in few directions, flat in others",
    8: "The sandwich: unseen ⊆ Null(A ⊗ S) ⊆ Null(G)",
    9: "γ-approximate null spaces are not nested",
    10: "What a γ guarantees",
    11: "When K-FAC is exact, and in what EK-FAC is best",
    12: "Piecewise-linear heads: the Hessian is the GGN",
    13: "Which optimisers stay in the subspace",
    14: "What layer-wise projection ignores",
    15: "Does ½ δᵀCδ predict what is lost?",
    16: "Sums and bases in low precision",
    17: "Another capability set, and fewer examples",
    18: "A cut, a budget, or a penalty",
}
# of claims that have figures of their own; the others get `cases.draw`
FIGURES: dict[int, list[tuple[str, Draw]]] = {
    2: [("bregman", bregman.draw)],
    7: [("anisotropy", anisotropy.draw)],
    9: [("nesting", nesting.draw)],
    13: [("leakage", leakage.draw)],
    14: [("coupling", coupling.draw)],
    15: [("prediction", prediction.draw)],
    17: [("mismatch", mismatch.draw)],
    18: [("budget", budget.draw), ("geometry", geometry.draw)],
}


def verdict(rows: list[Row]) -> str:
    """Over several settings: theirs where they agree."""
    found = {row["verdict"] for row in rows}
    return found.pop() if len(found) == 1 else "holds under conditions"


def worst(rows: list[Row], what: str) -> tuple[Row, dict[str, Any]] | None:
    """The main case of a kind (or any) that came nearest to the wrong side of its bound, and its check."""
    own = [(row, row["cases"][0]) for row in rows if kind(row["cases"][0]) == what]
    own = own or [(row, case) for row in rows for case in row["cases"] if kind(case) == what]
    if not own:
        return None
    return max(own, key=lambda pair: -ratio(pair[1]) if what in ("expected to fail", CONTROL) else ratio(pair[1]))


def telling(rows: list[Row]) -> tuple[Row, dict[str, Any]]:
    """The case to quote: of those expected to hold, else measured without expectation, else expected to fail."""
    found = [worst(rows, what) for what in KINDS]
    return next(pair for pair in found if pair is not None)


def number(value: float) -> str:
    return f"{value:.3g}" if value else "0"


def sentence(found: tuple[Row, dict[str, Any]]) -> str:
    row, case = found
    sign = {"<=": "≤", ">=": "≥"}[case["relation"]]
    where = f" ({row['setting']})" if row["setting"] else ""
    return f"{case['name']}: **{number(case['measured'])}**, bound {sign} {number(case['bound'])}{where}"


def ledger(rows: list[Row]) -> str:
    """One line a claim's function: verdict, settings, the case nearest to its bound."""
    lines = [
        "| claim | checked | verdict | settings | measured, nearest to its bound | as expected |",
        "|" + " --- |" * 6,
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        passed = "yes" if all(row["passed"] for row in own) else "**NO**"
        nearest = sentence(telling(own)).replace("|", "\\|")
        lines.append(
            f"| {own[0]['claim']} | {name.replace('_', ' ')} | {verdict(own)} | {len(own)} | {nearest} | {passed} |"
        )
    return "\n".join(lines)


def section(claim: int, rows: list[Row], files: Sequence[Path]) -> str:
    """A claim: its statements with the idea of their proofs, the numbers, the picture."""
    parts = [f"## {claim}. {TITLES.get(claim, '')}"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        first = own[0]
        text = f"**{first['statement']}** *({first['source']}; {verdict(own)}, {len(own)} settings)*"
        parts.append(text if len(own) > 1 else text.replace("1 settings", "1 setting"))
        if first["idea"]:
            parts.append(first["idea"])
        lines = []
        for what, label in (
            ("expected to hold", "Measured, nearest to its bound"),
            ("measured, either way", "Measured, a result either way"),
            ("expected to fail", "Fails, as expected"),
            (CONTROL, "Control, rejected"),
        ):
            found = worst(own, what)
            if found is not None:
                wrong = (
                    ""
                    if all(c["should"] in (None, c["holds"]) for r in own for c in r["cases"] if kind(c) == what)
                    else (" **(not as expected)**")
                )
                all_of = [case["holds"] for row in own for case in row["cases"] if kind(case) == what]
                often = f", holds in {sum(all_of)} of {len(all_of)}" if "either way" in what else ""
                lines.append(f"- {label}{often}{wrong}: {sentence(found)}")
        parts.append("\n".join(lines))
    parts += [f"![Claim {claim}]({file.name})" for file in files if file.suffix == ".png"]
    return "\n\n".join(parts)


def pictures(rows: list[Row], folder: Path, suffix: Literal[".pdf", ".png"] = ".pdf") -> list[Path]:
    """Draw the figures of one claim into `folder`, from all its rows; their files."""
    claim = rows[0]["claim"]
    files = [file for name, draw in FIGURES.get(claim, []) for file in draw(rows, folder / f"{name}{suffix}")]
    return files or cases.draw(rows, folder / f"claim_{claim:02}{suffix}")


def write(
    rows: list[Row],
    folder: Path,
    suffix: Literal[".pdf", ".png"] = ".pdf",
    drawn: Mapping[int, Sequence[Path]] | None = None,
) -> Path:
    """Draw every figure into `folder` and write claims.md there: the ledger, then a section a claim.

    Figures are PNG, with `suffix` .pdf each is also a PDF. `drawn` are files by claim that `pictures` has drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = drawn or {}
    sections = []
    for claim in sorted({row["claim"] for row in rows}):
        own = [row for row in rows if row["claim"] == claim]
        sections.append(section(claim, own, drawn[claim] if claim in drawn else pictures(own, folder, suffix)))
    origin = rows[0].get("origin", {})
    about = ", ".join(
        f"{key} {origin[key]}" for key in ("preset", "dataset", "commit", "torch", "machine") if origin.get(key)
    )
    failed = sum(not row["passed"] for row in rows)
    text = [
        "# The claims of low-curvature editing, checked",
        f"{len(rows)} checks, {failed} not as expected ({about}). A check holds its claim to a bound: rounding, "
        "theory, or the claim itself put into numbers. Controls are deliberately wrong variants that it must reject. "
        "“Holds under conditions”: some of its cases hold and some do not. Of an empirical case nothing is expected: "
        "it is a result either way; what theory says must hold, or must fail, does.",
        "## Ledger",
        ledger(rows),
        *sections,
    ]
    page = folder / "claims.md"
    page.write_text("\n\n".join(text) + "\n")
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(write(json.loads(source.read_text()), source.parent))
