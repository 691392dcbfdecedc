"""The exact Gauss–Newton matrix against J and H_ŷ from torch.func."""

import pytest
import torch
from reference import (
    CASES,
    Case,
    assert_close,
    case,
    data_of,
    gauss_newton_matrix,
    hessian_matrix,
    padded,
    random_displacement,
    reorder,
    rows_vector,
    sequences,
    vectors,
)
from scipy.sparse.linalg import eigsh
from torch import nn

from curvlab.curvature import GaussNewton, Hessian
from curvlab.losses import CrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=list(CASES))
def any_case(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return case(request.param)


@pytest.mark.parametrize("store", [True, False], ids=["stored", "recomputed"])
def test_dense_is_the_definition_in_every_layout(any_case, store) -> None:  # type: ignore[no-untyped-def]
    expected = gauss_newton_matrix(any_case)
    fit = GaussNewton.fit(*any_case.arguments, bias=any_case.bias, store=store)
    for layout in ("parameters", "vec", "rows"):
        assert_close(fit.dense(layout), reorder(any_case, expected, layout))
    assert fit.trace() == pytest.approx(float(expected.trace()), rel=1e-12)
    assert fit.semidefinite


@pytest.mark.parametrize("store", [True, False], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    "name", ["linear, two layers", "sequence, two layers", "convolution and linear", "sequence, ragged"]
)
def test_products_forms_and_operators_agree_with_dense(name: str, store: bool) -> None:
    c = case(name)
    fit = GaussNewton.fit(*c.arguments, bias=c.bias, store=store)
    C = reorder(c, gauss_newton_matrix(c), "rows")
    v = torch.randn(5, fit.size)
    assert_close(fit.matmat(v), v @ C)
    delta = random_displacement(fit.layers, 2, 3)
    one = {name: Q[1, 2] for name, Q in delta.items()}
    flat = rows_vector(fit.layers, one)
    assert fit.quadratic_form(delta).shape == (2, 3)
    assert float(fit.quadratic_form(delta)[1, 2]) == pytest.approx(float(flat @ C @ flat), rel=1e-10)
    assert float(fit.quadratic_form(one)) == pytest.approx(float(flat @ C @ flat), rel=1e-10)
    operator = fit.linear_operator()
    assert_close(torch.from_numpy(operator @ v.T.numpy()), C @ v.T)
    assert_close(torch.from_numpy(operator.rmatvec(v[0].numpy())), C @ v[0])
    assert_close(torch.from_numpy(eigsh(operator, k=3, which="LA")[0]).flip(0), torch.linalg.eigvalsh(C).flip(0)[:3])


def test_vectors_of_the_wrong_length_are_refused() -> None:
    c = case("linear")
    with pytest.raises(ValueError, match="13 entries, the curvature 12"):
        GaussNewton.fit(*c.arguments).matmat(torch.zeros(1, 13))
    with pytest.raises(ValueError, match="layout"):
        GaussNewton.fit(*c.arguments).dense("columns")  # type: ignore[arg-type]


def test_piecewise_linear_models_have_the_hessian_as_gauss_newton() -> None:
    torch.manual_seed(1)
    c = vectors(CrossEntropy(), ["0"], True)
    c.model[1] = nn.ReLU()
    assert_close(GaussNewton.fit(*c.arguments, bias=True).dense(), hessian_matrix(c))


def test_softmax_regression_closed_form() -> None:
    """G = 1/N Σ (diag p − p pᵀ) ⊗ x xᵀ in row-major order."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3), torch.randint(4, (5,))
    p = model(x).softmax(-1).detach()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = sum(torch.kron(H[n], torch.outer(x[n], x[n])) for n in range(5)) / 5
    assert_close(GaussNewton.fit(model, CrossEntropy(), [(x, y)], "0").dense("rows"), expected)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["linear, two layers", "sequence, two layers"])
def test_batches_do_not_matter(name: str, micro_batch: int) -> None:
    c = case(name)
    whole = GaussNewton.fit(*c.arguments, bias=c.bias).dense()
    for store in (True, False):
        split = GaussNewton.fit(*c.arguments, bias=c.bias, store=store, micro_batch=micro_batch)
        assert_close(split.dense(), whole, 1e-12)


def test_many_stored_examples_are_worked_off_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear, two layers", "sequence", "convolution and linear"):
        c = case(name)
        fit = GaussNewton.fit(*c.arguments, bias=c.bias)
        dense, products, trace = fit.dense(), fit.matmat(torch.eye(fit.size)), fit.trace()
        with monkeypatch.context() as patch:
            patch.setattr("curvlab.curvature.products.CHUNK", 2)
            assert_close(fit.dense(), dense, 1e-12)
            assert_close(fit.matmat(torch.eye(fit.size)), products, 1e-12)
            assert fit.trace() == pytest.approx(trace)


def test_padding_counts_nowhere() -> None:
    together, single = padded()
    for layers in (["first"], ["first", "second"]):
        together.layers = single.layers = layers
        assert_close(
            GaussNewton.fit(*together.arguments, bias=True).dense(),
            GaussNewton.fit(*single.arguments, bias=True).dense(),
        )


@pytest.mark.parametrize("name", ["linear", "sequence, two layers", "convolution, replicate"])
def test_data_labels_give_the_empirical_fisher(name: str) -> None:
    c = case(name)
    fit = GaussNewton.fit(*c.arguments, bias=c.bias, labels="data")
    gradients = torch.stack(
        [
            torch.cat([d.gradients[0].flatten() for d in per_layer])
            for per_layer in zip(*(data_of(c, layer, "data") for layer in c.layers), strict=True)
        ]
    )
    assert_close(fit.dense("rows"), gradients.T @ gradients / fit.terms)


@pytest.mark.parametrize("name", ["linear", "sequence", "linear, squared error"])
def test_model_labels_converge_to_the_exact_matrix(name: str) -> None:
    c = case(name)
    exact = gauss_newton_matrix(c)
    few, many = (
        float(
            (GaussNewton.fit(*c.arguments, bias=c.bias, labels="model", draws=n).dense() - exact).norm() / exact.norm()
        )
        for n in (16, 1600)
    )
    assert many < 0.06  # Monte-Carlo error ∝ 1/√draws; ten times that of "few" draws would be a bias
    assert few > 2 * many


def test_recomputed_products_take_exact_labels_and_data_that_can_be_read_again() -> None:
    c = case("linear")
    with pytest.raises(ValueError, match="labels must be 'exact'"):
        GaussNewton.fit(*c.arguments, store=False, labels="model")
    with pytest.raises(ValueError, match="several passes"):
        GaussNewton.fit(c.model, c.loss, iter(c.data), c.layers, store=False)
    assert_close(GaussNewton.fit(c.model, c.loss, iter(c.data), c.layers).dense(), gauss_newton_matrix(c))


# Spectra


@pytest.fixture(scope="module")
def larger():  # type: ignore[no-untyped-def]
    """A GGN of 300 parameters, large enough that Krylov spaces stop early."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(15, 20, bias=False), nn.Tanh(), nn.Linear(20, 4))
    x = torch.randn(60, 15) * torch.linspace(2, 0.1, 15) ** 3
    return GaussNewton.fit(model, CrossEntropy(), [(x, torch.randint(4, (60,)))], "0")


def test_the_full_spectrum_reproduces_the_matrix(any_case) -> None:  # type: ignore[no-untyped-def]
    fit = GaussNewton.fit(*any_case.arguments, bias=any_case.bias)
    C = reorder(any_case, gauss_newton_matrix(any_case), "rows")
    (block,) = fit.spectrum().blocks
    U = block.basis.vectors
    assert_close(U.T @ U, torch.eye(fit.size))
    assert_close(U * block.values @ U.T, C)
    assert bool((block.values.diff() <= 0).all())
    assert float(block.values.min()) >= 0
    assert block.total == pytest.approx(float(C.trace()))
    assert (block.floor, block.total_error) == (0.0, 0.0)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_k_leading_pairs(larger, k: int) -> None:  # type: ignore[no-untyped-def]
    C = larger.dense("rows")
    (block,) = larger.spectrum(k=k).blocks
    full = torch.linalg.eigvalsh(C).flip(0)
    n = len(block.values)
    assert k < n < larger.size
    assert_close(block.values, full[:n], 1e-9)
    U = block.basis.vectors
    assert_close(U.T @ U, torch.eye(n))
    assert float((C @ U - U * block.values).norm(dim=0).max()) <= 1e-9 * float(full[0])
    assert block.total == pytest.approx(float(C.trace()))
    assert float(full[n]) <= block.floor * (1 + 1e-9)


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.99])
def test_a_gamma_spectrum_gives_the_null_space_of_the_full_one(larger, gamma: float) -> None:  # type: ignore[no-untyped-def]
    few = larger.spectrum(gamma=gamma)
    assert len(few.blocks[0].values) < larger.size
    a, b = few.null_space(gamma), larger.spectrum().null_space(gamma)
    assert a.removed == b.removed
    assert a.energy_removed == pytest.approx(b.energy_removed)
    delta = random_displacement(larger.layers, 3)
    assert_close(a.project(delta)["0"], b.project(delta)["0"], 1e-8)
    assert few.null_space(k=a.removed).removed == a.removed


