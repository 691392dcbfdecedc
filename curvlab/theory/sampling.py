"""Claim 6: the differences in the paper's tables against the sampling error of its test sets."""

import math

import pandas as pd

from curvlab.data.paper import paper_tables
from curvlab.theory.check import Case, Findings, claim, control

BASE = ["mmlu", "ifeval", "truthfulqa", "arc_c", "gsm8k"]
EDITED = ["rel_qa", "gen_qa", "rel_noctx", "gen_noctx"]
TASK_EXAMPLES, EDITS = 200, 3000


def standard_error(first: float, second: float, n: int) -> float:
    """Of the difference of two shares in %, from n examples each, binomial, in points."""
    p, q = first / 100, second / 100
    return 100 * math.sqrt((p * (1 - p) + q * (1 - q)) / n)


def error_of_mean(scores: pd.Series, n: int) -> float:
    """Of the mean of several tasks' scores, in points."""
    return 100 * math.sqrt(sum(s / 100 * (1 - s / 100) / n for s in scores)) / len(scores)


def error_of_means(first: pd.Series, second: pd.Series, n: int) -> float:
    """Of the difference of two such means, in points."""
    return math.hypot(error_of_mean(first, n), error_of_mean(second, n))


@claim(6, "paper, abstract and section E; ours")
def differences_against_sampling_error(tables: pd.DataFrame | None = None, *, n: int = TASK_EXAMPLES) -> Findings:
    """On 200 examples a task CrispEdit's differences from the base model are within two standard errors.

    A share p of n has variance p(1 − p)/n, a difference of two the sum. Of fifteen such differences one in twenty may
    exceed two standard errors by chance. The same arithmetic says that an average drop "below 1 %" cannot be told from
    twice that, and which editors CrispEdit's average is told from. Scores out of 200 are multiples of 0.5. Answers to
    the same questions before and after agree more than by chance, so that the true error is smaller, by an unknown
    factor: a difference of d needs d n answers that changed, hence no error below √(d/n) (series: "at best").

    Control: the differences of FT and of AlphaEdit.

    Args:
        n: examples a task.
    """
    t = paper_tables() if tables is None else tables
    rows = t[t["table"] == "table1"]
    methods = [m for m in rows["method"].unique() if m != "base"]
    scores = {m: rows[rows["method"] == m].set_index("data")[BASE].astype(float).stack() for m in ["base", *methods]}
    beyond = {m: _beyond(scores["base"], scores[m], n) for m in methods}
    paired = {m: int(((scores["base"] - scores[m]).abs() / 100 * n > 4).sum()) for m in methods}  # d / √(d/n) > 2
    cases = [
        Case(f"{m}: share of differences beyond two standard errors", beyond[m] / 15, 0.05)
        for m in ("CrispEdit", "CrispEdit-Seq")
    ]
    once = scores["base"].iloc[: len(BASE)]  # printed three times, measured once
    error = error_of_means(once, scores["CrispEdit"], n)
    cases.append(Case("two standard errors of CrispEdit's average drop, points", 2 * error, 1.0, should=False))
    told = {}
    for m in methods:
        if m in ("CrispEdit", "CrispEdit-Seq"):
            continue
        lead = float(scores["CrispEdit"].mean() - scores[m].mean())
        told[m] = lead / error_of_means(scores["CrispEdit"], scores[m], n)
        near = m in ("LocBF-FT", "UltraEdit", "LoRA")
        name = f"CrispEdit's capabilities above those of {m}, in standard errors"
        cases.append(Case(name, told[m], 2.0, should=not near, relation=">="))
    for task in ("arc_c", "gsm8k", "mmlu"):
        of_half = float(((rows[task] * 2) % 1 < 1e-9).mean())
        cases.append(Case(f"{task}: scores that are multiples of 0.5", of_half, 1.0, task != "mmlu", ">="))
    cases += [control(f"{m}: share beyond two standard errors", beyond[m] / 15, 0.05) for m in ("FT", "AlphaEdit")]
    before = rows.iloc[0][BASE].astype(float)
    series = {
        "beyond two standard errors, of 15": beyond,
        "beyond two at best, if paired": paired,
        "lead of CrispEdit in standard errors": told,
        "error of one difference": {task: standard_error(score, score, n) for task, score in before.items()},
    }
    return Findings(cases, series)


def _beyond(first: pd.Series, second: pd.Series, n: int) -> int:
    return sum(abs(a - b) > 2 * standard_error(a, b, n) for a, b in zip(first, second, strict=True))
