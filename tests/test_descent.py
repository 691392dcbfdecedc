"""Constrained descent: what each way of projecting keeps, handles and refuses."""

import copy
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, steps
from torch import Tensor, nn

from curvlab.curvature import KFAC, GaussNewton
from curvlab.descent import DriftRule, attach, relative_change
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.models import MLP


@pytest.fixture
def setting() -> tuple[MLP, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MLP((6, 8, 7, 4), activation="tanh").double().eval()
    return model, torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,))


def kfac(model: nn.Module, x: Tensor, y: Tensor, bias: bool = False) -> Any:
    return KFAC.fit(model, CrossEntropy(), [(x, y)], ["fc2"], labels="exact", bias=bias).spectrum()


def weights(model: nn.Module, bias: bool = False) -> list[nn.Parameter]:
    return [p for layer in find_layers(model, "fc2", bias) for p in layer.parameters()]


@pytest.mark.parametrize("name", ["sgd", "momentum"])
@pytest.mark.parametrize("bias", [False, True])
def test_projected_gradients_keep_linear_optimisers_in_the_null_space(name: str, bias: bool, setting: Any) -> None:
    model, x, y = setting
    null = kfac(model, x, y, bias).null_space(0.9)
    optimizer = OPTIMIZERS[name](weights(model, bias))
    descent = attach(model, optimizer, null)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, optimizer, x, y, 10)
    (delta,) = descent.displacement().values()
    assert delta.norm() > 1e-3
    assert descent.leak() < 1e-12
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == ({"fc2.weight", "fc2.bias"} if bias else {"fc2.weight"})


def test_the_first_step_is_the_projected_gradient(setting: Any) -> None:
    model, x, y = setting
    null = kfac(model, x, y).null_space(0.9)
    (W,) = weights(model)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y.roll(1)), W)
    optimizer = torch.optim.SGD([W], lr=0.3)
    descent = attach(model, optimizer, null)
    steps(model, optimizer, x, y, 1)
    (block,) = null.blocks
    U_out, U_in, M = block.basis.u_out, block.basis.u_in, ~block.removed
    expected = -0.3 * U_out @ ((U_out.T @ gradient @ U_in) * M) @ U_in.T
    torch.testing.assert_close(descent.displacement()["fc2"], expected)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_elementwise_optimisers_leak_on_gradients_with_a_warning(name: str, setting: Any) -> None:
    model, x, y = setting
    optimizer = OPTIMIZERS[name](weights(model))
    with pytest.warns(UserWarning, match="elementwise"):
        descent = attach(model, optimizer, kfac(model, x, y).null_space(0.9))
    steps(model, optimizer, x, y, 5)
    assert descent.leak() > 1e-3


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dense", [False, True])
def test_projected_updates_keep_every_optimiser_in_the_null_space(name: str, dense: bool, setting: Any) -> None:
    model, x, y = setting
    spectrum = GaussNewton.fit(model, CrossEntropy(), [(x, y)], "fc2").spectrum() if dense else kfac(model, x, y)
    optimizer = OPTIMIZERS[name](weights(model))
    descent = attach(model, optimizer, spectrum.null_space(0.9), project="update")
    steps(model, optimizer, x, y, 10)
    assert descent.displacement()["fc2"].norm() > 1e-3
    assert descent.leak() < 1e-12


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_updates_stay_in_the_ellipsoid(name: str, setting: Any) -> None:
    model, x, y = setting
    ellipsoid = kfac(model, x, y).ellipsoid(3e-4)
    optimizer = OPTIMIZERS[name](weights(model))
    descent = attach(model, optimizer, ellipsoid, project="update")
    for _ in range(10):
        steps(model, optimizer, x, y, 1)
        assert float(ellipsoid.spent(descent.displacement())) <= 3e-4 * (1 + 1e-9)
    assert float(ellipsoid.spent(descent.displacement())) > 2.99e-4


