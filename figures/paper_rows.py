"""What the paper's tables, figures and verdicts read from the records of `studies/paper_tables.py`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from curvlab.data.paper import paper_tables

# the paper's edit set that ours stands beside
BESIDE = {"generated": "CounterFact", "counterfact": "CounterFact", "zsre": "ZsRE", "wikibigedit": "WikiBigEdit"}
SUCCESS = "edit_success"
KEPT = "capability_kept"
BASE = ("mmlu", "ifeval", "truthfulqa", "arc_c", "gsm8k")


class Measured(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval, in % (NaN where nothing was measured)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if math.isnan(self.mean) else f"{self.mean:.0f} ({self.low:.0f}–{self.high:.0f})"


def over_seeds(rows: pd.DataFrame, measure: str) -> Measured:
    """The mean of a measure over the rows (one a seed), %, its interval that of the items asked.

    Half-widths of independent seeds add in squares (Zou and Donner 2008). A seed that diverged counts as nothing
    learnt and nothing kept.
    """
    if not len(rows) or measure not in rows:
        return Measured(math.nan, math.nan, math.nan)
    values, lows, highs = (rows[f"{measure}{end}"] for end in ("", "_low", "_high"))
    lost = rows["diverged"].astype(bool)
    values, lows, highs = (column.mask(lost, 0.0) for column in (values, lows, highs))
    if values.isna().any():
        return Measured(math.nan, math.nan, math.nan)
    mean, n = values.mean(), len(rows)
    down = math.sqrt(((values - lows) ** 2).sum()) / n
    up = math.sqrt(((highs - values) ** 2).sum()) / n
    return Measured(100 * mean, 100 * (mean - down), 100 * (mean + up))


def difference(first: pd.DataFrame, second: pd.DataFrame, measure: str) -> Measured:
    """first − second, in points, with an interval from theirs (MOVER: Zou and Donner 2008).

    Both answered the same questions; that is not made use of, so the interval is rather too wide.
    """
    a, b = over_seeds(first, measure), over_seeds(second, measure)
    d = a.mean - b.mean
    return Measured(d, d - math.hypot(a.mean - a.low, b.high - b.mean), d + math.hypot(a.high - a.mean, b.mean - b.low))


def lines_of(table: pd.DataFrame, name: str, edits: str) -> dict[str, pd.DataFrame]:
    """The rows (one a seed) of each line of a table for one edit set, in the table's order."""
    own = table[(table["table"] == name) & (table["edits"] == edits)]
    return {str(row): rows for row, rows in own.groupby("row", sort=False)}


def paper_rows(name: str, edits: str) -> pd.DataFrame:
    """The paper's lines of a table for the edit set that ours stands beside, indexed by method, n or γ.

    Columns: rel_qa … gsm8k as published (%); edit_success, the mean of the four edit measures' two without a context;
    capability_kept, the mean of the base capabilities as a share of the unedited model's, %.
    """
    published = paper_tables()
    own = published[(published["table"] == name) & published["data"].str.startswith(BESIDE.get(edits, "CounterFact"))]
    if not len(own):  # tables of one set only
        own = published[published["table"] == name]
    own = own[own["data"] == own["data"].iloc[0]].copy() if len(own) else own.copy()
    own["edit_success"] = own[["rel_noctx", "gen_noctx"]].mean(axis=1)
    capability = own[list(BASE)].mean(axis=1)
    base = capability[own["method"].isin(["base"])]
    own["capability_kept"] = 100 * capability / base.iloc[0] if len(base) else math.nan
    names = {"CrispEdit (Batch)": "CrispEdit", "CrispEdit (Seq)": "CrispEdit-Seq"}
    own["method"] = own["method"].replace(names)
    return own


def paper_source(name: str, edits: str) -> str:
    """The paper's model and edit set behind `paper_rows`; "" where it has no such table."""
    own = paper_rows(name, edits)
    return f"{own['model'].iloc[0]}, {own['data'].iloc[0]}" if len(own) else ""


def paper_values(name: str, edits: str, measure: str, by: str = "method") -> dict[Any, float]:
    """One column of the paper's lines (`paper_rows`), by method, "n" or "gamma"."""
    own = paper_rows(name, edits).dropna(subset=[by]).drop_duplicates(by)
    return dict(zip(own[by].tolist(), own[measure].tolist(), strict=True)) if measure in own else {}


def edit_sets(table: pd.DataFrame, name: str) -> Sequence[str]:
    """The edit sets of which a table has rows."""
    return list(dict.fromkeys(table[table["table"] == name]["edits"]))
