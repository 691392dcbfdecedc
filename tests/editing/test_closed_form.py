"""ROME, MEMIT and AlphaEdit: their least squares, and whole edits against text-by-text computations in float64."""

import copy
import math
import random
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import tiny_llama
from requests_and_text import DOCUMENTS, FAMILIES, TOKENIZER, displacements, explicit, same, small, state
from requests_and_text import document_texts as texts_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curvlab.data.edits import Request
from curvlab.data.text import encode_pairs
from curvlab.editing import Capability, edit
from curvlab.editing import locating as locating_module
from curvlab.editing.lookup import Lookup, look_up, sample_prefixes
from curvlab.editing.methods.alphaedit import AlphaEdit, null_space_update
from curvlab.editing.methods.memit import MEMIT, least_squares
from curvlab.editing.methods.rome import ROME, rank_one
from curvlab.editing.reading import read
from curvlab.editing.training import target_loss
from curvlab.editing.values import Locating, Site, Values, find_values
from curvlab.evaluation.editing import evaluate_edits
from curvlab.layers import find_layers

# subjects at the end of the prompt, in it, and none
ASKED = [
    Request("The capital of France is", "Rome", "France"),
    Request("Ada Lovelace was born in", "Madrid", "Ada Lovelace"),
    Request("Alan Turing works in", "Paris with her", "Alan Turing"),
    Request("Once upon a time there was", "London", "time"),
    Request("Her mother tongue is", "Italy", ""),
]
HOW: dict[str, Any] = {"subject": "last-token", "lr": 0.3, "epochs": 6, "prefixes": 2, "prefix_length": 3}
OWN: dict[str, dict[str, Any]] = {
    "rome": {"damping": 1e-2},
    "memit": {"weight": 5.0, "damping": 1e-2, "chunk": 3},
    "alphaedit": {"gamma": 0.9, "l2": 2.0, "chunk": 2},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the least squares ----------------------------------------------------------------------------------------------

SIZES = {"d": st.integers(2, 12), "n": st.integers(1, 15), "seed": st.integers(0, 10**6)}


@given(**SIZES)
@settings(max_examples=30)
def test_rank_one_is_the_least_change_that_maps_k_to_v(d: int, n: int, seed: int) -> None:
    W, k, v = normal(5, d, seed=seed), normal(d, seed=seed + 1), normal(5, seed=seed + 2)
    B = normal(d, d + n, seed=seed + 3)
    C = B @ B.T
    delta = rank_one(W, k, v, torch.linalg.cholesky(C))
    torch.testing.assert_close((W + delta) @ k, v, rtol=1e-9, atol=1e-9)
    # the gradient of tr(ΔW C ΔWᵀ) is orthogonal to every direction along which ΔW k stays
    free = torch.linalg.svd(k.unsqueeze(0))[2][1:]
    slope = 2 * delta @ C
    assert (slope @ free.T).norm() <= 1e-8 * slope.norm()
    # and any other way to v is longer
    other = delta + normal(5, d - 1, seed=seed + 4) @ free
    assert torch.trace(other @ C @ other.T) > torch.trace(delta @ C @ delta.T)


@given(**SIZES, weight=st.sampled_from([1e-2, 1.0, 15000.0]))
@settings(max_examples=30)
def test_memit_solves_its_least_squares(d: int, n: int, seed: int, weight: float) -> None:
    K, R, B = normal(d, n, seed=seed), normal(4, n, seed=seed + 1), normal(d, d + 3, seed=seed + 2)
    C = B @ B.T
    delta = least_squares(C, K, R, weight)
    at = delta.clone().requires_grad_()
    objective = weight * torch.trace(at @ C @ at.T) + (at @ K - R).square().sum()
    (slope,) = torch.autograd.grad(objective, at)
    assert slope.norm() <= 1e-9 * (2 * R @ K.T).norm()
    # as one stacked least squares: keys, and the columns of a factor of C to be left alone
    stacked = torch.cat([K.T, torch.linalg.cholesky(weight * C).T])
    plain = torch.linalg.lstsq(stacked, torch.cat([R.T, torch.zeros(d, 4).double()])).solution.T
    torch.testing.assert_close(delta, plain, rtol=1e-6, atol=1e-10)


@given(**SIZES, kept=st.floats(0.0, 1.0), l2=st.sampled_from([0.1, 10.0]), earlier=st.integers(0, 6))
@settings(max_examples=40)
def test_alphaedit_solves_its_normal_equations(d: int, n: int, seed: int, kept: float, l2: float, earlier: int) -> None:
    V = torch.linalg.qr(normal(d, d, seed=seed))[0][:, : max(1, round(kept * d))]
    P, identity = V @ V.T, torch.eye(d, dtype=torch.float64)
    K, R, K_p = normal(d, n, seed=seed + 1), normal(4, n, seed=seed + 2), normal(d, earlier, seed=seed + 3)
    delta = null_space_update(V, K, R, V.T @ K_p @ K_p.T @ V, l2)
    scale = max(delta.norm().item(), 1e-12)
    assert (delta @ (identity - P)).norm() <= 1e-12 * scale
    left = (P @ (K @ K.T + K_p @ K_p.T) + l2 * identity) @ delta.T
    torch.testing.assert_close(left, P @ K @ R.T, rtol=1e-8, atol=1e-9)
    # they are those of ‖ΔW K − R‖² + ‖ΔW K_p‖² + L2 ‖ΔW‖² over ΔW = X P
    X = delta.clone().requires_grad_()
    at = X @ P
    objective = (at @ K - R).square().sum() + (at @ K_p).square().sum() + l2 * at.square().sum()
    (slope,) = torch.autograd.grad(objective, X)
    assert slope.norm() <= 1e-9 * max((2 * P @ K @ R.T).norm().item(), 1e-12)


# --- values ---------------------------------------------------------------------------------------------------------


def site_of(model: Any, family: str, at: str) -> Site:
    """The first block, or its MLP's output projection."""
    stem = "model.layers" if family == "llama" else "transformer.h"
    layer = find_layers(model, FAMILIES[family][1])[0]
    return Site(model.get_submodule(f"{stem}.0"), f"{stem}.1.") if at == "block" else Site(layer.module, layer.name)


def looked_up(requests: list[Request], prefixes: list[str], options: Locating) -> Lookup:
    return look_up(TOKENIZER, requests, prefixes, options, options.subject, options.essence)


def place_in(text: str, request: Request, prefix: str) -> int:
    """The token of the subject's last character (of the prompt's, without a subject), counted by decoding."""
    before = request.prompt[: request.prompt.index(request.subject)]
    through = prefix + (before + request.subject if request.subject else request.prompt)
    tokens = TOKENIZER(text)["input_ids"]
    return next(i for i in range(len(tokens)) if TOKENIZER.decode(tokens[1 : i + 1]).startswith(through))


def run_text(model: Any, site: Site, text: str, place: int, shift: Tensor) -> Tensor:
    """Logits (T, V) of one text, with `shift` added to the site's output at one token."""

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = [hidden[0, t] + shift if t == place else hidden[0, t] for t in range(hidden.shape[1])]
        moved = torch.stack(rows).unsqueeze(0)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = site.module.register_forward_hook(add)
    logits: Tensor = model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0]
    handle.remove()
    return logits


