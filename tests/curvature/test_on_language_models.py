"""Curvature of Hugging Face causal LMs, held to outer products of single tokens that plain autograd gives."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama
from reference import assert_close
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from curvlab import batches, capture
from curvlab.capture import Batch, passes, split
from curvlab.curvature import EKFAC, KFAC, Covariance, grams
from curvlab.draws import uniforms
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy

WORDS, LOSS = 11, CrossEntropy()


def tiny_qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def tiny_opt() -> PreTrainedModel:
    """Whose MLPs see tokens as (N·T, d), and whose positions are counted from the attention mask."""
    config = OPTConfig(
        vocab_size=WORDS, hidden_size=8, word_embed_proj_dim=8, ffn_dim=12, num_hidden_layers=2, num_attention_heads=2,
        dropout=0.0, max_position_embeddings=64, init_std=0.4,
    )  # fmt: skip
    return OPTForCausalLM(config)


FAMILIES = {
    "llama": (lambda: tiny_llama(vocabulary=WORDS), "model.layers.*.mlp.down_proj", "model.layers.0.mlp.gate_proj"),
    "qwen2": (tiny_qwen2, "model.layers.*.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
    "gpt2": (lambda: tiny_gpt2(vocabulary=WORDS), "transformer.h.*.mlp.c_proj", "transformer.h.1.mlp.c_fc"),
    "opt": (tiny_opt, "model.decoder.layers.*.fc2", "model.decoder.layers.0.fc1"),
}


@dataclass
class Tokens:
    """Sequences of their own length: token ids, and next tokens with −100 where the label is ignored."""

    ids: list[Tensor]
    targets: list[Tensor]

    def padded(self, side: str = "right", extra: int = 0) -> Batch:
        """One batch, random tokens in the padding, the mask given by `attention_mask` alone."""
        length = max(map(len, self.ids)) + extra
        ids = torch.randint(WORDS, (len(self.ids), length))
        targets, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for n, (own, y) in enumerate(zip(self.ids, self.targets, strict=True)):
            place = slice(0, len(own)) if side == "right" else slice(length - len(own), length)
            ids[n, place], targets[n, place], mask[n, place] = own, y, 1
        return Batch({"input_ids": ids, "attention_mask": mask}, targets)


def tokens(lengths: Sequence[int] = (3, 5, 2), prompt: int = 1) -> Tokens:
    """Labels of the first `prompt` positions are ignored, as of a masked prompt, and the last has none."""
    ids = [torch.randint(WORDS, (n,)) for n in lengths]
    targets = [torch.cat([x[1:], torch.tensor([-100])]) for x in ids]
    for y in targets:
        y[: min(prompt, len(y) - 2)] = -100
    return Tokens(ids, targets)


def model_of(family: str) -> PreTrainedModel:
    """In float64 throughout: transformers' RMSNorm would compute in float32."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().double().eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


# The reference: one sequence at a time, without padding, token by token


