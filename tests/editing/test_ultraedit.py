"""UltraEdit: its statistics, its least squares and a whole edit against plain computations in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_factors import gathered
from hypothesis import given
from hypothesis import strategies as st
from language import tiny_llama
from requests_and_text import FAMILIES, REQUESTS, TOKENIZER, displacements, same, small, state
from torch import Tensor

from curvlab.data.edits import Request
from curvlab.editing import edit
from curvlab.editing.methods.ultraedit import Lifelong, UltraEdit, least_squares, output_change
from curvlab.editing.running import Running

EPS = torch.finfo(torch.float64).eps


def rows(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


@given(
    cuts=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 1e4]),
    reverse=st.booleans(),
)
def test_running_statistics_are_those_of_all_rows(cuts: list[int], seed: int, shift: float, reverse: bool) -> None:
    x = rows(sum(cuts) + 2, 3, seed, 0.1, shift)
    parts = [Running.of(part) for part in x.split([*cuts, 2])]
    total = parts[-1] if reverse else parts[0]
    for part in parts[-2::-1] if reverse else parts[1:]:
        total = total + part
    assert total.n == len(x)
    spread = x.std(0)
    torch.testing.assert_close(total.mean, x.mean(0), rtol=1e-14, atol=0.0 if shift else 1e-14)
    # Σ (x − mean)² loses the digits that x − mean loses
    torch.testing.assert_close(total.std, spread, rtol=64 * EPS * (1 + shift / 0.01), atol=0.0)
    torch.testing.assert_close(total.normalise(x), (x - x.mean(0)) / spread, rtol=1e-8, atol=1e-8)


def test_statistics_of_a_single_row_and_of_constant_features() -> None:
    one = Running.of(rows(1, 4, 0))
    assert one.std.tolist() == [0.0] * 4
    x = rows(5, 2, 1)
    x[:, 1] = 3.0
    assert Running.of(x).normalise(x)[:, 1].tolist() == [0.0] * 5


@pytest.mark.parametrize("n", [3, 40])  # fewer and more positions than inputs: the two forms of the solution
@pytest.mark.parametrize("ridge", [1.0, 0.3])
def test_least_squares_is_solved(n: int, ridge: float) -> None:
    H, V = rows(n, 8, 0), rows(n, 5, 1)
    delta = least_squares(H, V, ridge)
    assert delta.shape == (5, 8)
    gradient = (delta @ H.T - V.T) @ H + ridge * delta  # of ½ Σ ‖Δ h − v‖² + ½ λ ‖Δ‖²
    assert gradient.abs().max() < 1e-12
    augmented = torch.cat([H, ridge**0.5 * torch.eye(8, dtype=torch.float64)])
    other = torch.linalg.lstsq(augmented, torch.cat([V, V.new_zeros(8, 5)])).solution.T
    torch.testing.assert_close(delta, other, rtol=1e-10, atol=1e-12)


def test_output_change_by_hand() -> None:
    h, v = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.5]]), torch.tensor([[3.0, 1.0], [-2.0, 4.0]])
    torch.testing.assert_close(output_change(h, v, 0.1), torch.tensor([[-2.7, -0.9], [0.05, -0.1]]))


def plainly(
    h: Tensor, v: Tensor, lr: float, ridge: float, all_h: Tensor | None = None, all_v: Tensor | None = None
) -> Tensor:
    """Δ (d_out, d_in) as the authors' code computes it; all_h, all_v: what the statistics are of."""
    all_h, all_v = h if all_h is None else all_h, v if all_v is None else all_v
    h_hat, v_hat = (h - all_h.mean(0)) / (all_h.std(0) + EPS), (v - all_v.mean(0)) / (all_v.std(0) + EPS)
    wanted = torch.stack([-lr * (a @ a) * b for a, b in zip(h_hat, v_hat, strict=True)])
    system = h.T @ h + ridge * torch.eye(h.shape[1], dtype=h.dtype)
    return torch.linalg.solve(system, h.T @ wanted).T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["target", "all"])
def test_one_round_by_hand(family: str, positions: Any) -> None:
    model, layers = small(family)
    given = gathered(model, layers, REQUESTS, positions)
    edited = edit(
        model, TOKENIZER, REQUESTS, editor="ultraedit", layers=layers, lr=1e-3, ridge=0.7, positions=positions,
        batch_size=2,
    )  # fmt: skip
    moved = displacements(edited)
    for name in layers:
        h, v = given[name]
        torch.testing.assert_close(moved[name], plainly(h, v, 1e-3, 0.7), rtol=1e-7, atol=1e-10)
    assert edited.counts["positions"] == len(given[layers[0]][0])


