"""The numbers printed in the paper's tables (arXiv 2602.15823): Tables 1, 4, 5, 7 and 8, and Table 3."""

from importlib.resources import files

import pandas as pd


def paper_tables() -> pd.DataFrame:
    """Tables 1, 4, 5, 7, 8: one row a method and setting.

    Columns: table, model, data, method, setting; reliability and generalisation with the QA context (rel_qa, gen_qa)
    and without (rel_noctx, gen_noctx); base capabilities (mmlu, ifeval, truthfulqa, arc_c, gsm8k), all in %; time_s
    in Table 1. Tables 7 and 8 have n and γ in `setting`, parsed into the columns n and gamma.
    """
    table = pd.read_csv(str(files("curvlab.data") / "paper_tables.csv"))
    table["n"] = pd.to_numeric(table["setting"].str.extract(r"\bn=(\d+)", expand=False))
    table["gamma"] = pd.to_numeric(table["setting"].str.extract(r"\bgamma=([\d.]+)", expand=False))
    return table


def paper_table3() -> pd.DataFrame:
    """Table 3, teacher-forced: reliability, generalisation and specificity on three sets, in %, one row a method."""
    return pd.read_csv(str(files("curvlab.data") / "paper_table3.csv"))
