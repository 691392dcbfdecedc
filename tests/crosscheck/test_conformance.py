"""The cross-check names every fault of the generator and raises no alarm on correct artefacts; a miss would be seen."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from curvlab.crosscheck import Finding, Report
from curvlab.crosscheck.faults import FAULTS, KINDS

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STUDIES))
    try:
        yield importlib.import_module("conformance")
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def out(study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conformance")
    study.main(study.Config(preset="tiny", out=folder))
    return folder


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "conformance.json").read_text(encoding="utf-8"))["rows"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(rows: list[dict[str, Any]], name: str) -> None:
    own = [row for row in rows if row["made"] == [name]]
    assert own
    for row in own:
        assert not row["failed"], row
        assert not row["missed"], f"{row['again']}: named {row['named']}"


def test_no_alarm_on_correct_artefacts(rows: list[dict[str, Any]]) -> None:
    own = [row for row in rows if not row["made"]]
    assert {row["spectrum"] for row in own} == {*KINDS}
    for row in own:
        assert not row["failed"], row
        assert not row["unreadable"], row
        assert not row["alarms"], f"{row['again']}: {row['alarms']}"


def test_what_is_written(out: Path, rows: list[dict[str, Any]]) -> None:
    table = (out / "conformance.md").read_text(encoding="utf-8")
    assert all(f"| {name} | 1 |" in table and f"**{name}**: {fault.does}" in table for name, fault in FAULTS.items())
    assert (out / "conformance.pdf").read_bytes()[:4] == b"%PDF"
    assert (out / "conformance.png").stat().st_size > 10_000
    assert len(rows) == len(FAULTS) + 16


def report(*findings: tuple[str, str]) -> Report:
    """A report of (fault, severity)."""
    return Report(tuple(Finding("check", s, "layer", 1, 0, "cause", "", f) for f, s in findings), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "found", "missed", "alarms"),
    [
        ("swapped-factors", [("swapped-factors", "error")], False, 0),
        ("swapped-factors", [("swapped-factors", "convention")], True, 0),  # not as loud as it must be
        ("swapped-factors", [("stale-mask", "error")], True, 0),
        ("swapped-factors", [], True, 0),
        (None, [], False, 0),
        (None, [("empirical-labels", "convention")], False, 0),
        (None, [("stale-mask", "deviation")], False, 1),
    ],
)
def test_how_a_report_is_judged(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None,
    found: list[tuple[str, str]], missed: bool, alarms: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(study, "examine", lambda artefact, told: report(*found))
    trial = study.Trial(() if fault is None else (fault,), (6, 9), 0, "power", "authors")
    row = study.judge([trial], tmp_path)
    assert bool(row["missed"]) == missed
    assert len(row["alarms"]) == alarms
    assert study.wrong(row) == (missed or alarms > 0)


def test_a_check_that_fails_is_a_wrong_row(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(artefact: Any, told: bool) -> Report:
        raise RuntimeError("broken")

    monkeypatch.setattr(study, "examine", fail)
    row = study.judge([study.Trial((), (6, 9), 0, "power", "authors")], tmp_path)
    assert study.wrong(row)
    assert "broken" in row["failed"]


def test_artefacts_are_reproduced_from_their_row(study: ModuleType, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    row = next(row for row in rows if row["made"] == ["swapped-factors"])
    trial = study.Trial((*row["made"],), (*row["shape"],), row["seed"], row["spectrum"], row["storage"])
    assert str(trial) == row["again"]
    artefact = trial.make(tmp_path)
    assert artefact.faults == ("swapped-factors",)
    assert artefact.gamma == row["gamma"]
