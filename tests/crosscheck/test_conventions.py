"""Factors made by explicit loops in each convention, found by name."""

from typing import Any

import pytest
import torch
from production import Made, Run, gpt2, images, lenet, llama, produce, texts
from torch import Tensor

from curvlab.batches import Batch
from curvlab.crosscheck.conventions import Subject, check
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.parts import Item, Part
from curvlab.curvature import KFAC
from curvlab.losses import CrossEntropy

DOWN = "model.layers.1.mlp.down_proj"
PROJ = "transformer.h.0.mlp.c_proj"
SEEDS = (0, 1)


def part_of(layer: str, count: float | None = None, **tensors: Tensor) -> Part:
    items: dict[Any, Item] = {role: Item(role, t, f"file: {role}", "named") for role, t in tensors.items()}  # type: ignore[arg-type]
    return Part(layer, items, count)


def stored(made: Made, layer: str, dtype: torch.dtype = torch.float32) -> Part:
    return part_of(layer, made.N, A=made.A.to(dtype), S=made.S.to(dtype))


def faults(findings: list[Finding], *severities: str) -> set[str | None]:
    return {f.fault for f in findings if f.severity in (severities or ("error", "deviation", "convention"))} - {None}


def one(findings: list[Finding], check_name: str) -> Finding:
    (found,) = [f for f in findings if f.check == check_name]
    return found


def severities(findings: list[Finding]) -> set[str]:
    return {f.severity for f in findings}


MODELS = {"llama": (llama, DOWN), "gpt2": (gpt2, PROJ)}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 1), ("gpt2", 2)])
def test_our_convention_is_ok(name: str, left: bool, seed: int) -> None:
    make, layer = MODELS[name]
    model, data = make(seed), texts(seed, left=left, prompts=seed == 1)
    subject = Subject(model, CrossEntropy(), data)
    for labels in ("data", "model"):
        made = produce(model, layer, data, Run(labels=labels, seed=0))
        findings = check(stored(made, layer), subject)
        assert not severities(findings) & {"error", "deviation"}, findings
        assert faults(findings) == ({"empirical-labels"} if labels == "data" else set())
        assert one(findings, "convention-A").measured < 1e-5  # type: ignore[operator]
        assert one(findings, "factor-scale").severity == "ok"
        assert one(findings, "sample-count").severity == "ok"


CASES = {
    "last-position-dropped": (Run(positions="last dropped"), "convention"),
    "first-position-dropped": (Run(positions="first dropped"), "convention"),
    "prompt-positions-dropped": (Run(positions="prompt dropped"), "deviation"),
    "padding-counted": (Run(positions="padding"), "deviation"),
    "centred-covariance": (Run(centred=True), "deviation"),
    "unnormalised-sums": (Run(scale="sum"), "convention"),
    "mean-reduced-gradients": (Run(reduction="batch mean"), "deviation"),
    "per-batch-gradients": (Run(form="batch"), "deviation"),
    "bias-joined": (Run(bias=True), "convention"),
}


@pytest.mark.parametrize("fault", CASES)
@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 1), ("gpt2", 2)])
def test_each_convention_is_named(name: str, fault: str, seed: int) -> None:
    make, layer = MODELS[name]
    how, severity = CASES[fault]
    if how.bias and name == "llama":
        pytest.skip("its layers have no bias")
    model, data = make(seed), texts(seed + 10, prompts=fault == "prompt-positions-dropped", left=seed == 1)
    findings = check(stored(produce(model, layer, data, how), layer), Subject(model, CrossEntropy(), data))
    named = faults(findings) - {"per-batch-inputs"}
    assert named == {"empirical-labels", fault}, [f for f in findings if f.severity != "ok"]
    assert {f.severity for f in findings if f.fault == fault} == {severity}
    assert "error" not in severities(findings)


