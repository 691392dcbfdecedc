"""Masks of rules that are not γ on products: each named, and no γ mask taken for one of them."""

import pytest
import torch
from made import Made, alarms, faults, findings, made
from torch import Tensor


def below(values: Tensor, gamma: float, power: float = 1.0) -> Tensor:
    """True below the value at which the sum of values**power reaches γ."""
    ordered = values.clamp_min(0).flatten().sort(descending=True).values
    share = (ordered**power).cumsum(0) / (ordered**power).sum()
    return values < ordered[min(int(torch.searchsorted(share, gamma)), len(ordered) - 1)]


def sums(m: Made) -> Tensor:
    return below(m.la[:, None] + m.lb, 0.7)


def each(m: Made) -> Tensor:
    return below(m.la, m.gamma)[:, None] & below(m.lb, m.gamma)


def either(m: Made) -> Tensor:
    return below(m.la, 0.6)[:, None] | below(m.lb, 0.6)


def inputs_alone(m: Made) -> Tensor:
    return below(m.la, 0.7)[:, None].expand_as(m.M).clone()


RULES = {
    "threshold of sums": sums,
    "γ to each factor alone": each,
    "removes what both of them": either,
    "input side's eigenvalues alone": inputs_alone,
}


@pytest.mark.parametrize("shape", [(10, 16), (12, 12), (20, 9)])
@pytest.mark.parametrize("words", RULES)
def test_other_rules_are_named(words: str, shape: tuple[int, int]) -> None:
    for seed in range(3):
        m = made(shape, seed, "power")
        m.M = RULES[words](m)
        (found,) = [f for f in alarms(findings(m.files(), 0.9))]
        assert found.fault == "other-rule", (seed, found)
        assert words.split()[-1] in found.cause


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_sums_of_powers(power: float) -> None:
    m = made((10, 16), 0, "power")
    m.M = below(torch.outer(m.la, m.lb), 0.87, power)
    (found,) = alarms(findings(m.files(), 0.87))
    assert found.fault == "other-rule"
    assert ("squares" if power == 2 else "square roots") in found.cause
    assert not alarms(findings(m.files()))  # without γ it is the rule at some γ, which is all that can be said


@pytest.mark.parametrize("kind", ["power", "flat", "steep", "dominant", "repeated"])
def test_the_rule_itself_is_none_of_them(kind: str) -> None:
    for seed, shape, gamma in ((0, (10, 16), 0.5), (1, (12, 12), 0.9), (2, (3, 5), 0.9), (3, (9, 20), 0.99)):
        m = made(shape, seed, kind, gamma=gamma)
        assert "other-rule" not in faults(findings(m.files(), gamma))
        assert "other-rule" not in faults(findings(m.files()))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_random_masks_belong_to_no_eigenvalues(share: float) -> None:
    for shape in ((10, 16), (12, 12)):
        m = made(shape)
        m.M = torch.rand(m.M.shape, generator=torch.Generator().manual_seed(0)) < share
        assert faults(findings(m.files(), 0.9)) == ["stale-mask"]
