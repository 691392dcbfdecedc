"""The generator of faulty artefacts: each fault is what its sentence says, checked on the files it wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from curvlab.crosscheck.fault_classes import STAGES
from curvlab.crosscheck.faults import FAULTS, KINDS, STORAGES, NoDifference, make
from curvlab.crosscheck.production import AUTHORS, OURS, Corpus, float32_gram
from curvlab.curvature import EKFAC, KFAC

EPS = torch.finfo(torch.float32).eps


def load(folder: Path) -> dict[str, Any]:
    """What the files of the authors' formats, of an archive and of safetensors hold, keys of all files together."""
    out: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            out |= {f"{path.stem}:{k}" if "ekfac" in str(path) else f"{path.parent.name}:{k}": t
                    for k, t in load_file(path).items()}  # fmt: skip
        elif path.is_file() and "mom2" in path.name:
            with np.load(path, allow_pickle=False) as archive:
                out |= {k: torch.from_numpy(archive[k]) if archive[k].ndim else archive[k].item() for k in archive}
        elif path.is_file():
            content = torch.load(path, weights_only=True)
            out |= content if isinstance(content, dict) else {"P": content}
    return out


def written(folder: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    artefact = make(folder, **options)
    return load(folder), artefact


def products(content: dict[str, Any]) -> Tensor:
    """Curvatures along the stored eigenvectors (d_in, d_out), from the stored factors."""
    A, B, Ua, Ub = (content[k].double() for k in ("A", "B", "Ua", "Ub"))
    return torch.outer((Ua.mT @ A @ Ua).diagonal(), (Ub.mT @ B @ Ub).diagonal())


def share_removed(content: dict[str, Any]) -> float:
    values = products(content)
    return float(values[~content["M"]].sum() / values.sum())


# Correct ones


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_correct_cache_obeys_the_rule(tmp_path: Path, kind: Any, shape: tuple[int, int]) -> None:
    content, artefact = written(tmp_path, shape=shape, seed=4, spectrum=kind)
    d_out, d_in = shape
    assert content["M"].shape == (d_in, d_out)
    for U, C in ((content["Ua"], content["A"]), (content["Ub"], content["B"])):
        assert float((U.mT @ U - torch.eye(len(U))).abs().max()) < 64 * EPS
        rotated = U.double().mT @ C.double() @ U.double()
        off = rotated - torch.diag(rotated.diagonal())
        assert float(off.abs().max()) < 256 * EPS * float(rotated.abs().max())
        assert float(torch.linalg.eigvalsh(C.double()).min()) > -64 * EPS * float(C.abs().max())
    values = products(content)
    removed = values[~content["M"]]
    assert float(removed.sum() / values.sum()) >= artefact.gamma - 64 * EPS
    # without the eigenspace of the smallest of them it would be less than γ
    rest = removed[removed > removed.min() * (1 + 1e-4)]
    assert float(rest.sum() / values.sum()) < artefact.gamma
    assert float(removed.min()) >= float(values[content["M"]].max()) * (1 - 1e-4) - 64 * EPS * float(values.max())


@pytest.mark.parametrize("prompts", [False, True])
def test_our_conventions_on_a_real_model_are_curvlabs(prompts: bool) -> None:
    corpus = Corpus.make((6, 9), 1, prompts)
    for choices, labels in ((OURS, "exact"), (AUTHORS, "data")):
        plain = corpus.statistics(choices)
        fit = KFAC.fit(corpus.model, corpus.loss, corpus.data, corpus.layer, labels=labels)  # type: ignore[arg-type]
        factors = fit.factors[corpus.layer]
        S = plain.S if choices.per_term else plain.S * plain.count / plain.terms
        torch.testing.assert_close(S.float(), factors.S, rtol=1e-4, atol=1e-5 * float(S.abs().max()))
        if choices == OURS:
            assert (plain.count, plain.terms) == (factors.scale.positions, factors.scale.terms)
            torch.testing.assert_close(plain.A.float(), factors.A, rtol=1e-4, atol=1e-5 * float(plain.A.abs().max()))
            squares, examples = corpus.squares(choices, *_bases(fit))
            ekfac = EKFAC.fit(corpus.model, corpus.loss, corpus.data, corpus.layer, labels="exact", kfac=fit)
            (block,) = ekfac.spectrum().blocks
            expected = block.values * plain.terms
            torch.testing.assert_close(squares, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
            assert examples == 20


def _bases(fit: KFAC) -> tuple[Tensor, Tensor]:
    (block,) = fit.spectrum().blocks
    return block.basis.u_out, block.basis.u_in  # type: ignore[union-attr, return-value]


def test_float32_sums_are_sequential() -> None:
    rows = torch.rand(5, 2, dtype=torch.float64)
    total = np.zeros((2, 2), np.float32)
    for _ in range(7000):
        for r in rows.numpy():
            total += np.outer(r, r).astype(np.float32)
    assert np.array_equal(float32_gram(rows, 7000).numpy(), total.astype(np.float64))


def test_the_same_seed_writes_the_same_numbers(tmp_path: Path) -> None:
    one, two, other = (
        load(make(tmp_path / name, seed=seed, spectrum=kind).folder)
        for name, seed, kind in (("a", 5, "power"), ("b", 5, "power"), ("c", 6, "power"))
    )
    assert all(torch.equal(one[k], two[k]) for k in ("A", "B", "Ua", "Ub", "M"))
    assert not torch.equal(one["A"], other["A"])


# Faults that the files show by themselves


def faulty(folder: Path, fault: str, **options: Any) -> dict[str, Any]:
    return written(folder, **({"spectrum": "power", "seed": 2, "fault": fault} | options))[0]


def test_swapped_factors(tmp_path: Path) -> None:
    content = faulty(tmp_path, "swapped-factors")
    assert content["A"].shape == (6, 6)
    assert content["B"].shape == (9, 9)


def test_wrong_end_and_non_strict_keep_too_much(tmp_path: Path) -> None:
    correct = written(tmp_path / "0", seed=2, gamma=0.9)[0]
    wrong = faulty(tmp_path / "1", "wrong-end-threshold", gamma=0.9)
    loose = faulty(tmp_path / "2", "non-strict-threshold", gamma=0.9)
    assert share_removed(correct) >= 0.9 > share_removed(loose)
    assert int((loose["M"] ^ correct["M"]).sum()) == 1
    values = products(wrong)
    assert bool(wrong["M"].flatten()[values.argmax()])  # the sharpest direction is kept


def test_ties_are_cut(tmp_path: Path) -> None:
    content = faulty(tmp_path, "ties-cut", spectrum="ties", gamma=0.7)
    values = products(content)
    kept, removed = values[content["M"]], values[~content["M"]]
    assert float(kept.max()) == pytest.approx(float(removed.min()), rel=1e-4)


def test_float32_energy(tmp_path: Path) -> None:
    content, artefact = written(tmp_path, shape=(32, 48), seed=1, spectrum="tail", fault="float32-energy")
    assert abs(share_removed(content) - artefact.gamma) > 4e-6
    removed, kept = products(content)[~content["M"]].min(), products(content)[content["M"]].max()
    assert float(removed) > float(kept) * (1 - 1e-3)  # sorted, only cut elsewhere


@pytest.mark.parametrize("fault", ["transposed-eigenvectors", "bfloat16-eigenvectors", "stale-mask"])
def test_eigenvectors_that_are_none(tmp_path: Path, fault: str) -> None:
    content = faulty(tmp_path, fault)
    off = 0.0
    for U, C in ((content["Ua"], content["A"]), (content["Ub"], content["B"])):
        rotated = U.double().mT @ C.double() @ U.double()
        off = max(off, float((rotated - torch.diag(rotated.diagonal())).abs().max() / rotated.abs().max()))
    assert off > (1e-3 if fault.startswith("bfloat16") else 0.02)
    if fault != "bfloat16-eigenvectors":
        assert float((content["Ua"].mT @ content["Ua"] - torch.eye(9)).abs().max()) < 64 * EPS


def test_factors_that_are_none(tmp_path: Path) -> None:
    A = {name: faulty(tmp_path / name, name)["A"] for name in ("asymmetric-factor", "indefinite-factor")}
    assert not torch.allclose(A["asymmetric-factor"], A["asymmetric-factor"].mT, rtol=1e-3)
    values = torch.linalg.eigvalsh(A["indefinite-factor"].double())
    assert float(values[0] / values[-1]) == pytest.approx(-0.05, rel=1e-3)
    content = faulty(tmp_path / "rank", "rank-above-samples")
    assert int(torch.linalg.matrix_rank(content["A"].double())) > content["N"]
    assert not bool(faulty(tmp_path / "nan", "not-finite")["A"].isfinite().all())
    content = faulty(tmp_path / "empty", "empty-tensor")
    assert 0 in (content["A"].numel(), content["B"].numel())
    assert faulty(tmp_path / "crop", "mismatched-shapes")["A"].shape == (8, 8)


def test_projectors(tmp_path: Path) -> None:
    options: dict[str, Any] = {"storage": "alphaedit", "gamma": 0.7}
    content = {
        name: faulty(tmp_path / name, name, **options) if name else written(tmp_path / "0", seed=2, **options)[0]
        for name in ("", "projector-not-idempotent", "projector-not-symmetric", "projector-wrong-end")
    }
    P = {name: c["P"][0].double() for name, c in content.items()}
    idempotent = {name: float((p @ p - p).abs().max()) for name, p in P.items()}
    symmetric = {name: float((p - p.mT).abs().max()) for name, p in P.items()}
    assert idempotent[""] < 64 * EPS > symmetric[""]
    assert idempotent["projector-not-idempotent"] > 0.01
    assert idempotent["projector-not-symmetric"] < 64 * EPS
    assert symmetric["projector-not-symmetric"] > 0.01
    C = content[""]["mom2.mom2"].double()
    assert torch.trace(P[""] @ C) < 0.5 * torch.trace(C) < torch.trace(P["projector-wrong-end"] @ C)


@pytest.mark.parametrize(
    ("fault", "least", "most"), [(None, 0.0, 1e-5), ("update-outside-subspace", 0.05, 1), ("update-adam-leak", 0.05, 1)]
)
def test_updates(tmp_path: Path, fault: str | None, least: float, most: float) -> None:
    content, _ = written(tmp_path, seed=2, spectrum="power", storage="edit", fault=fault, gamma=0.9)
    name = "model.layers.5.mlp.down_proj.weight"
    delta = (content[f"edited:{name}"] - content[f"base:{name}"]).double()
    Z = content["Ub"].double().mT @ delta @ content["Ua"].double()
    outside = float(Z[~content["M"].mT].norm() / Z.norm())
    assert least <= outside <= most


def test_kronfluences_layout(tmp_path: Path) -> None:
    correct = written(tmp_path / "0", storage="kronfluence", spectrum="model", seed=3)[0]
    wrong = written(tmp_path / "1", storage="kronfluence", spectrum="model", seed=3, fault="per-batch-squares")[0]
    for key in ("activation_covariance:fc3", "gradient_covariance:fc3", "gradient_eigenvectors:fc3"):
        assert torch.equal(correct[key], wrong[key])
    assert not torch.allclose(correct["lambda_matrix:fc3"], wrong["lambda_matrix:fc3"], rtol=0.05)
    # Σ (U_outᵀ q U_in)² over entries is Σ ‖q‖², whatever the basis
    corpus = Corpus.make((6, 9), 0, False)
    assert correct["lambda_matrix:fc3"].shape == (6, 9)
    assert corpus.layer == "fc3"


# Faults of how statistics are computed


@pytest.mark.parametrize("fault", [f.name for f in FAULTS.values() if f.model and "authors" in f.storages])
def test_choices_change_the_factors_as_they_say(tmp_path: Path, fault: str) -> None:
    content, artefact = written(tmp_path, seed=3, spectrum="model", fault=fault)
    A, B, N = content["A"].double(), content["B"].double(), content["N"]
    a = _inputs(artefact.corpus)
    real, counted = sum(len(x) for x in a), torch.cat(a)
    mean = counted.mT @ counted / len(counted)
    last_dropped = torch.cat([x[:-1] for x in a])
    authors = last_dropped.mT @ last_dropped / len(last_dropped)
    rank = float(torch.linalg.matrix_rank(A))
    if fault == "unnormalised-sums":
        assert min(_far(A / N, M) for M in (mean, authors)) < 1e-5
    elif fault == "padding-counted":
        assert real < N
    elif fault == "centred-covariance":
        assert float(torch.linalg.eigvalsh(mean - A).min()) > -0.2 * float(mean.trace())
        assert min(_far(A, M) for M in (mean, authors)) > 0.05
    elif fault == "first-position-dropped":
        rest = torch.cat([x[1:] for x in a])
        assert _far(A, rest.mT @ rest / len(rest)) < 1e-5
    elif fault == "last-position-dropped":
        assert _far(A, authors) < 1e-5
    elif fault == "prompt-positions-dropped":
        rest = torch.cat([x[2:] for x in a])
        assert _far(A, rest.mT @ rest / len(rest)) < 1e-5
    elif fault == "bias-joined":
        assert A.shape == (10, 10)
        assert float(A[-1, -1]) == pytest.approx(1)
    elif fault == "float32-accumulation":
        assert N > 1_000_000
        assert 64 * EPS < _far(A, authors) < 0.1
    elif fault == "damped-factor":
        eye = torch.eye(len(A), dtype=torch.float64)
        assert min(_far(A, M + 0.05 * M.diagonal().mean() * eye) for M in (mean, authors)) < 1e-5
    elif fault in ("empirical-labels", "mean-reduced-gradients", "per-batch-gradients"):
        assert min(_far(A, M) for M in (mean, authors)) < 1e-5  # B alone
    else:
        assert fault in ("stale-factors", "other-layer")
        assert min(_far(A, M) for M in (mean, authors)) > 0.05
    assert rank >= 1
    assert bool(B.isfinite().all())


def _inputs(corpus: Corpus) -> list[Tensor]:
    """a of the layer, one (T, d_in) a document, each run by itself without padding."""
    out: list[Tensor] = []
    hook = corpus.model.get_submodule(corpus.layer).register_forward_hook(
        lambda module, args, output: out.append(args[0][0].detach().double())
    )
    for batch in corpus.data:
        assert batch.mask is not None
        for x, mask in zip(batch.inputs, batch.mask, strict=True):
            corpus.model(x[mask][None])
    hook.remove()
    return out


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# The registry


def test_the_registry_covers_the_issue() -> None:
    issue = {
        "swapped-factors", "transposed-mask", "wrong-end-threshold", "non-strict-threshold", "unsorted-eigenvalues",
        "unnormalised-sums", "mean-reduced-gradients", "per-batch-squares", "centred-covariance", "padding-counted",
        "empirical-labels", "float32-accumulation", "bfloat16-eigenvectors", "stale-factors", "other-layer",
    }  # fmt: skip
    assert issue <= set(FAULTS)
    for name, fault in FAULTS.items():
        assert name == fault.name
        assert fault.does.endswith(".")
        assert fault.stage in STAGES
        assert fault.storages
        assert {*fault.storages} <= {*STORAGES}
        assert fault.severities
        assert "ok" not in fault.severities


def test_several_at_once(tmp_path: Path) -> None:
    content, artefact = written(tmp_path, fault=["not-finite", "wrong-end-threshold", "indefinite-factor"], seed=2)
    assert artefact.faults == ("indefinite-factor", "wrong-end-threshold", "not-finite")
    assert not bool(content["A"].isfinite().all())


def test_a_fault_without_difference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoDifference, match="equal where"):
        make(tmp_path, fault="ties-cut", spectrum="power")
    with pytest.raises(NoDifference):
        make(tmp_path, fault="rank-above-samples", spectrum="one-sample")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fault": "typo"}, "no fault 'typo'"),
        ({"fault": "swapped-factors", "storage": "rome"}, "shows in the storages"),
        ({"fault": "other-layer"}, "spectrum='model'"),
        ({"spectrum": "flat"}, "spectra are"),
        ({"shape": (1, 4)}, "at least 2"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)
