"""Claim 17: other and smaller capability sets, and positions without a loss."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import Covariance, GaussNewton
from curvlab.curvature.kfac import Factors
from curvlab.theory import Setting
from curvlab.theory.mismatch import removed_in_common, take

SEQUENCES = random_settings(
    ("sequence",), ("tanh", "gelu", "identity"), ("cross-entropy",), examples=(1, 2), width=(7, 9), depth=(2, 3)
)


def test_take() -> None:
    x = torch.arange(10.0)
    data = list(zip(x.split(4), x.split(4), strict=True))
    assert [len(a) for a, _ in take(data, 7)] == [4, 3]
    assert torch.equal(torch.cat([a for a, _ in take(data, 7)]), x[:7])


@cases(25)
@given(random_settings(examples=(2, 6), width=(2, 4), dtypes=(torch.float32, torch.float64)), st.integers(1, 3))
def test_samples_underestimate_boundedly(setting: Setting, n: int) -> None:
    arguments = (setting.model, setting.loss, setting.data, setting.layers[0])
    findings = theory.samples_underestimate_boundedly.function(*arguments, n=n)
    assert all(case.as_expected for case in findings.cases), findings.cases


def test_samples_without_a_loss_are_refused() -> None:
    setting = theory.random_setting("sequence", "tanh", examples=4)
    data = [(torch.cat([x for x, _ in setting.data]), torch.cat([y for _, y in setting.data]))]
    data[0][1][:2] = -100
    for n, message in ((0, "at least one example"), (2, "no label of the first 2 examples")):
        with pytest.raises(ValueError, match=message):
            theory.samples_underestimate_boundedly(setting.model, setting.loss, data, "fc1", n=n)
    assert theory.samples_underestimate_boundedly(setting.model, setting.loss, data, "fc1", n=3).passed


@cases(15)
@given(random_settings(examples=(2, 6), width=(2, 4)), st.integers(1, 3))
def test_no_estimate_beats_the_whole_set(setting: Setting, n: int) -> None:
    arguments = (setting.model, setting.loss, setting.data, take(setting.data, n), setting.layers[-1])
    findings = theory.no_estimate_beats_the_whole_set.function(*arguments)
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(15)
@given(SEQUENCES, st.integers(1, 2))
def test_ignored_positions(setting: Setting, ignored: int) -> None:
    for layer in setting.layers[:-1]:
        check = theory.ignored_positions_count(setting.model, setting.data, layer, ignored=ignored)
        assert check.passed, check.cases


@cases(25)
@given(SEQUENCES, st.integers(1, 2))
def test_labelled_inputs(setting: Setting, ignored: int) -> None:
    for layer in setting.layers:
        last = layer == setting.layers[-1]
        arguments = (setting.model, setting.data, layer)
        check = theory.labelled_inputs_suffice(*arguments, ignored=ignored, should=last)
        assert (check.passed, check.verdict) == (True, "holds" if last else "refuted"), check.cases
        assert not theory.labelled_inputs_suffice(*arguments, ignored=ignored, should=not last).passed


def test_a_sample_of_everything_and_of_little() -> None:
    setting = theory.random_setting("mlp", "tanh", examples=40, width=6)
    arguments = (setting.model, setting.loss, setting.data)
    check = theory.sample_is_as_good(*arguments, setting.data, "fc1")
    assert (check.verdict, check.passed) == ("holds", True)
    for name in ("ggn", "kfac", "covariance"):
        own = check.series[name]
        assert own["let through"] == own["by the whole set"]
        assert own["found of its removed"] == pytest.approx(1)
        assert own["null inside its null"] == pytest.approx(1)
    assert check.series["ggn"]["let through"] <= 0.1
    little = take(setting.data, 1)
    check = theory.sample_is_as_good(*arguments, little, "fc1")
    assert (check.verdict, check.passed) == ("refuted", True)
    assert not theory.sample_is_as_good(*arguments, little, "fc1", should=True).passed


def test_removed_in_common() -> None:
    """Halves of the data that see different inputs: nothing removed by the one is removed by the other."""
    setting = theory.random_setting("mlp", "tanh", examples=4, width=5)
    x = torch.eye(6).double()
    one, two = ([(x[i : i + 3], torch.zeros(3, dtype=torch.long))] for i in (0, 3))
    first, second = (
        Covariance.fit(setting.model, setting.loss, d, "fc1").spectrum().null_space(0.9) for d in (one, two)
    )
    assert removed_in_common(first, second) == pytest.approx(0, abs=1e-12)
    assert removed_in_common(first, first) == pytest.approx(1)


def test_broken_libraries_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = theory.random_setting("sequence", "tanh", examples=2, width=9)
    arguments = (setting.model, setting.data, "fc1")
    assert theory.ignored_positions_count(*arguments).passed
    with monkeypatch.context() as broken:  # means of a aᵀ over loss terms instead of positions
        broken.setattr(Factors, "A", property(lambda self: self.a_sum / self.scale.terms))
        assert not theory.ignored_positions_count(*arguments).passed
    with monkeypatch.context() as broken:  # a GGN of the sum
        dense = GaussNewton.dense
        broken.setattr(GaussNewton, "dense", lambda self, layout: dense(self, layout) * self.terms)
        assert not theory.samples_underestimate_boundedly(*setting.arguments[:3], "fc1", n=1).passed
    with monkeypatch.context() as broken:  # positions counted as if each carried a loss
        fit = Covariance.fit

        def padded(*a: object, **k: object) -> Covariance:
            found = fit(*a, **k)  # type: ignore[arg-type]
            return replace(found, moments={n: replace(m, a_sum=m.a_sum * 1.5) for n, m in found.moments.items()})

        broken.setattr(Covariance, "fit", padded)
        assert not theory.ignored_positions_count(*arguments).passed
