"""The authors' wrong curvatures, and what null spaces are compared by, against their definitions."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from curvlab.curvature import EKFAC, KFAC, GaussNewton
from curvlab.evaluation.transfer import Transfer
from curvlab.losses import CrossEntropy

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import authors_curvatures
import authors_protocol

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def network() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A small head whose layer "fc2" (5 × 6) is curved, and 23 examples: batches of 10 leave one of 3."""
    torch.manual_seed(3)
    head = nn.Sequential()
    head.add_module("fc2", nn.Linear(6, 5))
    head.add_module("act", nn.ReLU())
    head.add_module("fc3", nn.Linear(5, 4))
    return head, (torch.randn(23, 6), torch.randint(0, 4, (23,)))


def gradients(head: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss with respect to fc2.weight, example by example: (N, 5, 6)."""
    out = []
    for one, label in zip(x, y, strict=True):
        head.zero_grad()
        F.cross_entropy(head(one[None]), label[None]).backward()
        out.append(head.fc2.weight.grad.clone())
    return torch.stack(out)


def test_through_probabilities_is_the_gauss_newton_matrix_of_the_probabilities(network: Any) -> None:
    head, (x, y) = network
    W = head.fc2.weight.detach()

    def probabilities(weight: Tensor, one: Tensor) -> Tensor:
        rest = {name: p.detach() for name, p in head.named_parameters() if name != "fc2.weight"}
        return functional_call(head, rest | {"fc2.weight": weight}, (one[None],))[0].softmax(-1)

    G = torch.zeros(30, 30)
    for one, label in zip(x, y, strict=True):
        p = probabilities(W, one)
        H = hessian(lambda q, label=label: -q[label].log())(p)
        expected = torch.zeros(4, 4)
        expected[label, label] = 1 / p[label] ** 2
        assert_close(H, expected)
        J = jacrev(probabilities)(W, one).reshape(4, 30)
        G += J.T @ H @ J / len(x)
    found = authors_curvatures.through_probabilities(head, (x, y), "fc2").dense("parameters")
    assert_close(found, G)
    right = GaussNewton.fit(head, CrossEntropy(), [(x, y)], "fc2").dense("parameters")
    assert (found - right).norm() > 0.1 * right.norm()  # another matrix than the one through logits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squares_of_batches(network: Any, reduction: Any) -> None:
    head, (x, y) = network
    (block,) = KFAC.fit(head, CrossEntropy(), [(x, y)], "fc2", labels="data").spectrum().blocks
    basis = block.basis
    found = authors_curvatures.batch_squares(
        head, (x, y), "fc2", basis, labels="data", batch=10, reduction=reduction
    ).blocks[0]
    values = torch.zeros(5, 6)
    for part in (slice(0, 10), slice(10, 20), slice(20, 23)):
        own = gradients(head, x[part], y[part])
        Q = own.mean(0) if reduction == "mean" else own.sum(0)
        for i in range(5):
            for j in range(6):
                values[i, j] += float(basis.u_out[:, i] @ Q @ basis.u_in[:, j]) ** 2 / 3
    assert_close(found.values, values)
    assert found.total == pytest.approx(float(values.sum()), rel=1e-12)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_batches_of_one_are_ekfac(network: Any, labels: Any) -> None:
    head, data = network
    right = EKFAC.fit(head, CrossEntropy(), [data], "fc2", labels=labels, seed=5).spectrum().blocks[0]
    found = authors_curvatures.batch_squares(head, data, "fc2", right.basis, labels=labels, batch=1, seed=5).blocks[0]
    assert_close(found.values, right.values)


def test_drawn_labels_make_sums_over_batches_right_in_expectation(network: Any) -> None:
    head, (x, y) = network
    x, y = x[:20], y[:20]
    right = EKFAC.fit(head, CrossEntropy(), [(x, y)], "fc2", labels="exact").spectrum().blocks[0]
    draws = torch.tensor([
        authors_curvatures.batch_squares(
            head, (x, y), "fc2", right.basis, labels="model", batch=10, reduction="sum", seed=seed
        ).blocks[0].total / 10
        for seed in range(200)
    ])  # fmt: skip
    error = float(draws.std()) / len(draws) ** 0.5
    assert abs(float(draws.mean()) - right.total) < 4 * error


def test_bad_arguments_of_squares_of_batches(network: Any) -> None:
    head, data = network
    basis = KFAC.fit(head, CrossEntropy(), [data], "fc2", labels="data").spectrum().blocks[0].basis
    with pytest.raises(ValueError, match="at least 1"):
        authors_curvatures.batch_squares(head, data, "fc2", basis, labels="data", batch=0)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        authors_curvatures.batch_squares(head, data, "fc2", basis, labels="data", batch=4, reduction="max")  # type: ignore[arg-type]


def test_energy_of_the_right_ggn_in_what_is_removed(network: Any) -> None:
    head, (x, y) = network
    task = Transfer(head, (x, y), (x, y), (x, y), (x, y), 0.0)
    G = GaussNewton.fit(head, CrossEntropy(), [(x, y)], "fc2").dense("rows")
    for wrong in (
        KFAC.fit(head, CrossEntropy(), [(x, y)], "fc2", labels="data").spectrum(),
        GaussNewton.fit(head, CrossEntropy(), [(x, y)], "fc2", labels="data").spectrum(),
    ):
        null = wrong.null_space(0.9)
        kept = null.project({"fc2": torch.eye(30).reshape(30, 5, 6)})["fc2"].reshape(30, 30)
        expected = float(((torch.eye(30) - kept) @ G).trace() / G.trace())
        assert authors_protocol.energy_of_ggn(null, task) == pytest.approx(expected, rel=1e-10)


def test_comparison_of_null_spaces(network: Any) -> None:
    head, (x, y) = network
    task = Transfer(head, (x, y), (x, y), (x, y), (x, y), 0.0)
    right = GaussNewton.fit(head, CrossEntropy(), [(x, y)], "fc2").spectrum().null_space(0.9)
    wrong = KFAC.fit(head, CrossEntropy(), [(x, y)], "fc2", labels="data").spectrum().null_space(0.9)
    eye = {"fc2": torch.eye(30).reshape(30, 5, 6)}
    P, R = (null.project(eye)["fc2"].reshape(30, 30) for null in (wrong, right))
    found = authors_protocol.compared(wrong, right, task)
    assert found["overlap"] == pytest.approx(float((P @ R).trace() / P.trace()), rel=1e-10)
    common = ((torch.eye(30) - P) @ (torch.eye(30) - R)).trace() / right.removed
    assert found["ggn_directions_removed"] == pytest.approx(float(common), rel=1e-9)
    itself = authors_protocol.compared(right, right, task)
    assert itself["overlap"] == pytest.approx(1)
    assert itself["ggn_energy_removed"] == pytest.approx(right.energy_removed, rel=1e-10)


def test_what_was_kept_and_learnt(network: Any) -> None:
    head, (x, y) = network
    other = (torch.randn(9, 6), torch.randint(0, 4, (9,)))
    task = Transfer(head, other, (x, y), other, (x[:7], y[:7]), 0.5)
    task.remember()
    unchanged = task.measures()
    assert unchanged["measured_kl"] == unchanged["pretrain_loss_increase"] == 0
    before, loss = head(x[:7]).detach(), F.cross_entropy(head(x), y).item()
    with torch.no_grad():
        head.fc2.weight += 0.3 * torch.randn(5, 6)
    found = task.measures()
    after = head(x[:7]).detach()
    kl = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found["measured_kl"] == pytest.approx(float(kl), rel=1e-10)
    assert found["pretrain_loss_increase"] == pytest.approx(F.cross_entropy(head(x), y).item() - loss, rel=1e-9)
    assert found["finetune_accuracy"] == pytest.approx((head(other[0]).argmax(1) == other[1]).double().mean().item())
    assert found["base_accuracy"] == 0.5
