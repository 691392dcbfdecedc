"""Factors that a step with a name made of the right ones."""

from collections.abc import Callable

import pytest
import torch
from production import Made, Run, llama, produce, texts
from test_conventions import DOWN, one, part_of
from torch import Tensor, nn

from curvlab.batches import Batch
from curvlab.crosscheck.altered import altered, damping, resembles
from curvlab.crosscheck.conventions import Subject, check
from curvlab.crosscheck.gathering import gather
from curvlab.crosscheck.moments import LayerMoments
from curvlab.losses import CrossEntropy

LIMIT = 1e-5


def order(d: int) -> Tensor:
    return torch.randperm(d, generator=torch.Generator().manual_seed(0))


def basis(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]


def power(C: Tensor, exponent: float) -> Tensor:
    values, U = torch.linalg.eigh(C)
    return (U * (values.clamp_min(0) + 1e-12 * values[-1]) ** exponent) @ U.mT


def without(C: Tensor) -> Tensor:
    C = C.clone()
    C[2], C[:, 2] = 0, 0
    return C


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "multiple of the identity": lambda C: 3 * torch.eye(len(C), dtype=C.dtype),
    "the diagonal of ours": lambda C: torch.diag(C.diagonal()),
    "correlation matrix": lambda C: C / torch.outer(C.diagonal().sqrt(), C.diagonal().sqrt()),
    "1 features": without,
    "another order": lambda C: C[order(len(C))][:, order(len(C))],
    "another basis": lambda C: basis(len(C)) @ C @ basis(len(C)).mT,
    "the square of ours": lambda C: C @ C,
    "the square root of ours": lambda C: power(C, 0.5),
    "the inverse of ours": lambda C: power(C, -1.0),
}


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, list[Batch], Made, LayerMoments]:
    model, data = llama(0), texts(0)
    made = produce(model, DOWN, data, Run())
    return model, data, made, gather(model, CrossEntropy(), data, DOWN)[DOWN]


@pytest.mark.parametrize("words", STEPS)
def test_steps_are_named(words: str, setting: tuple[nn.Module, list[Batch], Made, LayerMoments]) -> None:
    _, _, made, moments = setting
    found = altered(STEPS[words](made.A), "A", moments, LIMIT)
    assert found is not None
    assert words in found


def test_nothing_is_named_where_nothing_was_done(setting: tuple[nn.Module, list[Batch], Made, LayerMoments]) -> None:
    _, _, made, moments = setting
    d = len(made.A)
    unrelated = basis(d) @ torch.diag(torch.arange(1.0, d + 1, dtype=torch.float64)) @ basis(d).mT
    assert altered(unrelated, "A", moments, LIMIT) is None
    assert resembles(made.A, "A", moments)
    assert not resembles(unrelated, "A", moments)


@pytest.mark.parametrize("share", [1e-2, 1.0, 30.0])
def test_damping_is_measured(share: float, setting: tuple[nn.Module, list[Batch], Made, LayerMoments]) -> None:
    _, _, made, moments = setting
    delta = share * float(made.A.trace()) / len(made.A)
    eye = torch.eye(len(made.A), dtype=torch.float64)
    assert damping(made.A + delta * eye, "A", moments, LIMIT) == pytest.approx(delta, rel=1e-6)
    assert damping(made.A, "A", moments, LIMIT) is None
    assert damping(made.A - 1e-3 * delta * eye, "A", moments, LIMIT) is None


def test_the_step_reaches_the_report(setting: tuple[nn.Module, list[Batch], Made, LayerMoments]) -> None:
    model, data, made, _ = setting
    part = part_of(DOWN, made.N, A=STEPS["another order"](made.A).float(), S=made.S.float())
    found = one(check(part, Subject(model, CrossEntropy(), data)), "convention")
    assert found.severity == "error"
    assert "A is ours with its features in another order" in found.cause
