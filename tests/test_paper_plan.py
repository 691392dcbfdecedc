"""What the study of the paper's tables edits, tunes and trains on, without making an edit."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "studies"))
    import paper_plan
    import paper_tables as study
    from editing_bench import Setup, draw_requests, with_kept

SETUP = Setup("embedded", "tiny", "generated", 4, 1000, 5, 0, split="test")
BASE = paper_plan.Base(SETUP, 12, "embedded-gpt2", 30, study.GRIDS["crispedit"][0], study.GRIDS["crispedit-seq"][0])


def test_the_score_is_a_harmonic_mean_of_what_is_measured() -> None:
    table = pd.DataFrame(
        {
            "reliability": [1.0, 0.5, math.nan], "generalisation": [0.5, 0.5, math.nan],
            "specificity": [0.25, 0.5, math.nan], "capability_kept": [1.25, 0.5, math.nan],
        }
    )  # fmt: skip
    assert study.score(table).tolist() == pytest.approx([4 / (1 + 2 + 4 + 1), 0.5, math.nan], nan_ok=True)
    table["specificity"] = math.nan  # of an edit set without neighbours
    assert study.score(table)[0] == pytest.approx(3 / (1 + 2 + 1))


def test_what_is_kept_is_a_share_of_the_same_seeds_unedited_model() -> None:
    rows = [("none", 0, 0.8), ("none", 1, 0.4), ("ft", 0, 0.4), ("ft", 1, 0.4)]
    table = pd.DataFrame(rows, columns=["editor", "seed", "capability"])
    table = table.assign(capability_low=table["capability"] - 0.1, capability_high=table["capability"] + 0.1)
    kept = with_kept(table.assign(edits="generated"), ["edits", "seed"])
    assert kept["capability_kept"].tolist() == pytest.approx([1.0, 1.0, 0.5, 1.0])
    assert kept["capability_kept_low"].tolist()[2:] == pytest.approx([0.375, 0.75])
    assert kept["capability_kept_high"].tolist()[2:] == pytest.approx([0.625, 1.25])
    losses = table.drop(columns=["capability", "capability_low", "capability_high"])
    losses = with_kept(losses.assign(nll=[2.0, 1.0, 2.5, 0.5], nll_low=[1.9, 0.9, 2.4, 0.4], nll_high=2.6))
    assert losses["capability_kept"].tolist() == pytest.approx([1.0, 1.0, math.exp(-0.5), 1.0])
    assert losses["capability_kept_low"][2] == pytest.approx(math.exp(-0.6))


class Recorded:
    """Stands in for the runner: rows whose measures are those that `quality` gives a setting."""

    def __init__(self, grid: int, quality: dict[str, tuple[float, float]]) -> None:
        self.preset, self.quality = replace(study.PRESETS["tiny"], grid=grid), quality
        self.trials: list[study.Trial] = []

    def __call__(self, trials: list[study.Trial], desc: str) -> dict[study.Trial, dict[str, Any]]:
        self.trials += trials
        found = {}
        for trial in trials:
            edited, kept = self.quality.get(study.describe(trial.options), (0.0, 1.0))
            found[trial] = {
                "model": trial.setup.model, "edits": trial.setup.edits, "editor": trial.editor,
                "capability": 0.5 * kept, "capability_low": 0.5 * kept, "capability_high": 0.5 * kept,
                **dict.fromkeys(("reliability", "generalisation", "specificity"), edited),
            }  # fmt: skip
        return found


def test_tuning_sees_the_other_half_alone_and_takes_the_best() -> None:
    more = replace(SETUP, n_edits=12)
    wanted = [paper_plan.Wanted("table1", "FT", replace(SETUP, seed=seed), "ft") for seed in (3, 4)]
    wanted += [paper_plan.Wanted("table4", "FT", replace(more, seed=3), "ft")]
    wanted += [paper_plan.Wanted("table8", "γ = 0.5", SETUP, "crispedit", (("gamma", 0.5),))]  # nothing to tune
    first, second, third, fourth = (study.describe(options) for options in study.GRIDS["ft"])
    # the mean of the last but one is the largest; what it keeps is not
    run = Recorded(4, {first: (0.5, 0.6), second: (0.7, 0.8), third: (1.0, 0.2), fourth: (math.nan, 1.0)})
    chosen, table = study.tune(cast(study.Runner, run), wanted, seed=3)
    assert chosen == {("embedded", "generated", "ft"): study.GRIDS["ft"][1]}
    assert {trial.setup for trial in run.trials} == {replace(SETUP, seed=3, split="train")}
    assert [trial.editor for trial in run.trials] == ["none", *["ft"] * 4]
    assert table["chosen"].tolist() == [False, False, True, False, False]
    # fewer settings, or none to choose from: the first of the grid, the authors'
    for grid, options in ((1, study.GRIDS["ft"][0]), (0, study.AUTHORS["ft"])):
        run = Recorded(grid, {})
        assert study.tune(cast(study.Runner, run), wanted, seed=3)[0].popitem()[1] == options
        assert not run.trials


def test_halves_share_no_fact_and_mend_is_trained_on_neither_edits() -> None:
    def facts(setup: Setup) -> set[tuple[str, str]]:
        return {(request.subject, request.truth) for request in draw_requests(setup)}

    for seed in (0, 1):
        setup = replace(SETUP, seed=seed)
        trained = study.to_train_on(cast(study.Bench, SimpleNamespace(setup=setup)))
        assert trained
        about = {(request.subject, request.truth) for request in trained}
        prompts = {request.prompt for request in trained}
        for edited in (setup, replace(setup, split="train")):
            assert not about & facts(edited)
            assert not prompts & {request.prompt for request in draw_requests(edited)}
        everything = replace(setup, n_edits=study.available(setup))
        assert not about & facts(everything)  # nor on any fact that another seed edits


def test_each_line_varies_what_its_table_says() -> None:
    four = list(paper_plan.table4(BASE))
    assert {w.setup for w in four} == {replace(SETUP, n_edits=12)}
    assert not list(paper_plan.table4(replace(BASE, available=11)))
    assert {w.setup.model for w in paper_plan.table5(BASE)} == {"embedded-gpt2"}
    methods = {w.editor: w for w in paper_plan.table1(BASE)}
    assert methods["crispedit-seq"].setup.n_capability == 30
    assert methods["crispedit"].setup == SETUP
    assert all(w.options is None for w in methods.values())

    seven = {w.row: w for w in paper_plan.table7(BASE)}
    sizes = {row: w for row, w in seven.items() if row.startswith("n = ")}
    assert list(sizes) == ["n = 10", "n = 30", "n = 100", "n = 300", "n = 1000", "n = 3000"]
    for row, w in sizes.items():
        assert row == f"n = {w.setup.n_capability}" == f"n = {w.value}"
    assert seven["stories only"].setup == replace(SETUP, capability="stories")
    without = dict(seven["No Projection (FT)"].options or ())
    assert "gamma" not in without
    lrs = {dict(w.options or ()).get("lr") for w in seven.values() if w.editor != "none"}
    assert lrs == {dict(BASE.crispedit)["lr"]}

    for w in paper_plan.table8(BASE):
        if w.editor != "none":
            assert dict(w.options or ())["gamma"] == w.value
            assert w.row == f"γ = {w.value:g}"

    six = {w.row: w for w in paper_plan.table6(BASE) if w.editor != "none"}
    for labels in ("data", "model"):
        found = {}
        for row in ("whole text", "target only", "target's loss, all positions"):
            w = six[f"{row}, {labels} labels"]
            options = dict(w.options or ())
            found[row] = (options["mask_factors"], options["factor_positions"])
            assert (w.setup.labels, w.setup.n_capability, options["gamma"]) == (labels, 30, 0.999)
        assert found == {
            "whole text": (False, "all"), "target only": (True, "loss"),
            "target's loss, all positions": (True, "all"),
        }  # fmt: skip

    weights = [w for w in paper_plan.merge(BASE) if w.editor != "none"]
    assert [w.setup.n_capability for w in weights] == [30, 30, 30, 1000, 1000, 1000]
    for w in weights:
        options = dict(w.options or ())
        said = "tokens" if options["weights"] == "tokens" else f"share {options['share']:g}"
        assert w.row == f"{said}, n = {w.setup.n_capability}"


@pytest.mark.parametrize(
    ("asked", "plans"),
    [(("table3", "fig1", "cases"), ["table1"]), (("table8", "fig5"), ["table7", "table8"])],
)
def test_tables_share_their_edits(asked: tuple[str, ...], plans: list[str]) -> None:
    assert paper_plan.plans_of(asked) == plans
    assert paper_plan.plans_of(("all", *asked)) == list(paper_plan.PLANS)


def test_every_method_is_tuned_by_the_same_budget() -> None:
    counts = {name: len(set(grid)) for name, grid in study.GRIDS.items() if name != "none"}
    assert set(counts.values()) == {4}
    assert set(counts) | {"none"} == set(paper_plan.NAMES) == set(study.AUTHORS)
