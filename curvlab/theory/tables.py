"""Claim 6: what the paper says about its tables, by arithmetic on their printed numbers (`curvlab.data.paper`)."""

import pandas as pd

from curvlab.data.paper import paper_tables
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.sampling import BASE, EDITED, EDITS, TASK_EXAMPLES, error_of_means, standard_error

SETS = ("ZsRE", "CounterFact", "WikiBigEdit")
_SEQ = "CrispEdit-Seq"


@claim(6, "paper, abstract")
def degradation_below_one_percent(tables: pd.DataFrame | None = None) -> Findings:
    """CrispEdit keeps capability degradation below 1 % on average across datasets.

    The drop of the mean of the five base capabilities against the base model's, in points and in per cent of it.
    It averages gains against losses; it is no bound on a dataset, on a task, on more edits or on another model.

    Control: the same of FT and of AlphaEdit.

    Args:
        tables: the paper's, by default.
    """
    t = paper_tables() if tables is None else tables
    cases: list[Case] = []
    series: dict[str, dict[str, float]] = {}
    for method, per_cent_too in (("CrispEdit", True), ("CrispEdit-Seq", False)):
        found = {data: drop(t, "table1", data, method) for data in SETS}
        points = pd.DataFrame(found).mean()
        relative = pd.Series({data: 100 * points[data] / base(t, "table1", data).mean() for data in SETS})
        cases += [
            Case(f"{method}: average drop, points", float(points.mean()), 1.0),
            Case(
                f"{method}: average drop, % of the base model's mean", float(relative.mean()), 1.0, should=per_cent_too
            ),
        ]
        for data in SETS:
            right = (method, data) != (_SEQ, "WikiBigEdit")
            cases.append(Case(f"{method}, {data}: drop, points", float(points[data]), 1.0, right))
            series.setdefault(method, {})[data] = float(points[data])
        task = pd.DataFrame(found).max(axis=1)
        cases.append(
            Case(f"{method}: largest drop of one task ({task.idxmax()})", float(task.max()), 1.0, should=False)
        )
    more = float(drop(t, "table4", "ZsRE 10K", "CrispEdit").mean())
    cases.append(Case("CrispEdit, 10,000 edits (Table 4): drop", more, 1.0, should=False))
    qwen = [float(drop(t, "table5", data, "CrispEdit (Batch)").mean()) for data in SETS]
    cases.append(Case("CrispEdit, Qwen (Table 5): average drop", sum(qwen) / 3, 1.0, should=False))
    others = [m for m in t[t["table"] == "table1"]["method"].unique() if m not in ("base", *series)]
    for method in others:
        series[method] = {data: float(drop(t, "table1", data, method).mean()) for data in SETS}
    for method in ("FT", "AlphaEdit"):
        cases.append(control(f"{method}: average drop, points", sum(series[method].values()) / 3, 1.0))
    return Findings(cases, {"drop in points": series})


@claim(6, "paper, section 4.2 (i), Table 8")
def robust_to_gamma(tables: pd.DataFrame | None = None) -> Findings:
    """CrispEdit's base capabilities are robust to γ from 0.5 to 0.99: within two standard errors of the base model.

    The mean of five tasks of 200 examples has a standard error; a drop beyond two of them is one. Edited
    capabilities, which the paper does not call robust, are held to their own (3,000 edits).

    Control: no projection at all (FT, Table 7).
    """
    t = paper_tables() if tables is None else tables
    own = t[(t["table"] == "table8") & (t["method"] == "CrispEdit")]
    cases: list[Case] = []
    for data, rows in own.groupby("data", sort=False):
        least = rows["gamma"] < 0.55
        above, at = (_worst_drop(t, "table8", str(data), part) for part in (rows[~least], rows[least]))
        spread = _range_in_errors(rows)
        cases += [
            Case(f"{data}: largest drop, γ ≥ 0.6, in standard errors", above, 2.0),
            Case(f"{data}: drop at γ = 0.5, in standard errors", at, 2.0, should=data != "CounterFact"),
            Case(f"{data}: range of reliability over γ, in standard errors", spread, 2.0, should=False),
        ]
    ft = t[(t["table"] == "table7") & t["method"].str.startswith("No Projection")]
    cases.append(control("no projection, in standard errors", _worst_drop(t, "table7", "ZsRE", ft), 2.0))
    before = own["data"].map({d: base(t, "table8", d).mean() for d in SETS})
    kept = own.assign(drop=before - own[BASE].mean(axis=1))
    return Findings(cases, {"rows": kept[["data", "gamma", "drop", "rel_qa"]].to_dict("records")})


