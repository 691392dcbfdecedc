"""A small LeNet with tanh against curvlinops, which shares no code with us.

Conventions: both sides order the parameters as torch does (our layout "parameters"); `separate_weight_and_bias=False`
is our joint bias; torch's mean squared error is `SquaredError(scale=2 / C)`; matrices are compared, not the two
Kronecker factors, between which scalars move freely. Then there is no factor between us, with one exception: the
empirical Fisher of a mean squared error. Ours is the mean of the outer products of per-example gradients, in which
1 / C appears squared; curvlinops divides once, and is C times ours.
"""

import warnings
from typing import Any

import pytest
import torch
from reference import Case, assert_close, dense_of
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, GaussNewton, Hessian
from curvlab.losses import CrossEntropy, SquaredError
from curvlab.spectrum import Spectrum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")

pytestmark = pytest.mark.usefixtures("float64")


def lenet(loss: str, bias: bool) -> tuple[Case, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=bias), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(2, 3, 3, bias=bias), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias),
    )  # fmt: skip
    x = torch.randn(7, 1, 8, 8)
    y = torch.randint(3, (7,)) if loss == "cross-entropy" else torch.randn(7, 3)
    ours, theirs = (
        (CrossEntropy(), nn.CrossEntropyLoss()) if loss == "cross-entropy" else (SquaredError(2 / 3), nn.MSELoss())
    )
    data = list(zip(x.split((4, 3)), y.split((4, 3)), strict=True))
    return Case(model, ours, data, ["0", "3", "6", "8"], bias), theirs


def dense(operator: Any) -> Tensor:
    return operator @ torch.eye(operator.shape[1])


@pytest.fixture(params=["cross-entropy", "mean squared error"])
def loss(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("kind", "name"), [(GaussNewton, "GGNLinearOperator"), (Hessian, "HessianLinearOperator")])
def test_exact_matrices(kind: Any, name: str, loss: str) -> None:
    c, torch_loss = lenet(loss, bias=True)
    theirs = dense(getattr(curvlinops, name)(c.model, torch_loss, list(c.model.parameters()), c.data))
    assert_close(kind.fit(*c.arguments, bias=True).dense("parameters"), theirs)


def factored(kind: str, c: Case, torch_loss: nn.Module, sharing: str, fisher: str) -> Tensor:
    fisher_type = curvlinops.FisherType.TYPE2 if fisher == "exact" else curvlinops.FisherType.EMPIRICAL
    approximation = curvlinops.KFACType.EXPAND if sharing == "expand" else curvlinops.KFACType.REDUCE
    operator = getattr(curvlinops, kind)(
        c.model, torch_loss, list(c.model.parameters()), c.data, fisher_type=fisher_type, kfac_approx=approximation,
        separate_weight_and_bias=False,
    )  # fmt: skip
    return dense(operator)


def in_their_order(c: Case, spectrum: Spectrum) -> Tensor:
    """Our blocks on the diagonal, in the layout "parameters"."""
    blocks = []
    for block in spectrum.blocks:
        layer = block.basis.layer  # type: ignore[union-attr]
        index = torch.arange(layer.size).view(layer.d_out, layer.d_in)
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]]) if layer.bias else index.flatten()
        blocks.append(dense_of(Spectrum((block,)))[order][:, order])
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["exact", "data"])
def test_kfac(loss: str, labels: str, sharing: str, bias: bool) -> None:
    c, torch_loss = lenet(loss, bias)
    ours = KFAC.fit(*c.arguments, labels=labels, sharing=sharing, bias=bias).spectrum()  # type: ignore[arg-type]
    factor = 3 if (labels, loss) == ("data", "mean squared error") else 1  # see above
    theirs = factored("KFACLinearOperator", c, torch_loss, sharing, labels)
    assert_close(factor * in_their_order(c, ours), theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_ekfac(loss: str, bias: bool) -> None:
    c, torch_loss = lenet(loss, bias)
    ours = EKFAC.fit(*c.arguments, labels="exact", bias=bias).spectrum()
    assert_close(in_their_order(c, ours), factored("EKFACLinearOperator", c, torch_loss, "expand", "exact"))