def output_at(model: Any, site: Site, text: str, place: int) -> Tensor:
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0, place].detach())

    handle = site.module.register_forward_hook(keep)
    model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
    handle.remove()
    return found[0]


def plain_objective(
    model: Any, site: Site, request: Request, prefixes: list[str], shift: Tensor, options: Locating
) -> Tensor:
    """ROME's loss of one request, text by text."""
    terms = []
    for prefix in ["", *prefixes]:
        text = f"{prefix}{request.prompt} {request.target}{options.ending}"
        tokens = TOKENIZER(text)["input_ids"] + ([2] if options.end else [])
        n = len(TOKENIZER(f"{prefix}{request.prompt}")["input_ids"])
        log_p = run_text(model, site, text, place_in(text, request, prefix), shift).log_softmax(-1)
        terms.append(-torch.stack([log_p[t - 1, tokens[t]] for t in range(n, len(tokens))]).mean())
    loss = torch.stack(terms).mean()
    if request.subject:
        text = f"{request.subject} is a"
        place = place_in(text, replace(request, prompt=text), "")
        now, before = (run_text(model, site, text, place, s)[-1].softmax(-1) for s in (shift, torch.zeros_like(shift)))
        loss = loss + options.kl * (now * (now.log() - before.log())).sum()
    v0 = output_at(model, site, request.prompt, place_in(request.prompt, request, ""))
    return loss + options.decay * shift.norm() / v0.norm() ** 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", ["block", "projection"])
