"""The theory study end to end by its tiny preset, its page, and what makes it fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curvlab.theory import Case, Check
from curvlab.theory.check import control
from figures import claims_page

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "studies" / "verify_theory.py"


def run(out: Path, cache: Path, *arguments: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    """The study in a process of its own; `setup` is Python that runs before it."""
    code = f"import sys, runpy; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{setup}\nimport verify_theory, tyro\n"
    code += "verify_theory.main(tyro.cli(verify_theory.Config))"
    command = [sys.executable, "-c", code, "--preset", "tiny", "--dataset", "embedded", "--out", str(out), *arguments]
    env = os.environ | {"CURVLAB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("study") / "tiny"
    done = run(out, cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_claim_is_in_the_ledger(finished: tuple[Path, str]) -> None:
    out, printed = finished
    rows = json.loads((out / "checks.json").read_text())
    assert {row["claim"] for row in rows} == set(range(1, 19))
    for row in rows:
        assert row["passed"], row
        assert row["verdict"] in ("holds", "refuted", "holds under conditions")
        assert len(row["statement"]) > 30
        assert row["idea"], row["name"]
        assert row["source"]
        assert row["seconds"] >= 0
        assert row["origin"]["dataset"] == "embedded"
        assert isinstance(row["measured"], float | int)
    # a claim without a control asserts nothing
    for number in range(1, 19):
        cases = [case for row in rows if row["claim"] == number for case in row["cases"]]
        assert any(case["control"] for case in cases), number
        assert not any(case["control"] and case["holds"] for case in cases), number
    assert "not as expected" in printed
    assert str(out / "checks.json") in printed


def test_page_and_figures(finished: tuple[Path, str]) -> None:
    out, _ = finished
    page = (out / "claims.md").read_text()
    for number in range(1, 19):
        assert f"## {number}. " in page
    pictures = [line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) >= 18
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_takes_what_is_finished_by_however_many_processes(finished: tuple[Path, str], cache: Path) -> None:
    out, _ = finished
    before = json.loads((out / "checks.json").read_text())
    (unit,) = out.glob("units/*/3.json")
    unit.unlink()
    done = run(out, cache, "--claims", "1", "3", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    after = json.loads((out / "checks.json").read_text())

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["claim"] in (1, 3)]

    assert plain(after) == plain(before)
    assert [row["seconds"] for row in after if row["claim"] == 1] == [
        row["seconds"] for row in before if row["claim"] == 1
    ]


def test_a_broken_formula_turns_the_ledger(cache: Path, tmp_path: Path) -> None:
    """K-FAC's factors swapped in scale: the study says so and exits with 1."""
    setup = (
        "from curvlab.curvature.kfac import Factors\n"
        "Factors.S = property(lambda self: self.s_sum / self.scale.terms * 1.01)"
    )
    done = run(tmp_path / "broken", cache, "--claims", "11", setup=setup)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: claim 11" in done.stdout
    assert "NO" in done.stdout


def test_a_claim_that_raises_leaves_the_others_in_the_ledger(cache: Path, tmp_path: Path) -> None:
    setup = (
        "from curvlab.curvature import EKFAC\n"
        "def broken(*_, **__): raise RuntimeError('no eigenvalues today')\n"
        "EKFAC.fit = broken"
    )
    out = tmp_path / "raised"
    done = run(out, cache, "--claims", "3", "11", setup=setup)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no eigenvalues today" in done.stdout
    rows = json.loads((out / "checks.json").read_text())
    assert {row["claim"] for row in rows} == {3, 11}
    assert [row["name"] for row in rows if row["claim"] == 11] == ["claim_11_raised"]
    assert (out / "claims.md").is_file()
    # nothing of it is taken for finished
    assert [file.stem for file in out.glob("units/*/*.json")] == ["3"]
    assert run(out, cache, "--claims", "3", "11").returncode == 0


def test_unknown_claims(tmp_path: Path, cache: Path) -> None:
    done = run(tmp_path / "no", cache, "--claims", "99")
    assert done.returncode == 2
    assert "unknown [99]" in done.stderr
    assert not (tmp_path / "no").exists()


def check(*cases: Case, name: str = "something") -> dict[str, Any]:
    return Check(1, name, "A statement.", "An idea.", "ours", "a setting", cases, {}, 0.1).row()


def test_verdicts() -> None:
    good, bad = Case("a", 1.0, 2.0), Case("b", 3.0, 2.0, should=False)
    assert check(good)["verdict"] == "holds"
    assert check(bad)["verdict"] == "refuted"
    assert check(good, bad)["verdict"] == "holds under conditions"
    assert check(good, control("c", 3.0, 2.0)) | {"seconds": 0} == check(good, control("c", 3.0, 2.0)) | {"seconds": 0}
    assert check(good, control("c", 3.0, 2.0))["verdict"] == "holds"
    assert all(check(*cases)["passed"] for cases in ([good], [bad], [good, bad], [good, control("c", 3.0, 2.0)]))
    assert not check(good, control("c", 1.0, 2.0))["passed"]
    assert not check(Case("a", 3.0, 2.0))["passed"]
    assert not check(Case("a", 1.0, 2.0, should=False))["passed"]
    assert Case("a", 3.0, 2.0, relation=">=").holds
    either = Case("a", 3.0, 2.0, should=None)
    assert (check(either)["verdict"], check(either)["passed"]) == ("refuted", True)
    assert check(Case("a", 1.0, 2.0, should=None))["passed"]
    for should in (True, False, None):
        assert not Case("a", float("nan"), 2.0, should=should).as_expected


def test_the_page_says_when_something_is_not_as_expected(tmp_path: Path) -> None:
    rows = [check(Case("a", 3.0, 2.0)), check(Case("a", 1.0, 2.0), control("c", 1.0, 2.0), name="other")]
    page = claims_page.write(rows, tmp_path).read_text()
    assert (tmp_path / "claim_01.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "claim_01.pdf").read_bytes().startswith(b"%PDF")
    assert "2 checks, 2 not as expected" in page
    assert "| something | refuted | 1 | a: **3**, bound ≤ 2 (a setting) | **NO** |" in page
    assert "Control, rejected **(not as expected)**: c: **1**, bound ≤ 2" in page
