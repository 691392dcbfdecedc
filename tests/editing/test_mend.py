"""MEND: its network, its edits and its training against plain computations in float64, and its files."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from language import tiny_llama
from requests_and_text import DOCUMENTS, FAMILIES, REQUESTS, TOKENIZER, displacements, request_texts, same, small, state
from torch import Tensor, nn

from curvlab.data.edits import Request
from curvlab.editing import edit, meta_learning
from curvlab.editing.hypernetwork import Hypernetwork
from curvlab.editing.meta_draws import draw, related, unrelated_texts
from curvlab.editing.meta_learning import losses_of, train_network
from curvlab.editing.methods import mend as mend_module
from curvlab.editing.methods.mend import MEND
from curvlab.editing.rank_one import Factors, rank_one_factors
from curvlab.layers import LayerShape, find_layers
from curvlab.storage import save_tensors

TRAIN = [
    Request("The capital of Spain is", "Paris", "Spain", ("Spain has the capital",), (("Italy's capital is", "Rome"),)),
    Request("Lily plays in the", "city", "Lily", ("The place Lily plays in is the",), (("She works in", "Madrid"),)),
    Request("Mother was born in", "Rome", "Mother", ("The town where Mother was born is",)),
    Request("His sister lives in", "Spain", "sister", (), (("The girl lives in", "Paris"),)),
    Request("The friend is named", "Ada", "friend"),
    Request("English is the tongue of", "Alan", "English"),
]  # fmt: skip
FEW: dict[str, Any] = {"train_requests": TRAIN, "steps": 4, "group": 3, "asked": 2, "rank": 8, "lr": 1e-3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "mend").glob("[!.]*"))


def gradients(model: nn.Module, layers: list[str], request: Request) -> dict[str, Tensor]:
    """∂(−log p of the target)/∂W as (d_out, d_in) matrices, by autograd on the weights."""
    ((tokens, targets),) = request_texts([request], mask_prompt=True)
    model.requires_grad_(True)
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    chosen = find_layers(model, layers)
    found = torch.autograd.grad(loss, [layer.parameters()[0] for layer in chosen])
    return {layer.name: layer.matrix([g]) for layer, g in zip(chosen, found, strict=True)}


def made(layers: list[Any], *, seed: int = 0, trained: bool = True, **how: Any) -> Hypernetwork:
    """A network in float64, its parameters away from where they begin."""
    network = Hypernetwork(layers, rank=6, seed=seed, **how).double()
    generator = torch.Generator().manual_seed(seed)
    if trained:
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return network.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_edits_are_steps_of_gradient_descent(family: str) -> None:
    """Σ δ uᵀ is autograd's gradient, edits of several requests add up, and the network begins as the identity."""
    model, layers = small(family)
    each = [gradients(model, layers, request) for request in REQUESTS]
    total = {name: torch.stack([own[name] for own in each]).sum(0) for name in layers}
    network = made(find_layers(model, layers), trained=False, edit_lr=2.0**-5, normalise=False)
    edited = edit(model, TOKENIZER, REQUESTS, editor="mend", layers=layers, network=network, batch_size=2)
    for name, moved in displacements(edited).items():
        torch.testing.assert_close(moved, -(2.0**-5) * total[name], rtol=1e-8, atol=1e-11)


def explicit(network: Hypernetwork, layer: LayerShape, number: int, u: Tensor, delta: Tensor) -> Tensor:
    """ΔW of one layer, token by token (paper, eq. 3 and 4)."""
    blocks: Any = network.networks[f"{layer.d_out}x{layer.d_in}"]
    edit_of = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)
    chosen = [r for r in range(len(u)) if delta[r].any()]
    mean_u, mean_delta, std_u, std_delta = (
        u[chosen].mean(0),
        delta[chosen].mean(0),
        u[chosen].std(0),
        delta[chosen].std(0),
    )
    for r in chosen:
        z = torch.cat([(u[r] - mean_u) / std_u, (delta[r] - mean_delta) / std_delta])
        first, last = blocks
        z = z + torch.clamp(first.scale[number] * (first.U @ first.V @ z + first.bias) + first.offset[number], min=0)
        z = z + last.scale[number] * (last.U @ last.V @ z + last.bias) + last.offset[number]
        edit_of -= network.alpha[layers_of(network).index(layer.name)] * torch.outer(z[layer.d_in :], z[: layer.d_in])
    return edit_of


