"""What UltraEdit and MEND share: gradients as rank-one factors, the contract of an editor, and what an edit does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_factors import gathered
from language import tiny_llama
from requests_and_text import FAMILIES, REQUESTS, TOKENIZER, request_texts, same, small, state

from curvlab.data.edits import Request
from curvlab.data.text import encode_pairs
from curvlab.data.world import World, make_world
from curvlab.editing import edit
from curvlab.editing.rank_one import rank_one_factors
from curvlab.editing.training import target_loss
from curvlab.editing.wording import Wording
from curvlab.layers import find_layers
from curvlab.models.language import embedded_model

LAYERS = "model.layers.*.mlp.down_proj"
TRAIN = [
    Request("The capital of Spain is", "Paris", "Spain"),
    Request("Lily plays in the", "city", "Lily"),
    Request("Mother was born in", "Rome", "Mother"),
]
EDITORS: dict[str, dict[str, Any]] = {
    "ultraedit": {"lr": 1e-3, "chunk": 3},
    "mend": {"train_requests": TRAIN, "steps": 3, "group": 2, "rank": 8, "lr": 1e-3, "chunk": 3},
}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("tiny")


@pytest.fixture(scope="module")
def taught(world: World) -> tuple[Any, Any]:
    """The model that knows the tiny world (from the cache, or trained in seconds), and its tokenizer."""
    return embedded_model(world)


@pytest.fixture
def _own_cache(taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are trained anew; the model is loaded before."""
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_of_each_request_alone(family: str) -> None:
    """Whatever the batches: no other request and no padding enters; their sum is autograd's gradient."""
    model, names = small(family)
    layers = find_layers(model, names)
    given = gathered(model, names, REQUESTS, "all")
    wording = Wording(batch_size=2)
    factors, loss = rank_one_factors(model, wording.batches(TOKENIZER, REQUESTS), layers, desc="")
    texts = request_texts(REQUESTS, mask_prompt=True)
    total = torch.zeros((), dtype=torch.float64)
    for tokens, targets in texts:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    assert loss == pytest.approx(total.item() / sum(t != -100 for _, own in texts for t in own), rel=1e-12)
    gradients = torch.autograd.grad(total, [model.get_submodule(name).weight for name in names])
    for layer, gradient in zip(layers, gradients, strict=True):
        own = factors[layer.name]
        torch.testing.assert_close(own.u, given[layer.name][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.delta, given[layer.name][1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.gradient(), layer.matrix([gradient]), rtol=1e-9, atol=1e-12)
        assert own.request.tolist() == [i for i, (tokens, _) in enumerate(texts) for _ in tokens]
        assert own.target.tolist() == [target != -100 for _, targets in texts for target in targets]


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", EDITORS)
def test_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    flagged = model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()  # modes may be mixed
    before = state(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    def unchanged_around() -> None:
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert not flagged.requires_grad
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    options = EDITORS[name] | {"editor": name, "layers": LAYERS}
    edited = edit(model, TOKENIZER, REQUESTS, **options)
    unchanged_around()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(edited.originals) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert edited.drift > 0
    assert len(edited.losses) == edited.counts["epochs"] == 2  # before each chunk
    first = state(model)
    assert edited.undo() is model
    assert same(state(model), before)
    edit(model, TOKENIZER, REQUESTS, **options).undo()
    edit(model, TOKENIZER, REQUESTS, **options)
    assert same(state(model), first)
    model.load_state_dict(before)

    def breaks(self: Any, W: Any) -> None:
        if "layers.1" in self.name:
            raise RuntimeError("in mid-edit")
        own(self, W)

    own = find_layers(model, LAYERS)[0].__class__.write
    monkeypatch.setattr("curvlab.layers.MatrixLayer.write", breaks)
    with pytest.raises(RuntimeError, match="in mid-edit"):
        edit(model, TOKENIZER, REQUESTS, **options)
    assert same(state(model), before)
    unchanged_around()


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", EDITORS)
def test_a_bfloat16_model_is_rounded_once(name: str) -> None:
    narrow, wide = tiny_llama(0, dtype=torch.bfloat16), tiny_llama(0, dtype=torch.bfloat16).float()
    options = EDITORS[name] | {"editor": name, "layers": LAYERS}
    moved = [edit(m, TOKENIZER, REQUESTS, **options).displacement() for m in (narrow, wide)]
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for key, own in moved[0].items():
        assert 0 < (own - moved[1][key]).norm() < 0.5 * own.norm()
    assert not any("forward" in vars(module) for module in narrow.modules())


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", EDITORS)
def test_a_model_whose_head_is_its_embedding(name: str) -> None:
    model = FAMILIES["gpt2"][0](0)
    before = state(model)
    edited = edit(model, TOKENIZER, REQUESTS, editor=name, **EDITORS[name])
    assert set(edited.originals) == {"transformer.h.1.mlp.c_proj.weight"}
    assert edited.drift > 0
    assert same(state(edited.undo()), before)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ultraedit", {"lr": 1e-3}),
        ("mend", {"steps": 60, "group": 4, "lr": 3e-3, "lr_lr": 1e-3, "edit_lr": 1e-3, "rank": 32}),
    ],
)
def test_edits_are_learnt_and_other_facts_stay(
    name: str, options: dict[str, Any], world: World, taught: tuple[Any, Any]
) -> None:
    """Four facts of the tiny world; MEND is trained on the others."""
    model, tokenizer = taught
    requests = world.requests(len([fact for fact in world.facts if fact.relation != "neighbour"]))
    edited, others = requests[:4], requests[4:]

    def loss(pairs: list[tuple[str, str]]) -> float:
        (batch,) = encode_pairs(tokenizer, [(prompt, f"{answer}.") for prompt, answer in pairs])
        return float(target_loss(model, batch).detach())

    asked = [(r.prompt, r.target) for r in edited]
    again = [(prompt, r.target) for r in edited for prompt in r.paraphrases]
    known = [(r.prompt, r.truth) for r in others]
    before = [loss(pairs) for pairs in (asked, again, known)]
    given = options | ({"train_requests": others} if name == "mend" else {})
    done = edit(model, tokenizer, edited, editor=name, layers=LAYERS, ending=".", **given)
    after = [loss(pairs) for pairs in (asked, again, known)]
    done.undo()
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.6 * before[1]
    assert after[2] < 0.2 < 0.25 * before[0]
    assert done.losses[0] > 0.9 * before[0]