def test_projected_sgd_solves_the_constrained_quadratic_problem() -> None:
    """min ½‖W − T‖² subject to ½ Σ λ Z² ≤ ε has a closed form; the descent reaches it."""
    torch.manual_seed(1)
    model = MLP((5, 4, 3), activation="tanh").double().eval()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))
    ellipsoid = KFAC.fit(model, CrossEntropy(), [(x, y)], "fc1", labels="exact").spectrum().ellipsoid(1e-3)
    (layer,) = find_layers(model, "fc1")
    W0 = layer.matrix().clone()
    target = W0 + torch.randn_like(W0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    descent = attach(model, optimizer, ellipsoid, project="update")
    for _ in range(100):
        optimizer.zero_grad()
        (0.5 * (layer.parameters()[0] - target).square().sum()).backward()
        optimizer.step()
    expected = ellipsoid.confine({"fc1": target - W0})["fc1"]
    torch.testing.assert_close(descent.displacement()["fc1"], expected, rtol=1e-8, atol=1e-10)


def test_closures_see_projected_gradients(setting: Any) -> None:
    model, x, y = setting
    null = kfac(model, x, y).null_space(0.9)
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(weights(twin), lr=0.3)
    attach(twin, plain, null)
    steps(twin, plain, x, y, 3)
    optimizer = torch.optim.SGD(weights(model), lr=0.3)
    attach(model, optimizer, null)
    steps(model, optimizer, x, y, 3, closure=True)
    assert torch.equal(weights(model)[0], weights(twin)[0])


def test_lbfgs_stays_in_the_null_space_on_gradients(setting: Any) -> None:
    model, x, y = setting
    optimizer = torch.optim.LBFGS(weights(model), lr=0.5, max_iter=8, line_search_fn="strong_wolfe")
    descent = attach(model, optimizer, kfac(model, x, y).null_space(0.9))
    start = float(nn.functional.cross_entropy(model(x), y.roll(1)))
    steps(model, optimizer, x, y, 3, closure=True)
    assert float(nn.functional.cross_entropy(model(x), y.roll(1))) < start - 1e-3
    assert descent.leak() < 1e-10


def test_ways_that_would_be_wrong_are_refused(setting: Any) -> None:
    model, x, y = setting
    spectrum = kfac(model, x, y)
    with pytest.raises(ValueError, match="LBFGS"):
        attach(model, torch.optim.LBFGS(weights(model)), spectrum.null_space(0.9), project="update")
    with pytest.raises(ValueError, match="ellipsoid"):
        attach(model, torch.optim.SGD(weights(model), lr=0.1), spectrum.ellipsoid(1e-3))
    with pytest.raises(ValueError, match="weight decay"):
        attach(model, torch.optim.SGD(weights(model), lr=0.1, weight_decay=0.1), spectrum.null_space(0.9))
    with pytest.raises(ValueError, match="does not move"):
        attach(model, torch.optim.SGD([model.get_parameter("fc1.weight")], lr=0.1), spectrum.null_space(0.9))
    with pytest.raises(ValueError, match="also moves"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), spectrum.null_space(0.9))
    with pytest.raises(ValueError, match="project must be"):
        attach(model, torch.optim.SGD(weights(model), lr=0.1), spectrum.null_space(0.9), project="both")  # type: ignore[arg-type]


def test_an_update_with_several_evaluations_is_undone_and_refused(setting: Any) -> None:
    model, x, y = setting

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                closure()
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p -= 0.1 * p.grad

    optimizer = Twice(weights(model), lr=0.1)
    attach(model, optimizer, kfac(model, x, y).null_space(0.9), project="update")
    before = weights(model)[0].detach().clone()
    with pytest.raises(RuntimeError, match="2 times"):
        steps(model, optimizer, x, y, 1, closure=True)
    assert torch.equal(weights(model)[0], before)


def test_detach_leaves_the_optimiser_alone(setting: Any) -> None:
    model, x, y = setting
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(weights(model), lr=0.3)
    attach(model, optimizer, kfac(model, x, y).null_space(0.9)).detach()
    steps(model, optimizer, x, y, 2)
    plain = torch.optim.SGD(weights(twin), lr=0.3)
    steps(twin, plain, x, y, 2)
    assert torch.equal(weights(model)[0], weights(twin)[0])