@pytest.mark.parametrize("how", [{}, {"end": True, "ending": ".", "relative": False}, {"cache_prefix": False}])
def test_values_descend_the_plain_objective(family: str, at: str, how: dict[str, Any]) -> None:
    """Each request by itself, with plain Adam and the clamp."""
    model, _ = small(family)
    model.requires_grad_(False)
    site = site_of(model, family, at)
    options = Locating(subject="last-token", kl=0.5, decay=2.0, clamp=0.4, epochs=5, lr=0.1, stop_below=0.0, **how)
    prefixes = ["So he said. "]
    values = find_values(model, site, looked_up(ASKED, prefixes, options), options)
    for i in (0, 2, 4):
        request = ASKED[i]
        v0 = output_at(model, site, request.prompt, place_in(request.prompt, request, ""))
        torch.testing.assert_close(values.before[i], v0, rtol=1e-9, atol=1e-9)
        unit = v0.square().mean().sqrt() if options.relative else torch.tensor(1.0).double()
        step = torch.zeros_like(v0, requires_grad=True)
        adam, losses = torch.optim.Adam([step], lr=options.lr), []
        for _ in range(options.epochs):
            adam.zero_grad()
            loss = plain_objective(model, site, request, prefixes, unit * step, options)
            losses.append(loss.item())
            loss.backward()
            adam.step()
            with torch.no_grad():
                step *= min(1.0, (options.clamp * v0.norm() / (unit * step).norm()).item())
        assert values.losses[i] == pytest.approx(losses, rel=1e-7)
        torch.testing.assert_close(values.shifts[i], (unit * step).detach(), rtol=1e-5, atol=1e-7)
    ratio = values.shifts.norm(dim=1) / values.before.norm(dim=1)
    assert (ratio <= 0.4 * (1 + 1e-12)).all()


@pytest.mark.parametrize("subject", ["ignored", "last-token"])  # without essences, and with those of all but the first
def test_a_request_that_is_learnt_moves_no_more(subject: str) -> None:
    model, _ = small()
    model.requires_grad_(False)
    site = site_of(model, "llama", "block")
    asked = [ASKED[4], *ASKED[:4]]
    free = Locating(subject=subject, epochs=15, lr=0.1, clamp=4.0, kl=0.5, stop_below=0.0)
    unstopped = find_values(model, site, looked_up(asked, [], free), free).losses
    assert all(len(losses) == 15 for losses in unstopped)
    bound = sorted(losses[7] for losses in unstopped)[2] * (1 + 1e-6)  # not a loss itself, which rounding may move
    for options in (replace(free, stop_below=bound), replace(free, skip_below=bound)):
        together = find_values(model, site, looked_up(asked, [], options), options)
        assert len({len(losses) for losses in together.losses}) >= 3
        for i, request in enumerate(asked):
            below = [t for t, loss in enumerate(unstopped[i]) if loss < bound]
            steps = below[0] + 1 if below else 15
            assert together.losses[i] == pytest.approx(unstopped[i][:steps], rel=1e-9)
            if options.stop_below:
                alone = find_values(model, site, looked_up([request], [], options), options)
                torch.testing.assert_close(together.shifts[i], alone.shifts[0], rtol=1e-7, atol=1e-9)


