"""The study of the authors' protocol end to end, by its tiny preset on the embedded pair, and its bad input."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from curvlab.data import load_pair
from curvlab.models import LeNet5, pretrained_lenet

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import authors_protocol

VARYING = ["seconds", "peak_bytes"]


def test_variants_say_what_they_are() -> None:
    assert [v.deviations for v in list(authors_protocol.VARIANTS.values())[:3]] == ["", "", ""]
    assert all(v.deviations for v in list(authors_protocol.VARIANTS.values())[3:])
    assert authors_protocol.VARIANTS["ekfac-all"].deviations.count(";") == 2


def test_the_authors_settings() -> None:
    preset = authors_protocol.PRESETS["paper"]
    assert preset.gammas == preset.dense_gammas == preset.probability_gammas
    assert len(preset.gammas) == 20
    assert preset.gammas[0] == pytest.approx(1 - 10**-0.1)
    assert preset.gammas[-1] == pytest.approx(1 - 1e-7, abs=1e-15)
    assert (preset.epochs, preset.lr, preset.curvature_images, preset.finetune_images) == (100, 1e-3, 9000, 60000)
    default = authors_protocol.PRESETS["default"]
    travelled = [p.epochs * p.finetune_images * p.lr for p in (default, preset)]
    assert travelled[0] == pytest.approx(travelled[1])  # the same lr · steps


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CURVLAB_DATA", raising=False)
        found = authors_protocol.provenance()  # once: an edit of the package starts units afresh
        patch.setattr(authors_protocol, "provenance", lambda *scripts: found)
        yield
    torch.set_num_threads(threads)


TINY = authors_protocol.Config(preset="tiny", dataset="embedded")


@pytest.fixture(scope="module")
def finished(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "tiny"
    authors_protocol.main(replace(TINY, out=out))
    return out


def test_rows_summary_and_figure(finished: Path) -> None:
    table = pd.read_csv(finished / "results.csv")
    counts = table.groupby("variant").size().to_dict()
    assert counts == {name: 2 if name.startswith("ggn") else 3 for name in authors_protocol.VARIANTS}
    assert (table["removed"] + table["kept"] == 10080).all()
    assert (table["energy_removed"] >= table["gamma"] - 1e-6).all()
    right = table[table["deviations"].isna()].groupby("variant").first()
    assert right["ggn_energy_removed_at_0.9"].between(0.89, 0.92).all()
    alone = table.groupby("variant").first()["ggn_energy_removed_at_0.9"]
    assert alone["ekfac-batch-labels"] < alone["ekfac-labels"] < alone["ekfac"]
    assert alone["ggn-probabilities"] < alone["ggn"]
    for method in ("ggn", "kfac", "ekfac"):  # one start for all variants of one network
        assert table[table["method"] == method].groupby("relu_logits")["base_accuracy"].nunique().eq(1).all()
    lines = pd.read_csv(finished / "summary.csv")
    assert list(lines["variant"]) == list(authors_protocol.VARIANTS)
    assert (finished / "authors_protocol.pdf").read_bytes().startswith(b"%PDF")
    assert (finished / "authors_protocol.png").read_bytes().startswith(b"\x89PNG")


def test_continues_and_adds_seeds(finished: Path) -> None:
    first = pd.read_csv(finished / "results.csv")
    units = {file: file.stat().st_mtime_ns for file in finished.glob("units/*/*.json")}
    lost = next(file for file in units if file.name == "0-kfac-labels.json")
    lost.unlink()
    config = replace(TINY, out=finished, variants=("kfac-labels",), seeds=(0, 1))
    authors_protocol.main(config)
    assert all(file.stat().st_mtime_ns == written for file, written in units.items() if file != lost)
    second = pd.read_csv(finished / "results.csv")
    assert second.groupby(["variant", "seed"]).size().to_dict() == {
        (name, seed): 3 for name in ("kfac", "kfac-labels") for seed in (0, 1)
    }
    again = second[second["seed"] == 0].reset_index(drop=True)
    expected = first[first["variant"].isin(["kfac", "kfac-labels"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        again.drop(columns=VARYING), expected.drop(columns=VARYING), check_exact=True, check_dtype=False
    )


def test_differences_are_taken_seed_by_seed() -> None:
    rows = []
    for name, learnt in (("kfac", 0.6), ("kfac-labels", 0.5)):
        for seed in (0, 1):
            for gamma, kept in ((0.5, 0.97), (0.9, 0.99)):
                row: dict[str, Any] = {"variant": name, "seed": seed, "gamma": gamma, "pretrain_accuracy": kept}
                row |= {"finetune_accuracy": learnt + 0.1 * seed - 0.2 * (gamma > 0.6), "base_accuracy": 0.9}
                row["diverged"] = 0
                for g in authors_protocol.COMPARED:
                    for column in ("removed", "overlap", "ggn_directions_removed", "ggn_energy_removed"):
                        row[f"{column}_at_{g}"] = 1.0
                rows.append(row)
    lines = authors_protocol.summary(pd.DataFrame(rows)).set_index("variant")
    assert lines.loc["kfac-labels", "difference_at_0.98"] == pytest.approx(-10)
    assert lines.loc["kfac", "learnt_at_0.98"] == pytest.approx(55)  # halfway between 60 and 40, and 70 and 50
    table = pd.DataFrame(rows)
    table.loc[(table["variant"] == "kfac-labels") & (table["seed"] == 1), "pretrain_accuracy"] = 0.5
    assert pd.isna(authors_protocol.summary(table).set_index("variant").loc["kfac-labels", "difference_at_0.98"])


def test_logits_through_a_relu(cache: None) -> None:
    pair = load_pair("embedded")
    state = torch.get_rng_state()
    clamped = pretrained_lenet(pair, seed=0, images=300, epochs=1, relu_logits=True)
    plain = pretrained_lenet(pair, seed=0, images=300, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    assert isinstance(plain, LeNet5)
    x = pair.pretrain_test.x[:100]
    with torch.no_grad():
        assert (clamped(x) >= 0).all()
        assert (plain(x) < 0).any()
        assert (clamped(x) == 0).any()
    again = pretrained_lenet(pair, seed=0, images=300, epochs=1, relu_logits=True)  # from the cache
    assert all(torch.equal(a, b) for a, b in zip(clamped.parameters(), again.parameters(), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(clamped.parameters(), plain.parameters(), strict=True)
    )  # other files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ("kfca",)}, "unknown ['kfca']"),
        ({"seeds": (1, 1)}, "--seeds must be distinct"),
        ({"seeds": ()}, "--seeds must be distinct"),
        ({"lr": 0.0}, "must be positive"),
        ({"curvature_batch": 0}, "must be positive"),
        ({"drift": -1.0}, "must not be negative"),
        ({"device": "nowhere"}, "--device nowhere"),
        ({"dataset": "mnist", "data": Path("nowhere")}, "CURVLAB_DATA"),
    ],
)
def test_bad_input_is_refused_before_any_work(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        authors_protocol.main(replace(TINY, out=tmp_path / "out", **change))
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()