@claim(6, "paper, section 4.2 (ii), Table 7")
def robust_to_sample_size(tables: pd.DataFrame | None = None) -> Findings:
    """CrispEdit's base capabilities are robust to the size of the capability set from n = 100 on.

    As for γ: within two standard errors of the base model. So they are at n = 50; the edited ones are not robust.

    Control: no projection at all.
    """
    t = paper_tables() if tables is None else tables
    rows = t[(t["table"] == "table7") & (t["method"] == "CrispEdit")]
    many = rows["n"] >= 100
    worst = {n: _worst_drop(t, "table7", "ZsRE", rows[rows["n"] == n]) for n in rows["n"].astype(int)}
    ft = t[(t["table"] == "table7") & t["method"].str.startswith("No Projection")]
    return Findings(
        [
            Case("largest drop, n ≥ 100, in standard errors", max(e for n, e in worst.items() if n >= 100), 2.0),
            Case("drop at n = 50, in standard errors", worst[50], 2.0),
            Case("drop at n = 10, in standard errors", worst[10], 2.0, should=False),
            Case("range of reliability, n ≥ 100, in standard errors", _range_in_errors(rows[many]), 2.0, should=False),
            control("no projection, in standard errors", _worst_drop(t, "table7", "ZsRE", ft), 2.0),
        ],
        {"n": list(worst), "drop in standard errors": list(worst.values()), "reliability": rows["rel_qa"].tolist()},
    )


@claim(6, "review; paper, footnote 1 and Table 1")
def hundred_times_faster(tables: pd.DataFrame | None = None) -> Findings:
    """CrispEdit is 100 times faster than AlphaEdit: 3,000 edits in six minutes, the curvature cached.

    Quotients of the printed times. They leave out the curvature, which AlphaEdit's covariances cost as well.

    Control: LocBF-FT is not.
    """
    t = paper_tables() if tables is None else tables
    seconds = t[t["table"] == "table1"].pivot(index="data", columns="method", values="time_s").loc[list(SETS)]
    cases: list[Case] = []
    for method, right in (("CrispEdit", SETS[:2]), (_SEQ, ())):
        for data in SETS:
            ratio = float(seconds["AlphaEdit"][data] / seconds[method][data])
            cases.append(Case(f"AlphaEdit / {method}, {data}", ratio, 100.0, data in right, ">="))
    cases += [
        Case("CrispEdit: longest, minutes, for six", float(seconds["CrispEdit"].max()) / 60, 6.5),
        Case("CrispEdit: shortest, minutes, for six", float(seconds["CrispEdit"].min()) / 60, 5.5, False, ">="),
        control("AlphaEdit / LocBF-FT", float((seconds["AlphaEdit"] / seconds["LocBF-FT"]).max()), 100.0, ">="),
    ]
    return Findings(cases, {"seconds": {m: seconds[m].to_dict() for m in seconds if m != "base"}})


@claim(6, "paper, section 4.2, key results")
def tops_editing(tables: pd.DataFrame | None = None) -> Findings:
    """CrispEdit consistently tops editing performance, on every dataset, measure and context of Table 1.

    The lead of the better of CrispEdit and CrispEdit-Seq over the best other editor, in points.

    Control: FT in their place.
    """
    t = paper_tables() if tables is None else tables
    rows = t[(t["table"] == "table1") & (t["method"] != "base")]
    lost = {("CounterFact", m) for m in EDITED[1:]} | {("WikiBigEdit", m) for m in EDITED[2:]}
    cases, wrong = [], []
    for data, measure in ((d, m) for m in EDITED for d in SETS):
        score = rows[rows["data"] == data].set_index("method")[measure]
        ours = float(score[["CrispEdit", _SEQ]].max())
        lead = ours - float(score.drop(["CrispEdit", _SEQ]).max())
        cases.append(Case(f"{data}, {measure}: lead in points", lead, 0.0, (data, measure) not in lost, ">="))
        wrong.append(float(score["FT"] - score.drop("FT").max()))
    cases.append(control("FT: largest lead", max(wrong), 0.0, ">="))
    return Findings(cases, {"cells led": sum(case.holds for case in cases[:-1]), "of": len(cases) - 1})


