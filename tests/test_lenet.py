"""The small networks, their training and the two measures of classification."""

import math

import pytest
import torch
from torch import nn

from curvlab.data import load_pair, subset
from curvlab.evaluation import accuracy, kl_divergence
from curvlab.models import MLP, LeNet5, pretrain


def test_lenet_has_61706_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in LeNet5().named_parameters()}
    assert shapes == {
        "conv1.weight": (6, 1, 5, 5),
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, 5, 5),
        "conv2.bias": (16,),
        "fc1.weight": (120, 400),
        "fc1.bias": (120,),
        "fc2.weight": (84, 120),
        "fc2.bias": (84,),
        "fc3.weight": (10, 84),
        "fc3.bias": (10,),
    }
    assert sum(math.prod(s) for s in shapes.values()) == 61_706


@pytest.mark.parametrize(("name", "layer"), [("relu", nn.ReLU), ("tanh", nn.Tanh)])
def test_lenet_is_the_textbook_stack(name: str, layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = LeNet5(name)  # type: ignore[arg-type]
    stack = nn.Sequential(
        *(model.conv1, layer(), nn.MaxPool2d(2), model.conv2, layer(), nn.MaxPool2d(2), nn.Flatten()),
        *(model.fc1, layer(), model.fc2, layer(), model.fc3),
    )
    x = torch.randn(3, 1, 28, 28)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x), stack(x))


def test_lenet_leaves_layer_outputs_alone() -> None:
    torch.manual_seed(0)
    model = LeNet5()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: (out, out.clone())}))
    model(torch.randn(2, 1, 28, 28))
    assert list(seen) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    for out, before in seen.values():
        assert (before < 0).any()
        assert torch.equal(out, before)


def test_caller_seeds_lenet() -> None:
    torch.manual_seed(5)
    first = LeNet5()
    torch.manual_seed(5)
    assert torch.equal(LeNet5().fc1.weight, first.fc1.weight)
    assert not torch.equal(LeNet5().fc1.weight, first.fc1.weight)


def test_lenet_errors() -> None:
    with pytest.raises(ValueError, match="gelu"):
        LeNet5("gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 784\)"):
        LeNet5()(torch.zeros(2, 784))


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_its_formula(bias: bool) -> None:
    torch.manual_seed(0)
    model = MLP([4, 5, 3, 2], "tanh", bias=bias)
    assert [name for name, _ in model.named_children()] == ["fc1", "fc2", "fc3"]
    assert sum(p.numel() for p in model.parameters()) == 20 + 15 + 6 + (10 if bias else 0)
    w1, w2, w3 = (model.get_parameter(f"fc{i}.weight") for i in (1, 2, 3))
    b1, b2, b3 = (model.get_parameter(f"fc{i}.bias") if bias else torch.zeros(()) for i in (1, 2, 3))
    x = torch.randn(6, 4)
    expected = torch.tanh(torch.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x.view(6, 2, 2)), expected)


def test_mlp_activations_differ_and_identity_is_linear() -> None:
    outs = []
    x = torch.randn(5, 3)
    for name in ("relu", "tanh", "gelu", "identity"):
        torch.manual_seed(0)
        model = MLP([3, 8, 2], name)  # type: ignore[arg-type]
        outs.append(model(x))
    assert len({tuple(out.flatten().tolist()) for out in outs}) == 4
    zero = model(torch.zeros(1, 3))
    torch.testing.assert_close(model(x) + model(-x), 2 * zero.expand(5, 2))


@pytest.mark.parametrize("sizes", [[], [3], [3, 0, 2]])
def test_mlp_size_errors(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="two or more positive widths"):
        MLP(sizes)


def test_mlp_activation_error() -> None:
    with pytest.raises(ValueError, match="swish"):
        MLP([2, 2], "swish")  # type: ignore[arg-type]