@pytest.mark.parametrize("layer", ["0", "3", "6", "8"])
@pytest.mark.parametrize("how", [Run(), Run(labels="model"), Run(reduction="batch mean"), Run(form="example")], ids=str)
def test_image_classifiers(layer: str, how: Run) -> None:
    model, data = lenet(0), images(0)
    findings = check(stored(produce(model, layer, data, how), layer), Subject(model, CrossEntropy(), data))
    expected = {"empirical-labels"} if how.labels == "data" else set()
    assert faults(findings) == expected | ({"mean-reduced-gradients"} if how.reduction != "sum" else set())
    assert "error" not in severities(findings)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_drawn_with_an_unknown_seed_are_told_from_the_data_s(seed: int) -> None:
    model, data = llama(seed), texts(seed, sizes=(8, 8, 8, 8))
    findings = check(
        stored(produce(model, DOWN, data, Run(labels="model", seed=99)), DOWN), Subject(model, CrossEntropy(), data)
    )
    found = one(findings, "convention-S")
    assert found.severity == "ok"
    assert "drawn from the model" in found.cause
    assert "statistical" in found.cause
    assert not faults(findings)


@pytest.mark.parametrize("seed", SEEDS)
def test_swapped_sides(seed: int) -> None:
    model, data = llama(seed), texts(seed)
    made = produce(model, DOWN, data, Run())
    findings = check(part_of(DOWN, made.N, A=made.S.float(), S=made.A.float()), Subject(model, CrossEntropy(), data))
    assert faults(findings, "error") == {"swapped-factors"}
    square = "model.layers.0.self_attn.q_proj"  # 8 × 8: shapes cannot tell
    made = produce(model, square, data, Run())
    findings = check(part_of(square, made.N, A=made.S.float(), S=made.A.float()), Subject(model, CrossEntropy(), data))
    assert faults(findings, "error") == {"swapped-factors"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "pair", [(DOWN, DOWN.replace("1", "0")), (DOWN.replace("down", "gate"), DOWN.replace("down", "up"))]
)
def test_another_layer_s_factors(pair: tuple[str, str], seed: int) -> None:
    """Gate and up projections have the same inputs: S alone tells them apart."""
    model, data = llama(seed), texts(seed)
    claimed, own = pair
    made = produce(model, own, data, Run())
    findings = check(stored(made, claimed), Subject(model, CrossEntropy(), data))
    assert faults(findings, "error") == {"other-layer"}
    assert own in next(f.cause for f in findings if f.fault == "other-layer")
    nameless = check(stored(made, ""), Subject(model, CrossEntropy(), data))
    assert one(nameless, "layer").measured == own
    assert "error" not in severities(nameless)


