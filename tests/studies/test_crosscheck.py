"""The cross-check end to end: its command line, exit status and files, its report, and the helper for other tests."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from language import tiny_llama, tiny_tokenizer
from scripts import load_study

from curvlab.crosscheck import assert_agrees, crosscheck
from curvlab.crosscheck.authors import save_authors_cache, save_authors_factors
from curvlab.crosscheck.curves import curves
from curvlab.crosscheck.findings import SEVERITIES, Finding
from curvlab.crosscheck.tables import as_markdown, as_text
from curvlab.curvature import KFAC
from curvlab.data.text import encode_documents
from curvlab.losses import CrossEntropy

LAYERS = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
TEXT = [f"Document {i}: the capital of France is Paris, and number {7 * i * i} is not a city." for i in range(12)]
GAMMA = 0.9
study = load_study("crosscheck")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A production run: its model, its text, its factors and its projection cache."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXT))
    batches = encode_documents(tokenizer, TEXT, batch_size=1)
    kfac = KFAC.fit(model, CrossEntropy(), batches, LAYERS, labels="data")
    save_authors_factors(kfac, folder / "stats", model="tiny", dataset="text", n=len(TEXT))
    save_authors_cache(kfac.spectrum().null_space(GAMMA), folder / "stats" / "projection.pt")
    return {"stats": folder / "stats", "model": folder / "model", "text": folder / "text.jsonl"}


@pytest.fixture
def damaged(run: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the statistics, to be damaged."""
    return Path(shutil.copytree(run["stats"], tmp_path / "stats"))


def main(paths: Path | tuple[Path, ...], out: Path, **options: object) -> int:
    given = (paths,) if isinstance(paths, Path) else paths
    return int(study.main(study.Config(given, out=out, **options)))


def swap(folder: Path) -> None:
    """Input and output side of one layer's factors exchanged."""
    (file,) = folder.rglob("*layers.0*.npz")
    content = torch.load(file, weights_only=True)
    torch.save({"A": content["B"], "B": content["A"], "N": content["N"]}, file)


def flip(folder: Path) -> None:
    """Masks that keep the sharp directions."""
    content = torch.load(folder / "projection.pt", weights_only=True)
    torch.save({n: own | {"M": ~own["M"]} for n, own in content.items()}, folder / "projection.pt")


def test_a_run_that_is_right_passes(run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run["stats"], tmp_path, model=str(run["model"]), data=run["text"], gamma=GAMMA) == 0
    findings = json.loads((tmp_path / "crosscheck.json").read_text())
    assert {f["severity"] for f in findings} <= {"convention", "ok"}
    assert {"check", "severity", "measured", "bound", "cause", "remedy"} <= set(findings[0])
    assert all(any(layer in f["subject"] for f in findings) for layer in LAYERS)
    page = (tmp_path / "crosscheck.md").read_text()
    assert "empirical" in page  # labels of the data are named, as the convention they are
    assert all((tmp_path / f"crosscheck.{suffix}").stat().st_size > 5000 for suffix in ("pdf", "png"))
    printed = capsys.readouterr().out
    assert "2 layers: 0 error, 0 deviation" in printed
    assert "crosscheck.png" in printed


@pytest.mark.parametrize(
    ("damage", "fault"), [(swap, "swapped-factors"), (flip, "wrong-end-threshold")], ids=["swap", "flip"]
)
@pytest.mark.parametrize("with_model", [False, True])
def test_faults_are_errors(damaged: Path, run: dict[str, Path], tmp_path: Path, damage, fault, with_model) -> None:  # type: ignore[no-untyped-def]
    damage(damaged)
    model = {"model": str(run["model"])} if with_model else {}
    assert main(damaged, tmp_path, gamma=GAMMA, **model) == 1
    findings = json.loads((tmp_path / "crosscheck.json").read_text())
    assert findings[0]["severity"] == "error"
    named = {f["fault"] for f in findings if f["severity"] == "error"}
    assert named == {fault}
    order = [SEVERITIES.index(f["severity"]) for f in findings]
    assert order == sorted(order)


