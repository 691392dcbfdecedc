"""Claim 14: coupling of layers, known shares, exact and approximate null spaces of layers put together."""

import pytest
import torch
from hypothesis import given
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import GaussNewton
from curvlab.losses import SquaredError
from curvlab.models import MLP
from curvlab.theory import Setting
from curvlab.theory.coupling import block_diagonal, share_outside


def test_shares_with_known_answers() -> None:
    blocks = torch.block_diag(torch.eye(3), 5 * torch.ones(2, 2), torch.tensor([[7.0]]))
    assert share_outside(blocks, [3, 2, 1]) == 0
    assert share_outside(blocks, [2, 2, 2]) > 0.1  # scrambled: blocks read at the wrong places
    assert share_outside(torch.ones(6, 6), [2, 2, 2]) == pytest.approx(2 / 3)
    assert torch.equal(block_diagonal(torch.ones(3, 3), [1, 2]), torch.block_diag(torch.ones(1, 1), torch.ones(2, 2)))


def test_two_weights() -> None:
    """ŷ = w₂ w₁ x: J = x (w₂, w₁), so that 2 w₁² w₂² / (w₁² + w₂²)² of ‖G‖² couples the layers."""
    model = MLP([1, 1, 1], "identity", bias=False).double()
    model.fc1.weight.data.fill_(1.0)
    model.fc2.weight.data.fill_(2.0)
    data = [(torch.randn(5, 1).double(), torch.zeros(5, 1).double())]
    check = theory.layers_do_not_interact(model, SquaredError(), data)
    assert (check.measured, check.verdict, check.passed) == (pytest.approx(8 / 25), "refuted", True)
    assert not theory.layers_do_not_interact(model, SquaredError(), data, should=True).passed
    model.fc2.weight.data.fill_(100.0)  # then the first layer has nearly all the curvature
    assert theory.layers_do_not_interact(model, SquaredError(), data, should=True).passed


@cases(20)
@given(random_settings(dtypes=(torch.float32, torch.float64)))
def test_coupling_is_bounded(setting: Setting) -> None:
    findings = theory.coupling_is_bounded.function(*setting.arguments)
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(20)
@given(random_settings(depth=(2, 3), width=(2, 4), dtypes=(torch.float32, torch.float64)))
def test_exact_null_spaces_combine(setting: Setting) -> None:
    findings = theory.exact_null_spaces_combine.function(*setting.arguments)
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(20)
@given(random_settings(depth=(2, 3), width=(2, 4)))
def test_curvatures_add_up_to_a_factor(setting: Setting) -> None:
    findings = theory.curvatures_add_up_to_a_factor.function(*setting.arguments, gamma=0.7)
    assert all(case.as_expected for case in findings.cases), findings.cases


@cases(20)
@given(random_settings(depth=(2, 3), width=(2, 4), examples=(3, 6)))
def test_layerwise_projection_keeps_more(setting: Setting) -> None:
    findings = theory.layerwise_projection_keeps_more.function(*setting.arguments, gamma=0.7)
    assert all(case.as_expected for case in findings.cases), findings.cases


def test_broken_libraries_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = theory.random_setting("mlp", "tanh", examples=8, width=4, depth=3)
    sizes = [20, 16, 12]
    dense, fit = GaussNewton.dense, GaussNewton.fit
    with monkeypatch.context() as broken:  # the joint matrix without its cross-layer blocks
        broken.setattr(
            GaussNewton,
            "dense",
            lambda self, layout: block_diagonal(dense(self, layout), [n.size for n in self.layers]),
        )
        assert not theory.exact_null_spaces_combine(*setting.arguments).passed
        assert theory.layers_do_not_interact(*setting.arguments).measured == 0
    with monkeypatch.context() as broken:  # layers' blocks at a tenth of their scale
        broken.setattr(GaussNewton, "dense", lambda self, layout: dense(self, layout) / (10 if self.size < 48 else 1))
        assert not theory.curvatures_add_up_to_a_factor(*setting.arguments).passed
    with monkeypatch.context() as broken:  # labels of the data
        broken.setattr(GaussNewton, "fit", lambda *a, **k: fit(*a, labels="data", **k))
        assert not theory.exact_null_spaces_combine(*setting.arguments).passed
    assert sum(sizes) == GaussNewton.fit(*setting.arguments).size
