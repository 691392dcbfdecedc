"""Losses: derivatives by torch.func, the factor of H_ŷ at any confidence, draws, Bregman distances."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import IGNORED, assert_close, cross_entropy_kl, losses
from torch import Tensor, nn
from torch.func import grad, hessian

from curvlab.losses import BinaryCrossEntropy, CrossEntropy, Scale, SquaredError, as_loss

pytestmark = pytest.mark.usefixtures("float64")

LOSSES: list[Any] = [CrossEntropy(), CrossEntropy(ignore_index=2), SquaredError(), SquaredError(scale=0.3)]
LOSSES.append(BinaryCrossEntropy())


def example(loss: Any, N: int = 3, T: int = 4, C: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    outputs = 2 * torch.randn(N, T, C)
    if isinstance(loss, SquaredError):
        return outputs, torch.randn(N, T, C)
    if isinstance(loss, BinaryCrossEntropy):
        return outputs, torch.rand(N, T, C)
    targets = torch.randint(C, (N, T))
    targets[0, 1] = targets[-1, -2] = loss.ignore_index
    return outputs, targets


def exact_hessian(logits: Tensor) -> Tensor:
    """diag p − p pᵀ without cancellation: the diagonal is p_i Σ_{j≠i} p_j."""
    p = logits.double().softmax(-1)
    H = -p.unsqueeze(-1) * p.unsqueeze(-2)
    off = 1 - torch.eye(p.shape[-1])
    diagonal = p * (p.unsqueeze(-2) * off).sum(-1)
    return H * off + torch.diag_embed(diagonal)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_derivatives(loss: Any) -> None:
    outputs, targets = example(loss)
    assert_close(loss.value(outputs, targets), losses(loss, outputs, targets))
    assert_close(loss.gradient(outputs, targets), grad(lambda o: losses(loss, o, targets).sum())(outputs))
    L, v = loss.hessian_factor(outputs, targets), torch.randn_like(outputs)
    for n in range(3):
        for t in range(4):
            H = hessian(lambda o, n=n, t=t: losses(loss, o[None, None], targets[n, t][None, None]).sum())(outputs[n, t])
            assert_close(L[n, t] @ L[n, t].T, H)
            assert_close(loss.hessian_product(outputs, targets, v)[n, t], H @ v[n, t])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_terms(loss: Any) -> None:
    outputs, targets = example(loss)
    terms = loss.terms(outputs, targets)
    assert terms.shape == outputs.shape[:2]
    assert terms.dtype == torch.bool
    ignored = torch.zeros(3, 4, dtype=torch.bool)
    if isinstance(loss, CrossEntropy):
        ignored = targets == loss.ignore_index
        assert ignored.any()
    assert torch.equal(terms, ~ignored)
    for derivative in (loss.value, loss.gradient, loss.hessian_factor):
        assert float(derivative(outputs, targets)[ignored].abs().sum()) == 0.0
    if isinstance(loss, CrossEntropy):
        draws = loss.sampled_gradient(outputs, targets, 0, 0, torch.arange(3))
        assert float(draws[ignored].abs().sum()) == 0.0
        assert float(loss.bregman(outputs, outputs.flip(-1), targets)[ignored].abs().sum()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    logits=st.lists(st.sampled_from([0.0, 1.0, -1.0, 3.5, 50.0, -50.0, 90.0, 1000.0, -1000.0]), min_size=2, max_size=6)
)
def test_the_factor_keeps_its_digits_at_any_confidence(dtype: torch.dtype, logits: list[float]) -> None:
    outputs = torch.tensor(logits, dtype=dtype)[None, None]
    L = CrossEntropy().hessian_factor(outputs, torch.zeros(1, 1, dtype=torch.long))[0, 0]
    assert L.dtype == dtype
    assert L.shape == (len(logits), len(logits) - 1)
    assert bool(L.isfinite().all())
    H, L = exact_hessian(outputs[0, 0]), L.double()
    size = H.diagonal().sqrt()
    digits = 1e-12 if dtype == torch.float64 else 2e-5
    underflow = 1e-300 if dtype == torch.float64 else 1e-36
    deviation = (L @ L.T - H).abs()
    assert bool((deviation <= digits * size[:, None] * size[None, :] + underflow).all())


def test_confident_predictions_still_have_curvature() -> None:
    """1 − p² would be zero in float32."""
    outputs = torch.tensor([[[30.0, 0.0, -5.0]]], dtype=torch.float32)
    L = CrossEntropy().hessian_factor(outputs, torch.zeros(1, 1, dtype=torch.long))[0, 0].double()
    assert float((L @ L.T)[0, 0]) == pytest.approx(math.exp(-30) * (1 + math.exp(-5)), rel=1e-5)


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError(scale=0.3), BinaryCrossEntropy()], ids=repr)
def test_second_moment_of_drawn_gradients_is_the_hessian(loss: Any) -> None:
    outputs, targets = example(loss, N=1, T=2, C=3)
    if isinstance(loss, CrossEntropy):
        targets = torch.zeros(1, 2, dtype=torch.long)
    N = 40_000
    many = outputs.expand(N, -1, -1)
    g = loss.sampled_gradient(many, targets.expand(N, *targets.shape[1:]), 0, 0, torch.arange(N))
    L = loss.hessian_factor(outputs, targets)[0]
    for t in range(2):
        assert_close(g[:, t].T @ g[:, t] / N, L[t] @ L[t].T, 0.03)
        assert float(g[:, t].mean(0).abs().max()) < 0.02
    across = g[:, 0].T @ g[:, 1] / N  # positions draw independently
    assert float(across.abs().max()) < 0.02
    if isinstance(loss, CrossEntropy):
        drawn = (many.softmax(-1) - g).argmax(-1)
        share = torch.stack([(drawn[:, 0] == c).double().mean() for c in range(3)])
        assert float((share - outputs[0, 0].softmax(-1)).abs().max()) < 0.015


def test_labels_drawn_from_certain_predictions_are_certain() -> None:
    for dtype in (torch.float32, torch.float64):
        outputs = torch.tensor([[[-1000.0, 1000.0, -1000.0]]], dtype=dtype).expand(1000, 1, 3)
        targets = torch.zeros(1000, 1, dtype=torch.long)
        g = CrossEntropy().sampled_gradient(outputs, targets, 0, 0, torch.arange(1000))
        assert g.dtype == dtype
        assert float(g.abs().max()) == 0.0


def test_draws_take_their_key() -> None:
    for loss in (CrossEntropy(), SquaredError(), BinaryCrossEntropy()):
        outputs = torch.zeros(50, 2, 5)
        targets = torch.zeros(50, 2, dtype=torch.long)

        def draw(seed: int, number: int, first: int, loss=loss, outputs=outputs, targets=targets) -> Tensor:  # type: ignore[no-untyped-def]
            return loss.sampled_gradient(outputs, targets, seed, number, torch.arange(first, first + 50))

        base = draw(0, 0, 0)
        assert torch.equal(base, draw(0, 0, 0))
        assert torch.equal(base[10:], draw(0, 0, 10)[:40])
        for other in (draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 50)):
            assert float((base != other).double().mean()) > 0.2
        assert not torch.equal(base[:, 0], base[:, 1])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_bregman_is_its_definition(loss: Any) -> None:
    outputs, targets = example(loss)
    reference = outputs + torch.randn_like(outputs)
    slope = grad(lambda o: losses(loss, o, targets).sum())(reference)
    expected = (
        losses(loss, outputs, targets) - losses(loss, reference, targets) - (slope * (outputs - reference)).sum(-1)
    )
    assert_close(loss.bregman(outputs, reference, targets), expected)
    assert float(loss.bregman(outputs, outputs, targets).abs().max()) < 1e-14


def test_bregman_of_cross_entropy_is_the_kl_from_the_reference() -> None:
    outputs, targets = example(CrossEntropy())
    reference = 3 * torch.randn_like(outputs)
    kl = cross_entropy_kl(reference, outputs) * (targets != IGNORED)
    assert_close(CrossEntropy().bregman(outputs, reference, targets), kl)
    # free of labels
    assert torch.equal(
        CrossEntropy().bregman(outputs, reference, targets.clamp_min(0)),
        CrossEntropy().bregman(outputs, reference, torch.ones_like(targets)),
    )


def test_bregman_of_the_logistic_loss_is_a_sum_of_kls_and_keeps_its_digits() -> None:
    outputs, reference = torch.tensor([[[40.0, -40.0, 1.0]]]), torch.tensor([[[-35.0, 30.0, 1.0]]])
    found = float(BinaryCrossEntropy().bregman(outputs, reference, torch.zeros(1, 1, 3)))
    exact = [
        math.log1p(math.exp(o)) - math.log1p(math.exp(r)) - (o - r) / (1 + math.exp(-r))
        for o, r in ((40, -35), (-40, 30))
    ]  # nearly certain of opposite things
    assert found == pytest.approx(sum(exact), rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1), (6,)])
def test_the_logistic_loss_wants_targets_shaped_like_outputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shaped like the outputs"):
        BinaryCrossEntropy().value(torch.zeros(6, 1, 4), torch.zeros(shape))


def test_torch_losses() -> None:
    assert as_loss(nn.CrossEntropyLoss()) == CrossEntropy()
    assert as_loss(nn.CrossEntropyLoss(ignore_index=3)) == CrossEntropy(ignore_index=3)
    own = SquaredError(2.0)
    assert as_loss(own) is own
    for wrong in (
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
    ):
        with pytest.raises(ValueError, match="not supported"):
            as_loss(wrong)
    with pytest.raises(ValueError, match=r"SquaredError\(scale=2 / C\)"):
        as_loss(nn.MSELoss())
    for nothing in (None, "mse", nn.L1Loss(), CrossEntropy):
        with pytest.raises(TypeError, match="is no loss"):
            as_loss(nothing)


def test_mean_squared_error_of_torch() -> None:
    outputs, targets = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    assert float(SquaredError(scale=2 / 4).value(outputs, targets).mean()) == pytest.approx(
        float(nn.MSELoss()(outputs, targets))
    )


@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1), (6,)])
def test_squared_error_wants_targets_shaped_like_outputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shaped like the outputs"):
        SquaredError().value(torch.zeros(6, 1, 4), torch.zeros(shape))


def test_scales_add() -> None:
    assert Scale(1, 2) + Scale(3, 4) == Scale(4, 6)
    assert sum([Scale(1, 1), Scale(2, 5)], start=Scale()) == Scale(3, 6)