def test_what_cannot_be_read_is_status_two(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(damaged.rglob("*.npz"))
    file.write_bytes(file.read_bytes()[:-200])
    assert main(damaged, tmp_path) == 2
    printed = capsys.readouterr().out
    assert "UNREADABLE" in printed
    assert file.name in printed
    assert json.loads((tmp_path / "crosscheck.json").read_text())  # the other files were checked all the same


def test_an_edit_is_held_against_the_model_and_its_null_space(run: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_llama()
    weight = model.get_parameter(f"{LAYERS[0]}.weight").detach().clone()
    (own,) = [f for f in run["stats"].rglob("projection.pt")]
    cache = torch.load(own, weights_only=True)[f"{LAYERS[0]}.weight"]
    ua, ub, mask = (cache[k].double() for k in ("Ua", "Ub", "M"))
    (file,) = run["stats"].rglob("*layers.0*.npz")
    factors = torch.load(file, weights_only=True)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    step = factors["B"].double() @ noise @ factors["A"].double()  # as gradients do, along the sharp directions
    step *= weight.double().norm() / step.norm()
    inside = ub @ ((ub.T @ step @ ua) * mask.T) @ ua.T
    statuses = {}
    for name, delta in (("projected", inside), ("unprojected", step)):
        edited = tmp_path / f"{name}.pt"
        torch.save({f"{LAYERS[0]}.weight": (weight.double() + 1e-2 * delta).float()}, edited)
        report = crosscheck([run["stats"], edited], model=model, layer=LAYERS[0])
        statuses[name] = (report.status, "update-outside-subspace" in report.faults)
    assert statuses == {"projected": (0, False), "unprojected": (1, True)}


@pytest.mark.parametrize("fault", [None, "wrong-end-threshold", "wrong-gamma", "stale-mask"])
def test_a_cache_alone_is_held_against_recomputed_factors(run: dict[str, Path], tmp_path: Path, fault) -> None:  # type: ignore[no-untyped-def]
    (own,) = run["stats"].rglob("projection.pt")
    content = torch.load(own, weights_only=True)
    first, second = (f"{layer}.weight" for layer in LAYERS)
    if fault == "wrong-end-threshold":
        content[first]["M"] = ~content[first]["M"]
    if fault == "stale-mask":
        content[first], content[second] = content[second], content[first]
    torch.save(content, tmp_path / "projection.pt")
    gamma = 0.5 if fault == "wrong-gamma" else GAMMA
    batches = encode_documents(tiny_tokenizer(), TEXT, batch_size=1)
    report = crosscheck(tmp_path, model=tiny_llama(), data=batches, gamma=gamma)
    alarms = {f.fault for f in report.findings if f.severity in ("error", "deviation")}
    assert alarms == ({fault} if fault else set())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_damaged_factors_beside_a_cache_are_reported_and_drawn(damaged: Path, tmp_path: Path, value: float) -> None:
    (file,) = damaged.rglob("*layers.0*.npz")
    content = torch.load(file, weights_only=True)
    content["B"] = content["B"] * value
    torch.save(content, file)
    assert main(damaged, tmp_path / "report") == 1
    for name in ("crosscheck.json", "curves.json"):
        json.loads((tmp_path / "report" / name).read_text(), parse_constant=lambda word: pytest.fail(word))
    assert (tmp_path / "report" / "crosscheck.png").stat().st_size > 10_000


def test_numbers_that_json_does_not_know_are_strings() -> None:
    found = Finding("d", "error", "there", float("nan"), float("inf"), "").as_json()
    assert (found["measured"], found["bound"]) == ("nan", "inf")
    assert Finding("d", "ok", "", 0.5, 3, "").as_json()["measured"] == 0.5


def test_bad_arguments_are_one_line(run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(expected: str, *arguments: object, **options: object) -> None:
        assert main(*arguments, **options) == 2  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error

    refused("no such file or folder", tmp_path / "missing", tmp_path)
    refused("--data needs --model", run["stats"], tmp_path, data=run["text"])
    refused("strictly between 0 and 1", run["stats"], tmp_path, gamma=1.0)
    refused("did you mean", run["stats"], tmp_path, model=str(run["model"]), layer="model.layers.7.mlp.down_proj")
    refused("no such file", run["stats"], tmp_path, model=str(run["model"]), data=tmp_path / "none.txt")
    refused("--batch-size", run["stats"], tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="no paths"):
        crosscheck([])
    with pytest.raises(ValueError, match="without the model"):
        crosscheck(run["stats"], data=[])


def test_a_folder_with_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "state.pt")
    report = crosscheck(tmp_path)
    assert report.status in (1, 2)
    assert report.findings or report.unreadable


def test_assert_agrees_is_for_other_peoples_tests(run: dict[str, Path], damaged: Path) -> None:
    report = assert_agrees(run["stats"], gamma=GAMMA)
    assert report.parts
    flip(damaged)
    with pytest.raises(AssertionError, match="wrong end of the spectrum"):
        assert_agrees(damaged, gamma=GAMMA)
    assert assert_agrees(damaged, gamma=GAMMA, known=["wrong-end-threshold"]).count("error") > 0
    with pytest.raises(ValueError, match="worst must be"):
        assert_agrees(damaged, worst="fatal")  # type: ignore[arg-type]


def test_tables_show_the_worst_first_and_escape() -> None:
    fine = Finding("a", "ok", "here", 1.0, 2.0, "")
    bad = Finding("b", "error", "there", "x|y", None, "because | of\nthis", "do that")
    text = as_text([fine, bad])
    assert text.index("ERROR") < text.index("OK")
    assert "→ do that" in text
    page = as_markdown([bad, fine], "Title", ["f.npz: cut short"])
    assert "because \\| of this" in page
    assert "f.npz: cut short" in page
    with pytest.raises(ValueError, match="severity"):
        Finding("c", "fine", "", None, None, "")  # type: ignore[arg-type]


def test_curves_are_those_of_plain_linear_algebra(run: dict[str, Path]) -> None:
    report = crosscheck(run["stats"], layer=LAYERS[1])
    (part,) = report.parts
    A, S = part.tensor("A"), part.tensor("S")
    assert A is not None
    assert S is not None
    drawn = curves(part, {"A": A, "S": torch.eye(len(S))}, GAMMA)
    index, value = zip(*drawn["spectra"]["A"], strict=True)
    exact = torch.linalg.eigvalsh(A.double()).flip(0)
    torch.testing.assert_close(torch.tensor(value), exact[torch.tensor(index).long() - 1].float(), rtol=1e-4, atol=1e-7)
    assert drawn["overlaps"]["A"]["points"][2][1] == pytest.approx(1, abs=1e-3)
    assert drawn["overlaps"]["S"]["points"][0][1] < 1  # the first axis is no eigenvector of S
    assert drawn["mask"]["gamma"] == GAMMA
    kept = torch.tensor(drawn["mask"]["kept"])
    assert not bool(kept[0, 0])  # the sharpest direction is removed
    assert bool(kept[-1, -1])
