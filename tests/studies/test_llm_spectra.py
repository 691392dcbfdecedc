"""The study of spectra end to end by its tiny preset, on a model given by path and the embedded one, and bad input."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import tyro
from commands import run_study
from language import tiny_gpt2, tiny_tokenizer
from scripts import load_study

from curvlab import capture
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.data.text import encode_documents, read_documents
from curvlab.losses import CrossEntropy
from curvlab.models.language import load_language_model
from curvlab.projector import overlap
from figures.llm_spectra import draw

COLUMNS = {
    "record", "layer", "d_out", "d_in", "method", "other", "gamma", "index", "share", "kept", "removed", "overlap",
    "by_chance", "energy_removed", "documents", "terms", "positions", "labels", "seed", "model", "weights", "dataset",
    "dataset_checksum", "seconds", "peak_bytes", "commit", "torch", "curvlab",
}  # fmt: skip
TEXT = "\n\n".join(f"Document {i}: the capital of France is Paris, and number {7 * i} is not a city." for i in range(9))


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CURVLAB_DATA", raising=False)
        patch.setenv("CURVLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def study() -> Any:
    return load_study("llm_spectra")


def run(study: Any, out: Path, *arguments: str) -> None:
    study.main(tyro.cli(study.Config, args=["--preset", "tiny", "--out", str(out), *arguments]))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GPT-2 saved to disk, and a text file."""
    folder = tmp_path_factory.mktemp("given")
    tiny_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder / "model", folder / "text.txt"


def arguments_of(given: tuple[Path, Path]) -> list[str]:
    model, text = given
    options = "--n-capability 6 --gammas 0.9 0.6 --labels data --seed 3 --layers transformer.h.*.mlp.c_proj"
    return ["--model", str(model), "--capability", str(text), *options.split()]


@pytest.fixture(scope="module")
def finished(given: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from the command line."""
    out = tmp_path_factory.mktemp("study") / "gpt2"
    done = run_study("llm_spectra.py", dict(os.environ), out, *arguments_of(given))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_rows_are_what_the_library_says(finished: tuple[Path, str], given: tuple[Path, Path]) -> None:
    table = pd.read_csv(finished[0] / "results.csv")
    assert set(table.columns) >= COLUMNS
    assert sorted(table["layer"].unique()) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert table["seed"].eq(3).all()
    model, tokenizer = load_language_model(str(given[0]))
    texts = read_documents(given[1])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(3)).tolist()
    data = encode_documents(tokenizer, [texts[i] for i in order[:6]])
    fits = {
        method: kind.fit(model, CrossEntropy(), data, "transformer.h.1.mlp.c_proj", labels="data")  # type: ignore[attr-defined]
        for method, kind in {"kfac": KFAC, "ekfac": EKFAC, "covariance": Covariance}.items()
    }
    own = table[table["layer"] == "transformer.h.1.mlp.c_proj"]
    assert own["terms"].eq(fits["kfac"].factors["transformer.h.1.mlp.c_proj"].scale.terms).all()
    assert own["positions"].eq(fits["kfac"].factors["transformer.h.1.mlp.c_proj"].scale.positions).all()
    nulls = {method: fit.spectrum().null_space(0.6) for method, fit in fits.items()}
    for method, null in nulls.items():
        row = own[(own["record"] == "null space") & (own["gamma"] == 0.6) & (own["method"] == method)].iloc[0]
        assert abs(row["removed"] - null.removed) <= 2  # ties within round-off
        assert row["energy_removed"] == pytest.approx(null.energy_removed, abs=1e-3)
        spectrum = own[(own["record"] == "spectrum") & (own["method"] == method)].sort_values("index")
        assert spectrum["index"].iloc[[0, -1]].tolist() == [1, 32 * 128]
        assert spectrum["share"].is_monotonic_decreasing
        values = fits[method].spectrum().blocks[0].magnitudes.flatten().sort(descending=True).values
        expected = float(values[0] / values.sum())
        assert spectrum["share"].iloc[0] == pytest.approx(expected, rel=1e-4)
        for other, second in nulls.items():
            rows = own[(own["record"] == "overlap") & (own["gamma"] == 0.6)]
            rows = rows[(rows["method"] == method) & (rows["other"] == other)]
            assert len(rows) == (method != other)
            if len(rows):
                assert rows["overlap"].iloc[0] == pytest.approx(overlap(null, second), abs=2e-3)
                assert rows["by_chance"].iloc[0] == pytest.approx(second.kept / second.dimensions, abs=1e-3)


def test_figure_and_table(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, printed = finished
    assert "kfac in covariance" in printed
    assert "transformer.h.1.mlp.c_proj" in printed
    assert str(out / "llm_spectra.png") in printed
    files = draw(pd.read_csv(out / "results.csv"), tmp_path / "again.pdf")  # from the records alone
    assert [file.name for file in files] == ["again.pdf", "again.png"]
    assert files[1].read_bytes() == (out / "llm_spectra.png").read_bytes()
    assert files[0].read_bytes().startswith(b"%PDF")


def test_an_interrupted_study_continues(
    finished: tuple[Path, str], given: tuple[Path, Path], study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Finished layers are read back, and so are finished passes; sums of passes are gone when the rows are there."""
    out, rows = tmp_path / "killed", study.layer_rows
    assert not list(finished[0].glob("units/*/*.safetensors"))
    calls = []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows(*arguments)

    monkeypatch.setattr(study, "layer_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        run(study, out, *arguments_of(given))
    assert not (out / "results.csv").exists()
    (unit,) = out.glob("units/*/*.json")
    assert {file.stem for file in out.glob("units/*/*.safetensors")} == {"kfac", "ekfac", "ekfac-basis"}
    before, forwards = unit.stat().st_mtime_ns, []
    forward = capture._forward
    monkeypatch.setattr(capture, "_forward", lambda *arguments: forwards.append(1) or forward(*arguments))
    run(study, out, *arguments_of(given))
    assert (len(calls), unit.stat().st_mtime_ns, forwards) == (3, before, [])
    first, second = (pd.read_csv(folder / "results.csv") for folder in (finished[0], out))
    varying = ["seconds", "peak_bytes", "threads"]
    pd.testing.assert_frame_equal(first.drop(columns=varying), second.drop(columns=varying))


def test_the_embedded_model(study: Any, tmp_path: Path) -> None:
    run(study, tmp_path / "embedded")
    table = pd.read_csv(tmp_path / "embedded" / "results.csv")
    kinds = {name.rsplit(".", 1)[1] for name in table["layer"]}
    assert kinds == {"gate_proj", "up_proj", "down_proj"}
    kept = table[table["record"] == "null space"].pivot_table("kept", ["layer", "method"], "gamma")
    assert (kept[0.5] > kept[0.9]).all()
    assert table["dataset"].str.startswith("generated-tiny").all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gammas", "1.0"], "--gammas must lie strictly between 0 and 1"),
        (["--n-capability", "0"], "--n-capability must be positive"),
        (["--model", "embedded-opt"], "choose embedded, embedded-gpt2"),
        (["--model", "nowhere/model"], "give --capability FILE"),
        (["--capability", "nowhere.txt"], "no such file"),
        (["--device", "warp"], "--device warp"),
        (["--labels", "exact"], "labels='exact' takes one backward pass a class"),
        (["--out", str(Path(__file__) / "out")], "--out: cannot write into"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments: list[str], message: str, study: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message) as refused:
        run(study, tmp_path / "out", *arguments)
    assert refused.value.code == 2
    assert not (tmp_path / "out").exists()
