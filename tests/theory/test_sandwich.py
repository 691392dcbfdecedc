"""Claim 8: the sandwich on random models, its counterexamples, and a library that breaks it."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings
from torch import Tensor

from curvlab import theory
from curvlab.curvature import KFAC
from curvlab.losses import CrossEntropy
from curvlab.models import MLP
from curvlab.theory import Check, Setting


def wrong(check: Check) -> list[object]:
    return [case for case in check.cases if not case.as_expected]


@cases(80)
@given(random_settings(dtypes=(torch.float32, torch.float64), examples=(1, 3), width=(2, 5)))
def test_sandwich(setting: Setting) -> None:
    check = theory.sandwich(*setting.arguments)
    assert check.passed, wrong(check)
    for dims in check.series.values():
        assert dims["unseen"] <= dims["null of K-FAC"] <= dims["parameters"]


def test_known_dimensions() -> None:
    """Two examples, three classes, the last layer: rank A = 2, rank S = 2 (the softmax is blind to 1)."""
    torch.manual_seed(0)
    model = MLP([6, 5, 3], "tanh").double()
    data = [(torch.randn(2, 6).double(), torch.zeros(2, dtype=torch.long))]
    check = theory.sandwich(model, CrossEntropy(), data)
    assert check.passed, wrong(check)
    assert check.series["fc2"] == {"unseen": 3 * (5 - 2), "null of K-FAC": 15 - 2 * 2, "parameters": 15}
    assert check.series["fc1"] == {"unseen": 5 * (6 - 2), "null of K-FAC": 30 - 2 * 4, "parameters": 30}


@pytest.mark.parametrize("variant", list(theory.VARIANTS))
def test_counterexamples(variant: str) -> None:
    kind: Any = "sequence" if variant == "reduce form" else "mlp"
    makers = [partial(theory.random_setting, kind, examples=2, width=6, depth=3, seed=seed) for seed in range(10)]
    check = theory.sandwich_breaks(variant, makers)
    assert check.passed, wrong(check)
    assert check.verdict == "holds under conditions"


def test_enough_examples_leave_no_counterexample() -> None:
    """With many examples the empirical S has full rank, and the search comes back with nothing."""
    makers = [partial(theory.random_setting, "mlp", examples=60, width=4, depth=2)]
    check = theory.sandwich_breaks("empirical S", makers)
    assert not check.passed


@pytest.mark.parametrize("kfac", theory.VARIANTS.values(), ids=list(theory.VARIANTS))
def test_approximations_fed_in_are_rejected(kfac: dict[str, Any]) -> None:
    setting = theory.random_setting("sequence", "tanh", examples=1, width=9, depth=3)
    assert theory.sandwich(*setting.arguments).passed
    assert not theory.sandwich(*setting.arguments, **kfac).passed


def test_positions_without_a_label() -> None:
    """Their a and g enter every factor; what they carry to later positions is in G."""
    setting = theory.random_setting("sequence", "tanh", examples=2, width=6)
    data = [(x, y.clone()) for x, y in setting.data]
    for _, y in data:
        y[:, 0] = -100
    check = theory.sandwich(*replace(setting, data=data).arguments)
    assert check.passed, wrong(check)


@pytest.mark.parametrize("broken", ["labels of the data", "swapped factors", "rotation", "centred inputs"])
def test_a_broken_library_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    import curvlab.curvature.kfac as kfac

    setting = theory.random_setting("mlp", "tanh", examples=2, width=6, classes=6)
    setting = replace(setting, layers=("fc2",))
    assert theory.sandwich(*setting.arguments).passed
    fit, block, gram = KFAC.fit.__func__, kfac.kronecker_block, kfac.add_gram  # type: ignore[attr-defined]

    def empirical(cls: type, *args: Any, labels: str, **rest: Any) -> KFAC:
        return fit(cls, *args, labels="data", **rest)  # type: ignore[no-any-return]

    def centred(total: Tensor, x: Tensor) -> None:
        gram(total, x - x.mean((0, 1), keepdim=True))

    if broken == "labels of the data":
        monkeypatch.setattr(KFAC, "fit", classmethod(empirical))
    elif broken == "swapped factors":
        monkeypatch.setattr(kfac, "kronecker_block", lambda layer, A, S, *rest: block(layer, S, A, *rest))
    elif broken == "rotation":
        honest = kfac.eigh
        monkeypatch.setattr(kfac, "eigh", lambda C, semidefinite: (honest(C, semidefinite)[0], honest(C)[1].mT))
    else:
        monkeypatch.setattr(kfac, "add_gram", centred)
    assert not theory.sandwich(*setting.arguments).passed