def layers_of(network: Hypernetwork) -> list[str]:
    return [layer.name for layer in network.layers]


def random_factors(layer: LayerShape, seed: int, n: int = 12) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, layer.d_in, dtype=torch.float64, generator=generator) * 3 + 1
    delta = torch.randn(n, layer.d_out, dtype=torch.float64, generator=generator) * 1e-3
    delta[5] = 0  # a token that nothing depends on
    return Factors(u, delta, torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool))


def test_the_network_by_hand() -> None:
    layers = [LayerShape("a", 4, 6, False), LayerShape("b", 6, 4, False), LayerShape("c", 4, 6, False)]
    network = made(layers)
    assert set(network.networks) == {"4x6", "6x4"}  # layers of one shape share theirs
    factors = {layer.name: random_factors(layer, i) for i, layer in enumerate(layers)}
    network.observe(factors)
    found = network(factors)
    for layer, number in zip(layers, (0, 0, 1), strict=True):
        own = factors[layer.name]
        torch.testing.assert_close(
            found[layer.name], explicit(network, layer, number, own.u, own.delta), rtol=1e-6, atol=1e-9
        )


def test_edits_of_several_requests_add_up() -> None:
    model, layers = small()
    network = made(find_layers(model, layers))
    network.observe({layer.name: random_factors(layer, 1) for layer in network.layers})

    def moved(requests: list[Request], **how: Any) -> dict[str, Tensor]:
        edited = edit(model, TOKENIZER, requests, editor="mend", layers=layers, network=network, **how)
        found = displacements(edited)
        edited.undo()
        return found

    together, alone = moved(REQUESTS), [moved([request]) for request in REQUESTS]
    for name in layers:
        total = torch.stack([own[name] for own in alone]).sum(0)
        torch.testing.assert_close(together[name], total, rtol=1e-9, atol=1e-12)
    first = edit(model, TOKENIZER, REQUESTS[:3], editor="mend", layers=layers, network=network)
    second = displacements(first)
    for name, own in moved(REQUESTS[3:]).items():
        second[name] = second[name] + own
    first.undo()
    in_chunks = moved(REQUESTS, chunk=3)
    for name in layers:  # the second chunk's gradients are of the edited model
        torch.testing.assert_close(in_chunks[name], second[name], rtol=1e-8, atol=1e-11)
        assert not torch.allclose(in_chunks[name], together[name], rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_loss_and_its_gradient(family: str) -> None:
    """Against a copy of the model whose weights were moved, one text at a time."""
    model, names = small(family)
    model.requires_grad_(False)
    layers = find_layers(model, names)
    generator = torch.Generator().manual_seed(3)
    delta = {
        layer.name: (
            0.05 * torch.randn(layer.d_out, layer.d_in, dtype=torch.float64, generator=generator)
        ).requires_grad_()
        for layer in layers
    }
    asked, texts = [("The capital of Spain is", "Paris with her"), ("Lily is", "Ada")], DOCUMENTS[:2]
    found = losses_of(model, TOKENIZER, layers, delta, asked, texts, MEND(ending=".", max_length=9))

    other = copy.deepcopy(model)
    others = find_layers(other, names)
    for layer in others:
        layer.write(layer.matrix() + delta[layer.name].detach())
    other.requires_grad_(True)
    requests = [Request(prompt, f"{target}.") for prompt, target in asked]
    terms = []
    for tokens, targets in request_texts(requests, mask_prompt=True):
        logits = other(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        terms += [-logits[t, target] for t, target in enumerate(targets) if target != -100]
    edit_loss = torch.stack(terms).mean()
    terms = []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"][:9]])
        p, q = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (model, other))
        terms += list((p.exp() * (p - q)).sum(-1))
    locality = torch.stack(terms).mean()
    for value, expected in zip(found, (edit_loss, locality), strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)
        slopes = torch.autograd.grad(value, list(delta.values()), retain_graph=True)
        wanted = torch.autograd.grad(expected, [moved.parameters()[0] for moved in others], retain_graph=True)
        for slope, gradient, layer in zip(slopes, wanted, layers, strict=True):
            torch.testing.assert_close(slope, layer.matrix([gradient]), rtol=1e-7, atol=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_training_teaches_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    before = state(model)
    options = FEW | {"steps": 40, "lr": 3e-3, "edit_lr": 1e-3, "lr_lr": 1e-3, "layers": "model.layers.*.mlp.down_proj"}
    first = edit(model, TOKENIZER, REQUESTS[:2], editor="mend", **options)
    (file,) = cached(tmp_path)
    network = Hypernetwork.load(file)
    losses = network.record["edit_losses"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert first.counts["training_steps"] == network.record["steps"] == 40
    assert first.curvature_seconds > network.record["seconds"] > 0
    edited = state(model)
    first.undo()
    assert same(state(model), before)

    monkeypatch.setattr(mend_module, "train_network", lambda *args, **how: pytest.fail("trained again"))
    again = edit(model, TOKENIZER, REQUESTS[:2], editor="mend", **options)
    assert same(state(model), edited)
    again.undo()
    given: dict[str, Any] = {"editor": "mend", "layers": options["layers"]}
    for source in (str(file), file, network):
        from_file = edit(model, TOKENIZER, REQUESTS[:2], network=source, **given)
        assert same(state(model), edited)
        from_file.undo()
    edit(model, TOKENIZER, REQUESTS[2:], network=file, **given).undo()  # other requests, the same network
    assert same(state(model), before)


def test_training_steps_by_hand(tmp_path: Path) -> None:
    """Adam on c_edit · edit + c_loc · locality, clipped; the α's with a learning rate of their own."""
    model, names = small()
    layers, texts = find_layers(model, names), unrelated_texts(TRAIN, DOCUMENTS)
    own: dict[str, Any] = {"c_edit": 0.3, "c_loc": 50.0, "lr": 1e-2, "lr_lr": 3e-3, "edit_lr": 1e-2, "clip": 0.1}
    options = MEND(**FEW | own)
    found = train_network(model, TOKENIZER, layers, TRAIN, texts, options, seed=5, checkpoint=tmp_path / "training")

    expected = Hypernetwork(layers, rank=8, edit_lr=1e-2, seed=5).double()
    factors = [rank_one_factors(model, options.batches(TOKENIZER, [r]), layers, desc="")[0] for r in TRAIN]
    expected.observe({name: Factors.cat([each[name] for each in factors]) for name in names})
    parameters = [*expected.networks.parameters(), expected.alpha]
    adams = [torch.optim.Adam(parameters[:-1], lr=1e-2), torch.optim.Adam(parameters[-1:], lr=3e-3)]
    norms = []
    for step in range(4):
        edited, asked, left = draw(TRAIN, texts, 3, 2, seed=5, step=step)
        delta = expected({name: Factors.cat([factors[i][name] for i in edited]) for name in names})
        edit_loss, locality = losses_of(model, TOKENIZER, layers, delta, asked, left, options)
        slopes = torch.autograd.grad(0.3 * edit_loss + 50.0 * locality, parameters)
        norms.append(math.sqrt(sum(slope.square().sum().item() for slope in slopes)))
        for p, slope in zip(parameters, slopes, strict=True):
            p.grad = slope * min(1.0, 0.1 / (norms[-1] + 1e-6))
        for adam in adams:
            adam.step()
        assert found.record["edit_losses"][step] == pytest.approx(edit_loss.item(), rel=1e-7)
        assert found.record["locality_losses"][step] == pytest.approx(locality.item(), rel=1e-6)
    assert max(norms) > 0.1
    tensors = expected.tensors()
    for name, value in found.tensors().items():
        if name != "prompts":
            torch.testing.assert_close(value, tensors[name], rtol=1e-6, atol=1e-9)


def test_an_interrupted_training_goes_on_to_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = small()
    how: dict[str, Any] = {"editor": "mend", "layers": layers, "capability": DOCUMENTS} | FEW
    edit(model, TOKENIZER, REQUESTS, **how).undo()
    (file,) = cached(tmp_path)
    whole = Hypernetwork.load(file)
    file.unlink()
    before = state(model)

    taken = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise KeyboardInterrupt
        return losses_of(*args, **kwargs)

    monkeypatch.setattr(meta_learning, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(meta_learning, "losses_of", broken)
    with pytest.raises(KeyboardInterrupt):
        edit(model, TOKENIZER, REQUESTS, **how)
    assert same(state(model), before)
    assert not cached(tmp_path)
    edit(model, TOKENIZER, REQUESTS, **how).undo()
    assert taken == 3 + 2  # two steps were done, two remained
    (file,) = cached(tmp_path)
    continued = Hypernetwork.load(file)
    assert same(continued.tensors(), whole.tensors())
    assert continued.record["edit_losses"] == whole.record["edit_losses"]
    assert [p.name for p in file.parent.iterdir() if "training" in p.name] == []

    file.unlink()
    damaged = file.with_name(f".{file.stem}.training.safetensors")
    damaged.write_bytes(b"half a file")
    edit(model, TOKENIZER, REQUESTS, **how).undo()  # begins anew
    assert same(Hypernetwork.load(file).tensors(), whole.tensors())
    assert not damaged.exists()


def test_other_trainings_are_other_networks(tmp_path: Path) -> None:
    model, layers = small()
    how: dict[str, Any] = {"editor": "mend", "layers": layers} | FEW | {"steps": 1}
    variants: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"lr": 1e-4}, {"train_requests": TRAIN[:5]}, {"capability": DOCUMENTS}, {"layers": layers[1:]},
    ]  # fmt: skip
    for variant in variants:
        edit(model, TOKENIZER, REQUESTS, **(how | variant)).undo()
    assert len(cached(tmp_path)) == len(variants)
    edit(model, TOKENIZER, REQUESTS, chunk=2, **how).undo()  # how it is used is another matter
    assert len(cached(tmp_path)) == len(variants)
    with torch.no_grad():
        model.get_submodule(layers[0]).weight[0, 0] += 1e-3
    edit(model, TOKENIZER, REQUESTS, **how).undo()
    assert len(cached(tmp_path)) == len(variants) + 1


def test_files_named_by_the_user(tmp_path: Path) -> None:
    model, layers = small()
    file = tmp_path / "mine" / "network.safetensors"
    how: dict[str, Any] = {"editor": "mend", "layers": layers, "network": file}
    edit(model, TOKENIZER, REQUESTS, **how, **FEW).undo()
    assert file.is_file()
    assert not cached(tmp_path)
    edit(model, TOKENIZER, REQUESTS, **how, **FEW).undo()  # the same training: what the file holds
    with pytest.raises(ValueError, match="was trained otherwise"):
        edit(model, TOKENIZER, REQUESTS, **how, **(FEW | {"steps": 5}))
    with pytest.raises(ValueError, match=r"1 edited requests share a prompt or paraphrase .*such as 'Spain has the"):
        edit(model, TOKENIZER, [*REQUESTS, Request("Spain has the capital", "Rome")], **how)
    with pytest.raises(ValueError, match="this MEND network edits"):
        edit(model, TOKENIZER, REQUESTS, **(how | {"layers": layers[1:]}))
    with pytest.raises(ValueError, match="give one of them"):
        edit(model, TOKENIZER, REQUESTS, **(how | FEW | {"network": Hypernetwork.load(file)}))
    with torch.no_grad():
        model.get_submodule(layers[0]).weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="was trained for LlamaForCausalLM with other weights"):
        edit(model, TOKENIZER, REQUESTS, **how)
    edit(model, TOKENIZER, REQUESTS, **(how | {"network": Hypernetwork.load(file)})).undo()  # all the same
    with pytest.raises(ValueError, match="with other weights"):
        Hypernetwork.load(file, model)


def test_damaged_and_other_files(tmp_path: Path) -> None:
    model, layers = small()
    file = tmp_path / "network.safetensors"
    how: dict[str, Any] = {"editor": "mend", "layers": layers, "network": file}
    file.write_bytes(b"no network")
    with pytest.raises(ValueError, match="no intact safetensors file"):
        edit(model, TOKENIZER, REQUESTS, **how)
    save_tensors(file, "kfac", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="holds 'kfac', expected 'MEND network'"):
        edit(model, TOKENIZER, REQUESTS, **how)
    save_tensors(file, "MEND network", {"weight/alpha": torch.ones(1)}, {"layers": "[]"})
    with pytest.raises(ValueError, match="no intact MEND network"):
        edit(model, TOKENIZER, REQUESTS, **how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs a trained network: edit\(…, network=file\), or train_requests"),
        ({"network": "nowhere.safetensors"}, r"needs a trained network \(nowhere.safetensors does not exist\)"),
        ({"train_requests": [*TRAIN, REQUESTS[0]], "group": 3, "asked": 2}, "share a prompt or paraphrase with the"),
        ({"train_requests": TRAIN, "group": 9}, "edits group=9 requests a step, 6 to train on"),
        ({"train_requests": [*TRAIN, TRAIN[0]], "group": 3, "asked": 2}, "the same as request 0"),
        ({"group": 0}, "group must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"steps": -1}, "must not be negative"),
        ({"lr": float("nan")}, "lr must be positive and finite"),
        ({"c_loc": -1.0}, "c_loc must be finite and not negative"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"network": 3}, "a Hypernetwork or a file, got int"),
        ({"template": "no place"}, "must contain"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meta_learning, "rank_one_factors", lambda *args, **how: pytest.fail("training began"))
    model, layers = small()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        edit(model, TOKENIZER, REQUESTS, editor="mend", layers=layers, **options)
    assert same(state(model), before)
    assert not cached(tmp_path)


def test_a_loss_that_is_not_finite() -> None:
    model, layers = small()
    before = state(model)
    with pytest.raises(FloatingPointError, match="MEND's training loss is"):
        edit(model, TOKENIZER, REQUESTS, editor="mend", layers=layers, **(FEW | {"c_edit": 1.7e308}))
    assert same(state(model), before)


def test_texts_to_be_left_alone() -> None:
    texts = unrelated_texts(TRAIN, DOCUMENTS)
    assert texts == ["Italy's capital is Rome", "She works in Madrid", "The girl lives in Paris", *DOCUMENTS]
    bare = [Request(r.prompt, r.target) for r in TRAIN]
    assert unrelated_texts(bare, []) == [r.prompt for r in TRAIN]
    assert related("In Spain it rains.", TRAIN[0])  # its subject
    assert related("The capital of Spain is Madrid", bare[0])  # its prompt
    assert not related("Italy's capital is Rome", TRAIN[0])
    asked_of: set[str] = set()
    for step in range(60):
        edited, asked, left = draw(TRAIN, texts, 3, 2, seed=5, step=step)
        assert draw(TRAIN, texts, 3, 2, seed=5, step=step) == (edited, asked, left)
        assert len(set(edited)) == 3
        assert len(asked) == len(left) == 2
        for index, (prompt, target) in zip(edited, asked, strict=False):
            assert prompt in (TRAIN[index].prompt, *TRAIN[index].paraphrases)
            assert target == TRAIN[index].target
        assert not any(related(text, TRAIN[i]) for text in left for i in edited)
        asked_of |= {prompt for prompt, _ in asked}
    assert asked_of == {prompt for r in TRAIN for prompt in (r.prompt, *r.paraphrases)}
    assert draw(TRAIN, texts, 3, 2, seed=6, step=0) != draw(TRAIN, texts, 3, 2, seed=5, step=0)
    with pytest.raises(ValueError, match="all that were given are about the edits"):
        draw(TRAIN[:1], ["Spain is far."], 1, 1, seed=0, step=0)
