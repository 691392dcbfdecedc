"""bfloat16 models: small steps add up, and the edit follows that of the same weights in float32."""

from typing import Any

import pytest
import torch
from requests_and_text import DOCUMENTS, FAMILIES, REQUESTS, TOKENIZER, displacements, same, state
from torch import Tensor

from curvlab.editing import Capability, Training, edit, editors
from curvlab.editing.locating import Locating
from curvlab.editing.precision import widened
from curvlab.layers import find_layers

SPACING = 2.0**-8  # of bfloat16, relative


def twins(family: str) -> tuple[Any, Any, str]:
    """The same weights in bfloat16 and in float32."""
    make, pattern = FAMILIES[family]
    narrow = make(0, dtype=torch.bfloat16)
    wide = make(0)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide, pattern


def run(model: Any, pattern: str, editor: str = "ft", **options: Any) -> Any:
    # labels of the data: drawn ones may differ where rounding moves a probability
    given = {"layers": pattern, "capability": Capability(DOCUMENTS, labels="data"), "optimizer": "sgd", "lr": 1e-2}
    return edit(model, TOKENIZER, REQUESTS, editor=editor, **(given | {"epochs": 4, "batch_size": 5} | options))


def cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / (a.norm() * b.norm())).item()


CASES: list[dict[str, Any]] = [
    {},
    {"editor": "replay"},
    {"editor": "kfac-penalty", "strength": 1.0},
    {"editor": "crispedit", "gamma": 0.7},
    {"editor": "crispedit", "gamma": 0.7, "project": "update"},
    {"editor": "crispedit", "gamma": 0.7, "project": "eigenbasis"},
    {"editor": "crispedit", "gamma": 0.7, "drift": 0.02, "project": "eigenbasis"},
    {"editor": "crispedit-eps", "epsilon": 1e-3},
    {"editor": "crispedit-seq", "gamma": 0.7, "chunk": 3},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())) or "ft")
def test_the_edit_follows_that_in_float32(case: dict[str, Any], family: str) -> None:
    narrow, wide, pattern = twins(family)
    a, b = run(narrow, pattern, **case), run(wide, pattern, **case)
    assert a.losses == pytest.approx(b.losses, rel=0.03)
    assert a.counts.get("refits") == b.counts.get("refits")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for (name, found), expected in zip(displacements(a).items(), displacements(b).values(), strict=True):
        weights = find_layers(wide, name)[0].matrix().abs()
        rounding = SPACING * weights.norm().item() / expected.norm().item()
        assert cosine(found, expected) > 0.98 - rounding**2, name


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_below_the_spacing_of_bfloat16_add_up(family: str) -> None:
    """40 steps of a tenth of the spacing move the weights by four; in bfloat16 each would be lost."""
    narrow, wide, pattern = twins(family)
    layers = find_layers(narrow, pattern)
    before = {layer.name: layer.matrix().clone() for layer in layers}
    typical = torch.cat([W.float().abs().flatten() for W in before.values()]).median().item()
    large = {name: W.abs() > typical for name, W in before.items()}
    lr = 0.1 * SPACING * typical
    for name, W in before.items():
        assert torch.equal((W + lr)[large[name]], W[large[name]])  # one step is lost
    options = {"optimizer": "adam", "lr": lr, "epochs": 40, "stop_below": 0.0, "skip_below": 0.0}
    a, b = run(narrow, pattern, **options), run(wide, pattern, **options)
    assert a.losses[-1] == pytest.approx(b.losses[-1], rel=0.02)
    assert b.losses[-1] < b.losses[0]
    for (name, found), expected in zip(displacements(a).items(), displacements(b).values(), strict=True):
        assert cosine(found[large[name]], expected[large[name]]) > 0.9
        assert (found - expected).abs().mean().item() < SPACING * typical


@pytest.mark.parametrize("name", [name for name, found in editors().items() if issubclass(found.options, Training)])
def test_every_editor_leaves_bfloat16_behind(name: str) -> None:
    narrow, _, pattern = twins("llama")
    before = state(narrow)
    options: dict[str, Any] = {"optimizer": "adam", "epochs": 5}
    if issubclass(editors()[name].options, Locating):  # the requests name no subjects
        options |= {"subject": "last-token", "prefixes": 0}
    if name == "alphaedit":
        options["gamma"] = 0.5
    edited = run(narrow, pattern, name, **options)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in edited.displacement().values()} == {torch.float32}
    assert all("forward" not in vars(module) for module in narrow.modules())
    assert edited.losses[-1] < edited.losses[0] or "seq" in name or "eps" in name
    assert same(state(edited.undo()), before)


def test_forward_passes_see_the_rounded_weight() -> None:
    """What is trained is the model that will be saved: accelerate's forwards are wrapped, not replaced."""
    narrow, _, pattern = twins("gpt2")
    layer = find_layers(narrow, pattern)[1]
    x = torch.randn(2, 3, 128).bfloat16()
    before = layer.module(x)
    with widened(layer):
        weight = layer.parameters()[0]
        assert weight.dtype == torch.float32
        assert torch.equal(layer.module(x), before)
        weight.data += 1e-6  # too little to round to another number, for most weights
        torch.testing.assert_close(layer.module(x), before, rtol=0.05, atol=0.05)
        layer.module(x).float().sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
    assert weight.dtype == torch.bfloat16
    assert weight.grad is None
    assert "forward" not in vars(layer.module)

    module = layer.module
    module._hf_hook, module._old_forward = object(), module.forward
    module.forward = lambda *args, **how: module._old_forward(*args, **how)  # type: ignore[assignment,method-assign]
    outer = module.forward
    with widened(layer):
        assert module.forward is outer
        assert torch.equal(module(x), layer.module(x))
        assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), before, rtol=0.05, atol=0.05)


def test_float32_and_better_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        make, pattern = FAMILIES["llama"]
        (layer, _) = find_layers(make(0, dtype=dtype), pattern)
        with widened(layer):
            assert layer.parameters()[0].dtype == dtype
            assert "forward" not in vars(layer.module)