def see(model: nn.Module, layer: str, ids: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """a (T, d_in), s (T, d_out) as a leaf of the graph, and log-probabilities (T, words)."""
    found: dict[str, Tensor] = {}

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found["a"], found["s"] = args[0].detach(), output.detach().requires_grad_()
        return found["s"]

    handle = model.get_submodule(layer).register_forward_hook(hook)
    log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    handle.remove()
    a = found["a"].reshape(len(ids), -1)
    if bias:
        a = torch.cat([a, torch.ones(len(ids), 1)], 1)
    return a, found["s"], log_p


def gradients(s: Tensor, values: Tensor) -> Tensor:
    """∂ Σ values / ∂s as (T, d_out)."""
    (g,) = torch.autograd.grad(values.sum(), s, retain_graph=True)
    return g.reshape(-1, s.shape[-1])


def drawn(log_p: Tensor, example: int, seed: int) -> list[int]:
    u = uniforms(seed, 0, torch.tensor([example]), len(log_p))[0, :, 0].tolist()
    labels = []
    for height, p in zip(u, log_p.exp().tolist(), strict=True):
        word, running = 0, p[0]
        while running < height:
            word += 1
            running += p[word]
        labels.append(word)
    return labels


def per_example(model: nn.Module, layer: str, data: Tokens, labels: str, bias: bool, seed: int) -> Iterator[Any]:
    """For each sequence: a (T, d_in), and (weight, g (T, d_out)) of each label that counts."""
    for n, (ids, y) in enumerate(zip(data.ids, data.targets, strict=True)):
        a, s, log_p = see(model, layer, ids, bias)
        terms = [t for t in range(len(y)) if y[t] != -100]
        if labels == "exact":  # the Fisher's expectation, word by word: positions draw independently
            g = [(log_p[t, c].exp().item(), gradients(s, -log_p[t, c])) for t in terms for c in range(WORDS)]
        else:
            words = y.tolist() if labels == "data" else drawn(log_p.detach(), n, seed)
            g = [(1.0, gradients(s, -torch.stack([log_p[t, words[t]] for t in terms])))]
        yield a, g, len(terms)


def factors(
    model: nn.Module, layer: str, data: Tokens, labels: str, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    A = S = torch.zeros(())
    positions = terms = 0
    for a, weighted, carrying in per_example(model, layer, data, labels, bias, seed):
        for row in a:
            A = A + torch.outer(row, row)
        for weight, g in weighted:
            for row in g:
                S = S + weight * torch.outer(row, row)
        positions, terms = positions + len(a), terms + carrying
    return A / positions, S / terms


# K-FAC, EK-FAC and covariance


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("labels", ["data", "model", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_token_by_token(family: str, labels: Any) -> None:
    """All layers of a pattern in one pass; padding on either side, in any amount, counts nowhere; prompts do."""
    model, data, pattern = model_of(family), tokens(), FAMILIES[family][1:]
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for side, extra in (("right", 0), ("left", 0), ("right", 3), ("left", 2)):
        batch = data.padded(side, extra)
        fit = KFAC.fit(model, LOSS, [batch], pattern, labels=labels, seed=4)
        assert len(fit.factors) == 3
        for name, own in fit.factors.items():
            if name not in expected:
                expected[name] = factors(model, name, data, labels, seed=4)
            assert_close(own.A, expected[name][0])
            assert_close(own.S, expected[name][1])
            assert (own.scale.positions, own.scale.terms) == (10, 5)


@pytest.mark.usefixtures("float64")
def test_conv1d_with_its_bias() -> None:
    model, data = model_of("gpt2"), tokens()
    name = "transformer.h.0.mlp.c_proj"
    fit = KFAC.fit(model, LOSS, [data.padded("left", 1)], name, labels="data", bias=True).factors[name]
    assert (fit.layer.d_out, fit.layer.d_in) == (32, 129)
    A, S = factors(model, name, data, "data", bias=True)
    assert_close(fit.A, A)
    assert_close(fit.S, S)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_ekfac_and_covariance(family: str) -> None:
    model, data, pattern = model_of(family), tokens(), FAMILIES[family][1]
    batch = data.padded("left", 1)
    ekfac = EKFAC.fit(model, LOSS, [batch], pattern, labels="data")
    covariance = Covariance.fit(model, LOSS, [batch], pattern)
    for block in ekfac.spectrum().blocks:
        name = block.basis.layers[0].name
        squares = torch.zeros(block.basis.shape)
        for a, ((_, g),), _ in per_example(model, name, data, "data", False, 0):
            q = sum(torch.outer(left, right) for left, right in zip(g, a, strict=True))
            squares += (block.basis.u_out.mT @ q @ block.basis.u_in).square()
        assert_close(block.values, squares / 5)
        assert_close(covariance.moments[name].A, factors(model, name, data, "data")[0])
        assert ekfac.scales[name] == covariance.moments[name].scale


@pytest.mark.usefixtures("float64")
def test_an_ignored_label_has_no_loss_but_its_position_counts() -> None:
    model, name = model_of("llama"), "model.layers.0.mlp.down_proj"
    data = tokens((6,), prompt=4)  # one label left
    fit = KFAC.fit(model, LOSS, [data.padded()], name, labels="data").factors[name]
    assert (fit.scale.terms, fit.scale.positions) == (1, 6)
    _, s, log_p = see(model, name, data.ids[0], False)
    g = gradients(s, -log_p[4, data.targets[0][4]])
    assert bool((g[:5].norm(dim=1) > 0).all())  # of the prompt too
    assert_close(fit.S, g.mT @ g)


@pytest.mark.usefixtures("float64")
def test_the_mask_of_a_batch_wins_over_its_attention_mask() -> None:
    model, name = model_of("llama"), "model.layers.1.mlp.down_proj"
    inputs, targets = tokens((4, 4)).padded().inputs, torch.randint(WORDS, (2, 4))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 0] = False  # a real token whose statistics are not wanted
    targets[0, 0] = -100
    assert next(split([(inputs, targets)])).mask.all()
    fit = KFAC.fit(model, LOSS, [(inputs, targets, mask)], name, labels="data").factors[name]
    assert fit.scale.positions == 7
    a = [see(model, name, ids, False)[0] for ids in inputs["input_ids"]]
    assert_close(fit.A, (a[0][1:].mT @ a[0][1:] + a[1].mT @ a[1]) / 7)
    with pytest.raises(ValueError, match="does not say which positions are padding"):
        next(split([(inputs | {"attention_mask": torch.ones(2, 1, 4, 4)}, targets)]))
    targets[0, 0] = 1
    with pytest.raises(ValueError, match="padding carries a loss"):
        KFAC.fit(model, LOSS, [(inputs, targets, mask)], name, labels="data")
    with pytest.raises(ValueError, match="input_ids"):
        next(split([inputs | {"labels": targets}]))


# What a pass costs


def test_backward_stops_at_the_lowest_layer_and_frozen_weights_gather_nothing() -> None:
    model = model_of("llama").float()
    batch, reached = tokens().padded(), []
    for module in (model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.gate_proj):
        module.register_forward_hook(lambda _, __, s: reached.append(s.requires_grad))
    layers = find_layers(model, "model.layers.1.mlp.down_proj")
    (pass_,) = passes(model, LOSS, [batch], layers, desc="test")
    assert reached == [False, False]  # neither below the layer nor in it before its output
    nodes, queue = set(), [pass_.outputs.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            queue += [parent for parent, _ in node.next_functions]
    names = [type(node).__name__ for node in nodes]
    assert sum("Mm" in name or "mm" in name for name in names) == 1  # the head: no other product is differentiated
    assert names.count("AccumulateGrad") == 1  # s itself, no weight
    KFAC.fit(model, LOSS, [batch], "model.layers.1.mlp.down_proj", labels="data")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_graph_without_labels() -> None:
    model, seen = model_of("gpt2").float(), []
    model.lm_head.register_forward_hook(lambda _, __, s: seen.append(s.requires_grad))
    Covariance.fit(model, LOSS, [tokens().padded()], "transformer.h.0.mlp.c_proj")
    assert seen == [False]


@pytest.mark.parametrize("labels", ["data", "model"])
def test_bfloat16_weights_have_float32_sums(labels: Any) -> None:
    torch.manual_seed(0)
    model = tiny_llama(vocabulary=WORDS, dtype=torch.bfloat16)
    name, batches = "model.layers.0.mlp.down_proj", [tokens((9, 9, 9)).padded() for _ in range(30)]
    fit = KFAC.fit(model, LOSS, batches, name, labels=labels)
    own = fit.factors[name]
    assert own.a_sum.dtype == own.s_sum.dtype == torch.float32
    assert fit.origin is not None
    assert fit.origin.dtype == "torch.bfloat16"
    a_sum, s_sum = torch.zeros(48, 48, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    for pass_ in passes(model, LOSS, batches, find_layers(model, name), desc="test"):
        a = pass_.inputs(pass_.layers[0])
        assert a.dtype == torch.bfloat16
        a_sum += a.double().flatten(0, 1).mT @ a.double().flatten(0, 1)
        for g in pass_.gradients(capture.columns(pass_, LOSS, labels)):
            s_sum += g[name].double().flatten(0, 1).mT @ g[name].double().flatten(0, 1)
    assert_close(own.a_sum, a_sum, 3e-6)  # bfloat16 sums would be off by 1e-2
    assert_close(own.s_sum, s_sum, 3e-6)


def test_confident_predictions_keep_their_gradient_in_bfloat16() -> None:
    """p − 1 is taken in float32: p = 0.999 is 1 in bfloat16, and the gradient would vanish."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    nn.init.eye_(model[0].weight)
    x = 9.0 * torch.eye(8, dtype=torch.bfloat16)[:1]
    (pass_,) = passes(model, LOSS, [(x, torch.tensor([0]))], find_layers(model, "0"), desc="test")
    (v,) = capture.columns(pass_, LOSS, "data")
    assert_close(v[0, 0], x[0].double().softmax(0) - torch.eye(8)[0], 1e-2)
    assert float(v[0, 0, 0]) < 0


def test_micro_batches_are_bounded_by_positions_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama").float(), tokens((8,) * 10).padded()
    name = "model.layers.0.mlp.down_proj"

    def sizes(**bounds: int) -> list[int]:
        with monkeypatch.context() as patch:
            for bound, value in bounds.items():
                patch.setattr(batches, bound, value)
            return [len(part) for part in split([batch], model=model)]

    assert sizes() == [10]
    assert sizes(MICRO_BATCH=4) == [4, 4, 2]
    assert sizes(MICRO_POSITIONS=30) == [3, 3, 3, 1]  # of eight tokens
    assert sizes(MICRO_OUTPUT_BYTES=5 * 8 * WORDS * 4) == [5, 5]
    assert sizes(MICRO_OUTPUT_BYTES=1) == [1] * 10
    assert [len(part) for part in split([batch])] == [10]  # without a model the vocabulary is not known
    whole = KFAC.fit(model, LOSS, [batch], name, labels="model")
    monkeypatch.setattr(batches, "MICRO_POSITIONS", 24)
    monkeypatch.setattr(capture, "PIECE_BYTES", 8 * 8 * WORDS)  # pieces of one example
    cut = KFAC.fit(model, LOSS, [batch], name, labels="model")
    assert_close(cut.factors[name].S, whole.factors[name].S, 1e-5)
    assert_close(cut.factors[name].A, whole.factors[name].A, 1e-5)


def test_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama").float(), tokens().padded()
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": 1000)
    with pytest.raises(MemoryError, match=r"K-FAC factors of 2 layers needs 26.0 KiB"):
        KFAC.fit(model, LOSS, [batch], "model.layers.*.mlp.down_proj", labels="data")
    free = iter((30_000, 5_000))
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": next(free))
    with pytest.raises(MemoryError, match=r"outputs of a pass needs 5.2 KiB.*a smaller micro_batch"):
        KFAC.fit(model, LOSS, [batch], "model.layers.*.mlp.down_proj", labels="data")


# How sums are taken


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("leaf", [1, 3, 16, 512])
def test_grams_by_their_upper_triangle(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "LEAF", leaf)
    torch.manual_seed(0)
    for shape in ((4, 3, 37), (2, 50, 7), (1, 1, 20)):
        x = torch.randn(shape)
        for same in (x, x.mT.contiguous().mT):  # contiguous, and not
            total = torch.zeros(shape[2], shape[2])
            grams.add_gram(total, same)
            grams.add_gram(total, 2 * same)
            grams.mirror(total)
            assert_close(total, 5 * torch.einsum("ntd,nte->de", x, x), 1e-13)
    model, data, name = model_of("llama"), tokens(), "model.layers.0.mlp.down_proj"
    fit = KFAC.fit(model, LOSS, [data.padded("left", 1)], name, labels="data").factors[name]
    A, S = factors(model, name, data, "data")
    assert_close(fit.A, A)
    assert_close(fit.S, S)
    assert_close(Covariance.fit(model, LOSS, [data.padded()], name).moments[name].A, A)


@pytest.mark.usefixtures("float64")
def test_padding_may_hold_anything() -> None:
    """What a layer is given at padding may be no number at all."""

    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, WORDS)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.first(input_ids.where(attention_mask.bool().unsqueeze(-1), torch.nan))
            return self.last(h.where(attention_mask.bool().unsqueeze(-1), 0.0))

    torch.manual_seed(0)
    model, x = Spoilt().eval(), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    y = torch.randint(WORDS, (2, 4)).where(mask.bool(), -100)
    data = [({"input_ids": x, "attention_mask": mask}, y)]
    rows = x[mask.bool()]
    for sharing in ("expand", "reduce"):
        fit = KFAC.fit(model, LOSS, data, "first", labels="exact", sharing=sharing).factors["first"]
        means = torch.stack([x[0, :3].mean(0), x[1, 1:].mean(0)])
        expected = rows if sharing == "expand" else means
        assert_close(fit.A, expected.mT @ expected / len(expected))
        assert bool(fit.s_sum.isfinite().all())
    values = EKFAC.fit(model, LOSS, data, "first", labels="exact").spectrum().blocks[0].values
    assert bool(values.isfinite().all())
    assert float(values.sum()) > 0


def test_a_pass_frees_its_graph_and_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama").float(), tokens().padded()
    layers = find_layers(model, "model.layers.0.mlp.down_proj")
    (pass_,) = passes(model, LOSS, [batch], layers, desc="test")
    v = torch.ones_like(pass_.outputs)
    assert len(list(pass_.gradients([v, v]))) == 2
    with pytest.raises(RuntimeError, match="second time"):
        list(pass_.gradients([v]))
    alive: list[Any] = []
    forward = capture._forward

    def watched(*arguments: Any) -> Any:
        assert all(reference() is None for reference in alive)
        pass_ = forward(*arguments)
        alive.append(weakref.ref(pass_))
        return pass_

    monkeypatch.setattr(capture, "_forward", watched)
    for kind in (KFAC, EKFAC, Covariance):
        kind.fit(model, LOSS, [batch] * 3, layers[0].name, labels="data")
    assert len(alive) == 3 + 6 + 3


@pytest.mark.usefixtures("float64")
def test_the_covariance_behind_kfac() -> None:
    model, name = model_of("llama"), "model.layers.0.mlp.down_proj"
    arguments = (model, LOSS, [tokens().padded()], name)
    own, other = Covariance.of(KFAC.fit(*arguments, labels="data")), Covariance.fit(*arguments, labels="data")
    assert_close(own.moments[name].A, other.moments[name].A)
    assert own.moments[name].g_norm == pytest.approx(other.moments[name].g_norm)
    assert (own.labels, own.origin, own.moments[name].scale) == ("data", other.origin, other.moments[name].scale)
    with pytest.raises(ValueError, match="means over positions"):
        Covariance.of(KFAC.fit(*arguments, labels="data", sharing="reduce"))
