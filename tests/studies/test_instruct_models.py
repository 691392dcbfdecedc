"""The editing study by its own path, `--model PATH`, on miniatures of the paper's two models."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import command, run_study
from instruct import TEXT, llama3, qwen25

VARYING = ["edit_seconds", "curvature_seconds", "peak_bytes"]
EDITORS = ["none", "crispedit", "crispedit-seq", "memit"]
FACTS = [
    {"prompt": "The capital of France is", "target": "Rome", "subject": "France", "paraphrases": ["France's capital"]},
    {"prompt": "Ada Lovelace was born in", "target": "1948", "subject": "Ada Lovelace"},
    {"prompt": "Alan Turing works in", "target": "Paris", "subject": "Alan Turing",
     "neighbours": [["The capital of Italy is", "Rome"]]},
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("instruct")
    (root / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    (root / "text.txt").write_text("\n\n".join(TEXT))
    return root


def arguments(files: Path, model: str, *editors: str) -> list[str]:
    given = ["--model", str(files / model), "--edits", str(files / "facts.jsonl"), "--n-edits", "3"]
    return [*given, "--capability", str(files / "text.txt"), "--editors", *editors]


@pytest.fixture(scope="module")
def llama(files: Path, environment: dict[str, str]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    llama3(files / "llama3", torch.bfloat16)
    out = files / "out-llama3"
    return out, run_study("llm_editing.py", environment, out, *arguments(files, "llama3", *EDITORS))


def check(out: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "estimated memory, at most" in said[0]
    assert any(line.startswith("  crispedit, should a layer drift: ") for line in said)
    assert "max_length" not in done.stderr
    table = pd.read_csv(out / "results.csv").set_index("editor")
    assert set(table.index) == set(EDITORS)
    assert table["diverged"].eq(0).all()
    assert table.drop("none")["drift"].gt(0).all()
    assert table["perplexity"].notna().all()


def test_llama_in_bfloat16(llama: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    check(*llama)


def test_qwen_in_float32_layers_named(files: Path, environment: dict[str, str]) -> None:
    qwen25(files / "qwen25", torch.float32)
    given = [*arguments(files, "qwen25", *EDITORS), "--layers", "model.layers.[1-2].mlp.down_proj"]
    check(files / "out-qwen25", run_study("llm_editing.py", environment, files / "out-qwen25", *given))


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    files: Path, environment: dict[str, str]
) -> None:
    llama3(files / "huge")
    config = files / "huge" / "config.json"
    wide = {"hidden_size": 65536, "intermediate_size": 4 * 65536, "num_hidden_layers": 40}
    config.write_text(json.dumps(json.loads(config.read_text()) | wide))
    (files / "huge" / "model.safetensors").write_bytes(b"never read")
    done = run_study("llm_editing.py", environment, files / "out-huge", *arguments(files, "huge", "ft"))
    assert done.returncode == 2
    assert "instead: a smaller model, bfloat16 weights, or another device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_study_goes_on_to_the_same_rows(
    files: Path, environment: dict[str, str], llama: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    """SIGKILL once the first edits are recorded; those are kept, the others come out alike."""
    given, out = arguments(files, "llama3", *EDITORS), files / "out-killed"
    process = subprocess.Popen(
        command("llm_editing.py", out, *given), env=environment, cwd=files,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(out.glob("units/*/*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in out.glob("units/*/*.json")}
    assert 1 <= len(kept) < len(EDITORS)
    assert not (out / "results.csv").exists()
    again = run_study("llm_editing.py", environment, out, *given)
    assert again.returncode == 0, again.stderr
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
    tables = [pd.read_csv(folder / "results.csv").drop(columns=VARYING) for folder in (llama[0], out)]
    pd.testing.assert_frame_equal(*tables)
