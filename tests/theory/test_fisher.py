"""Claim 4: Fisher and GGN on random models; the empirical Fisher apart from both; fitted targets."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, random_settings
from torch import Tensor

from curvlab import losses, theory
from curvlab.curvature import GaussNewton
from curvlab.layers import find_layers
from curvlab.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from curvlab.models import MLP
from curvlab.theory import Check, Setting
from curvlab.theory.fisher import every_label, fisher


def wrong(check: Check) -> list[object]:
    return [case for case in check.cases if not case.as_expected]


@cases(80)
@given(random_settings(examples=(1, 4), width=(2, 4)))
def test_fisher_is_the_ggn(setting: Setting) -> None:
    check = theory.fisher_is_gauss_newton(*setting.arguments)
    assert check.passed, wrong(check)


@pytest.mark.parametrize(
    ("kind", "loss"), [("mlp", "cross-entropy"), ("sequence", "logistic"), ("conv", "squared error")]
)
def test_sampled_labels_converge(kind: Any, loss: str) -> None:
    setting = theory.random_setting(kind, "tanh", loss, examples=10, width=3)
    check = theory.sampled_fisher_converges(*setting.arguments)
    assert check.passed, wrong(check)
    assert not theory.sampled_fisher_converges(*setting.arguments, labels="data").passed


@cases(25)
@given(st.integers(0, 2**31), st.sampled_from(["tanh", "gelu", "relu"]))
def test_scaled_to_fit(seed: int, activation: Any) -> None:
    setting = theory.random_setting("mlp", activation, examples=6, width=4, seed=seed)
    check = theory.on_fitted_targets(setting.model, setting.data, setting.layers[-1])
    assert check.passed, wrong(check)


def test_trained_to_fit() -> None:
    torch.manual_seed(0)
    model = MLP([5, 10, 3], "tanh").double()
    before = [p.clone() for p in model.parameters()]
    data = [(torch.randn(8, 5).double(), torch.arange(8) % 3)]
    check = theory.while_fitting_targets(model, data, lr=5e-2)
    assert check.passed, wrong(check)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="did not fit"):
        theory.while_fitting_targets(model, data, steps=1)


def test_two_labels_alike_cannot_be_fitted() -> None:
    model = MLP([2, 2], "tanh").double()
    torch.nn.init.ones_(model.fc1.weight)
    torch.nn.init.zeros_(model.fc1.bias)
    with pytest.raises(ValueError, match="equally likely"):
        theory.on_fitted_targets(model, [(torch.ones(1, 2).double(), torch.zeros(1, dtype=torch.long))], "fc1")


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy(), SquaredError(scale=0.7)])
def test_labels_have_the_probabilities_and_moments_of_the_model(loss: Any) -> None:
    """Σ p = 1, and E[∇ℓ] = 0, E[∇ℓ ∇ℓᵀ] = H_ŷ in closed form."""
    y0 = torch.tensor([[[0.3, -1.0, 2.0]]]).double()
    options = list(every_label(loss, y0))
    assert torch.isclose(sum(p for _, p in options), torch.tensor(1.0).double()).all()  # type: ignore[arg-type]
    g = torch.stack([loss.gradient(y0, y)[0, 0] for y, _ in options])
    p = torch.stack([p[0, 0] for _, p in options])
    q = y0[0, 0].softmax(-1) if isinstance(loss, CrossEntropy) else y0[0, 0].sigmoid()
    truth = {
        CrossEntropy: q.diag() - q.outer(q), BinaryCrossEntropy: (q * (1 - q)).diag(),
        SquaredError: 0.7 * torch.eye(3).double(),
    }[type(loss)]  # fmt: skip
    assert torch.allclose(p @ g, torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(g.mT * p @ g, truth, atol=1e-12)


def test_ignored_positions_carry_no_information() -> None:
    setting = theory.random_setting("sequence", "tanh", "cross-entropy", examples=4)
    data = [(x, y.clone()) for x, y in setting.data]
    for _, y in data:
        y[:, :2] = -100
    check = theory.fisher_is_gauss_newton(setting.model, setting.loss, data)
    assert check.passed, wrong(check)
    with pytest.raises(TypeError, match="not known"):
        next(every_label(object(), torch.zeros(1, 1, 2)))  # type: ignore[call-overload]


def test_the_empirical_fisher_is_apart_from_it() -> None:
    torch.manual_seed(1)
    x = torch.randn(600, 6).double()
    model = MLP([6, 4, 3], "tanh").double()
    check = theory.empirical_fisher_differs(model, CrossEntropy(), [(x, x[:, :3].argmax(-1))])
    assert check.passed, wrong(check)
    # the model's own labels in place of the data's: no bias, and the claim is refuted
    own = torch.distributions.Categorical(logits=model(x).detach()).sample()
    fed = theory.empirical_fisher_differs(model, CrossEntropy(), [(x, own)], at_least=0.15)
    assert fed.cases[0].name.startswith("‖E F_emp")
    assert not fed.cases[0].holds


def test_a_wrong_noise_is_rejected() -> None:
    setting = theory.random_setting("mlp", "tanh", "squared error")
    assert not theory.fisher_is_gauss_newton(*setting.arguments, noise=1.1).passed
    scaled = theory.fisher_is_gauss_newton(setting.model, SquaredError(scale=3.0), setting.data)
    assert scaled.passed


@pytest.mark.parametrize("broken", ["no off-diagonal", "labels of the data", "scale", "draws"])
def test_a_broken_library_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    setting = theory.random_setting("mlp", "tanh", "cross-entropy", examples=8, width=3)
    fit = GaussNewton.fit.__func__  # type: ignore[attr-defined]

    def empirical(cls: type, *args: Any, labels: str = "exact", store: bool = True, **rest: Any) -> GaussNewton:
        return fit(cls, *args, labels="data", **rest)  # type: ignore[no-any-return]

    def unscaled(
        self: CrossEntropy, outputs: Tensor, targets: Tensor, seed: int, draw: int, examples: Tensor
    ) -> Tensor:
        return 1.1 * honest(self, outputs, targets, seed, draw, examples)

    honest, dense = CrossEntropy.sampled_gradient, GaussNewton.dense
    if broken == "no off-diagonal":
        monkeypatch.setattr(CrossEntropy, "hessian_factor", lambda self, o, t: o.softmax(-1).sqrt().diag_embed())
    elif broken == "labels of the data":
        monkeypatch.setattr(GaussNewton, "fit", classmethod(empirical))
    elif broken == "scale":
        monkeypatch.setattr(GaussNewton, "dense", lambda self, layout: dense(self, layout) * self.terms)
    else:
        monkeypatch.setattr(CrossEntropy, "sampled_gradient", unscaled)
    checks = (
        theory.fisher_is_gauss_newton(*setting.arguments),
        theory.sampled_fisher_converges(*setting.arguments, draws=(1, 16, 256), seeds=4),
    )
    assert not all(check.passed for check in checks)


def test_uniform_labels_are_another_matrix() -> None:
    setting = theory.random_setting("mlp", "tanh", "cross-entropy")
    layers = find_layers(setting.model, "fc2")
    F, U = (fisher(setting.model, setting.loss, setting.data, layers, uniform=u) for u in (False, True))
    assert not torch.allclose(F, U)


@pytest.mark.parametrize("kept", ["example", "batch"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "logistic"])
def test_draws_alike_are_found_out(monkeypatch: pytest.MonkeyPatch, loss: str, kept: str) -> None:
    """The same draws for every example, or for every batch."""
    setting = theory.random_setting("mlp", "tanh", loss, examples=128, width=3)
    arguments = (*setting.arguments[:3], setting.layers[-1])
    assert theory.sampled_fisher_is_unbiased(*arguments).passed
    for name in ("uniforms", "normals"):
        honest = getattr(losses, name)
        monkeypatch.setattr(
            losses, name, lambda seed, draw, examples, *rest, honest=honest: honest(
                seed, draw, examples * 0 if kept == "example" else examples - examples[0], *rest
            ),
        )  # fmt: skip
    assert not theory.sampled_fisher_is_unbiased(*arguments).passed