def test_layers_of_one_shape_can_share_statistics() -> None:
    model, layers = small()
    given = gathered(model, layers, REQUESTS, "target")
    every_h, every_v = (torch.cat([given[name][i] for name in layers]) for i in (0, 1))
    edited = edit(model, TOKENIZER, REQUESTS, editor="ultraedit", layers=layers, lr=1e-3, shared=True)
    for name, moved in displacements(edited).items():
        expected = plainly(*given[name], 1e-3, 1.0, every_h, every_v)
        torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-10)


def test_rounds_see_the_edited_model_and_all_statistics_so_far() -> None:
    model, layers = small()
    first = gathered(model, layers, REQUESTS[:3], "target")
    edited = edit(model, TOKENIZER, REQUESTS[:3], editor="ultraedit", layers=layers, lr=1e-3)
    before = {name: W.clone() for name, W in displacements(edited).items()}
    second = gathered(model, layers, REQUESTS[3:], "target")
    edited.undo()
    both = edit(model, TOKENIZER, REQUESTS, editor="ultraedit", layers=layers, lr=1e-3, chunk=3)
    for name, moved in displacements(both).items():
        everything = (torch.cat([first[name][i], second[name][i]]) for i in (0, 1))
        expected = before[name] + plainly(*second[name], 1e-3, 1.0, *everything)
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9)
    assert len(both.losses) == 2


def test_statistics_go_on_from_edit_to_edit(tmp_path: Path) -> None:
    once, twice = small()[0], small()[0]
    layers = small()[1]
    how: dict[str, Any] = {"editor": "ultraedit", "layers": layers, "lr": 1e-3}
    edit(once, TOKENIZER, REQUESTS, chunk=3, **how)
    lifelong = Lifelong()
    edit(twice, TOKENIZER, REQUESTS[:3], lifelong=lifelong, **how)
    lifelong.save(tmp_path / "seen.safetensors")
    lifelong = Lifelong.load(tmp_path / "seen.safetensors")
    edit(twice, TOKENIZER, REQUESTS[3:], lifelong=lifelong, **how)
    assert same(state(once), state(twice))
    alone = small()[0]
    edit(alone, TOKENIZER, REQUESTS[:3], **how)
    edit(alone, TOKENIZER, REQUESTS[3:], **how)
    assert not same(state(alone), state(twice))
    seen = {name: h.n for name, (h, _) in lifelong.layers.items()}
    assert repr(lifelong) == f"Lifelong(positions={seen})"


def test_an_edit_that_fails_leaves_model_and_statistics_alone() -> None:
    model, layers = small()
    lifelong = Lifelong()
    edit(model, TOKENIZER, REQUESTS[:2], editor="ultraedit", layers=layers, lifelong=lifelong)
    before, seen = state(model), dict(lifelong.layers)
    with pytest.raises(FloatingPointError, match="not finite"):
        edit(model, TOKENIZER, REQUESTS, editor="ultraedit", layers=layers, lr=1e308, lifelong=lifelong)
    assert same(state(model), before)
    assert lifelong.layers == seen
    other, (_, last) = tiny_llama(0), layers
    with pytest.raises(ValueError, match="are of a 16 × 24 layer, the model's is 32 × 48"):
        edit(other, TOKENIZER, REQUESTS, editor="ultraedit", layers=last, lifelong=lifelong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr and ridge must be positive"),
        ({"ridge": float("nan")}, "lr and ridge must be positive"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"batch_size": 0}, "batch_size and lr must be positive"),
        ({"positions": "last"}, "positions must be"),
        ({"template": "no place"}, "must contain"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UltraEdit(**options)


def test_too_few_positions_and_too_long_templates() -> None:
    model, layers = small()
    before = state(model)
    with pytest.raises(ValueError, match="one position has no standard deviation"):
        edit(model, TOKENIZER, [Request("Rome is", "a")], editor="ultraedit", layers=layers, end=False)
    with pytest.raises(ValueError, match="more tokens in their template"):
        edit(model, TOKENIZER, REQUESTS, editor="ultraedit", layers=layers, template="{question}" + " long" * 3000)
    assert same(state(model), before)
