"""The editing study end to end, by its tiny preset on the embedded world, and its bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "studies" / "llm_editing.py"
COLUMNS = [
    "editor", "gamma", "epsilon", "strength", "seed", "edit_success", "reliability", "reliability_low",
    "reliability_high", "generalisation", "specificity", "reliability_qa", "reliability_teacher_forced", "repetition",
    "recall", "capability", "capability_kept", "perplexity", "kl", "predicted_kl", "edit_seconds",
    "curvature_seconds", "peak_bytes", "drift", "refits", "dataset", "dataset_checksum", "commit", "torch", "curvlab",
]  # fmt: skip
VARYING = ["edit_seconds", "curvature_seconds", "peak_bytes"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "CURVLAB_DATA"}
    return env | {"CURVLAB_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=out.parent)


@pytest.fixture(scope="module")
def finished(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("study") / "tiny"
    done = run(environment, out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_rows_and_figure(finished: tuple[Path, str]) -> None:
    out, printed = finished
    table = pd.read_csv(out / "results.csv")
    assert set(COLUMNS) <= set(table.columns)
    assert table["editor"].tolist() == ["none", "ft", "crispedit", "crispedit-eps", "crispedit-seq"]
    assert (
        (table["reliability_low"] <= table["reliability"]) & (table["reliability"] <= table["reliability_high"])
    ).all()
    base, edited = table[table["editor"] == "none"], table[table["editor"] != "none"]
    assert base["drift"].eq(0).all()
    assert base["kl"].abs().max() < 1e-6
    assert base["capability_kept"].eq(1).all()
    assert edited["drift"].gt(0).all()
    assert edited["kl"].gt(1e-6).all()
    assert (edited["edit_loss"] < 10).all()
    budget = table[table["editor"] == "crispedit-eps"].iloc[0]
    assert budget["predicted_kl"] <= budget["epsilon"] * (1 + 1e-3)
    free = table[table["editor"] == "ft"].iloc[0]
    held = table[table["editor"] == "crispedit"].iloc[0]
    assert held["predicted_kl"] < free["predicted_kl"]  # γ takes curvature away
    assert (out / "llm_editing.pdf").read_bytes().startswith(b"%PDF")
    assert (out / "llm_editing.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "llm_editing.png") in printed


def test_resumes_with_the_same_rows(environment: dict[str, str], finished: tuple[Path, str]) -> None:
    out, _ = finished
    first = pd.read_csv(out / "results.csv").drop(columns=VARYING)
    (unit,) = out.glob("units/*/0-crispedit-0.9.json")
    unit.unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("units/*/*.json")}
    again = run(environment, out)
    assert again.returncode == 0, again.stderr
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
    pd.testing.assert_frame_equal(pd.read_csv(out / "results.csv").drop(columns=VARYING), first)


def test_changed_files_are_noticed(environment: dict[str, str], tmp_path: Path) -> None:
    edits, text = tmp_path / "edits.jsonl", tmp_path / "text.txt"
    arguments = ["--edits", str(edits), "--capability", str(text), "--n-edits", "1", "--editors", "none"]
    text.write_text("\n\n".join(f"The {n} ships sail east." for n in ("ten", "two", "six", "four")))
    rows = []
    for target in ("east", "west"):
        edits.write_text(f'{{"prompt": "The ships sail", "target": "{target}"}}\n')
        done = run(environment, tmp_path / "out", *arguments)
        assert done.returncode == 0, done.stderr
        rows.append(pd.read_csv(tmp_path / "out" / "results.csv").iloc[0])
    assert rows[0]["edit_success"] == rows[0]["reliability"]  # without paraphrases
    assert len(list((tmp_path / "out" / "units").iterdir())) == 2  # not the rows of the old file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editors", "ft", "memit2"], "unknown ['memit2']"),
        (["--gammas", "1.5"], "strictly between 0 and 1"),
        (["--epsilons", "-1"], "must be positive"),
        (["--layers", "model.layers.9.mlp.down_proj"], "did you mean"),
        (["--edits", "nowhere.json"], "nowhere.json"),
        (["--model", "no/such-model"], "--data"),
        (["--seeds", "0", "0"], "distinct"),
        (["--gammas", "0.9", "0.9"], "distinct"),
        (["--editors", "crispedit", "--constraint", "ellipsoid"], "no edit to make"),
        (["--device", "gpu"], "--device"),
    ],
)
def test_bad_input(environment: dict[str, str], tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(environment, tmp_path / "out", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
