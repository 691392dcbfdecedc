"""The study of the paper's tables end to end, by its tiny preset on the embedded world, and its bad input."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
import tyro
from commands import STUDIES, run_study
from instruct import TEXT, qwen25

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(STUDIES))
    import editing_bench
    import paper_tables as study

VARYING = ["edit_seconds", "curvature_seconds", "peak_bytes"]
METHODS = ["base", "UltraEdit", "FT", "CrispEdit", "CrispEdit-Seq"]


def run(environment: dict[str, str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_study("paper_tables.py", environment, out, *arguments)


@pytest.fixture(scope="module")
def finished(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("study") / "tiny"
    done = run(environment, out, "--tables", "all", "--second", "none")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def results(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv", dtype={"learnt": str})


def test_rows_of_every_table(finished: tuple[Path, str]) -> None:
    out, printed = finished
    table = results(out)
    assert list(dict.fromkeys(table["table"])) == ["table1", "table4", "table6", "table7", "table8", "merge"]
    first = table[table["table"] == "table1"]
    assert first["row"].tolist() == METHODS
    assert first["n_edits"].eq(4).all()
    assert table[table["table"] == "table4"]["n_edits"].eq(12).all()
    assert table["split"].eq("test").all()
    assert (table["reliability_low"] <= table["reliability"]).all()
    assert first["learnt"].str.len().eq(4).all()
    assert first["learnt"].map(lambda s: s.count("1") / 4).tolist() == first["reliability"].tolist()
    assert table[table["editor"] == "none"]["capability_kept"].eq(1).all()
    seq = table[table["table"] == "table6"].set_index("row")
    # positions without a loss carry inputs; a loss on the prompt carries gradients
    for labels in ("data", "model"):
        whole, target, every = (
            seq.loc[f"{row}, {labels} labels"] for row in ("whole text", "target only", "target's loss, all positions")
        )
        assert target["edits_input_share"] < every["edits_input_share"] == pytest.approx(whole["edits_input_share"])
        assert target["edits_gradient_share"] < whole["edits_gradient_share"]
        assert whole["labels"] == labels
    sizes = table[table["table"] == "table7"].set_index("row")
    assert sizes.loc["n = 3", "n_capability"] == 3
    assert sizes.loc["stories only", "capability_set"] == "stories"
    assert sizes.loc["No Projection (FT)", "editor"] == "ft"
    for name in ("tables.md", "verdicts.md", "fig1_generated.pdf", "fig5_generated.png", "table8_generated.png"):
        assert (out / name).stat().st_size > 0
    assert str(out / "verdicts.md") in printed
    assert "4 edits." in (out / "tables.md").read_text()
    cases = json.loads((out / "cases.json").read_text())
    assert {case["row"] for case in cases} == set(METHODS)
    assert len(cases) == 4 * len(METHODS)


def test_tuning_is_on_the_other_half_and_recorded(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(environment, out, "--editors", "ft", "--grid", "2", "--n-asked", "3")
    assert done.returncode == 0, done.stderr
    assert "1 edits for the tables" not in done.stdout
    tuning = pd.read_csv(out / "tuning.csv")
    tried = tuning[tuning["editor"] == "ft"]
    assert tried["settings"].tolist() == ["lr 0.002", "lr 0.001"]
    assert tuning["split"].eq("train").all()
    assert tried["chosen"].sum() == 1
    assert tried.loc[tried["chosen"], "score"].item() == tried["score"].max()
    (row,) = results(out).query("editor == 'ft'").to_dict("records")
    assert row["settings"] == tried.loc[tried["chosen"], "settings"].item()
    assert row["split"] == "test"
    text = (out / "tables.md").read_text()
    assert "## Tuning" in text
    assert f"**{row['settings']}:" in text

    # a table more adds to what is there, what was made is not made again; what is missing is made the same
    first = results(out)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("units/*.json")}
    next(out.glob("units/ft-*.json")).unlink()
    again = run(environment, out, "--editors", "ft", "--grid", "2", "--n-asked", "3", "--tables", "table1", "table4")
    assert again.returncode == 0, again.stderr
    assert sum(file.stat().st_mtime_ns == stamp for file, stamp in kept.items()) == len(kept) - 1
    both = results(out)
    assert set(both["table"]) == {"table1", "table4"}
    same = both[both["table"] == "table1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(same.drop(columns=VARYING), first.drop(columns=VARYING), check_dtype=False)


def test_an_editor_that_refuses_is_a_row_where_others_go_on(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CURVLAB_CACHE", environment["CURVLAB_CACHE"])
    bench = editing_bench.prepare(editing_bench.Setup("embedded", "tiny", "generated", 2, 5, 3, 0))
    given = {"editor": "crispedit-seq", "settings": {"curvature": "ekfac"}, "layers": bench.layers}
    row = editing_bench.edit_and_measure(bench, **given, refusals=True)
    assert (row["stopped"], row["diverged"]) == ("refused", 1)
    assert row["edit_success"] != row["edit_success"]
    assert "do not merge over rounds; use 'kfac'; recorded as refused" in caplog.text
    with pytest.raises(ValueError, match="do not merge over rounds"):
        editing_bench.edit_and_measure(bench, **given)


def test_a_real_models_files_with_the_papers_settings(environment: dict[str, str], tmp_path: Path) -> None:
    qwen25(tmp_path / "qwen", torch.bfloat16)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    facts = [
        {"prompt": f"The {n} ships sail", "target": "east", "subject": f"{n} ships"} for n in ("ten", "two", "six")
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    given = ["--model", str(tmp_path / "qwen"), "--edits", str(tmp_path / "facts.jsonl"), "--preset", "paper"]
    given += ["--capability", str(tmp_path / "text.txt"), "--n-asked", "2", "--epochs", "2", "--n-capability", "4"]
    done = run(environment, tmp_path / "out", *given, "--editors", "ft", "ultraedit", "crispedit", "crispedit-seq")
    assert done.returncode == 0, done.stderr
    assert "estimated memory, at most" in done.stdout
    assert "3 edits and not 3000" in done.stdout
    table = results(tmp_path / "out").set_index("editor")
    assert table["split"].eq("all").all()
    assert table["settings"].fillna("").to_dict() == {
        "none": "", "ultraedit": "lr 1e-06", "ft": "lr 0.0005", "crispedit": "gamma 0.9, lr 0.0005",
        "crispedit-seq": "gamma 0.999, lr 0.0005",
    }  # fmt: skip
    assert table["diverged"].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "table2"], "--tables: unknown ['table2']; choose from table1"),
        (["--editors", "ft", "fine-tuning"], "unknown ['fine-tuning']"),
        (["--seeds", "1", "1"], "distinct"),
        (["--edits", "generated", "generated"], "distinct"),
        (["--n-edits", "0"], "must be positive"),
        (["--grid", "9"], "--grid must be 1 to 4"),
        (["--edits", "nowhere.json"], "nowhere.json"),
        (["--model", "embedded-bert"], "choose embedded"),
        (["--model", "no/such-model"], "--edits generated"),
        (["--out", str(Path(__file__) / "out")], "--out: cannot write into"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    config = tyro.cli(study.Config, args=["--preset", "tiny", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        study.main(config)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
