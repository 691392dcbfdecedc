"""Passes over the data: what is captured, counted, cut, refused, and left behind."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import (
    Tokens,
    assert_close,
    case,
    data_of,
    layer_inputs,
    mlp,
    output_hessian,
    output_jacobian,
    padded,
    vectors,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlab.batches import MICRO_BATCH
from curvlab.capture import (
    Batch,
    columns,
    count_examples,
    passes,
    require_reiterable,
    run,
    shaped,
    split,
    split_at,
)
from curvlab.curvature import KFAC
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy, Scale

pytestmark = pytest.mark.usefixtures("float64")


def capture(c: Any, **options: Any) -> list[Any]:
    return list(passes(c.model, c.loss, c.data, find_layers(c.model, c.layers, c.bias), desc="test", **options))


@pytest.mark.parametrize("name", ["linear, two layers", "sequence, two layers", "Conv1D", "convolution, same"])
def test_inputs_and_pseudo_gradients_of_every_example(name: str) -> None:
    c = case(name)
    for pass_, batch in zip(capture(c), c.data, strict=True):
        v = torch.randn_like(pass_.outputs)
        (gradients,) = pass_.gradients([v])
        for layer in pass_.layers:
            a = pass_.inputs(layer)
            assert not a.requires_grad
            for n in range(len(batch[0])):
                one = batch[0][n : n + 1]
                assert_close(a[n], layer_inputs(c, layer.name, one))
                J = output_jacobian(c, layer.name, one)
                assert_close(gradients[layer.name][n], torch.einsum("oc,octd->td", v[n], J))


def test_several_backward_passes_share_one_forward_pass() -> None:
    c = case("sequence, two layers")
    (pass_, _) = capture(c)
    v, w = torch.randn(2, *pass_.outputs.shape)
    together = list(pass_.gradients([v, w, v + w]))
    for name in c.layers:
        assert_close(together[0][name] + together[1][name], together[2][name])
    assert list(pass_.gradients([])) == []


def test_masks_zero_what_is_padding_and_scales_count_the_rest() -> None:
    together, single = padded()
    (pass_,) = capture(together)
    mask = together.data[0][2]
    (gradients,) = pass_.gradients([torch.randn_like(pass_.outputs)])
    for layer in pass_.layers:
        a = pass_.inputs(layer)
        assert float(a[~mask].abs().sum()) == 0.0
        assert float(gradients[layer.name][~mask].abs().sum()) == 0.0
        assert bool((a[mask].abs().sum(-1) > 0).all())
        assert pass_.scale(layer, a) == Scale(terms=6, positions=9)
        assert pass_.positions(a).flatten().tolist() == [2, 4, 3]
        assert pass_.used(a) == 3
    assert [p.scale(p.layers[0], p.inputs(p.layers[0])) for p in capture(single)] == [
        Scale(1, 2),
        Scale(3, 4),
        Scale(2, 3),
    ]


def test_examples_are_numbered_through() -> None:
    c = case("linear")
    assert torch.cat([p.examples for p in capture(c)]).tolist() == list(range(7))
    assert torch.cat([p.examples for p in capture(c, micro_batch=2, first_example=10)]).tolist() == list(range(10, 17))
    assert [len(p.examples) for p in capture(c, micro_batch=2)] == [2, 1, 2, 2]


# Columns


@pytest.mark.parametrize("name", ["linear", "linear, ignored", "sequence", "linear, squared error"])
def test_exact_columns_are_a_factor_of_the_output_hessian(name: str) -> None:
    c = case(name)
    pass_ = capture(c)[0]
    v = torch.stack(list(columns(pass_, c.loss, "exact")))  # (K, N, T, C)
    for n in range(v.shape[1]):
        for t in range(v.shape[2]):
            expected = output_hessian(c.loss, pass_.outputs[n, t].detach(), pass_.targets[n, t])
            assert_close(v[:, n, t].T @ v[:, n, t], expected)
    at_once = (v.abs().sum((1, 3)) > 0).sum(1)  # loss positions in one column
    assert int(at_once.max()) == 1


def test_data_columns_are_the_gradient_and_model_columns_are_unbiased() -> None:
    c = case("sequence")
    pass_ = capture(c)[0]
    (v,) = columns(pass_, c.loss, "data")
    assert_close(v, c.loss.gradient(pass_.outputs, pass_.targets))
    drawn = list(columns(pass_, c.loss, "model", draws=4, seed=1))
    assert len(drawn) == 4
    for i, v in enumerate(drawn):
        expected = c.loss.sampled_gradient(pass_.outputs, pass_.targets, 1, i, pass_.examples) / 2
        assert_close(v, expected)
    assert not any(v.requires_grad for v in drawn)


# What is left behind


def test_a_pass_that_is_abandoned_gives_the_model_back() -> None:
    c = case("linear")
    c.model[0].bias.requires_grad_(False)
    generator = passes(c.model, c.loss, c.data, find_layers(c.model, "0"), desc="test")
    next(generator)
    assert not any(p.requires_grad for p in c.model.parameters())
    assert not any(m._forward_hooks for m in c.model.modules())
    generator.close()  # type: ignore[attr-defined]
    assert [p.requires_grad for p in c.model.parameters()] == [True, False, True, True]


def test_backward_stops_at_the_lowest_layer() -> None:
    reached = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            reached.append(x.requires_grad)
            return x

    c = vectors(CrossEntropy(), ["2"], False)
    c.model = nn.Sequential(c.model[0], Watch(), nn.Linear(4, 3), Watch())
    capture(c)
    assert reached == [False, True] * 2


def test_frozen_layers_and_inputs_without_gradients() -> None:
    c = vectors(CrossEntropy(), ["0"], False)
    c.model.requires_grad_(False)
    d = data_of(c, "0", "data")
    (g,) = capture(c)[0].gradients(columns(capture(c)[0], c.loss, "data"))
    assert_close(g["0"][0], d[0].g[0])


# Batches


def test_batches_are_cut_and_keep_their_parts_together() -> None:
    x, y, mask = torch.arange(10).view(5, 2), torch.arange(5), torch.arange(10).view(5, 2) % 2 == 0
    parts = list(split([(x, y, mask), ({"a": x, "b": y}, y)], 2))
    assert [len(part) for part in parts] == [2, 2, 1] * 2
    assert torch.equal(torch.cat([part.inputs for part in parts[:3]]), x)
    assert torch.equal(torch.cat([part.mask for part in parts[:3]]), mask)
    assert torch.equal(torch.cat([part.inputs["b"] for part in parts[3:]]), y)
    assert parts[3].mask is None
    assert [len(part) for part in split([Batch(x, y)])] == [5]
    big = torch.zeros(MICRO_BATCH + 1)
    assert [len(part) for part in split([(big, big)])] == [MICRO_BATCH, 1]


def test_examples_are_counted_where_that_costs_no_pass() -> None:
    x, y = torch.zeros(5, 2), torch.zeros(5)
    assert count_examples([(x, y), Batch(x, y), (x, y, y)]) == 15
    assert count_examples(DataLoader(TensorDataset(x, y), batch_size=2)) == 5
    assert count_examples(iter([(x, y)])) is None
    assert count_examples([(x,)]) is None
    require_reiterable([(x, y)])
    require_reiterable(DataLoader(TensorDataset(x, y)))
    for once in (iter([(x, y)]), (batch for batch in [(x, y)])):
        with pytest.raises(ValueError, match="not an iterator"):
            require_reiterable(once)


def test_outputs_and_targets_get_a_position() -> None:
    assert [tuple(t.shape) for t in shaped(torch.zeros(4, 3), torch.zeros(4).long())] == [(4, 1, 3), (4, 1)]
    assert [tuple(t.shape) for t in shaped(torch.zeros(4, 3), torch.zeros(4, 3))] == [(4, 1, 3), (4, 1, 3)]
    assert [tuple(t.shape) for t in shaped(torch.zeros(4, 2, 3), torch.zeros(4, 2).long())] == [(4, 2, 3), (4, 2)]
    for outputs, targets in (
        (torch.zeros(4, 3), torch.zeros(5).long()),
        (torch.zeros(4, 3), torch.zeros(4, 3).long()),
        (torch.zeros(4, 3), torch.zeros(4, 2)),
        (torch.zeros(4, 2, 3), torch.zeros(4).long()),
    ):
        with pytest.raises(ValueError, match="do not fit outputs"):
            shaped(outputs, targets)
    with pytest.raises(ValueError, match=r"outputs must be \(N, C\) or"):
        shaped(torch.zeros(4, 2, 3, 5), torch.zeros(4).long())


def test_models_are_run_as_they_are_called() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(run(lambda features, gain: features * gain, {"features": x, "gain": 2.0}), 2 * x)
    assert torch.equal(run(lambda x: SimpleNamespace(logits=x), x), x)
    for wrong in (lambda x: (x, x), lambda x: {"logits": x}):
        with pytest.raises(ValueError, match=r"tensor or an object with .logits"):
            run(wrong, x)


# Cutting a model


def test_models_are_cut_below_a_layer() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Tanh(), c=nn.Linear(4, 3)))
    x = torch.randn(2, 3)
    for layer, below in (("a", []), ("b", ["a"]), ("c", ["a", "b"])):
        body, head = split_at(model, layer)
        assert [name for name, _ in body.named_children()] == below
        assert next(iter(dict(head.named_children()))) == layer
        assert torch.equal(head(body(x)), model(x))
    assert head.c is model.c
    for wrong, name in ((model, "d"), (Tokens(), "first"), (nn.Sequential(OrderedDict(a=mlp())), "a.0")):
        with pytest.raises(ValueError, match="no direct child of a Sequential"):
            split_at(wrong, name)  # type: ignore[arg-type]


def test_a_layer_called_by_keyword_is_refused() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=x)

    model = Named().eval()
    with pytest.raises(ValueError, match="by position"):
        KFAC.fit(model, CrossEntropy(), [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))], "fc", labels="exact")
