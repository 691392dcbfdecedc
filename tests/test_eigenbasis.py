"""Descent in the eigenbasis: the same path as projecting for SGD, inside the constraint for any optimiser."""

import copy
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, steps
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton
from curvlab.descent import DriftRule, attach
from curvlab.eigenbasis import parametrize
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.models import MLP


def network(kind: str) -> tuple[nn.Sequential, Tensor, Tensor, str]:
    torch.manual_seed(0)
    y = torch.randint(0, 4, (20,))
    if kind == "linear":
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
        return model.double().eval(), torch.randn(20, 6, dtype=torch.float64), y, "2"
    if kind == "conv":
        conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), conv, nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))
        return model.double().eval(), torch.randn(20, 1, 8, 8, dtype=torch.float64), y, "2"
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D(7, 8)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), conv1d, nn.Tanh(), nn.Linear(7, 4))
    return model.double().eval(), torch.randn(20, 6, dtype=torch.float64), y, "2"


def spectrum(curvature: str, model: nn.Module, x: Tensor, y: Tensor, layers: Any, bias: bool) -> Any:
    data, loss = [(x, y)], CrossEntropy()
    if curvature == "kfac":
        return KFAC.fit(model, loss, data, layers, labels="exact", bias=bias).spectrum()
    if curvature == "ekfac":
        return EKFAC.fit(model, loss, data, layers, labels="exact", bias=bias).spectrum()
    if curvature == "covariance":
        return Covariance.fit(model, loss, data, layers, labels="exact", bias=bias).spectrum()
    ggn = GaussNewton.fit(model, loss, data, layers, bias=bias)
    return ggn.spectrum() if curvature == "ggn" else ggn.spectrum(gamma=0.95)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "covariance", "ggn", "top"])
@pytest.mark.parametrize("name", ["sgd", "momentum"])
@pytest.mark.parametrize("bias", [False, True])
def test_sgd_takes_the_path_of_projected_gradients(kind: str, curvature: str, name: str, bias: bool) -> None:
    model, x, y, layer = network(kind)
    null = spectrum(curvature, model, x, y, layer, bias).null_space(0.9)
    twin = copy.deepcopy(model)
    (found,) = find_layers(twin, layer, bias)
    optimizer = OPTIMIZERS[name](found.parameters())
    attach(twin, optimizer, null)
    steps(twin, optimizer, x, y, 6)
    eigen = parametrize(model, null)
    mine = OPTIMIZERS[name](eigen.parameters())
    steps(model, mine, x, y, 6)
    inside = model(x)
    eigen.merge()
    torch.testing.assert_close(inside, model(x))
    for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=n)