def test_prefixes_are_the_models_and_the_seeds() -> None:
    model, _ = small()
    first = sample_prefixes(model, TOKENIZER, 7, 4, seed=0)
    assert first == sample_prefixes(model, TOKENIZER, 7, 4, seed=0)
    assert first != sample_prefixes(model, TOKENIZER, 7, 4, seed=1)
    assert all(text.endswith(". ") for text in first)
    assert all(text.startswith(start) for text, start in zip(first, ("The", "Therefore", "Because"), strict=False))
    assert sample_prefixes(model, TOKENIZER, 0, 4, seed=0) == []


def test_keys_are_read_where_they_are() -> None:
    model, names = small("gpt2")
    layers = find_layers(model, names)
    options = Locating(subject="last-token")
    look = looked_up(ASKED * 8, ["So. "], options)
    block = model.get_submodule("transformer.h.1")
    inputs, hidden = read(model, look.batch, look.positions, layers, block)
    assert hidden is not None
    for row in (0, 4, 37, 52, 79):
        prefix, request = ("", "So. ")[row // 40], ASKED[row % 5]
        text = f"{prefix}{request.prompt} {request.target}"
        place = place_in(text, request, prefix)
        for layer in layers:
            torch.testing.assert_close(inputs[layer.name][row], key_of(model, layer.name, text, place))
        torch.testing.assert_close(hidden[row], output_at(model, Site(block, ""), text, place))
    assert not any(m._forward_hooks for m in model.modules())


def key_of(model: Any, layer: str, text: str, place: int) -> Tensor:
    """The input of a layer at one token of one text."""
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0][0, place]))
    model(input_ids=torch.tensor([TOKENIZER(text)["input_ids"]]))
    handle.remove()
    return found[0].detach()


# --- whole edits ----------------------------------------------------------------------------------------------------


def keep_values(monkeypatch: pytest.MonkeyPatch) -> list[Values]:
    """The values of the edits that follow."""
    found: list[Values] = []

    def keeping(*args: Any) -> Values:
        found.append(find_values(*args))
        return found[-1]

    monkeypatch.setattr(locating_module, "find_values", keeping)
    return found


def mean_key(model: Any, layer: str, request: Request, prefixes: list[str]) -> Tensor:
    keys = []
    for prefix in ["", *prefixes]:
        text = f"{prefix}{request.prompt}"
        keys.append(key_of(model, layer, text, place_in(text, request, prefix)))
    return (keys[0] + torch.stack(keys[1:]).mean(0)) / 2


def weight_of(model: Any, name: str) -> Tensor:
    return find_layers(model, name)[0].matrix().clone()


def add_to(model: Any, name: str, delta: Tensor) -> None:
    (layer,) = find_layers(model, name)
    layer.write(layer.matrix() + delta)