@claim(6, "review")
def review_quotes(tables: pd.DataFrame | None = None) -> Findings:
    """The numbers that the review takes from the tables are in the tables.

    Each is compared with its cell to half a unit of the last digit that the review prints.

    Control: GSM8K of FT Sequential on CounterFact is 0.0, that of LoRA Sequential is not.
    """
    t = paper_tables() if tables is None else tables

    def cell(method: str, column: str, data: str = "ZsRE") -> float:
        row = t[(t["table"] == "table1") & (t["data"] == data) & (t["method"] == method)]
        return float(row[column].iloc[0])

    mmlu = cell("CrispEdit", "mmlu") - cell("AlphaEdit", "mmlu")
    quotes = (  # quote, stated, unit in the last digit, cell, right
        ("MEMIT drops MMLU to 22.9", 22.9, 0.1, cell("MEMIT", "mmlu"), True),
        ("AlphaEdit drops GSM8K to 45.5", 45.5, 0.1, cell("AlphaEdit", "gsm8k"), True),
        ("MMLU differs by 17 points", 17, 1, mmlu, True),
        ("UltraEdit is faster (3 min)", 3, 1, cell("UltraEdit", "time_s") / 60, True),
        ("CrispEdit-Seq: 80.5 → 71.1", 71.1, 0.1, cell(_SEQ, "rel_qa"), True),
        ("CrispEdit-Seq preserves GSM8K 73–74", 73.5, 1, cell(_SEQ, "gsm8k", "CounterFact"), True),
        ("LoRA Sequential GSM8K 0.0 (ZsRE)", 0.0, 0.1, cell("LoRA Sequential", "gsm8k"), False),
        ("LoRA Sequential GSM8K 0.0 (CounterFact)", 0.0, 0.1, cell("LoRA Sequential", "gsm8k", SETS[1]), False),
        ("LoRA Sequential GSM8K 0.0 (WikiBigEdit)", 0.0, 0.1, cell("LoRA Sequential", "gsm8k", SETS[2]), False),
    )
    cases = [Case(f"“{q}”: away from the cell", abs(s - v), u / 2 + 1e-9, right) for q, s, u, v, right in quotes]
    away = abs(cell("FT Sequential", "gsm8k", SETS[1]) - cell("LoRA Sequential", "gsm8k", SETS[1]))
    return Findings([*cases, control("one for the other", away, 0.05)])


def base(t: pd.DataFrame, table: str, data: str) -> pd.Series:
    """The base model's capabilities."""
    rows = t[(t["table"] == table) & (t["data"] == data) & (t["method"] == "base")]
    return rows[BASE].iloc[0].astype(float)


def drop(t: pd.DataFrame, table: str, data: str, method: str) -> pd.Series:
    """What a method loses of each capability, in points."""
    rows = t[(t["table"] == table) & (t["data"] == data) & (t["method"] == method)]
    return base(t, table, data) - rows[BASE].iloc[0].astype(float)


def _worst_drop(t: pd.DataFrame, table: str, data: str, rows: pd.DataFrame) -> float:
    """The largest drop of the mean of the capabilities over rows, in standard errors of the difference."""
    start = base(t, table, data)
    scores = [row[BASE].astype(float) for _, row in rows.iterrows()]
    return max(float(start.mean() - s.mean()) / error_of_means(start, s, TASK_EXAMPLES) for s in scores)


def _range_in_errors(rows: pd.DataFrame) -> float:
    high, low = float(rows["rel_qa"].max()), float(rows["rel_qa"].min())
    return (high - low) / standard_error(high, low, EDITS)
