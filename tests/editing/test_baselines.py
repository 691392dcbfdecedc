"""The soft constraints and other baselines against explicit computations in float64."""

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from requests_and_text import (
    DOCUMENTS,
    FAMILIES,
    REQUESTS,
    TOKENIZER,
    displacements,
    document_texts,
    explicit,
    plain_loss,
    request_texts,
    small,
    state,
)
from torch import Tensor

from curvlab.capture import Batch
from curvlab.curvature import EKFAC
from curvlab.data.text import encode_documents
from curvlab.editing import Capability, edit
from curvlab.editing.job import Job
from curvlab.editing.methods.adam_nscl import near_smallest
from curvlab.editing.methods.ewc import diagonal
from curvlab.editing.methods.kfac_penalty import penalty
from curvlab.editing.methods.lora import _orthogonality
from curvlab.editing.methods.replay import Replay, replayed
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.spectrum import KroneckerBasis, Spectrum

LABELS: Any = "data"


def job_on(family: str = "llama", **capability: Any) -> tuple[Job, list[str]]:
    model, layers = small(family)
    how = {"labels": LABELS} | capability
    return Job(model, TOKENIZER, REQUESTS, layers, Capability(DOCUMENTS, **how), 0, "test"), layers


def moved(job: Job, layers: list[str]) -> dict[str, Tensor]:
    """Move every edited weight by a known displacement, returned as matrices."""
    generator = torch.Generator().manual_seed(7)
    deltas = {}
    for name in layers:
        weight = job.model.get_submodule(name).weight
        delta = torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
        with torch.no_grad():
            weight += delta
        transposed = type(job.model.get_submodule(name)).__name__ == "Conv1D"
        deltas[name] = delta.T if transposed else delta
    return deltas


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_the_penalty_is_the_quadratic_form(curvature: Any, family: str) -> None:
    job, layers = job_on(family)
    sums = {name: explicit(job.model, name, document_texts(DOCUMENTS)) for name in layers}
    spectrum = job.needs_capability().spectrum(job.model, TOKENIZER, layers, curvature)
    parameters = job.parameters()
    value = penalty(job, spectrum, 3.0)
    assert value().item() == 0
    deltas = moved(job, layers)
    expected, slopes = 0.0, []
    for name in layers:
        own, flat = sums[name], deltas[name].flatten()
        C = own.kronecker()
        if curvature == "ekfac":
            U = torch.kron(torch.linalg.eigh(own.S)[1], torch.linalg.eigh(own.A)[1])
            squares = sum((U.T @ q.flatten()).square() for q in own.examples) / own.terms
            C = (U * squares) @ U.T
        expected += 1.5 * (flat @ C @ flat).item()
        slopes.append((3.0 * C @ flat).view_as(deltas[name]))
    assert value().item() == pytest.approx(expected, rel=1e-9)
    for found, slope in zip(torch.autograd.grad(value(), parameters), slopes, strict=True):
        torch.testing.assert_close(found if found.shape == slope.shape else found.T, slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_ewc_weighs_each_weight_by_its_squared_gradients(family: str) -> None:
    """Document by document, each gradient summed over its tokens and then squared, over the number of tokens."""
    job, layers = job_on(family)
    model = job.model
    expected: dict[str, Tensor] = {}
    texts = document_texts(DOCUMENTS)
    for tokens, targets in texts:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
        weights = [model.get_submodule(name).weight for name in layers]
        for name, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
            expected[name] = expected.get(name, torch.zeros(())) + gradient.square()
    terms = sum(len(tokens) - 1 for tokens, _ in texts)
    F = diagonal(job)
    for name in layers:
        own = expected[name] / terms
        torch.testing.assert_close(F.values[name], own if family == "llama" else own.T, rtol=1e-9, atol=1e-15)
    parameters = job.parameters()
    value = penalty(job, F, 3.0)
    deltas = moved(job, layers)
    assert value().item() == pytest.approx(sum(1.5 * (F.values[n] * deltas[n] ** 2).sum().item() for n in layers))
    for name, found in zip(layers, torch.autograd.grad(value(), parameters), strict=True):
        slope = 3.0 * F.values[name] * deltas[name]
        torch.testing.assert_close(found if family == "llama" else found.T, slope, rtol=1e-9, atol=1e-12)


def test_bases_are_of_the_layers() -> None:
    job, layers = job_on()
    data = encode_documents(TOKENIZER, DOCUMENTS)
    (first, second) = (layer.shape for layer in find_layers(job.model, layers))
    bases = [KroneckerBasis(layer, None, torch.eye(24)) for layer in (first, second)]
    for wrong in (bases[:1], bases[::-1], [bases[0], KroneckerBasis(second, None, torch.eye(24)[:, :3])]):
        with pytest.raises(ValueError, match="a complete basis of each layer"):
            EKFAC.fit(job.model, CrossEntropy(), data, layers, labels="data", basis=wrong)


def test_ewc_takes_the_labels_of_the_capability_set() -> None:
    """In expectation over labels drawn from the model: the diagonal of J' H J."""
    job, layers = job_on(labels="exact", max_length=4)
    exact = diagonal(job)
    drawn = diagonal(job_on(labels="model", max_length=4)[0])
    data = diagonal(job_on(labels="data", max_length=4)[0])
    model = job.model
    weight = model.get_submodule(layers[1]).weight
    expected, terms = torch.zeros(weight.shape).double(), 0
    for tokens, _ in document_texts(DOCUMENTS):
        tokens = tokens[:4]
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        p = logits.softmax(-1).detach()
        for t in range(len(tokens) - 1):
            terms += 1
            J = torch.autograd.grad(
                logits[t], weight, torch.eye(logits.shape[1]).double(), retain_graph=True, is_grads_batched=True
            )[0]
            mean = torch.einsum("c,cij->ij", p[t], J)
            expected += torch.einsum("c,cij->ij", p[t], (J - mean).square())
    torch.testing.assert_close(exact.values[layers[1]], expected / terms, rtol=1e-7, atol=1e-12)
    for other in (drawn, data):
        assert not torch.allclose(other.values[layers[1]], exact.values[layers[1]])
    ratio = drawn.values[layers[1]].sum() / exact.values[layers[1]].sum()
    assert 0.3 < ratio.item() < 3


def test_a_strong_penalty_holds_the_capability_back() -> None:
    model, layers = small()
    C = {name: explicit(model, name, document_texts(DOCUMENTS)).kronecker() for name in layers}

    def spent(**how: Any) -> float:
        options = {"layers": layers, "capability": Capability(DOCUMENTS, labels=LABELS), "epochs": 10, "lr": 1e-2}
        edited = edit(model, TOKENIZER, REQUESTS, **options, **how)
        found = sum((d.flatten() @ C[n] @ d.flatten()).item() for n, d in displacements(edited).items())
        edited.undo()
        return found

    free = spent(editor="ft")
    assert spent(editor="kfac-penalty", strength=10.0) < 0.2 * free
    assert spent(editor="ewc", strength=1000.0) < 0.2 * free
    assert 0.5 * free < spent(editor="kfac-penalty", strength=1e-6) < 2 * free


@pytest.mark.parametrize("cache_prefix", [True, False])
def test_replay_is_the_capability_loss_batch_by_batch(cache_prefix: bool) -> None:
    job, layers = job_on(batch_size=2)
    job.layers = layers[1:]
    batches = encode_documents(TOKENIZER, DOCUMENTS, batch_size=2)
    values = [plain_loss(job.model, batch).item() for batch in batches]
    loss = replayed(job, Replay(strength=0.7, cache_prefix=cache_prefix))
    found = [loss().item() / 0.7 for _ in range(8)]
    for start in range(0, 8, 2):  # each pass over the documents takes every batch once
        assert sorted(found[start : start + 2]) == pytest.approx(sorted(values), rel=1e-9)
    assert len({tuple(found[start : start + 2]) for start in range(0, 8, 2)}) == 2  # in an order drawn for each pass


def test_a_step_of_replay_descends_the_sum() -> None:
    model, layers = small()
    weights = [model.get_submodule(name).weight for name in layers]
    (documents,) = encode_documents(TOKENIZER, DOCUMENTS)
    texts = request_texts(REQUESTS, mask_prompt=True)
    whole = plain_loss(model, _batch(texts)) + 2.0 * plain_loss(model, documents)
    gradients = torch.autograd.grad(whole, weights)
    edited = edit(
        model, TOKENIZER, REQUESTS, editor="replay", layers=layers, capability=DOCUMENTS, strength=2.0,
        optimizer="sgd", lr=0.1, epochs=1,
    )  # fmt: skip
    for name, gradient in zip(layers, gradients, strict=True):
        torch.testing.assert_close(displacements(edited)[name], -0.1 * gradient, rtol=1e-8, atol=1e-10)


def _batch(texts: list[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(tokens) for tokens, _ in texts)
    tokens = torch.tensor([t + [0] * (length - len(t)) for t, _ in texts])
    targets = torch.tensor([y + [-100] * (length - len(y)) for _, y in texts])
    real = torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in texts])
    return Batch({"input_ids": tokens, "attention_mask": real}, targets)


