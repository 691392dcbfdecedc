"""EK-FAC: eigenvalues are the curvature of per-example gradients along K-FAC's eigenvectors."""

import pytest
import torch
from reference import (
    assert_close,
    case,
    data_of,
    dense_of,
    gauss_newton_matrix,
    kfac_factors,
    padded,
    reorder,
)
from torch import Tensor

from curvlab.curvature import EKFAC, KFAC, GaussNewton
from curvlab.spectrum import KroneckerBasis, Spectrum

pytestmark = pytest.mark.usefixtures("float64")

ONE_LAYER = [
    "linear",
    "linear, bias",
    "linear, last",
    "linear, ignored",
    "sequence",
    "sequence, squared error",
    "sequence, keywords",
    "Conv1D",
    "convolution, plain",
    "convolution, replicate",
    "convolution, one pixel",
]


def explicit(basis: KroneckerBasis, gradients: list[Tensor], terms: int) -> Tensor:
    """Σ (u_outᵀ q u_in)² / terms, one eigenvalue at a time."""
    assert basis.u_out is not None
    values = torch.zeros(basis.shape)
    for i, u in enumerate(basis.u_out.T):
        for j, v in enumerate(basis.u_in.T):
            values[i, j] = sum(float(u @ q @ v) ** 2 for q in gradients) / terms
    return values


@pytest.mark.parametrize("labels", ["exact", "data"])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_eigenvalues_of_rotated_per_example_gradients(name: str, labels: str) -> None:
    c = case(name)
    fit = EKFAC.fit(*c.arguments, labels=labels, bias=c.bias)  # type: ignore[arg-type]
    kfac = KFAC.fit(*c.arguments, labels=labels, bias=c.bias)  # type: ignore[arg-type]
    (block,) = fit.spectrum().blocks
    gradients = [q for d in data_of(c, c.layers[0], labels) for q in d.gradients]
    terms = kfac.factors[c.layers[0]].scale.terms
    assert_close(block.values, explicit(block.basis, gradients, terms))
    assert fit.labels == labels
    # the basis is K-FAC's
    A, S = kfac_factors(c, c.layers[0], labels)
    for U, factor in ((block.basis.u_in, A), (block.basis.u_out, S)):
        diagonal = U.T @ factor @ U
        assert_close(diagonal, torch.diag(diagonal.diagonal()))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_nearest_in_the_basis_and_of_the_trace_of_gauss_newton(name: str, sharing: str) -> None:
    c = case(name)
    G = reorder(c, gauss_newton_matrix(c), "rows")
    kfac = KFAC.fit(*c.arguments, labels="exact", sharing=sharing, bias=c.bias)  # type: ignore[arg-type]
    ekfac = EKFAC.fit(*c.arguments, labels="exact", sharing=sharing, bias=c.bias)  # type: ignore[arg-type]
    (block,) = ekfac.spectrum().blocks
    U = torch.kron(block.basis.u_out, block.basis.u_in)  # row-major: U_out ⊗ U_in
    assert_close(block.values.flatten(), (U.T @ G @ U).diagonal())
    assert block.total == pytest.approx(float(G.trace()), rel=1e-12)
    near, far = ((dense_of(fit.spectrum()) - G).norm() for fit in (ekfac, kfac))
    assert float(near) <= float(far) * (1 + 1e-12)
    if len(c.data) > 1 and name != "linear, ignored":
        assert float(near) < 0.999 * float(far)  # several data: truly nearer


def test_several_layers_at_once_are_each_their_own() -> None:
    for name in ("linear, two layers", "convolution and linear", "sequence, two layers", "sequence, ragged"):
        c = case(name)
        joint = EKFAC.fit(*c.arguments, labels="exact", bias=c.bias).spectrum()
        for layer, block in zip(c.layers, joint.blocks, strict=True):
            alone = c.only(layer)
            (own,) = EKFAC.fit(*alone.arguments, labels="exact", bias=c.bias).spectrum().blocks
            assert_close(block.values, own.values)
            assert block.total == pytest.approx(GaussNewton.fit(*alone.arguments, bias=c.bias).trace())


def test_padding_counts_nowhere() -> None:
    together, single = padded()
    a, b = (EKFAC.fit(*c.arguments, labels="exact", bias=True).spectrum() for c in (together, single))
    for layer, x, y in zip(single.layers, a.blocks, b.blocks, strict=True):
        assert_close(dense_of(Spectrum((x,))), dense_of(Spectrum((y,))))
        G = reorder(single.only(layer), gauss_newton_matrix(single.only(layer)), "rows")
        assert x.total == pytest.approx(float(G.trace()))


@pytest.mark.parametrize("name", ["linear", "sequence", "convolution, plain"])
def test_model_labels_see_the_same_draws_twice_and_converge(name: str) -> None:
    c = case(name)
    fits = [
        EKFAC.fit(c.model, c.loss, c.data, c.layers, labels="model", draws=3, seed=2, micro_batch=m) for m in (None, 1)
    ]
    assert_close(fits[0].spectrum().blocks[0].values, fits[1].spectrum().blocks[0].values)
    # the second pass with the draws of the first: the sum over coordinates is that of the drawn gradients
    drawn = GaussNewton.fit(*c.arguments, labels="model", draws=3, seed=2)
    assert fits[0].spectrum().blocks[0].total == pytest.approx(drawn.trace(), rel=1e-10)
    given = EKFAC.fit(
        *c.arguments, labels="model", draws=3, seed=2, kfac=KFAC.fit(*c.arguments, labels="model", draws=3, seed=2)
    )
    assert_close(given.spectrum().blocks[0].values, fits[0].spectrum().blocks[0].values)
    many = EKFAC.fit(*c.arguments, labels="model", draws=1000).spectrum().blocks[0]
    exact = GaussNewton.fit(*c.arguments)
    assert many.total == pytest.approx(exact.trace(), rel=0.05)


def test_a_shard_of_the_data_draws_as_the_whole_does() -> None:
    c = case("linear")
    kfac = KFAC.fit(*c.arguments, labels="model")
    whole = EKFAC.fit(*c.arguments, labels="model", kfac=kfac)
    (x, _), (y, _) = c.data
    parts = [
        EKFAC.fit(c.model, c.loss, [batch], c.layers, labels="model", kfac=kfac, first_example=first)
        for batch, first in zip(c.data, (0, len(x)), strict=True)
    ]
    weights = [len(x) / (len(x) + len(y)), len(y) / (len(x) + len(y))]
    mixed = sum(w * part.spectrum().blocks[0].values for w, part in zip(weights, parts, strict=True))
    assert_close(mixed, whole.spectrum().blocks[0].values)


def test_given_factors_are_used_and_need_one_pass_only() -> None:
    c = case("linear")
    kfac = KFAC.fit(*c.arguments, labels="exact", sharing="reduce")
    fit = EKFAC.fit(c.model, c.loss, iter(c.data), c.layers, labels="exact", kfac=kfac)
    assert_close(fit.spectrum().blocks[0].values, EKFAC.fit(*c.arguments, labels="exact").spectrum().blocks[0].values)
    with pytest.raises(ValueError, match="several passes"):
        EKFAC.fit(c.model, c.loss, iter(c.data), c.layers, labels="exact")
    for other in (c.only("2"), c):
        with pytest.raises(ValueError, match="other layers"):
            EKFAC.fit(*other.arguments, labels="exact", bias=other is c, kfac=kfac)
