"""The paper's tables from the records of `studies/paper_tables.py`, its numbers beside ours; computes no result.

python figures/paper_tables.py results/paper_tables
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from curvlab.data.paper import paper_table3
from curvlab.storage import replacing
from figures.paper_rows import BESIDE, KEPT, SUCCESS, edit_sets, lines_of, over_seeds, paper_rows, paper_source

Cells = dict[str, str]

TITLES = {
    "table1": "Table 1: edited and base capabilities of every method",
    "table3": "Table 3: teacher-forced measures, and by how much they flatter",
    "table4": "Table 4: three times the edits",
    "table5": "Table 5: another model family",
    "table6": "Table 6: what CrispEdit-Seq's edit factors are taken from",
    "table7": "Table 7: the size of the capability set",
    "table8": "Table 8: γ",
    "merge": "Merge weights of CrispEdit-Seq",
}
MEASURES = {
    "reliability_qa": "Rel, QA", "generalisation_qa": "Gen, QA", "reliability": "Rel", "generalisation": "Gen",
    "specificity": "Spec", "recall": "other facts", KEPT: "kept",
}  # fmt: skip
PAPER = {"rel_qa": "Rel, QA", "gen_qa": "Gen, QA", "rel_noctx": "Rel", "gen_noctx": "Gen", KEPT: "kept"}


def write(table: pd.DataFrame, tuning: pd.DataFrame, cases: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write `tables.md` into a folder: every table that the records hold, the tuning and the case studies."""
    parts = [_head(table)]
    for name, title in TITLES.items():
        source = "table1" if name == "table3" else name
        for edits in edit_sets(table, source):
            parts.append(
                f"## {title} · {edits}\n\n{_note(table, source, edits)}\n\n{_markdown(_LINES[name](table, edits))}"
            )
    if len(tuning):
        parts.append(_tuning(tuning))
    if cases:
        parts.append(_cases(cases))
    path = folder / "tables.md"
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def summary(table: pd.DataFrame) -> str:
    """A few columns of every table, for the terminal."""
    blocks = []
    for name in dict.fromkeys(table["table"]):
        for edits in edit_sets(table, name):
            lines = []
            for row, rows in lines_of(table, name, edits).items():
                found = {m: f"{over_seeds(rows, m).mean:.0f}".replace("nan", "–") for m in (*MEASURES, SUCCESS)}
                shown = {label: found[m] for m, label in MEASURES.items()} | {"success": found[SUCCESS]}
                lines.append({"": row} | shown | {"setting": str(rows["settings"].iloc[0]).replace("nan", "")})
            blocks.append(f"{TITLES[name]} · {edits} (%)\n{pd.DataFrame(lines).to_string(index=False)}")
    return "\n\n".join(blocks)


def _head(table: pd.DataFrame) -> str:
    first, seeds = table.iloc[0], sorted(set(table["seed"]))
    commits = ", ".join(dict.fromkeys(map(str, table["commit"])))
    return (
        "# The paper's tables at this scale\n\n"
        f"`studies/paper_tables.py --preset {first['preset']}` at commit {commits}, world {first['dataset']}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Generated answers and exact match unless said "
        "otherwise; %, means over seeds with 95 % intervals over the items asked. *Kept* is the mean accuracy on other "
        "facts and on the tasks (in the paper: on its five benchmarks) as a share of the unedited model's. The "
        "paper's numbers (3,000 edits; Table 4: 10,000) stand in italics."
    )


def _note(table: pd.DataFrame, name: str, edits: str) -> str:
    own = table[(table["table"] == name) & (table["edits"] == edits)]
    models, counts = ", ".join(dict.fromkeys(own["model"])), ", ".join(map(str, sorted(set(own["n_edits"]))))
    source = paper_source(name, edits)
    return f"{models}; {counts} edits." + (f" The paper's: {source}." if source else "")


def _ours(rows: pd.DataFrame, measures: dict[str, str] = MEASURES) -> Cells:
    cells = {label: str(over_seeds(rows, measure)) for measure, label in measures.items()}
    if bool(rows["diverged"].all()):
        return dict.fromkeys(cells, str(rows["stopped"].iloc[0]))  # "diverged" or "refused"
    return cells


def _published(lines: pd.DataFrame) -> Cells:
    """The one line of the paper's that is meant; empty cells where there is none."""
    if len(lines) != 1:
        return {f"*{label}*": "" for label in PAPER.values()}
    return {f"*{label}*": f"*{lines.iloc[0][c]:.1f}*".replace("*nan*", "") for c, label in PAPER.items()}


def _methods(name: str, table: pd.DataFrame, edits: str) -> list[Cells]:
    """Lines that are methods."""
    published = paper_rows(name, edits)
    lines = []
    for row, rows in lines_of(table, name, edits).items():
        setting = {"setting": str(rows["settings"].iloc[0]).replace("nan", "")}
        cells = {"method": row} | setting | _ours(rows) | {"s": f"{rows['edit_seconds'].mean():.0f}"}
        lines.append(cells | _published(published[published["method"] == row]))
    return lines