@pytest.mark.parametrize("ratio", [3.0, 100.0])
def test_adam_nscl_moves_along_the_smallest_eigenvectors_alone(ratio: float) -> None:
    model, layers = small()
    free = {}
    for name in layers:
        own = explicit(model, name, document_texts(DOCUMENTS))
        values, vectors = torch.linalg.eigh(own.A)
        free[name] = vectors[:, values <= ratio * values[0]]
        assert 0 < free[name].shape[1] < len(values)
    edited = edit(
        model, TOKENIZER, REQUESTS, editor="adam-nscl", layers=layers, capability=DOCUMENTS, ratio=ratio, lr=1e-2,
        epochs=4,
    )  # fmt: skip
    for name, delta in displacements(edited).items():
        assert delta.norm() > 1e-3
        inside = delta @ free[name] @ free[name].T
        assert ((delta - inside).norm() / delta.norm()).item() < 1e-8
        assert torch.linalg.matrix_rank(delta, rtol=1e-6) <= free[name].shape[1]
    kept = sum(16 * V.shape[1] for V in free.values())
    assert edited.counts["kept_dimensions"] == kept
    assert edited.counts["refits"] == 0


def test_rounding_does_not_set_the_smallest_eigenvalue() -> None:
    """Fewer positions than inputs: the smallest eigenvalues are zero, and whatever rounding makes of them is free."""
    model, layers = small()
    spectrum = Capability(DOCUMENTS[2:3], max_length=12).spectrum(model, TOKENIZER, layers, "covariance")
    noise = torch.Generator().manual_seed(0)
    blocks = []
    for block in spectrum.blocks:
        rounding = 1e-9 * block.values.max() * torch.rand(24, dtype=torch.float64, generator=noise)
        blocks.append(replace(block, values=block.values + rounding))
    exact, rounded = (near_smallest(s, 10.0) for s in (spectrum, Spectrum(tuple(blocks))))
    for a, b in zip(exact.blocks, rounded.blocks, strict=True):
        assert torch.equal(a.removed, b.removed)
        assert 0 < int(a.removed[0].sum()) <= 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["lora", "adalora"])
