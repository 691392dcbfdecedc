"""The trade-off study end to end, by its tiny preset on the embedded pair, and its bad input."""

import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import command, run_study

SCRIPT = "mnist_tradeoff.py"
COLUMNS = [
    "method", "constraint", "gamma", "epsilon", "seed", "pretrain_accuracy", "finetune_accuracy",
    "pretrain_loss_increase", "predicted_kl", "measured_kl", "removed", "kept", "drift", "refits", "project",
    "optimizer", "activation", "dataset", "dataset_checksum", "seconds", "peak_bytes", "commit", "torch", "curvlab",
]  # fmt: skip
VARYING = ["seconds", "peak_bytes"]


def run(environment: dict[str, str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_study(SCRIPT, environment, out, "--dataset", "embedded", *arguments)


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
    counts = table.groupby(["method", "constraint"]).size().to_dict()
    nulls = {("kfac", "null-space"): 3, ("ekfac", "null-space"): 3, ("covariance", "null-space"): 3,
             ("ggn", "null-space"): 2, ("hessian", "null-space"): 2}  # fmt: skip
    ellipsoids = {(m, "ellipsoid"): 2 for m in ("ggn", "kfac", "ekfac")}
    assert counts == nulls | ellipsoids | {("none", "none"): 1}
    null = table[table["constraint"] == "null-space"]
    assert (null["removed"] + null["kept"] == 10080).all()
    assert (null["energy_removed"] >= null["gamma"] - 1e-9).all()
    assert (null["leak"] < 1e-4).all()  # SGD, no refits: nothing leaves the null space
    ellipsoid = table[table["constraint"] == "ellipsoid"]
    known = ellipsoid["method"] != "ggn"  # whose trailing eigenvalues count with their mean
    assert (ellipsoid[known]["predicted_kl"] <= ellipsoid[known]["epsilon"] * (1 + 1e-3)).all()
    assert (ellipsoid["predicted_kl"] <= ellipsoid["epsilon"] * 1.5).all()
    assert (ellipsoid["project"] == "update").all()
    assert table["dataset"].eq("embedded").all()
    assert (out / "tradeoff.pdf").read_bytes().startswith(b"%PDF")
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "tradeoff.png") in printed
    assert "equals its GGN" in printed


def test_more_freedom_moves_the_weights_more(finished: tuple[Path, str]) -> None:
    table = pd.read_csv(finished[0] / "results.csv")
    for method in ("kfac", "ekfac", "covariance", "ggn"):
        rows = table[(table["method"] == method) & (table["constraint"] == "null-space")].sort_values("gamma")
        assert rows["kept"].is_monotonic_decreasing
        assert rows["drift"].is_monotonic_decreasing
    free = table[table["method"] == "none"]["drift"].item()
    assert (table[table["constraint"] == "null-space"]["drift"] < free).all()


def test_a_repeated_run_gives_the_same_rows(finished: tuple[Path, str], environment: dict[str, str]) -> None:
    out, _ = finished
    first = pd.read_csv(out / "results.csv")
    again = out.parent / "again"
    done = run(environment, again, "--jobs", "2", "--methods", "kfac", "covariance", "none")
    assert done.returncode == 0, done.stderr
    second = pd.read_csv(again / "results.csv")
    expected = first[first["method"].isin(["kfac", "covariance", "none"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(expected.drop(columns=VARYING), second.drop(columns=VARYING), check_exact=True)


def test_a_killed_run_continues(finished: tuple[Path, str], environment: dict[str, str]) -> None:
    out = finished[0].parent / "killed"
    given = command(SCRIPT, out, "--dataset", "embedded")
    process = subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while len(list(out.glob("units/*/[0-9]*.json"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("units/*/[0-9]*.json")}
    assert before
    assert not (out / "results.csv").exists()
    done = run(environment, out)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == written for file, written in before.items())  # not computed again
    first, second = pd.read_csv(finished[0] / "results.csv"), pd.read_csv(out / "results.csv")
    pd.testing.assert_frame_equal(first.drop(columns=VARYING), second.drop(columns=VARYING), check_exact=True)


def test_options_reach_the_rows(finished: tuple[Path, str], environment: dict[str, str]) -> None:
    out = finished[0].parent / "options"
    arguments = """--activation tanh --methods hessian kfac --constraint null-space --gammas 0.5 --dtype float64
        --optimizer adam --project eigenbasis --seeds 4 --layer fc3"""
    done = run(environment, out, *arguments.split())
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out / "results.csv")
    assert list(table["method"]) == ["hessian", "kfac"]
    assert table["gamma"].eq(0.5).all()
    assert table["seed"].eq(4).all()
    assert (table["removed"] + table["kept"] == 840).all()
    assert table["leak"].max() < 1e-10  # Adam in the eigenbasis stays inside
    for column, value in {
        "activation": "tanh",
        "optimizer": "adam",
        "project": "eigenbasis",
        "dtype": "float64",
    }.items():
        assert table[column].eq(value).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gammas", "1.0"], "--gammas must lie strictly between 0 and 1"),
        (["--epsilons", "-1"], "--epsilons must be positive"),
        (["--methods", "kfca"], "unknown ['kfca']"),
        (["--layer", "fc9"], "no layer fits 'fc9'"),
        (["--seeds", "1", "1"], "--seeds must be distinct"),
        (["--dataset", "mnist", "--data", "nowhere"], "CURVLAB_DATA"),
        (["--lr", "0"], "must be positive"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str], message: str, environment: dict[str, str], tmp_path: Path
) -> None:
    started = time.time()
    done = run(environment, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert time.time() - started < 60