def _table3(table: pd.DataFrame, edits: str) -> list[Cells]:
    published = paper_table3().set_index("method").to_dict("index")
    prefix = BESIDE.get(edits, "CounterFact").lower()
    lines = []
    for row, rows in lines_of(table, "table1", edits).items():
        cells = {"method": row}
        for measure, label in (("reliability", "Rel"), ("generalisation", "Gen"), ("specificity", "Spec")):
            forced, said = over_seeds(rows, f"{measure}_teacher_forced"), over_seeds(rows, measure)
            cells |= {f"{label}, forced": str(forced), f"{label}, + over generation": f"{forced.mean - said.mean:+.0f}"}
        name = "Llama 3 8B Instruct" if row == "base" else row
        for end, label in (("rel", "Rel"), ("gen", "Gen"), ("spec", "Spec")):
            cells[f"*{label}, forced*"] = f"*{published[name][f'{prefix}_{end}']:.1f}*" if name in published else ""
        lines.append(cells)
    return lines


def _table6(table: pd.DataFrame, edits: str) -> list[Cells]:
    said = {"whole text, data labels": "*71.1* (ZsRE, QA)", "target only, data labels": "*12* (ZsRE, QA)"}
    lines = []
    for row, rows in lines_of(table, "table6", edits).items():
        shares = {
            f"edits' share of {label}": _percent(rows, f"edits_{side}_share")
            for side, label in (("input", "tr Σaaᵀ"), ("gradient", "tr Σggᵀ"))
        }
        lines.append({"factors of the edits": row} | _ours(rows) | shares | {"*Rel*": said.get(row, "")})
    return lines


def _percent(rows: pd.DataFrame, column: str) -> str:
    return f"{100 * rows[column].mean():.1f} %" if column in rows and rows[column].notna().any() else ""


def _varied(name: str, key: str, table: pd.DataFrame, edits: str) -> list[Cells]:
    """Lines that vary one number; the paper's line of the same number, where it has one."""
    published = paper_rows(name, edits)
    lines = []
    for row, rows in lines_of(table, name, edits).items():
        value = rows["value"].iloc[0]
        same = published[published["method"] == row]
        if not len(same) and not math.isnan(value):
            same = published[(published[key] == value) & (published["method"] == "CrispEdit")]
        lines.append({"": row} | _ours(rows) | _published(same))
    return lines


def _merge(table: pd.DataFrame, edits: str) -> list[Cells]:
    return [{"weights": row} | _ours(rows) for row, rows in lines_of(table, "merge", edits).items()]


_LINES: dict[str, Callable[[pd.DataFrame, str], list[Cells]]] = {
    "table1": lambda table, edits: _methods("table1", table, edits),
    "table3": _table3,
    "table4": lambda table, edits: _methods("table4", table, edits),
    "table5": lambda table, edits: _methods("table5", table, edits),
    "table6": _table6,
    "table7": lambda table, edits: _varied("table7", "n", table, edits),
    "table8": lambda table, edits: _varied("table8", "gamma", table, edits),
    "merge": _merge,
}


def _markdown(lines: Sequence[Cells]) -> str:
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([line[name] for name in names] for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _tuning(tuning: pd.DataFrame) -> str:
    lines = []
    made = tuning[tuning["editor"] != "none"]
    for model, edits, editor in dict.fromkeys(zip(made["model"], made["edits"], made["editor"], strict=True)):
        rows = made[(made["model"] == model) & (made["edits"] == edits) & (made["editor"] == editor)]
        scores = zip(rows["settings"], rows["score"], rows["chosen"], strict=True)
        tried = [
            f"**{what}: {100 * value:.1f}**" if best else f"{what}: {100 * value:.1f}" for what, value, best in scores
        ]
        lines.append({"model": model, "edits": edits, "method": editor, "settings: score": "; ".join(tried)})
    return (
        "## Tuning\n\nEach method's settings on as many edits of the other half of the facts; the score is the "
        "harmonic mean of reliability, generalisation, specificity and capability kept, %. The best one, in bold, "
        "is taken.\n\n" + _markdown(lines)
    )


def _cases(cases: Sequence[dict[str, Any]]) -> str:
    """Appendix F: what the methods say to the first requests of each edit set, at its first seed."""
    blocks = ["## Case studies (Appendix F)"]
    seeds = {case["edits"]: case["seed"] for case in reversed(cases)}
    asked = {(c["edits"], c["prompt"]): c["target"] for c in cases if c["seed"] == seeds[c["edits"]]}
    for (edits, prompt), target in asked.items():
        lines = [
            {"method": c["row"], "says": c["text"].replace("\n", "⏎") or "(nothing)"}
            for c in cases
            if (c["edits"], c["prompt"], c["seed"]) == (edits, prompt, seeds[edits])
        ]
        blocks.append(f"**{prompt}** → {target} ({edits})\n\n{_markdown(lines)}")
    return "\n\n".join(blocks)


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, Any]]]:
    """The records of a folder: results, tuning (empty where nothing was tuned) and cases."""
    tuning = folder / "tuning.csv"
    return (
        pd.read_csv(folder / "results.csv", dtype={"learnt": str}),
        pd.read_csv(tuning) if tuning.is_file() else pd.DataFrame(),
        json.loads((folder / "cases.json").read_text()),
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(*read(Path(sys.argv[1])), Path(sys.argv[1])))
