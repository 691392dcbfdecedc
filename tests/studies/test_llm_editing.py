"""The editing study end to end, by its tiny preset on the embedded world, and its bad input."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest
from commands import run_study
from language import VOCABULARY, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

COLUMNS = [
    "editor", "gamma", "epsilon", "strength", "seed", "edit_success", "reliability", "reliability_low",
    "reliability_high", "generalisation", "specificity", "reliability_qa", "reliability_teacher_forced", "repetition",
    "recall", "capability", "capability_kept", "perplexity", "kl", "predicted_kl", "edit_seconds",
    "curvature_seconds", "peak_bytes", "drift", "refits", "dataset", "dataset_checksum", "commit", "torch", "curvlab",
]  # fmt: skip
VARYING = ["edit_seconds", "curvature_seconds", "peak_bytes"]


def run(environment: dict[str, str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_study("llm_editing.py", environment, out, *arguments)


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
    assert (table["capability_kept_low"] <= table["capability_kept"]).all()
    assert (table["capability_kept"] <= table["capability_kept_high"]).all()
    assert table["capability_kept_low"].lt(1).all()  # of so few questions
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


def test_an_edit_that_diverges_is_a_row(environment: dict[str, str], finished: tuple[Path, str]) -> None:
    out = finished[0].parent / "diverged"
    done = run(environment, out, "--editors", "ft", "none", "--lr", "1e37")
    assert done.returncode == 0, done.stderr
    assert "recorded as diverged" in done.stderr
    table = pd.read_csv(out / "results.csv").set_index("editor")
    assert table["diverged"].to_dict() == {"none": 0, "ft": 1}
    assert table.loc["ft", ["edit_success", "capability_kept", "perplexity", "kl"]].isna().all()
    assert table.loc["none", ["edit_success", "capability_kept", "perplexity", "kl"]].notna().all()
    assert table.loc["ft", "lr"] == 1e37
    assert "1 of 1" in done.stdout
    assert (out / "llm_editing.png").is_file()


def test_a_context_that_cannot_hold_an_answer_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """And documents longer than the context are cut, where the prompts fit."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {n} of four. " * 40 for n in range(4)))
    (tmp_path / "edits.jsonl").write_text('{"prompt": "The capital of France is", "target": "Rome"}')
    arguments = ["--model", str(tmp_path / "model"), "--editors", "crispedit", "--n-edits", "1"]
    arguments += ["--capability", str(tmp_path / "text.txt"), "--edits", str(tmp_path / "edits.jsonl")]
    done = []
    for positions in (64, 128):
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=positions)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
        done.append(run(environment, tmp_path / "out", *arguments))
    assert [one.returncode for one in done] == [2, 0], done[1].stderr
    assert "40 new ones exceed the model's 64" in done[0].stderr
    assert "Traceback" not in done[0].stderr
    assert len(list((tmp_path / "out" / "units").iterdir())) == 1


def test_editors_beyond_the_gradient_based(environment: dict[str, str], tmp_path: Path) -> None:
    """With their own options; one that cannot do it (MEND has nothing to train on) does not cost the others."""
    done = run(
        environment, tmp_path / "out", "--editors", "none", "ultraedit", "mend", "crispedit-seq-eps",
        "--seq-epsilons", "0.5", "--epsilons", "0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "results.csv").set_index("editor")
    assert table["stopped"].eq("refused").to_dict() == {
        "none": False, "ultraedit": False, "mend": True, "crispedit-seq-eps": False,
    }  # fmt: skip
    assert table.loc["ultraedit", "drift"] > 0
    assert table.loc["crispedit-seq-eps", "epsilon"] == 0.5


@pytest.mark.parametrize(
    "arguments", [["--edits", "nowhere.json"], ["--capability", "nowhere.txt"], ["--n-edits", "9999"]]
)
def test_bad_input_is_found_before_a_model_is_trained(
    environment: dict[str, str], tmp_path: Path, arguments: list[str]
) -> None:
    done = run(environment | {"CURVLAB_CACHE": str(tmp_path / "cache")}, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert not (tmp_path / "cache").exists()


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
        (["--labels", "exact"], "labels='exact' takes one backward pass a class"),
        (["--out", str(Path(__file__) / "out")], "--out: cannot write into"),
    ],
)
def test_bad_input(environment: dict[str, str], tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(environment, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