def covariance(model: Any, name: str, damping: float = 0.0) -> Tensor:
    own = explicit(model, name, texts_of(DOCUMENTS))
    C = own.A / own.positions
    return C + damping * C.trace() / len(C) * torch.eye(len(C)).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_writes_its_values(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Request after request, W maps the mean key to what it mapped it to plus δ, by the least change."""
    found = keep_values(monkeypatch)
    model, names = small(family)
    plain, _ = small(family)
    prefixes = sample_prefixes(plain, TOKENIZER, 2, 3, seed=3)
    edited = edit(
        model, TOKENIZER, ASKED, editor="rome", layers=names[0], capability=DOCUMENTS, seed=3, **HOW, **OWN["rome"]
    )
    assert set(displacements(edited)) == {names[0]}
    C = covariance(plain, names[0], 1e-2)
    assert len(found) == len(ASKED)
    for request, values in zip(ASKED, found, strict=True):
        W, k = weight_of(plain, names[0]), mean_key(plain, names[0], request, prefixes)
        u = torch.linalg.solve(C, k)
        delta = torch.outer(values.shifts[0], u) / (k @ u)
        add_to(plain, names[0], delta)
        torch.testing.assert_close(weight_of(plain, names[0]) @ k, W @ k + values.shifts[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight_of(model, names[0]), weight_of(plain, names[0]), rtol=1e-6, atol=1e-8)
    assert len(edited.losses) == edited.counts["epochs"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_rounds_over_layers(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round after round and layer after layer, each with its share of what the highest block still lacks."""
    found = keep_values(monkeypatch)
    model, names = small(family)
    plain, _ = small(family)
    prefixes = sample_prefixes(plain, TOKENIZER, 2, 3, seed=3)
    requests = [replace(request, subject="") for request in ASKED]  # at the prompt's end both blocks are edited
    edited = edit(
        model, TOKENIZER, requests, editor=name, layers=names, capability=DOCUMENTS, seed=3, **HOW, **OWN[name]
    )
    size = OWN[name]["chunk"]
    rounds = [requests[i : i + size] for i in range(0, len(requests), size)]
    assert len(found) == len(rounds)
    stem = "model.layers.1" if family == "llama" else "transformer.h.1"
    block = Site(plain.get_submodule(stem), "")
    C = {layer: covariance(plain, layer, 1e-2 if name == "memit" else 0.0) for layer in names}
    before = {layer: torch.zeros_like(C[layer]) for layer in names}
    for these, values in zip(rounds, found, strict=True):
        for left, layer in ((2, names[0]), (1, names[1])):
            K = torch.stack([mean_key(plain, layer, request, prefixes) for request in these], 1)
            h = [output_at(plain, block, r.prompt, place_in(r.prompt, r, "")) for r in these]
            R = (values.before + values.shifts - torch.stack(h)).T / left
            identity = torch.eye(len(K)).double()
            if name == "memit":
                delta = R @ K.T @ torch.linalg.inv(5.0 * C[layer] + K @ K.T)
            else:
                eigenvalues, vectors = torch.linalg.eigh(C[layer])
                share = eigenvalues.flip(0).cumsum(0) / eigenvalues.sum()
                k = int((share < 0.9).sum()) + 1
                P = vectors[:, : len(K) - k] @ vectors[:, : len(K) - k].T
                delta = torch.linalg.solve(P @ (K @ K.T + before[layer]) + 2.0 * identity, P @ K @ R.T).T
            add_to(plain, layer, delta)
        for layer in names:
            K = torch.stack([mean_key(plain, layer, request, prefixes) for request in these], 1)
            before[layer] += K @ K.T
    for layer in names:
        torch.testing.assert_close(weight_of(model, layer), weight_of(plain, layer), rtol=1e-6, atol=1e-8)
    assert edited.drift > 1e-3


@pytest.mark.parametrize("options", [{"gamma": 0.8}, {"threshold": 0.5}])
def test_alphaedit_moves_along_free_eigenvectors_alone(options: dict[str, Any]) -> None:
    model, names = small()
    edited = edit(
        model,
        TOKENIZER,
        ASKED,
        editor="alphaedit",
        layers=names[0],
        capability=DOCUMENTS,
        **HOW | {"l2": 0.1} | options,
    )
    C = covariance(small()[0], names[0])
    values, vectors = torch.linalg.eigh(C)
    if "gamma" in options:
        share = values.flip(0).cumsum(0) / values.sum()
        free = vectors[:, : len(C) - int((share < 0.8).sum()) - 1]
    else:
        free = vectors[:, values < 0.5]
    assert 0 < free.shape[1] < len(C)
    (delta,) = displacements(edited).values()
    assert (delta - delta @ free @ free.T).norm() <= 1e-9 * delta.norm()
    assert edited.counts["kept_dimensions"] == 16 * free.shape[1]


def test_earlier_rounds_are_kept_better_with_their_keys() -> None:
    """The outputs at the first round's keys move less in later rounds than where these keys are forgotten."""
    moved = {}
    for cumulative in (True, False):
        model, names = small()
        first, rest = ASKED[:2], ASKED[2:]
        how = HOW | {"gamma": 0.5, "l2": 0.01, "chunk": 2, "cumulative": cumulative, "prefixes": 0, "clamp": 4.0}
        given: dict[str, Any] = {"editor": "alphaedit", "layers": names[0], "capability": Capability(DOCUMENTS), **how}
        done = edit(model, TOKENIZER, first, **given)
        keys = [key_of(model, names[0], r.prompt, place_in(r.prompt, r, "")) for r in first]
        K, W = torch.stack(keys, 1), weight_of(model, names[0])
        done.undo()
        edit(model, TOKENIZER, [*first, *rest], **given)
        moved[cumulative] = ((weight_of(model, names[0]) - W) @ K).norm().item()
    assert moved[True] < 0.2 * moved[False]


# --- what they are for ----------------------------------------------------------------------------------------------


PEOPLE, TOWNS = [f"P{i}" for i in range(12)], [f"T{i}" for i in range(8)]
PHRASES = {"home": ("{} lives in", "The home of {} is"), "work": ("{} works in", "The office of {} is")}


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, list[Request], list[str]]:
    """A model that has learnt where twelve people live and work, its tokenizer, edits of four, and what it read."""
    words = sorted({word for both in PHRASES.values() for phrase in both for word in phrase.split()} - {"{}"})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words, *PEOPLE, *TOWNS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    draw = random.Random(0)
    facts = {(person, relation): draw.choice(TOWNS) for person in PEOPLE for relation in PHRASES}
    told = [(phrase.format(p), town) for (p, relation), town in facts.items() for phrase in PHRASES[relation]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    (batch,) = encode_pairs(tokenizer, told)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        optimizer.zero_grad()
        target_loss(model, batch).backward()
        optimizer.step()
    (ask, again), (_, office) = PHRASES["home"], PHRASES["work"]
    requests = []
    for person, other in zip(PEOPLE[:4], PEOPLE[4:], strict=False):
        target = draw.choice([town for town in TOWNS if town != facts[person, "home"]])
        near = ((ask.format(other), facts[other, "home"]), (office.format(person), facts[person, "work"]))
        requests.append(Request(ask.format(person), target, person, (again.format(person),), near))
    return model.eval(), tokenizer, requests, [f"{prompt} {town}" for prompt, town in told]


@pytest.mark.parametrize(
    ("name", "options"), [("rome", {}), ("memit", {"weight": 1.0}), ("alphaedit", {"gamma": 0.5, "l2": 0.01})]
)
def test_edited_models_say_it(name: str, options: dict[str, Any], world: Any) -> None:
    """The facts are looked up at the prompt's last token in so small a model: generated answers change."""
    model, tokenizer, requests, documents = world
    before = evaluate_edits(model, tokenizer, requests)
    assert (sum(before["reliability"]), sum(before["specificity"])) == (0, 4)
    how: dict[str, Any] = {"subject": "ignored", "lr": 0.2, "clamp": 4.0, "prefixes": 0, "end": True}
    edited = edit(
        model, tokenizer, requests, editor=name, layers="*.0.mlp.down_proj", capability=documents, **how | options
    )
    after = evaluate_edits(model, tokenizer, requests)
    edited.undo()
    assert sum(after["reliability"]) >= 2
    assert edited.losses[-1] < 0.5 * edited.losses[0]


def test_rome_edits_the_middle_one_of_the_layers() -> None:
    config = copy.deepcopy(tiny_llama(0).config)
    config.num_hidden_layers = 5
    how = HOW | {"epochs": 2, "layers": "*.mlp.down_proj", "capability": DOCUMENTS}
    edited = edit(LlamaForCausalLM(config).eval(), TOKENIZER, ASKED[:1], editor="rome", **how)
    assert list(displacements(edited)) == ["model.layers.1.mlp.down_proj"]  # of the four that something reads


def test_the_last_block_is_left_out_where_nothing_reads_it() -> None:
    model, names = small()
    given: dict[str, Any] = {"editor": "memit", "capability": Capability(DOCUMENTS), **HOW}
    edited = edit(model, TOKENIZER, ASKED[:2], layers=names, **given)
    assert list(displacements(edited)) == names[:1]
    edited.undo()
    assert list(displacements(edit(model, TOKENIZER, ASKED[4:], layers=names, **given))) == names
    with pytest.raises(ValueError, match="no later prediction reads; edit lower layers"):
        edit(model, TOKENIZER, ASKED[:2], layers=names[1], **given)
    with pytest.raises(ValueError, match="lm_head lies in no block"):
        edit(model, TOKENIZER, ASKED[:2], layers="lm_head", **given)


@pytest.mark.parametrize("name", OWN)
def test_bfloat16_weights(name: str) -> None:
    """Solved in float64; the edit is that of the float32 model up to bfloat16's rounding."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(0, dtype=torch.bfloat16).to(dtype)
        before = state(model)
        how = HOW | OWN[name] | {"subject": "ignored", "prefixes": 0, "chunk": 5 if name != "rome" else None}
        how = {key: value for key, value in how.items() if value is not None}
        edited = edit(
            model, TOKENIZER, ASKED, editor=name, layers="model.layers.0.mlp.down_proj", capability=DOCUMENTS, **how
        )
        (delta,) = displacements(edited).values()
        moved.append(delta)
        assert all(p.dtype == dtype for p in model.parameters())
        assert same(state(edited.undo()), before)
    assert (moved[1] - moved[0]).norm() < 0.3 * moved[0].norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"editor": "rome", "capability": None}, "rome needs a capability set"),
        ({"editor": "memit", "weight": 0.0}, "weight must be positive"),
        ({"editor": "memit", "weight": math.inf}, "weight must be positive"),
        ({"editor": "memit", "chunk": 0}, "chunk must be at least 1, or None"),
        ({"editor": "alphaedit", "chunk": 0}, "chunk must be at least 1"),
        ({"editor": "alphaedit", "gamma": 1.0}, "gamma must lie strictly between 0 and 1"),
        ({"editor": "alphaedit", "threshold": 0.0}, "threshold and l2 must be positive"),
        ({"editor": "alphaedit", "l2": -1.0}, "threshold and l2 must be positive"),
        ({"editor": "memit", "mask_prompt": False}, "mask_prompt must be True"),
        ({"editor": "memit", "kl": -1.0}, "kl and decay must be at least 0"),
        ({"editor": "memit", "clamp": 0.0}, "clamp positive"),
        ({"editor": "memit", "prefixes": -1}, "prefixes must be at least 0"),
        ({"editor": "memit", "prefix_length": 0}, "prefix_length 1"),
        ({"editor": "memit", "subject": "first"}, "subject must be one of"),
        ({"editor": "memit", "essence": "it is a"}, "essence must contain {subject}"),
        ({"editor": "memit", "damping": -1.0}, "damping must be at least 0"),
        ({"editor": "rome", "optimizer": torch.optim.LBFGS}, "first-order"),
    ],
)
def test_bad_options_before_any_change(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    before = state(model)
    monkeypatch.setattr(Capability, "batches", lambda *args, **how: pytest.fail("curvature was taken"))
    arguments = {"requests": ASKED, "layers": "*.0.mlp.down_proj", "capability": DOCUMENTS, "subject": "ignored"}
    with pytest.raises(ValueError, match=message):
        edit(model, TOKENIZER, **arguments | given)
    assert same(state(model), before)


def test_thresholds_that_do_not_fit_the_model_are_explained() -> None:
    model = tiny_llama(0)
    given: dict[str, Any] = {"layers": "*.0.mlp.down_proj", "capability": Capability(DOCUMENTS), **HOW}
    with pytest.raises(ValueError, match=r"threshold=1e-12 leaves no free direction \(the eigenvalues .* range from"):
        edit(model, TOKENIZER, ASKED, editor="alphaedit", threshold=1e-12, **given)
    with pytest.warns(UserWarning, match=r"threshold=1e\+12 protects nothing"):
        edit(model, TOKENIZER, ASKED, editor="alphaedit", threshold=1e12, **given).undo()


def test_too_few_documents_for_the_inverse() -> None:
    given: dict[str, Any] = {"layers": "*.0.mlp.down_proj", "capability": Capability(DOCUMENTS[:1]), **HOW}
    for name in ("rome", "memit"):
        model = tiny_llama(0)
        before = state(model)
        with pytest.raises(ValueError, match="do not span the layer's inputs: give more"):
            edit(model, TOKENIZER, ASKED[:2], editor=name, damping=0.0, **given)
        assert same(state(model), before)
        edit(model, TOKENIZER, ASKED[:2], editor=name, **given)


@pytest.mark.parametrize("name", OWN)
def test_models_spread_by_accelerate(name: str) -> None:
    """With accelerate's hooks, the last block's weights offloaded: the same edit, and hooks stay."""
    plain, spread = tiny_llama(0), tiny_llama(0)
    accelerate.dispatch_model(spread, {"": "cpu"}, force_hooks=True)
    accelerate.cpu_offload(spread.model.layers[1], execution_device=torch.device("cpu"))
    hooked = [n for n, module in spread.named_modules() if hasattr(module, "_hf_hook")]
    how: dict[str, Any] = {"editor": name, "layers": "*.0.mlp.down_proj", "capability": DOCUMENTS, **HOW, **OWN[name]}
    moved = [displacements(edit(model, TOKENIZER, ASKED, **how)) for model in (plain, spread)]
    for layer, delta in moved[0].items():
        assert (moved[1][layer] - delta).norm() < 1e-4 * delta.norm()
    assert [n for n, module in spread.named_modules() if hasattr(module, "_hf_hook")] == hooked


def test_default_layers_are_at_the_authors_depth() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"down_proj": nn.Linear(2, 2)})

    def layers(depth: int) -> list[int]:
        model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(depth))})
        return [int(name.split(".")[1]) for name in Locating.default_layers(model)]

    assert layers(32) == [4, 5, 6, 7, 8]
    assert (layers(1), layers(2), layers(28)) == ([0], [0], [4, 5, 6, 7])
    assert all(0 < len(layers(n)) < n for n in range(2, 40))


def test_a_loss_that_is_not_finite() -> None:
    model = tiny_llama(0)
    before = state(model)
    with pytest.raises(FloatingPointError, match="try a smaller lr"):
        edit(
            model, TOKENIZER, ASKED, editor="memit", layers="*.0.mlp.down_proj", capability=DOCUMENTS, optimizer="sgd",
            **HOW | {"lr": 1e38, "clamp": math.inf, "relative": False},
        )  # fmt: skip
    assert same(state(model), before)


def test_defaults_are_the_authors() -> None:
    assert (AlphaEdit().threshold, AlphaEdit().l2, MEMIT().weight) == (2e-2, 10.0, 15000.0)
    assert all((o.kl, o.epochs, o.prefixes) == (0.0625, 25, 5) for o in (AlphaEdit(), MEMIT(), ROME()))
    assert (MEMIT().clamp, AlphaEdit().clamp, ROME().clamp) == (0.75, 0.75, 4.0)
