"""CrispEdit against explicit Kronecker products in float64: null spaces, ellipsoids, drift, rounds."""

from typing import Any

import pytest
import torch
from requests_and_text import (
    DOCUMENTS,
    FAMILIES,
    REQUESTS,
    TOKENIZER,
    Explicit,
    dense,
    displacements,
    document_texts,
    explicit,
    plain_loss,
    request_texts,
    same,
    sharp,
    small,
    state,
)
from torch import Tensor

from curvlab.data.text import encode_documents
from curvlab.editing import Capability, edit
from curvlab.editing import capability as capability_module
from curvlab.editing.methods.crispedit import Constrained
from curvlab.layers import find_layers

TIGHT = 1e-8


def run(model: Any, editor: str = "crispedit", *, requests: Any = REQUESTS, seed: int = 0, **options: Any) -> Any:
    given = {"layers": find(model), "capability": Capability(DOCUMENTS, labels="data"), "seed": seed}
    training = {"optimizer": "sgd", "lr": 0.1, "epochs": 3, "batch_size": 3, "gamma": 0.8, "drift": None}
    return edit(model, TOKENIZER, requests, editor=editor, **(given | training | options))


def find(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(("mlp.down_proj", "mlp.c_proj"))]


def outside(delta: Tensor, removed: Tensor) -> float:
    """Share of δ in the span of the columns `removed`."""
    flat = delta.flatten()
    return ((removed.T @ flat).norm() / flat.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_sgd_stays_in_the_null_space_of_the_explicit_kronecker_product(family: str) -> None:
    model, layers = small(family)
    removed = {name: sharp(explicit(model, name, document_texts(DOCUMENTS)).kronecker(), 0.8) for name in layers}
    edited = run(model)
    assert edited.losses[-1] < edited.losses[0]
    for name, delta in displacements(edited).items():
        assert delta.norm() > 1e-3
        assert 0 < removed[name].shape[1] < delta.numel()
        assert outside(delta, removed[name]) < TIGHT
    kept = sum(removed[name].shape[0] - removed[name].shape[1] for name in layers)
    assert edited.counts["kept_dimensions"] == kept
    assert edited.counts["leak"] < TIGHT


def test_one_step_is_the_projected_gradient() -> None:
    model, layers = small()
    removed = {name: sharp(explicit(model, name, document_texts(DOCUMENTS)).kronecker(), 0.8) for name in layers}
    (batch,) = Constrained().encode(TOKENIZER, REQUESTS)
    weights = [model.get_submodule(name).weight for name in layers]
    gradients = torch.autograd.grad(plain_loss(model, batch), weights)
    edited = run(model, epochs=1, batch_size=len(REQUESTS), lr=0.3)
    for name, gradient in zip(layers, gradients, strict=True):
        flat = gradient.flatten()
        expected = -0.3 * (flat - removed[name] @ (removed[name].T @ flat))
        torch.testing.assert_close(displacements(edited)[name].flatten(), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("drift", [None, 0.01])
def test_the_eigenbasis_is_the_projected_gradient_for_sgd(drift: float | None) -> None:
    found = []
    for project in ("gradient", "eigenbasis"):
        model, _ = small("gpt2")
        edited = run(model, project=project, drift=drift, epochs=4)
        found.append((edited, displacements(edited)))
    assert found[0][0].losses == pytest.approx(found[1][0].losses, rel=1e-9)
    assert found[0][0].counts["refits"] == found[1][0].counts["refits"]
    assert (found[0][0].counts["refits"] > 0) == (drift is not None)
    for name, delta in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], delta, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("project", ["gradient", "update", "eigenbasis"])
def test_adam(project: str) -> None:
    """The paper's way leaks; projected updates and the eigenbasis do not."""
    model, layers = small()
    removed = {name: sharp(explicit(model, name, document_texts(DOCUMENTS)).kronecker(), 0.8) for name in layers}
    edited = run(model, optimizer="adam", lr=1e-2, project=project)
    leaks = [outside(delta, removed[name]) for name, delta in displacements(edited).items()]
    assert (min(leaks) > 0.01) if project == "gradient" else (max(leaks) < TIGHT)
    assert edited.counts["leak"] == pytest.approx(max(leaks), rel=1, abs=TIGHT)
    assert edited.losses[-1] < edited.losses[0]


@pytest.mark.parametrize("project", ["update", "eigenbasis"])
def test_an_ellipsoid_spends_its_budget_and_no_more(project: str) -> None:
    model, layers = small()
    C = {name: explicit(model, name, document_texts(DOCUMENTS)).kronecker() for name in layers}

    def spent(**options: Any) -> float:
        edited = run(model, "crispedit-eps", project=project, optimizer="adam", lr=1e-2, **options)
        moved = displacements(edited)
        edited.undo()
        cost = sum(0.5 * delta.flatten() @ C[name] @ delta.flatten() for name, delta in moved.items())
        assert edited.counts["spent"] == pytest.approx(float(cost), rel=1e-6)
        return float(cost)

    free = spent(epsilon=1e6)
    for epsilon in (free / 10, free / 1000):
        assert spent(epsilon=epsilon) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("project", ["gradient", "update", "eigenbasis"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_the_drift_rule_refits_at_the_drifted_weights(
    curvature: str, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = small()
    start = {name: find_layers(model, name)[0].matrix().clone() for name in layers}
    tokens = encode_documents(TOKENIZER, DOCUMENTS)[0].inputs
    seen: list[tuple[str, float, Tensor]] = []
    fit = Capability.fit

    def spy(self: Capability, model: Any, tokenizer: Any, layers: Any, curvature: Any, **how: Any) -> Any:
        drift = max(
            float(((W := layer.matrix()) - start[layer.name]).norm() / start[layer.name].norm())
            for layer in find_layers(model, layers)
        )
        assert how.get("kfac") is None or not seen or drift == 0  # factors of other weights are not reused
        with torch.no_grad():
            logits = model(**tokens).logits
            other, _ = small()
            other.load_state_dict({n: v for n, v in model.state_dict().items()})
            torch.testing.assert_close(logits, other(**tokens).logits)  # what is seen is what the weights say
        seen.append((curvature, drift, W))
        return fit(self, model, tokenizer, layers, curvature, **how)

    monkeypatch.setattr(Capability, "fit", spy)
    edited = run(model, curvature=curvature, project=project, drift=0.02, epochs=6, lr=0.2)
    at_start = 2 if curvature == "ekfac" else 1  # its factors are kept too
    assert [d == 0 for _, d, _ in seen] == [True] * at_start + [False] * (len(seen) - at_start)
    drifts = [d for _, d, _ in seen[at_start:]]
    assert edited.counts["refits"] == len(drifts) > 0
    assert drifts[0] > 0.02
    assert edited.counts["leak"] < TIGHT
    assert len(drifts) <= 5  # not after the last epoch


def test_the_leak_is_the_largest_between_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit in between begins a new displacement; what leaked before it is not forgotten."""
    model, _ = small()
    edited = run(model, optimizer="adam", lr=1e-2, epochs=2, drift=1e-6)
    assert edited.counts["refits"] == 1
    first = run(small()[0], optimizer="adam", lr=1e-2, epochs=1)
    assert edited.counts["leak"] >= first.counts["leak"] > 0.01


def test_ekfac_and_covariance_use_what_they_say() -> None:
    model, layers = small()
    sums = {name: explicit(model, name, document_texts(DOCUMENTS)) for name in layers}
    edited = run(model, "crispedit-covariance")
    for name, delta in displacements(edited).items():
        top = sharp(sums[name].A, 0.8)
        assert ((delta @ top).norm() / delta.norm()).item() < TIGHT
    edited.undo()
    edited = run(model, "crispedit-ekfac")
    for name, delta in displacements(edited).items():
        own = sums[name]
        U_in, U_out = torch.linalg.eigh(own.A)[1], torch.linalg.eigh(own.S)[1]
        values = torch.stack([(U_out.T @ q @ U_in).square() for q in own.examples]).sum(0)
        order = values.flatten().sort(descending=True)
        k = int((order.values.cumsum(0) / values.sum() < 0.8).sum()) + 1
        removed = order.indices[:k]
        Z = (U_out.T @ delta @ U_in).flatten()
        assert (Z[removed].norm() / Z.norm()).item() < TIGHT
        products = torch.outer(torch.linalg.eigvalsh(own.S), torch.linalg.eigvalsh(own.A)).flatten()
        assert set(removed.tolist()) != set(products.sort(descending=True).indices[:k].tolist())  # not K-FAC's


def added(*parts: Explicit) -> Tensor:
    """The Kronecker product of the parts' sums, by tokens."""
    A, S = sum(p.A for p in parts), sum(p.S for p in parts)
    positions, terms = sum(p.positions for p in parts), sum(p.terms for p in parts)
    return torch.kron(torch.as_tensor(S / terms), torch.as_tensor(A / positions))


def shared(base: Explicit, rounds: list[Explicit], share: float) -> Tensor:
    """The Kronecker product of means, `share` of them the capability set's."""
    A = sum(p.A for p in rounds) / sum(p.positions for p in rounds)
    S = sum(p.S for p in rounds) / sum(p.terms for p in rounds)
    A = share * base.A / base.positions + (1 - share) * A
    S = share * base.S / base.terms + (1 - share) * S
    return torch.kron(S, A)


@pytest.mark.parametrize(("mask_factors", "positions"), [(False, "all"), (True, "all"), (True, "loss")])
@pytest.mark.parametrize("weights", ["tokens", "share"])
def test_rounds_merge_the_factors_of_edits_after_they_were_made(
    weights: str, mask_factors: bool, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    of = Constrained.of
    monkeypatch.setattr(Constrained, "of", lambda self, spectrum: seen.append(spectrum) or of(self, spectrum))
    options = {"weights": weights, "share": 0.3, "mask_factors": mask_factors, "chunk": 2}
    options["factor_positions"] = positions
    model, layers = small()
    base = {name: explicit(model, name, document_texts(DOCUMENTS)) for name in layers}
    edited = run(model, "crispedit-seq", **options)
    whole = state(model)
    edited.undo()
    assert len(seen) == 3  # rounds of 2, 2 and 1

    parts: dict[str, list[Explicit]] = {name: [] for name in layers}
    for number, spectrum in enumerate(seen[:3]):
        for name in layers:
            rounds = parts[name]
            if not rounds:
                expected = base[name].kronecker()
            elif weights == "tokens":
                expected = added(base[name], *rounds)
            else:
                expected = shared(base[name], rounds, 0.3)
            torch.testing.assert_close(dense(spectrum, name), expected, rtol=1e-8, atol=1e-12)
        # the model after this round: the same edit, ended here
        run(model, "crispedit-seq", requests=REQUESTS[: 2 * number + 2], **options)
        texts = request_texts(REQUESTS[2 * number : 2 * number + 2], mask_prompt=mask_factors)
        for name in layers:
            parts[name].append(explicit(model, name, texts, positions))
        if number < 2:
            model, _ = small()
    assert same(state(model), whole)
    for count, of in (("edits_input_share", "A"), ("edits_gradient_share", "S")):
        traces = {n: [float(getattr(part, of).trace()) for part in (base[n], *parts[n][:2])] for n in layers}
        expected = sum(sum(found[1:]) / sum(found) for found in traces.values()) / len(layers)
        assert edited.counts[count] == pytest.approx(expected, rel=1e-8)


def test_each_round_stays_in_its_own_null_space() -> None:
    """The second round leaves the capability set and the first round's edits alone."""
    model, layers = small()
    base = {name: explicit(model, name, document_texts(DOCUMENTS)) for name in layers}
    first = run(model, "crispedit-seq", requests=REQUESTS[:2], chunk=2)
    middle = displacements(first)
    removed = {}
    for name in layers:
        assert outside(middle[name], sharp(base[name].kronecker(), 0.8)) < TIGHT
        texts = request_texts(REQUESTS[:2], mask_prompt=False)
        removed[name] = sharp(added(base[name], explicit(model, name, texts)), 0.8)
    first.undo()
    whole = displacements(run(model, "crispedit-seq", requests=REQUESTS[:4], chunk=2))
    for name in layers:
        second = whole[name] - middle[name]
        assert second.norm() > 1e-3
        assert outside(second, removed[name]) < 1e-6


def test_a_capability_set_keeps_its_curvature_for_the_weights_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[str] = []
    fit = Capability.fit

    def spy(self: Capability, model: Any, tokenizer: Any, layers: Any, curvature: Any, **how: Any) -> Any:
        fits.append(curvature)
        return fit(self, model, tokenizer, layers, curvature, **how)

    monkeypatch.setattr(Capability, "fit", spy)
    model, layers = small()
    capability = Capability(DOCUMENTS, labels="data")
    first = run(model, capability=capability)
    assert first.curvature_seconds > 0
    assert fits == ["kfac"]
    first.undo()
    run(model, capability=capability, gamma=0.5).undo()
    run(model, "crispedit-ekfac", capability=capability).undo()
    run(model, "crispedit-eps", capability=capability).undo()
    assert fits == ["kfac", "ekfac"]  # K-FAC's factors serve both
    run(model, capability=capability, layers=layers[:1]).undo()
    assert fits == ["kfac", "ekfac", "kfac"]
    # a weight far from the edited layers moves: the curvature is another one
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] += 0.1
    other = capability.spectrum(model, TOKENIZER, layers, "kfac")
    assert fits == ["kfac", "ekfac", "kfac", "kfac"]
    torch.testing.assert_close(
        dense(other, layers[0]), explicit(model, layers[0], document_texts(DOCUMENTS)).kronecker()
    )
    capability.forget()
    capability.spectrum(model, TOKENIZER, layers, "kfac")
    assert len(fits) == 5


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "covariance"])
def test_the_weights_are_looked_through_once_a_question(curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    checksum = capability_module.weights_checksum
    monkeypatch.setattr(capability_module, "weights_checksum", lambda model: looked.append(1) or checksum(model))
    model, layers = small()
    capability = Capability(DOCUMENTS, labels="data")
    for asked in range(1, 3):  # computed, then kept
        spectrum = capability.spectrum(model, TOKENIZER, layers, curvature)
        assert len(looked) == asked
    assert capability.spectrum(model, TOKENIZER, layers, curvature) is spectrum
    assert capability.statistics(model, TOKENIZER, layers, curvature) is not None
    assert len(looked) == 4