def test_merged_low_rank_updates_are_the_wrapped_outputs(
    variant: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = small(family)
    before, kind, seen = state(model), type(model), []
    (batch,) = encode_documents(TOKENIZER, DOCUMENTS)
    wrap = peft.get_peft_model

    def wrapping(*args: Any, **how: Any) -> Any:
        wrapped: Any = wrap(*args, **how)
        own = wrapped.merge_and_unload

        def merging() -> Any:
            wrapped.eval()
            with torch.no_grad():
                seen.append(wrapped(**batch.inputs).logits)
            return own()

        wrapped.merge_and_unload = merging
        return wrapped

    monkeypatch.setattr(peft, "get_peft_model", wrapping)
    edited = edit(
        model, TOKENIZER, REQUESTS, editor="lora", variant=variant, rank=2, epochs=12, batch_size=3, skip_below=0.0,
        stop_below=0.0,
    )  # fmt: skip
    with torch.no_grad():
        found = model(**batch.inputs).logits
    torch.testing.assert_close(found[batch.mask], seen[0][batch.mask], rtol=1e-5, atol=1e-5)
    assert (type(model), list(model.state_dict())) == (kind, list(before))
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
    projections = ("q_proj", "v_proj") if family == "llama" else ("c_attn",)
    assert {n.split(".")[-2] for n in edited.originals} == set(projections)
    assert len(edited.originals) == 2 * len(projections)
    for name, delta in displacements(edited).items():
        assert 1 <= torch.linalg.matrix_rank(delta, rtol=1e-5) <= (2 if variant == "lora" else 3), name


def test_orthogonality_by_hand() -> None:
    holder = torch.nn.ParameterDict(
        {"lora_A": torch.nn.Parameter(torch.randn(3, 8)), "lora_B": torch.nn.Parameter(torch.randn(5, 3))}
    )
    A, B = holder["lora_A"], holder["lora_B"]
    one = (A @ A.T - torch.eye(3)).square().sum().sqrt()
    two = (B.T @ B - torch.eye(3)).square().sum().sqrt()
    torch.testing.assert_close(_orthogonality(holder), (one + two) / 2)
