"""Claim 15: what second order predicts, on random models; and predictions that are wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import EKFAC, GaussNewton, Hessian
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.models import MLP, pretrain
from curvlab.spectrum import Spectrum
from curvlab.theory import Check, Setting, explicit, random_setting
from curvlab.theory.paths import Measures


@cases(60)
@given(
    random_settings(
        kinds=("mlp", "sequence"), activations=("tanh", "gelu", "identity"), examples=(2, 6), width=(2, 3), depth=(1, 2)
    )
)
def test_small_steps(setting: Setting) -> None:
    check = theory.small_steps_are_predicted(*setting.arguments, directions=3)
    assert check.passed, check.cases


@pytest.fixture(scope="module")
def edited() -> tuple[Any, ...]:
    """A small classifier of clusters, trained; edits from clusters with other labels."""
    torch.manual_seed(0)
    centres = torch.randn(4, 6, dtype=torch.float64)
    y = torch.arange(80) % 4
    x = centres[y] + 0.7 * torch.randn(80, 6, dtype=torch.float64)
    model = MLP([6, 7, 5, 4], "tanh").double()
    pretrain(model, x, y, epochs=60, lr=1e-2)
    return model.eval(), CrossEntropy(), [(x, y)], [(x[:40].roll(1, 1), y[:40].roll(1))], ["fc1", "fc2"]


def test_edits(edited: tuple[Any, ...]) -> None:
    check = theory.prediction_along_edits(*edited, steps=25)
    names = {case.name: case for case in check.cases}
    for name in ("ggn", "kfac", "ekfac", "covariance"):
        assert names[f"{name}: rank correlation on edit paths"].holds
    assert names["ggn, small random δ: |measured / predicted − 1|"].holds
    assert all(case.as_expected for case in check.cases if case.control)
    point = check.series["points"][0]
    assert {"path", "size", "measured", "loss increase", "accuracy drop", "predicted"} <= set(point)


def test_measures_are_the_definitions(edited: tuple[Any, ...]) -> None:
    """KL, loss and accuracy after a displacement, against the model with its weights written."""
    model, loss, ((x, y),), _, names = edited
    layers = find_layers(model, names)
    delta = 0.1 * torch.randn(sum(layer.size for layer in layers), dtype=torch.float64)
    found = Measures(model, loss, [(x, y)], layers)(delta)
    with torch.no_grad():
        before = model(x).log_softmax(1)
        start = [layer.matrix().clone() for layer in layers]
        for layer, part in zip(layers, delta.split([layer.size for layer in layers]), strict=True):
            layer.write(layer.matrix() + part.view(layer.d_out, layer.d_in))
        after = model(x).log_softmax(1)
        for layer, W in zip(layers, start, strict=True):
            layer.write(W)
    assert found["distance"] == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-10)
    assert found["loss"] == pytest.approx(float(-after[torch.arange(len(y)), y].mean()), rel=1e-12)
    assert found["accuracy"] == pytest.approx(float((after.argmax(1) == y).double().mean()))
    outputs = explicit.outputs(model, layers, x)
    with torch.no_grad():
        bregman = loss.bregman(outputs(delta), outputs(explicit.zero(layers)), y[:, None])
    assert found["distance"] == pytest.approx(float(bregman.mean()))


def test_single_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        theory.small_steps_are_predicted(*random_setting(dtype=torch.float32).arguments)


def test_inputs_that_are_zero() -> None:
    """Only the later layers' weights count; permuted features are the same features."""
    setting = random_setting("mlp", "tanh")
    data = [(0 * x, y) for x, y in setting.data]
    check = theory.prediction_along_edits(setting.model, setting.loss, data, setting.data, steps=5, directions=1)
    assert check.passed, check.cases
    assert not any("permuted" in case.name for case in check.cases)


def failed(check: Check) -> set[str]:
    return {case.name for case in check.cases if not case.as_expected}


def test_a_scale_of_two_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GaussNewton.matmat
    monkeypatch.setattr(GaussNewton, "matmat", lambda self, v: 2 * honest(self, v))
    setting = random_setting("mlp", "tanh")
    assert "GGN: worst |measured / predicted − 1|" in failed(theory.small_steps_are_predicted(*setting.arguments))


def test_data_labels_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The empirical Fisher in place of the GGN."""
    honest = GaussNewton.fit.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(GaussNewton, "fit", classmethod(lambda cls, *a, **k: honest(cls, *a, **k, labels="data")))
    setting = random_setting("mlp", "tanh")
    assert "GGN: worst |measured / predicted − 1|" in failed(theory.small_steps_are_predicted(*setting.arguments))


def test_kfac_eigenvalues_for_ekfac_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.curvature import KFAC

    def plain(cls: Any, model: Any, loss: Any, data: Any, layers: Any, labels: Any) -> Any:
        return cls(KFAC.fit(model, loss, data, layers, labels=labels).spectrum(), labels, {})

    monkeypatch.setattr(EKFAC, "fit", classmethod(plain))
    setting = random_setting("sequence", "tanh", "logistic", seed=1)
    assert "EK-FAC: |measured / predicted − 1|, mean over a basis" in failed(
        theory.small_steps_are_predicted(*setting.arguments)
    )


def test_a_ggn_for_the_hessian_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ggn(cls: Any, model: Any, loss: Any, data: Any, layers: Any, **_: Any) -> Any:
        return GaussNewton.fit(model, loss, data, layers)

    monkeypatch.setattr(Hessian, "fit", classmethod(ggn))
    setting = random_setting("mlp", "tanh")
    assert "Hessian: loss increase beyond its linear part, against ½ δᵀ|H|δ" in failed(
        theory.small_steps_are_predicted(*setting.arguments)
    )


def test_eigenvalues_in_the_wrong_order_are_found_out(edited: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quadratic form with its eigenvalues reversed does not predict along gradients."""

    def reversed_form(self: Spectrum, delta: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for block in self.blocks:
            total += (
                block.basis.rotate(delta).square() * block.values.flatten().flip(0).view(block.values.shape)
            ).sum()
        return total

    monkeypatch.setattr(Spectrum, "quadratic_form", reversed_form)
    assert "ggn, small step along the edit gradient: |measured / predicted − 1|" in failed(
        theory.prediction_along_edits(*edited, steps=10, directions=1)
    )