@pytest.mark.parametrize("seed", SEEDS)
def test_stale_factors(seed: int) -> None:
    """All weights drifted; only this layer's did; and its edited weights are known."""
    data = texts(seed)
    drifted, model = llama(seed), llama(seed)
    with torch.no_grad():
        for p in drifted.parameters():
            p += 0.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    subject = Subject(model, CrossEntropy(), data)
    findings = check(stored(produce(drifted, DOWN, data, Run()), DOWN), subject)
    assert faults(findings, "error") == {"stale-factors"}
    only = llama(seed)
    with torch.no_grad():
        only.get_submodule(DOWN).weight += 0.1
    made = produce(only, DOWN, data, Run())
    findings = check(stored(made, DOWN), subject)
    assert faults(findings, "error") == {"stale-factors"}
    assert "A fits" in next(f.cause for f in findings if f.fault == "stale-factors")
    before = model.get_submodule(DOWN).weight.clone()
    edited = only.get_submodule(DOWN).weight.detach()
    findings = check(part_of(DOWN, made.N, A=made.A, S=made.S, edited=edited), subject)
    assert "the edited weights" in next(f.cause for f in findings if f.fault == "stale-factors")
    assert torch.equal(model.get_submodule(DOWN).weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stored_precision(dtype: torch.dtype) -> None:
    model, data = gpt2(3), texts(3)
    made = produce(model, PROJ, data, Run(positions="last dropped"))
    part = part_of(PROJ, A=made.A.to(dtype).float() if dtype == torch.bfloat16 else made.A, S=made.S.to(dtype))
    findings = check(part, Subject(model, CrossEntropy(), data))
    assert faults(findings) == {"empirical-labels", "last-position-dropped"}
    assert ("bfloat16" in one(findings, "convention-A").cause) == (dtype == torch.bfloat16)


def test_similar_text_is_measured() -> None:
    model = llama(0)
    made = produce(model, DOWN, texts(5, sizes=(24, 24, 21)), Run())
    findings = check(stored(made, DOWN), Subject(model, CrossEntropy(), texts(6, sizes=(24, 24))))
    found = one(findings, "convention")
    assert found.severity == "deviation"
    assert "similar" in found.cause
    assert "shared to" in found.cause
    assert one(findings, "sample-count").severity == "deviation"


EKFAC = {
    None: Run(form="example"),
    "per-batch-squares": Run(form="batch"),
    "mean-reduced-gradients": Run(form="example", reduction="batch mean"),
}


@pytest.mark.parametrize("fault", EKFAC)
@pytest.mark.parametrize("name", ["llama", "lenet"])
def test_eigenvalues_in_the_stored_basis(name: str, fault: str | None) -> None:
    model, layer, data = (llama(0), DOWN, texts(0)) if name == "llama" else (lenet(0), "3", images(0))
    made = produce(model, layer, data, EKFAC[fault])
    u_out, u_in = (
        torch.linalg.qr(torch.randn_like(C, generator=torch.Generator().manual_seed(4)))[0] for C in (made.S, made.A)
    )
    values = (u_out.T @ made.gradients @ u_in).square().sum(0) / made.terms
    part = part_of(layer, U_out=u_out.float(), U_in=u_in.float(), eigenvalues=values.float())
    findings = check(part, Subject(model, CrossEntropy(), data))
    assert faults(findings) == {"empirical-labels", fault} - {None}
    assert "error" not in severities(findings)


def test_products_are_told_from_corrected_eigenvalues() -> None:
    model, data = llama(0), texts(0)
    made = produce(model, DOWN, data, Run())
    (values_in, u_in), (values_out, u_out) = (torch.linalg.eigh(C) for C in (made.A, made.S))
    own = {"A": made.A, "S": made.S, "U_in": u_in, "U_out": u_out, "eigenvalues": torch.outer(values_out, values_in)}
    findings = check(part_of(DOWN, **own), Subject(model, CrossEntropy(), data))
    assert "K-FAC" in one(findings, "convention-eigenvalues").cause
    assert faults(findings) == {"empirical-labels"}


def test_damping_and_wrong_shapes_are_named() -> None:
    model, data = gpt2(0), texts(0)
    made = produce(model, PROJ, data, Run())
    subject = Subject(model, CrossEntropy(), data)
    damped = part_of(PROJ, A=made.A + 0.1 * torch.eye(len(made.A)), S=made.S)
    found = one(check(damped, subject), "convention-A-damped-factor")
    assert found.severity == "deviation"
    assert "damping" in found.cause
    assert found.measured == pytest.approx(0.1 * len(made.A) / float(made.A.trace()), rel=1e-3)
    wrong = part_of(PROJ, A=made.A[:5, :5], S=made.S)
    assert faults(check(wrong, subject), "error") == {"mismatched-shapes"}
    unknown = part_of("h.7.mlp", A=made.A[:5, :5])
    assert faults(check(unknown, subject), "error") == {"mismatched-shapes"}
    broken = part_of(PROJ, A=made.A * torch.nan)
    assert faults(check(broken, subject), "error") == {"not-finite"}


def test_low_precision_sums_are_near_but_not_equal() -> None:
    """A sum that lost digits: nearest convention named, with what arithmetic would explain."""
    model, data = llama(1), texts(1)
    made = produce(model, DOWN, data, Run())
    noise = torch.randn(made.A.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rough = made.A * (1 + 3e-4 * (noise + noise.T))
    findings = check(part_of(DOWN, A=rough.float(), S=made.S.float()), Subject(model, CrossEntropy(), data))
    assert one(findings, "convention-A").severity == "deviation"
    assert "every real position" in one(findings, "convention-A").cause
    assert one(findings, "convention-S").severity == "ok"


def test_choices_add_up() -> None:
    """Several at once, and the authors' own: no error, no deviation of theirs."""
    model, data = llama(0), texts(7, prompts=True)
    subject = Subject(model, CrossEntropy(), data)
    authors = check(stored(produce(model, DOWN, data, Run(positions="with a loss")), DOWN), subject)
    assert faults(authors) == {"empirical-labels", "last-position-dropped", "prompt-positions-dropped"}
    plain = texts(7)
    made = produce(model, DOWN, plain, Run(positions="with a loss"))
    findings = check(stored(made, DOWN), Subject(model, CrossEntropy(), plain))
    assert faults(findings) == {"empirical-labels", "last-position-dropped"}
    assert severities(findings) == {"ok", "convention"}
    both = produce(model, DOWN, plain, Run(positions="padding", centred=True, scale="sum"))
    findings = check(stored(both, DOWN), Subject(model, CrossEntropy(), plain))
    assert faults(findings) == {"empirical-labels", "padding-counted", "centred-covariance", "unnormalised-sums"}


def test_passes_of_a_part_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over a batch go on over its passes."""
    model, data = gpt2(0), texts(0, left=True)
    whole = gather(model, CrossEntropy(), data, PROJ, exact=False)[PROJ]
    monkeypatch.setattr("curvlab.batches.MICRO_BATCH", 3)
    parts = gather(model, CrossEntropy(), data, PROJ, exact=False)[PROJ]
    assert whole.grams.keys() == parts.grams.keys()
    for key, gram in whole.grams.items():
        scale = float(gram.matrix.abs().max())
        assert float((parts.grams[key].matrix - gram.matrix).abs().max()) <= 1e-5 * scale, key


def test_little_memory_tries_less_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = llama(0), texts(0)
    made = produce(model, DOWN, data, Run(positions="last dropped"))
    monkeypatch.setattr("curvlab.crosscheck.adding.available", lambda device: 1000)
    findings = check(stored(made, DOWN), Subject(model, CrossEntropy(), data))
    assert one(findings, "convention-breadth").severity == "convention"
    assert faults(findings) == {"empirical-labels", "last-position-dropped"}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_false_alarm_at_any_scale_or_precision_of_the_model(dtype: torch.dtype, scale: float) -> None:
    """One document a batch, one batch; and a model in bfloat16 whose factors were summed in float32."""
    model = lenet(1).to(dtype)
    data = images(1, sizes=(1,)) if dtype == torch.float32 else images(1, sizes=(64, 64, 40))
    data = [Batch(b.inputs.to(dtype), b.targets) for b in data]
    fit = KFAC.fit(model, CrossEntropy(), data, "6", labels="exact").factors["6"]
    part = part_of("6", A=fit.A * scale, S=fit.S * scale)
    found = check(part, Subject(model, CrossEntropy(), data))
    assert {f.severity for f in found if f.check == "convention-A"} == {"ok"}
    assert {f.severity for f in found if f.check == "convention-S"} == {"ok"}
    assert "error" not in severities(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_no_draw_of_labels_can_be(seed: int) -> None:
    """Few documents, whose draws scatter as widely as other matrices."""
    model, data = llama(seed), texts(seed, sizes=(8, 8, 8, 8))
    made = produce(model, DOWN, data, Run(labels="model", seed=99))
    diagonal = check(
        part_of(DOWN, made.N, A=made.A.float(), S=made.S.diagonal().diag().float()),
        Subject(model, CrossEntropy(), data),
    )
    assert "error" in severities(diagonal)
    dropped = produce(model, DOWN, data, Run(labels="model", seed=99, positions="first dropped"))
    mixed = check(part_of(DOWN, made.N, A=made.A.float(), S=dropped.S.float()), Subject(model, CrossEntropy(), data))
    assert "first-position-dropped" not in faults(mixed)  # which A says nothing of
