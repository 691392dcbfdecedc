"""W as one matrix: s = W a at every position, and which layers can be named."""

from typing import Any

import pytest
import torch
from reference import CONVOLUTIONS, Tokens, assert_close, convolutional, mlp, transposed, weight_matrix
from torch import Tensor, nn

from curvlab.layers import LayerShape, find_layers, flatten, unflatten

pytestmark = pytest.mark.usefixtures("float64")


def _conv(name: str) -> tuple[nn.Module, Tensor]:
    return convolutional(**CONVOLUTIONS[name])[0], torch.randn(2, 2, 6, 5)


LAYERS: dict[str, Any] = {
    "vectors": lambda: (nn.Linear(3, 4), torch.randn(5, 3)),
    "no bias": lambda: (nn.Linear(3, 4, bias=False), torch.randn(5, 3)),
    "sequences": lambda: (nn.Linear(3, 4), torch.randn(5, 2, 3)),
    "grids": lambda: (nn.Linear(3, 4), torch.randn(5, 2, 6, 3)),
    "Conv1D": lambda: (transposed(3, 4), torch.randn(5, 2, 3)),
    "Conv1D, vectors": lambda: (transposed(3, 4), torch.randn(5, 3)),
} | {f"convolution, {name}": lambda name=name: _conv(name) for name in CONVOLUTIONS}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_layer_is_a_matrix_at_every_position(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[name]()
    (layer,) = find_layers(nn.ModuleDict({"l": module}), "l", bias)
    W = layer.matrix()
    assert W.shape == (layer.d_out, layer.d_in)
    assert layer.size == W.numel() == sum(p.numel() for p in layer.parameters())
    assert not W.requires_grad
    s = layer.outputs(module(x))
    expected = layer.inputs(x) @ W.mT
    if module.bias is not None and not bias:
        expected = expected + module.bias
    assert s.shape == (*layer.inputs(x).shape[:2], layer.d_out)
    assert_close(s, expected.detach(), 1e-13)
    assert layer.bias == (bias and module.bias is not None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["vectors", "no bias", "Conv1D", "convolution, plain", "convolution, same"])
def test_matrices_and_tensors_are_inverses(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    module, _ = LAYERS[name]()
    (layer,) = find_layers(nn.ModuleDict({"l": module}), "l", bias)
    W = torch.randn(layer.d_out, layer.d_in)
    tensors = layer.tensors(W)
    assert [t.shape for t in tensors] == [p.shape for p in layer.parameters()]
    assert_close(layer.matrix(tensors), W, 0)
    if module.bias is not None:
        expected = weight_matrix(module, tensors[0], tensors[1] if bias else None)
        assert_close(W, expected, 0)
    stack = torch.randn(2, 3, layer.d_out, layer.d_in)
    assert_close(layer.matrix(layer.tensors(stack)), stack, 0)
    unused = None if bias or module.bias is None else module.bias.detach().clone()
    layer.write(W)
    assert_close(layer.matrix(), W, 0)
    assert unused is None or torch.equal(module.bias, unused)
    with pytest.raises(ValueError, match=f"expected a {layer.d_out} × {layer.d_in} matrix"):
        layer.tensors(W.T if layer.d_in != layer.d_out else W[1:])


def test_inputs_need_a_batch() -> None:
    (linear,) = find_layers(mlp(), "0")
    with pytest.raises(ValueError, match="batch dimension"):
        linear.inputs(torch.zeros(3))
    (conv,) = find_layers(convolutional(), "0")
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        conv.inputs(torch.zeros(2, 6, 5))


def test_flatten_is_row_major_and_in_order() -> None:
    layers = [LayerShape("b", 2, 3, False), LayerShape("a", 1, 2, True)]
    delta = {"a": torch.tensor([[7.0, 8.0]]), "b": torch.arange(1.0, 7.0).view(2, 3)}
    assert flatten(layers, delta).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    stacked = {name: torch.stack([Q, 2 * Q]).unsqueeze(1) for name, Q in delta.items()}
    assert flatten(layers, stacked).shape == (2, 1, 8)
    back = unflatten(layers, flatten(layers, stacked))
    assert all(torch.equal(back[name], Q) for name, Q in stacked.items())


def test_layers_come_in_the_order_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    assert [layer.name for layer in find_layers(model, ["3", "0"])] == ["0", "3"]
    assert [layer.name for layer in find_layers(model, ["3", "*", "0"])] == ["0", "2", "3"]
    assert find_layers(model, "3")[0].parameter_names == ["3.weight"]
    assert find_layers(model, "3", bias=True)[0].parameter_names == ["3.weight", "3.bias"]


def test_patterns_choose_what_is_supported() -> None:
    model = nn.ModuleDict({"block1": Tokens(), "block2": Tokens(), "norm": nn.LayerNorm(3)})
    assert [layer.name for layer in find_layers(model, "*.first")] == ["block1.first", "block2.first"]
    assert [layer.name for layer in find_layers(model, "block[2]*")] == ["block2.first", "block2.second"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block1.fist", r"no layer fits 'block1.fist'; did you mean one of \['block1.first'"),
        ("block1.first.weight", r"did you mean one of \['block1.first'"),
        ("zzz", r"did you mean one of \['block1.first', 'block1.second', 'block2.first', 'block2.second'\]"),
        ("norm", r"'norm' is a LayerNorm; curvature is defined for Linear, Conv2d and transformers' Conv1D"),
        ("block1", "'block1' is a Tokens"),
        ("", "'' is a ModuleDict"),
        ([], "no layers were named"),
    ],
)
def test_names_that_fit_nothing(layers: Any, message: str) -> None:
    model = nn.ModuleDict({"block1": Tokens(), "block2": Tokens(), "norm": nn.LayerNorm(3)})
    with pytest.raises(ValueError, match=message):
        find_layers(model, layers)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0': grouped convolutions \(groups=2\)"):
        find_layers(nn.Sequential(nn.Conv2d(2, 4, 1, groups=2)), "0")


def test_shared_parameters_are_refused_where_they_belong_to_w() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    model[2].weight, embedding = nn.Parameter(torch.randn(3, 3)), model[3]
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=rf"'{name}' shares its weight with \['0.weight', '1.weight'\]"):
            find_layers(model, name)
    find_layers(model, "2")
    with pytest.raises(ValueError, match=r"'2' shares its weight with \['0.bias', '2.bias'\]"):
        find_layers(model, "2", bias=True)
    embedding.weight = model[2].weight  # an output head tied to the embedding
    with pytest.raises(ValueError, match=r"\['2.weight', '3.weight'\]"):
        find_layers(model, "2")


def test_one_module_under_two_names_is_refused() -> None:
    inner = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"\['0.weight', '1.weight'\]"):
        find_layers(nn.Sequential(inner, inner), "0")


def test_parametrized_weights_are_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no plain parameter"):
        find_layers(model, "0")