def _rings(n: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Points inside (0) and outside (1) of a circle, which no linear map separates."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return x, (x.norm(dim=1) > 1.2).long()


def _trained(seed: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = MLP([2, 16, 2])
    pretrain(model, *_rings(), epochs=3, batch_size=50, lr=0.02, seed=seed)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_pretrain_learns_and_repeats() -> None:
    x, y = _rings()
    torch.manual_seed(0)
    model = MLP([2, 16, 2])
    run = pretrain(model, x, y, epochs=20, batch_size=50, lr=0.02, seed=0)
    assert accuracy(model, x, y) > 0.97
    assert run.epochs == 20
    assert 0 < run.loss < 0.15
    assert run.score is None
    first = _trained(7)
    torch.manual_seed(99)
    torch.rand(10)
    # The order depends on the seed alone, not on the global generator.
    assert torch.equal(first, _trained(7))
    assert not torch.equal(first, _trained(8))


def test_pretrain_leaves_global_generator_and_mode_alone() -> None:
    model = MLP([2, 4, 2]).eval()
    before = torch.get_rng_state()
    pretrain(model, *_rings(), epochs=1, batch_size=64, lr=0.01, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_pretrain_stops_at_target() -> None:
    scores = iter([0.2, 0.9, 0.95])
    model = MLP([2, 4, 2])
    run = pretrain(
        model,
        *_rings(),
        epochs=3,
        batch_size=64,
        lr=0.01,
        seed=0,
        target=0.9,
        evaluate=lambda m: next(scores),
    )
    assert (run.epochs, run.score) == (2, 0.9)


def test_pretrain_errors() -> None:
    x, y = _rings()
    model = MLP([2, 4, 2])
    with pytest.raises(ValueError, match="labels of shape"):
        pretrain(model, x, y[:-1], epochs=1, batch_size=8, lr=0.1, seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        pretrain(model, x, y, epochs=0, batch_size=8, lr=0.1, seed=0)
    with pytest.raises(ValueError, match="needs evaluate"):
        pretrain(model, x, y, epochs=1, batch_size=8, lr=0.1, seed=0, target=0.9)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        pretrain(model, x * float("nan"), y, epochs=1, batch_size=8, lr=0.1, seed=0)


def test_lenet_learns_the_embedded_digits() -> None:
    pair = load_pair("embedded")
    train = subset(pair.pretrain_train, 4000, seed=0)
    torch.manual_seed(0)
    model = LeNet5()
    assert accuracy(model, pair.pretrain_test.x, pair.pretrain_test.y) < 0.3
    pretrain(model, train.x, train.y, epochs=3, batch_size=64, lr=4e-3, seed=0)
    assert accuracy(model, pair.pretrain_test.x, pair.pretrain_test.y) > 0.93


def test_accuracy_counts_hits_in_evaluation_mode() -> None:
    x = torch.eye(4)
    y = torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Identity(), nn.Dropout(1.0)).train()
    assert accuracy(model, x, y, batch_size=3) == 0.75
    assert model.training
    assert accuracy(model.eval(), x, y) == 0.75
    assert not model.training


def test_accuracy_errors() -> None:
    model = nn.Identity()
    with pytest.raises(ValueError, match="N > 0"):
        accuracy(model, torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        accuracy(model, torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="batch_size"):
        accuracy(model, torch.zeros(2, 2), torch.zeros(2), batch_size=0)


def test_kl_divergence_by_hand() -> None:
    p0, p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75) + 0) / 2
    assert kl_divergence(p0.log(), p.log() + 3) == pytest.approx(by_hand, rel=1e-6)
    assert kl_divergence(p.log(), p0.log()) != pytest.approx(by_hand, rel=1e-2)


def test_kl_divergence_keeps_small_and_large_values() -> None:
    z = torch.tensor([[30.0, 0.0, -1.0]])
    assert kl_divergence(z, z) == 0.0
    # Second order: KL(p ‖ p + ε) is half the variance of the change of the logits under p.
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    change = torch.tensor([[1e-5, 0.0, -1e-5]], dtype=torch.float64)
    variance = float((p * change**2).sum() - (p * change).sum() ** 2)
    assert kl_divergence(p.log(), p.log() + change) == pytest.approx(variance / 2, rel=1e-4)
    # The other class is certain on both sides: 200 nats, not infinity.
    assert kl_divergence(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])) == pytest.approx(200.0)


def test_kl_divergence_errors() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="non-empty"):
        kl_divergence(torch.zeros(0, 3), torch.zeros(0, 3))
