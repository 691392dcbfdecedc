"""Claim 13: optimisers and the null space, on random models; and broken ways of projecting."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases, random_settings

from curvlab import theory
from curvlab.curvature import KFAC
from curvlab.theory import Check, Setting, curvatures, random_setting


def pair(seed: int = 1) -> tuple[Any, ...]:
    """A random model with capability data, and edits of the same kind."""
    own, other = (random_setting(examples=6, width=4, seed=s) for s in (seed, seed + 1))
    return own.model, own.loss, own.data, other.data, own.layers


@cases(80)
@given(
    random_settings(examples=(3, 6), width=(2, 4), depth=(1, 2), dtypes=(torch.float32, torch.float64)),
    st.sampled_from((0.5, 0.8, 0.95)),
    st.sampled_from(("kfac", "ggn", "ekfac", "covariance")),
)
def test_descent(setting: Setting, gamma: float, curvature: str) -> None:
    x = torch.randn(setting.data[0][0].shape, generator=torch.Generator().manual_seed(1)).to(setting.data[0][0])
    edits = [(x, setting.data[0][1])]
    try:
        check = theory.descent_in_the_null_space(
            setting.model, setting.loss, setting.data, edits, setting.layers,
            gamma=gamma, curvature=curvature, steps=2,
        )  # fmt: skip
    except ValueError as error:
        if "compared nothing" not in str(error):
            raise
        assume(False)
    assert check.passed, check.cases
    assert check.verdict == "holds"


def test_what_is_inside_stays_flat() -> None:
    """With the GGN's own null space every path that stays inside has at most the largest kept eigenvalue."""
    model, loss, data, edits, layers = pair()
    check = theory.descent_in_the_null_space(model, loss, data, edits, layers, gamma=0.8, curvature="ggn")
    spectrum = curvatures.fitted("ggn", model, loss, data, layers)
    (block,) = spectrum.null_space(0.8).blocks
    kept = float(spectrum.blocks[0].magnitudes[~block.removed].max())
    s = check.series
    for way in ("update", "eigenbasis"):
        for length, energy in zip(s["length"][f"Adam | {way}"], s["energy"][f"Adam | {way}"], strict=True):
            assert energy <= kept * length**2 * (1 + 1e-9)


def test_explicit_projector() -> None:
    """Of an energy 4, 3, 2, 1: γ = 0.7 removes two directions, γ = 0.71 three."""
    from curvlab.layers import LayerShape
    from curvlab.spectrum import dense_spectrum

    spectrum = dense_spectrum(
        torch.diag(torch.tensor([2.0, 4.0, 1.0, 3.0])).double(), [LayerShape("a", 2, 2, False)], True
    )
    assert curvatures.cut(spectrum, 0.7).diag().tolist() == [1, 0, 1, 0]
    assert curvatures.cut(spectrum, 0.71).diag().tolist() == [0, 0, 1, 0]
    assert torch.equal(curvatures.matrix(spectrum).diag(), torch.tensor([2.0, 4.0, 1.0, 3.0]).double())


def test_nothing_to_project_is_nothing_compared() -> None:
    model, loss, data, _, layers = pair()
    flat = [(torch.zeros_like(x), y) for x, y in data]  # no input, no gradient of the weights of the first layer
    with pytest.raises(ValueError, match="compared nothing"):
        theory.descent_in_the_null_space(model, loss, data, flat, layers[:1])


def failed(check: Check) -> set[str]:
    return {case.name for case in check.cases if not case.as_expected}


def test_a_staircase_transposed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.projector import NullSpace

    honest = NullSpace.project

    def swapped(self: NullSpace, delta: Any) -> Any:
        out = honest(self, {name: Q.flip(-1) for name, Q in delta.items()})
        return {name: Q.flip(-1) for name, Q in out.items()}

    monkeypatch.setattr(NullSpace, "project", swapped)
    assert "SGD, projected gradient: leakage" in failed(theory.descent_in_the_null_space(*pair()))


def test_a_mask_that_keeps_the_wrong_share_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KFAC.spectrum

    class Wrong:
        """A spectrum whose null space is that of a smaller γ."""

        def __init__(self, spectrum: Any) -> None:
            self.blocks, self.layers = spectrum.blocks, spectrum.layers
            self.null_space = lambda gamma: spectrum.null_space(gamma / 2)

    monkeypatch.setattr(KFAC, "spectrum", lambda self: Wrong(honest(self)))
    assert "SGD in the eigenbasis: leakage" in failed(theory.descent_in_the_null_space(*pair()))


def test_momentum_that_is_not_projected_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlab.descent.project_state", lambda *args: None)
    assert "momentum, gradient: leakage after a change of projector" in failed(
        theory.descent_in_the_null_space(*pair())
    )


def test_an_update_that_is_not_projected_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.projector import NullSpace

    monkeypatch.setattr(NullSpace, "admit", lambda self, start, before, after: after)
    assert "Adam, projected update: leakage" in failed(theory.descent_in_the_null_space(*pair()))


def test_leakage_without_a_root_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.theory import optimisers

    honest = optimisers.leakage
    monkeypatch.setattr(optimisers, "leakage", lambda *args: honest(*args).square())
    assert "curvlab.descent.leakage against P in full, free SGD" in failed(theory.descent_in_the_null_space(*pair()))