def test_several_layers_jointly_and_block_by_block() -> None:
    model, x, y, _ = network("linear")
    for curvature in ("kfac", "ggn"):
        null = spectrum(curvature, model, x, y, ["0", "2"], True).null_space(0.9)
        twin, mine = copy.deepcopy(model), copy.deepcopy(model)
        optimizer = torch.optim.SGD(
            [p for layer in find_layers(twin, ["0", "2"], True) for p in layer.parameters()], lr=0.3
        )
        attach(twin, optimizer, null)
        steps(twin, optimizer, x, y, 5)
        eigen = parametrize(mine, null)
        steps(mine, torch.optim.SGD(eigen.parameters(), lr=0.3), x, y, 5)
        eigen.merge()
        for p, q in zip(mine.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "ggn", "top"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_optimiser_leaves_the_null_space(curvature: str, name: str) -> None:
    model, x, y, layer = network("linear")
    eigen = parametrize(model, spectrum(curvature, model, x, y, layer, False).null_space(0.9))
    optimizer = OPTIMIZERS[name](eigen.parameters())
    steps(model, optimizer, x, y, 10)
    assert eigen.displacement()[layer].norm() > 1e-3
    assert eigen.leak() < 1e-12


def test_lbfgs_descends_in_the_eigenbasis() -> None:
    model, x, y, layer = network("linear")
    eigen = parametrize(model, spectrum("kfac", model, x, y, layer, False).null_space(0.9))
    optimizer = torch.optim.LBFGS(eigen.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    before = float(nn.functional.cross_entropy(model(x), y.roll(1)))
    steps(model, optimizer, x, y, 3, closure=True)
    assert float(nn.functional.cross_entropy(model(x), y.roll(1))) < before - 1e-2
    assert eigen.leak() < 1e-12


@pytest.mark.parametrize("curvature", ["kfac", "top"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_ellipsoid_in_the_eigenbasis(curvature: str, name: str) -> None:
    model, x, y, layer = network("linear")
    ellipsoid = spectrum(curvature, model, x, y, layer, False).ellipsoid(1e-3)
    twin = copy.deepcopy(model)
    eigen = parametrize(model, ellipsoid)
    optimizer = OPTIMIZERS[name](eigen.parameters())
    eigen.attach(optimizer)
    for _ in range(8):
        steps(model, optimizer, x, y, 1)
        assert float(ellipsoid.spent(eigen.displacement())) <= 1e-3 * (1 + 1e-9)
    if name == "sgd":  # a rotation changes nothing for SGD
        (found,) = find_layers(twin, layer)
        plain = OPTIMIZERS[name](found.parameters())
        attach(twin, plain, ellipsoid, project="update")
        steps(twin, plain, x, y, 8)
        torch.testing.assert_close(eigen.matrices()[layer], found.matrix(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_drift_refits_fold_the_weights_and_go_on(name: str) -> None:
    model, x, y, layer = network("linear")
    (found,) = find_layers(model, layer)
    seen: list[Tensor] = []

    def refit() -> Any:
        seen.append(found.matrix().clone())  # the merged weights
        return spectrum("kfac", model, x, y, layer, False).null_space(0.9)

    eigen = parametrize(model, refit())
    optimizer = OPTIMIZERS[name](eigen.parameters())
    eigen.attach(optimizer, drift=DriftRule(refit, threshold=0.1, every=1))
    twin = copy.deepcopy(network("linear")[0])
    steps(model, optimizer, x, y, 25)
    assert eigen.refits == len(seen) - 1 >= 1
    assert eigen.leak() < 1e-12
    if name != "adam":  # the same refits along the path of projected gradients
        (other,) = find_layers(twin, layer)
        plain = OPTIMIZERS[name](other.parameters())

        def refit_twin() -> Any:
            return spectrum("kfac", twin, x, y, layer, False).null_space(0.9)

        descent = attach(twin, plain, refit_twin(), drift=DriftRule(refit_twin, threshold=0.1, every=1))
        steps(twin, plain, x, y, 25)
        assert descent.refits == eigen.refits
        torch.testing.assert_close(eigen.matrices()[layer], other.matrix(), rtol=1e-7, atol=1e-9)


def test_rotated_inputs_give_the_same_step() -> None:
    for bias in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
        x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 4, (12,))
        eigen = parametrize(model, spectrum("kfac", model, x, y, "0", bias).null_space(0.8))
        with torch.no_grad():
            eigen.coordinates[0].normal_()
        plain = model(x)
        rotated = eigen.rotate_input("0", x)
        eigen.use_rotated("0", rotated)
        torch.testing.assert_close(model(x), plain)
        eigen.use_rotated("0", rotated[:5])
        with pytest.raises(ValueError, match="rotated inputs"):
            model(x)


def test_merge_leaves_a_plain_model() -> None:
    model, x, y, layer = network("linear")
    names = set(model.state_dict())
    eigen = parametrize(model, spectrum("kfac", model, x, y, layer, False).null_space(0.9))
    assert not model[2].weight.requires_grad
    steps(model, torch.optim.SGD(eigen.parameters(), lr=0.3), x, y, 3)
    eigen.merge()
    assert model[2].weight.requires_grad
    assert set(model.state_dict()) == names
    assert not model[2]._forward_hooks


def test_wrong_use_is_refused() -> None:
    model, x, y, layer = network("linear")
    s = spectrum("kfac", model, x, y, layer, False)
    eigen = parametrize(model, s.ellipsoid(1e-3))
    with pytest.raises(ValueError, match="exactly the eigenbasis"):
        eigen.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="LBFGS"):
        eigen.attach(torch.optim.LBFGS(eigen.parameters()))
    eigen.merge()
    with pytest.raises(ValueError, match="no layer fits"):
        parametrize(MLP((3, 2)).double(), s.null_space(0.9))


def test_weights_written_meanwhile_count() -> None:
    model, x, y, layer = network("linear")
    eigen = parametrize(model, spectrum("kfac", model, x, y, layer, False).null_space(0.9))
    with torch.no_grad():
        eigen.coordinates[0].normal_()
    model(x)
    (found,) = find_layers(model, layer)
    found.write(found.matrix() + 0.1)
    plain = copy.deepcopy(model)
    plain[2] = nn.Linear(8, 7).double()
    with torch.no_grad():
        plain[2].weight.copy_(eigen.matrices()[layer])
        plain[2].bias.copy_(found.module.bias)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("constrain", ["null", "ellipsoid"])
def test_bfloat16_weights_take_the_steps_of_wide_ones(kind: str, constrain: str) -> None:
    """Z stays in float32: a bfloat16 number near one does not feel a step of 1e-3."""
    model, x, y, layer = network(kind)
    s = spectrum("kfac", model, x, y, layer, False)
    constraint = s.null_space(0.8) if constrain == "null" else s.ellipsoid(10.0)
    narrow = copy.deepcopy(model).bfloat16()
    start = find_layers(narrow, layer)[0].matrix().clone()
    eigen = parametrize(narrow, constraint)
    (Z,) = eigen.parameters()
    assert Z.dtype == torch.float32
    with torch.no_grad():
        Z.normal_()
    before = narrow(x.bfloat16())
    optimizer = torch.optim.SGD([Z], lr=1e-5)
    eigen.attach(optimizer)
    old = Z.detach().clone()
    nn.functional.cross_entropy(before.float(), y).backward()
    assert Z.grad is not None
    expected = old - 1e-5 * Z.grad
    optimizer.step()
    assert not torch.equal(expected, old)
    torch.testing.assert_close(Z.detach(), expected, rtol=1e-6, atol=1e-7)
    wide = eigen.displacement()[layer]
    torch.testing.assert_close(wide, eigen.constraint.displacement([expected])[layer], rtol=1e-2, atol=1e-2)
    eigen.merge()
    after = find_layers(narrow, layer)[0].matrix()
    torch.testing.assert_close(after.float(), start.float() + wide, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(narrow(x.bfloat16()), before, rtol=0.05, atol=0.05)
