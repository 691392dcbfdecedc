"""Evaluation mode is lent, not given."""

import pytest
from torch import nn

from curvlab.evaluation.mode import evaluating


def test_every_module_is_handed_back_in_its_own_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_also_when_the_measurement_fails() -> None:
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(module.training for module in model.modules())
