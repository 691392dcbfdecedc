"""Rotated inputs of the lowest edited layers, computed once: the same path, whatever refits and rounds do."""

from typing import Any

import pytest
import torch
from requests_and_text import DOCUMENTS, FAMILIES, REQUESTS, TOKENIZER, displacements, small

from curvlab.data.text import encode_pairs, select
from curvlab.editing import Capability, edit
from curvlab.editing import rotated as module
from curvlab.editing.prefix import Prefix
from curvlab.editing.rotated import RotatedInputs
from curvlab.eigenbasis import parametrize


def run(model: Any, layers: Any, **options: Any) -> Any:
    given = {"layers": layers, "capability": Capability(DOCUMENTS, labels="data"), "project": "eigenbasis"}
    training = {"lr": 1e-2, "epochs": 4, "batch_size": 2, "gamma": 0.8}
    return edit(model, TOKENIZER, REQUESTS, **(given | training | options))


@pytest.mark.parametrize("options", [
    {"editor": "crispedit", "drift": None},
    {"editor": "crispedit", "drift": 0.01, "optimizer": "sgd", "lr": 0.1},
    {"editor": "crispedit", "cache_prefix": False},
    {"editor": "crispedit-eps", "epsilon": 1e-2},
    {"editor": "crispedit-seq", "chunk": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_or_not_the_path_is_the_same(family: str, options: dict[str, Any]) -> None:
    found = []
    for cache in (True, False):
        model, layers = small(family)
        edited = run(model, layers, cache_rotated=cache, **options)
        found.append((edited, displacements(edited)))
    (a, first), (b, second) = found
    assert a.losses == pytest.approx(b.losses, rel=1e-9)
    assert a.counts["refits"] == b.counts["refits"]
    if "drift" in options:
        assert (a.counts["refits"] > 0) == (options["drift"] is not None)
    for name, delta in first.items():
        assert delta.norm() > 1e-3
        torch.testing.assert_close(second[name], delta, rtol=1e-6, atol=1e-9)


def test_bfloat16() -> None:
    make, pattern = FAMILIES["llama"]
    losses = [run(make(0, dtype=torch.bfloat16), pattern, cache_rotated=cache).losses for cache in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_only_inputs_that_no_edit_feeds_are_kept() -> None:
    model, _ = small()
    model.requires_grad_(False)
    batch = encode_pairs(TOKENIZER, [(r.prompt, r.target) for r in REQUESTS])[0]
    names = [f"model.layers.{i}.mlp.{end}" for i in (0, 1) for end in ("gate_proj", "up_proj", "down_proj")]
    spectrum = Capability(DOCUMENTS, labels="data").spectrum(model, TOKENIZER, names)
    eigen = parametrize(model, spectrum.null_space(0.8))
    rotated = RotatedInputs(model, eigen, batch, None)
    assert rotated.names == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    # they are what a pass would compute
    index = torch.tensor([4, 1])
    chosen = select(batch, index)
    with torch.no_grad():
        for Z in eigen.parameters():
            Z.normal_(std=0.1)
    wanted = model(**chosen.inputs).logits
    own = model.model.layers[0].post_attention_layernorm
    seen: list[Any] = []
    own.register_forward_hook(lambda m, args, output: seen.append(output))
    rotated.use(index, chosen)
    torch.testing.assert_close(model(**chosen.inputs).logits[chosen.mask], wanted[chosen.mask], rtol=1e-9, atol=1e-9)
    expected = eigen.rotate_input(rotated.names[0], seen[-1])
    torch.testing.assert_close(rotated._stored[rotated.names[0]][index, : expected.shape[1]][chosen.mask],
                               expected[chosen.mask], rtol=1e-9, atol=1e-9)  # fmt: skip
    # a wrong one is noticed: they are really used
    rotated._stored[rotated.names[0]][:] = 0
    rotated.use(index, chosen)
    assert not torch.allclose(model(**chosen.inputs).logits[chosen.mask], wanted[chosen.mask])
    eigen.merge()


def test_they_are_computed_once_and_after_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = RotatedInputs._fill
    monkeypatch.setattr(RotatedInputs, "_fill", lambda self: filled.append(1) or fill(self))
    model, layers = small()
    edited = run(model, layers, drift=0.01, optimizer="sgd", lr=0.1)
    assert len(filled) == 1 + edited.counts["refits"] > 1
    filled.clear()
    run(small()[0], layers, drift=None)
    assert len(filled) == 1
    filled.clear()
    run(small()[0], layers, cache_rotated=False)
    run(small()[0], layers, project="update")
    assert filled == []


def test_bytes_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(module, "announce", lambda what, needed, cheaper, device: asked.append((needed, cheaper)))
    model, layers = small()
    run(model, layers)
    batch = encode_pairs(TOKENIZER, [(r.prompt, r.target) for r in REQUESTS])[0]
    assert asked == [(batch.targets.numel() * 24 * 8, "cache_rotated=False")]
    assert Prefix(model, layers, batch).skipped == 0
