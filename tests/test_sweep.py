"""Many runs at once are the same as one after another."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab.curvature import KFAC, Covariance, GaussNewton
from curvlab.descent import attach, relative_change
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.sweep import sweep

LOSS = CrossEntropy()


@pytest.fixture
def setting() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()
    return model, torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 4, (50,))


def constraint(model: nn.Module, x: Tensor, y: Tensor, what: tuple[str, float]) -> Any:
    kind, value = what
    data = [(x[:25], y[:25])]
    if kind == "kfac":
        return KFAC.fit(model, LOSS, data, "0", labels="exact").spectrum().null_space(value)
    if kind == "ggn":
        return GaussNewton.fit(model, LOSS, data, "0").spectrum(gamma=value).null_space(value)
    if kind == "covariance":
        return Covariance.fit(model, LOSS, data, "0").spectrum().null_space(value)
    return KFAC.fit(model, LOSS, data, "0", labels="exact").spectrum().ellipsoid(value)


def alone(
    model: nn.Sequential, x: Tensor, y: Tensor, what: tuple[str, float] | None, make: Any, project: str, drift: float
) -> tuple[Tensor, int]:
    """The run written out with `descent.attach`, one at a time."""
    model = copy.deepcopy(model)
    (layer,) = find_layers(model, "0")
    optimizer = make(layer.parameters())
    descent = None
    if what is not None:
        descent = attach(model, optimizer, constraint(model, x, y, what), project=project)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    refits = 0
    for _ in range(4):
        for index in torch.randperm(len(x), generator=generator).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index].roll(1)).backward()
            optimizer.step()
        if descent is not None and float(relative_change({"0": layer.matrix()}, descent.reference)) > drift:
            descent.replace(constraint(model, x, y, what))  # type: ignore[arg-type]
            refits += 1
    return layer.matrix().clone(), refits


@pytest.mark.filterwarnings("ignore:.*elementwise")
@pytest.mark.parametrize("drift", [math.inf, 0.15])
@pytest.mark.parametrize(
    ("project", "optimizer"),
    [("gradient", "sgd"), ("gradient", "momentum"), ("gradient", "adam"), ("update", "sgd"), ("update", "adam"),
     ("eigenbasis", "sgd"), ("eigenbasis", "momentum")],
)  # fmt: skip
def test_a_stack_equals_its_runs(setting: Any, project: str, optimizer: str, drift: float) -> None:
    model, x, y = setting
    makes: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.03),
    }
    make = makes[optimizer]
    runs: list[tuple[str, float] | None] = [
        ("kfac", 0.5),
        ("kfac", 0.9),
        ("ggn", 0.7),
        ("ggn", 0.95),
        ("covariance", 0.8),
    ]
    if project != "gradient":
        runs += [("ellipsoid", 1e-3), ("ellipsoid", 1e-1)]
    else:
        runs += [None]
    data = [(x[:25], y[:25])]
    kron = KFAC.fit(model, LOSS, data, "0", labels="exact").spectrum()
    shared = {("kfac", v): kron.null_space(v) for v in (0.5, 0.9)} | {
        ("ellipsoid", v): kron.ellipsoid(v) for v in (1e-3, 1e-1)
    }
    constraints = [None if r is None else shared.get(r) or constraint(model, x, y, r) for r in runs]

    def refit(run: int, W: Tensor) -> Any:
        twin = copy.deepcopy(model)
        find_layers(twin, "0")[0].write(W)
        what = runs[run]
        assert what is not None
        return constraint(twin, x, y, what)

    class Rolled(CrossEntropy):
        """The minibatch's labels, rolled, as in `alone`."""

        def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().value(outputs, targets.roll(1, 0))

    before = copy.deepcopy(model.state_dict())
    result = sweep(
        model, "0", Rolled(), x, y, constraints, optimizer=make, project=project,  # type: ignore[arg-type]
        epochs=4, batch_size=16, seed=3, refit=refit, threshold=drift,
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    way = "gradient" if project == "eigenbasis" else project
    for i, run in enumerate(runs):
        mode = "update" if run is not None and run[0] == "ellipsoid" else way
        W, refits = alone(model, x, y, run, make, mode, drift)
        assert result.refits[i] == refits, run
        torch.testing.assert_close(result.weights[i], W, rtol=1e-7, atol=1e-9, msg=str(run))
    assert drift == math.inf or max(result.refits) >= 1


def test_adam_in_drifting_eigenbases_goes_run_by_run(setting: Any) -> None:
    model, x, y = setting
    runs = [("kfac", 0.5), ("kfac", 0.9)]

    def go(which: list[tuple[str, float]]) -> Any:
        def refit(run: int, W: Tensor) -> Any:
            twin = copy.deepcopy(model)
            find_layers(twin, "0")[0].write(W)
            return constraint(twin, x, y, which[run])

        return sweep(
            model, "0", LOSS, x, y, [constraint(model, x, y, w) for w in which],
            optimizer=lambda p: torch.optim.Adam(p, lr=0.03), project="eigenbasis", epochs=4, batch_size=16, seed=3,
            refit=refit, threshold=0.1,
        )  # fmt: skip

    together = go(runs)
    assert max(together.refits) >= 1
    for i, run in enumerate(runs):
        single = go([run])
        assert torch.equal(together.weights[i], single.weights[0])
        assert together.refits[i] == single.refits[0]


def test_a_diverged_run_does_not_touch_the_others(setting: Any) -> None:
    model, x, y = setting
    null = constraint(model, x, y, ("kfac", 0.9))

    good = sweep(
        model, "0", LOSS, x, y, [null], optimizer=lambda p: torch.optim.SGD(p, lr=0.3), epochs=2, batch_size=16, seed=0
    )

    calls = {"n": 0}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.3)

        def poison(*_: Any) -> None:
            calls["n"] += 1
            if calls["n"] == 2:
                with torch.no_grad():
                    parameters[0][1] = math.nan

        optimizer.register_step_post_hook(poison)
        return optimizer

    both = sweep(model, "0", LOSS, x, y, [null, None], optimizer=make, epochs=2, batch_size=16, seed=0)
    assert both.diverged == [False, True]
    torch.testing.assert_close(both.weights[0], good.weights[0], rtol=1e-12, atol=1e-14)
    assert not both.weights[1].isfinite().all()


def test_bad_input(setting: Any) -> None:
    model, x, y = setting
    with pytest.raises(ValueError, match="need runs and data"):
        sweep(
            model, "0", LOSS, x, y, [], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=1, batch_size=8, seed=0
        )
    with pytest.raises(ValueError, match="no layer fits"):
        sweep(
            model,
            "9",
            LOSS,
            x,
            y,
            [None],
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            epochs=1,
            batch_size=8,
            seed=0,
        )