def test_repeated_eigenvalues_are_found_in_full() -> None:
    """G = A ⊗ I_24 for a linear model with squared error: every eigenvalue 24 times, more than a Krylov block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24, bias=False))
    x = torch.randn(50, 12) * torch.linspace(3, 0.1, 12) ** 2
    fit = GaussNewton.fit(model, SquaredError(), [(x, torch.randn(50, 24))], "0")
    full = fit.spectrum()
    for k in (10, 24, 30):
        few = fit.spectrum(k=k)
        assert_close(few.blocks[0].values, full.blocks[0].values[: len(few.blocks[0].values)], 1e-9)
        assert few.null_space(k=k).removed == full.null_space(k=k).removed == 24 * -(-k // 24)
    assert fit.spectrum(gamma=0.5).null_space(0.5).removed == full.null_space(0.5).removed


def test_arguments_of_spectra_are_checked() -> None:
    fit = GaussNewton.fit(*case("linear").arguments)
    for gamma in (0.0, 1.0, -0.2, 1.5, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            fit.spectrum(gamma=gamma)
    for k in (0, -1, fit.size, fit.size + 1):
        with pytest.raises(ValueError, match="k must"):
            fit.spectrum(k=k)


def test_dead_units_are_directions_without_curvature() -> None:
    torch.manual_seed(0)
    c = vectors(CrossEntropy(), ["0"], True)
    c.model[1] = nn.ReLU()
    with torch.no_grad():
        c.model[0].bias[1] = -100.0  # never active
        c.model[0].weight[1] = 0.0
    fit = GaussNewton.fit(*c.arguments, bias=True)
    (block,) = fit.spectrum().blocks
    assert_close(block.basis.vectors * block.values @ block.basis.vectors.T, fit.dense("rows"))
    assert_close(block.basis.vectors.T @ block.basis.vectors, torch.eye(fit.size))
    # a unit that is dead is free to move
    delta = {"0": torch.zeros(4, 4)}
    delta["0"][1] = torch.randn(4)
    assert_close(fit.spectrum().null_space(0.999).project(delta)["0"], delta["0"])


def test_sequence_with_one_position_is_a_vector() -> None:
    torch.manual_seed(0)
    c = sequences(SquaredError(), ["first"], True)
    c.data = [(x[:, :1], y[:, :1]) for x, y in c.data]
    assert_close(GaussNewton.fit(*c.arguments, bias=True).dense(), gauss_newton_matrix(c))


def sparse_case() -> Case:
    """Inputs zero on some examples or on all; output units dead on all, in the middle as well as at the end."""
    torch.manual_seed(0)
    c = vectors(CrossEntropy(), ["2"], True)
    c.model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        c.model[0].bias[2] = -100.0  # an input that is always zero
        c.model[4].weight[:, [1, 4]] = 0.0  # outputs that nothing depends on
    hidden = torch.cat([c.model[:2](x) for x, _ in c.data])
    zeros = (hidden == 0).double().mean(0)
    assert float(zeros[2]) == 1.0
    assert bool(((zeros > 0) & (zeros < 1)).any())
    return c


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_units_that_are_dead_now_and_then_or_always(kind) -> None:  # type: ignore[no-untyped-def]
    c = sparse_case()
    expected = gauss_newton_matrix(c) if kind is GaussNewton else hessian_matrix(c)
    fit = kind.fit(*c.arguments, bias=True)
    assert_close(fit.dense(), expected)
    assert_close(fit.matmat(torch.eye(fit.size)), reorder(c, expected, "rows"))
    assert fit.trace() == pytest.approx(float(expected.trace()))
