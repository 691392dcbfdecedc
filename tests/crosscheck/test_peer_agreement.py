"""Peers and curvlab agree on small models: every scale between them is named, and an error of ours would be seen."""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PEERS = ("curvlinops", "nngeometry", "kronfluence")
STUDIES = Path(__file__).parents[2] / "studies"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STUDIES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("peer_agreement")
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def rows(study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not study.installed():
        pytest.skip("no peer is installed")
    out = tmp_path_factory.mktemp("peers")
    study.main(study.Config(preset="tiny", out=out))
    assert (out / "peers.md").read_text(encoding="utf-8").count("| yes |") > 10
    found = json.loads((out / "peers.json").read_text(encoding="utf-8"))
    assert found["about"]["dtype"] == "float64"
    return found["rows"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("peer", PEERS)
def test_every_row_agrees_and_its_scale_is_named(rows: list[dict[str, Any]], peer: str) -> None:
    if find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    own = [row for row in rows if row["peer"] == peer]
    models = {row["model"] for row in own}
    assert {"MLP", "CNN"} <= models
    for row in own:
        assert row["residual"] <= row["tolerance"] < 1e-9, row
        assert row["scale"], row
        assert row["agrees"], row
    quantities = {row["quantity"] for row in own if row["model"] == "CNN"}
    assert (
        quantities
        >= {
            "curvlinops": {"Hessian", "GGN", "K-FAC, exact labels", "EK-FAC, exact labels", "covariance of inputs"},
            "nngeometry": {"Hessian", "GGN", "K-FAC, exact labels", "EK-FAC, exact labels", "covariance of inputs"},
            "kronfluence": {"K-FAC, labels of the data", "EK-FAC, labels of the data", "covariance of inputs"},
        }[peer]
    )
    if peer != "nngeometry":
        assert "sequence model" in models
        assert "Llama" in models or find_spec("transformers") is None


def test_known_differences_have_their_names(rows: list[dict[str, Any]]) -> None:
    found = {(row["peer"], row["model"], row["quantity"], row["layer"]): row for row in rows}
    if find_spec("kronfluence"):
        assert found["kronfluence", "CNN", "K-FAC, labels of the data", "0"]["scale"].startswith("÷ positions = 0.01")
        assert "× examples" in found["kronfluence", "MLP", "covariance of inputs", "fc1"]["scale"]
        assert "loss terms" in found["kronfluence", "sequence model", "EK-FAC, labels of the data", "fc1"]["scale"]
    if find_spec("nngeometry"):
        assert "√(classes − 1)" in found["nngeometry", "MLP", "covariance of inputs", "fc1"]["scale"]
    if find_spec("curvlinops"):
        first, last = (
            found["curvlinops", "sequence model", "K-FAC, exact labels", layer]["convention"]
            for layer in ("fc1", "fc2")
        )
        assert "in one pass" in first
        assert last == ""  # nothing mixes positions above the last layer


def test_a_wrong_matrix_does_not_agree(study: ModuleType) -> None:
    torch.manual_seed(0)
    ours = torch.rand(4, 4, dtype=torch.float64)
    counts = {"examples": 22.0}
    assert study._row(ours, 22 * ours, counts)["agrees"]
    assert not study._row(ours, 21 * ours, counts)["agrees"]
    assert not study._row(ours, ours + 1e-8 * torch.eye(4, dtype=torch.float64), counts)["agrees"]
    assert not study._row(ours, ours.mT, counts)["agrees"]
    assert not study._row(ours, -ours, counts)["agrees"]