@pytest.mark.parametrize("every", [None, 1])
def test_drift_refits_at_the_current_weights(every: int | None, setting: Any) -> None:
    model, x, y = setting
    seen: list[Tensor] = []

    def refit() -> Any:
        seen.append(weights(model)[0].detach().clone())
        return kfac(model, x, y).null_space(0.9)

    optimizer = torch.optim.SGD(weights(model), lr=1.0)
    rule = DriftRule(refit, threshold=0.05, every=every)
    descent = attach(model, optimizer, kfac(model, x, y).null_space(0.9), drift=rule)
    start = weights(model)[0].detach().clone()
    for _ in range(20):
        steps(model, optimizer, x, y, 1)
        if every is None:
            moved = float(relative_change({"w": weights(model)[0].detach()}, {"w": descent.reference["fc2"]}))
            assert descent.check_drift() == (moved > 0.05)
    assert descent.refits == len(seen) >= 1
    assert float((seen[0] - start).norm() / start.norm()) > 0.05
    assert descent.drift() <= 0.05
    assert torch.equal(descent.reference["fc2"], seen[-1])


def test_momentum_is_projected_into_the_new_null_space(setting: Any) -> None:
    model, x, y = setting
    optimizer = torch.optim.SGD(weights(model), lr=0.1, momentum=0.9)
    descent = attach(model, optimizer, kfac(model, x, y).null_space(0.5))
    steps(model, optimizer, x, y, 5)
    new = kfac(model, x, y).null_space(0.99)
    before = optimizer.state[weights(model)[0]]["momentum_buffer"].clone()
    descent.replace(new)
    torch.testing.assert_close(
        optimizer.state[weights(model)[0]]["momentum_buffer"], new.project({"fc2": before})["fc2"]
    )
    steps(model, optimizer, x, y, 5)
    assert descent.leak() < 1e-12


def test_for_sgd_projected_updates_are_projected_gradients_refits_included(setting: Any) -> None:
    model, x, y = setting
    paths = []
    for project in ("gradient", "update"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(weights(own), lr=0.3)
        descent = attach(own, optimizer, kfac(model, x, y).null_space(0.5), project=project)  # type: ignore[arg-type]
        steps(own, optimizer, x, y, 5)
        moved = descent.displacement()
        new = kfac(model, x, y).null_space(0.99)
        assert (moved["fc2"] - new.project(moved)["fc2"]).norm() > 1e-3  # the new null space does not hold all of it
        descent.replace(new)
        steps(own, optimizer, x, y, 5)
        assert torch.linalg.norm(descent.displacement()["fc2"] - moved["fc2"]) > 1e-4
        paths.append(weights(own)[0].detach())
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-10, atol=1e-12)


def test_history_of_unknown_kind_is_dropped_at_a_refit(setting: Any) -> None:
    model, x, y = setting
    optimizer = torch.optim.LBFGS(weights(model), lr=0.5, max_iter=4)
    descent = attach(model, optimizer, kfac(model, x, y).null_space(0.5))
    steps(model, optimizer, x, y, 2, closure=True)
    with pytest.warns(UserWarning, match="afresh"):
        descent.replace(kfac(model, x, y).null_space(0.99))
    steps(model, optimizer, x, y, 2, closure=True)
    assert descent.leak() < 1e-10


def test_the_ellipsoid_keeps_its_centre_when_refitted(setting: Any) -> None:
    model, x, y = setting
    optimizer = torch.optim.SGD(weights(model), lr=1.0)
    start = weights(model)[0].detach().clone()
    descent = attach(model, optimizer, kfac(model, x, y).ellipsoid(1e-2), project="update")
    steps(model, optimizer, x, y, 10)
    tighter = kfac(model, x, y).ellipsoid(1e-4)
    descent.replace(tighter)
    steps(model, optimizer, x, y, 1)
    # what was spent before the refit still counts: the whole displacement fits the new ellipsoid
    assert float(tighter.spent({"fc2": weights(model)[0].detach() - start})) <= 1e-4 * (1 + 1e-9)


def test_low_precision_weights_are_projected_in_float32() -> None:
    torch.manual_seed(0)
    model = MLP((6, 8, 4), activation="tanh").eval()
    x, y = torch.randn(20, 6), torch.randint(0, 4, (20,))
    null = KFAC.fit(model, CrossEntropy(), [(x, y)], "fc1", labels="exact").spectrum().null_space(0.9)
    model = model.bfloat16()
    optimizer = torch.optim.SGD([model.get_parameter("fc1.weight")], lr=0.5)
    attach(model, optimizer, null)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
    gradient = model.get_parameter("fc1.weight").grad
    assert gradient is not None
    expected = null.to(torch.float32).project({"fc1": gradient.float()})["fc1"].bfloat16()
    optimizer.step()
    torch.testing.assert_close(model.get_parameter("fc1.weight").grad, expected)
