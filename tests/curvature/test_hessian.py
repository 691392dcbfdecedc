"""The exact Hessian against torch.func.hessian, and its indefinite spectra."""

from typing import Any

import pytest
import torch
from reference import (
    CASES,
    assert_close,
    case,
    hessian_matrix,
    losses,
    padded,
    random_displacement,
    reorder,
    rows_vector,
    vectors,
)
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from curvlab.curvature import Hessian
from curvlab.curvature import hessian as hessian_module
from curvlab.curvature.products import AutogradProduct, KroneckerSum
from curvlab.losses import CrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", list(CASES))
def test_dense_is_the_second_derivative_in_every_layout(name: str) -> None:
    c = case(name)
    expected = hessian_matrix(c)
    fit = Hessian.fit(*c.arguments, bias=c.bias)
    for layout in ("parameters", "vec", "rows"):
        assert_close(fit.dense(layout), reorder(c, expected, layout))
    assert fit.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
    v = torch.randn(3, fit.size)
    rows = reorder(c, expected, "rows")
    assert_close(fit.matmat(v), v @ rows)
    delta = random_displacement(fit.layers)
    flat = rows_vector(fit.layers, delta)
    assert float(fit.quadratic_form(delta)) == pytest.approx(float(flat @ rows @ flat), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear", KroneckerSum),
        ("convolution, one pixel", KroneckerSum),
        ("linear, two layers", AutogradProduct),
        ("sequence", AutogradProduct),
        ("sequence, ragged", AutogradProduct),
    ],
)
def test_one_use_of_one_layer_needs_no_autograd(name: str, kind: type) -> None:
    assert isinstance(Hessian.fit(*case(name).arguments).product, kind)


def test_ragged_batches_of_one_layer() -> None:
    """The first batch alone would allow the short cut, the later ones do not."""
    c = case("sequence, ragged").only("first")
    assert_close(Hessian.fit(*c.arguments).dense(), hessian_matrix(c))


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("name", ["linear, bias", "linear, two layers", "sequence"])
def test_batches_do_not_matter(name: str, micro_batch: int) -> None:
    c = case(name)
    assert_close(Hessian.fit(*c.arguments, bias=c.bias, micro_batch=micro_batch).dense(), hessian_matrix(c))


def test_padding_counts_nowhere() -> None:
    together, single = padded()
    assert_close(Hessian.fit(*together.arguments, bias=True).dense(), hessian_matrix(single))


def test_products_are_differences_of_gradients() -> None:
    c = case("linear, two layers")
    fit = Hessian.fit(*c.arguments, bias=True)
    delta = random_displacement(fit.layers)

    def gradient(step: float) -> torch.Tensor:
        for layer in fit.layers:
            layer.write(layer.matrix() + step * delta[layer.name])
        total = sum(losses(c.loss, c.model(x)[:, None], y).sum() for x, y in c.data) / fit.terms
        grads = torch.autograd.grad(total, [p for layer in fit.layers for p in layer.parameters()])
        for layer in fit.layers:
            layer.write(layer.matrix() - step * delta[layer.name])
        pairs = zip(fit.layers, (grads[:2], grads[2:]), strict=True)
        return torch.cat([layer.matrix(g).flatten() for layer, g in pairs])

    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    assert_close(fit.matmat(rows_vector(fit.layers, delta)[None])[0], difference, 1e-7)


def test_a_loss_that_is_linear_in_the_layer_has_no_curvature() -> None:
    class Linear:
        """ℓ = Σ ŷ."""

        value = staticmethod(lambda outputs, targets: outputs.sum(-1))
        terms = staticmethod(lambda outputs, targets: torch.ones(outputs.shape[:2], dtype=torch.bool))
        hessian_factor = sampled_gradient = bregman = None

    model = nn.Sequential(nn.Linear(2, 3))
    fit = Hessian.fit(model, Linear(), [(torch.randn(4, 2), torch.zeros(4, 3))], "0")
    assert float(fit.dense().abs().max()) == 0.0
    assert fit.trace() == 0.0


class Cube(torch.autograd.Function):
    """x³ with derivatives written by hand and no rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g[0] * Slope.apply(x)


class Slope(torch.autograd.Function):
    """3 x², whose backward looks at its numbers: no batching tensor can serve it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 3 * x**2

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g[0] * 6 * x * (1.0 if bool(g[0].isfinite().all()) else float("nan"))


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Cube.apply(x)
        return y


def test_operations_that_cannot_be_batched_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    c = vectors(CrossEntropy(), ["0"], False)
    c.model[1] = Cubed()  # type: ignore[operator]
    batched = []
    grad = torch.autograd.grad

    def spy(*arguments: Any, **options: Any) -> Any:
        batched.append(options.get("is_grads_batched", False))
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    S = Hessian.fit(*c.arguments).dense("rows")
    assert True in batched
    assert batched.count(False) > 4  # the columns again, one by one
    monkeypatch.undo()

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    c.model[1] = Plain()  # type: ignore[operator]
    assert_close(S, reorder(c, hessian_matrix(c), "rows"))


def test_wide_layers_take_their_columns_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("linear, bias")
    monkeypatch.setattr(hessian_module, "COLUMNS", 3)
    assert_close(Hessian.fit(*c.arguments, bias=True).dense(), hessian_matrix(c))


def test_iterators_serve_one_pass_only() -> None:
    c = case("linear")
    assert_close(Hessian.fit(c.model, c.loss, iter(c.data), c.layers).dense(), hessian_matrix(c))
    c = case("sequence")
    with pytest.raises(ValueError, match="several passes"):
        Hessian.fit(c.model, c.loss, iter(c.data), c.layers)


# Spectra


@pytest.fixture(scope="module")
def larger() -> Hessian:
    """Indefinite, 300 parameters, a third of the energy negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(15, 20, bias=False), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(80, 15) * torch.linspace(2, 0.1, 15) ** 3
    return Hessian.fit(model, SquaredError(), [(x, 3 * torch.randn(80, 3))], "0")


def test_full_spectra_keep_signs_and_are_ordered_by_magnitude(larger: Hessian) -> None:
    C = larger.dense("rows")
    (block,) = larger.spectrum().blocks
    assert float(block.values.min()) < -0.05 * float(block.values.max())
    assert bool((block.values.abs().diff() <= 0).all())
    assert_close(block.basis.vectors * block.values @ block.basis.vectors.T, C)
    assert block.total == pytest.approx(float(torch.linalg.eigvalsh(C).abs().sum()))
    assert block.total > 1.2 * abs(float(C.trace()))  # the trace would have been the wrong total


@pytest.mark.parametrize("k", [1, 5, 30])
def test_the_k_largest_in_magnitude(larger: Hessian, k: int) -> None:
    full = torch.linalg.eigvalsh(larger.dense("rows"))
    full = full[full.abs().argsort(descending=True)]
    (block,) = larger.spectrum(k=k).blocks
    n = len(block.values)
    assert k < n < larger.size
    assert_close(block.values, full[:n], 1e-9)
    total = float(full.abs().sum())
    assert abs(block.total - total) < 5 * block.total_error < 0.5 * total  # of all eigenvalues, known or not
    expected = eigsh(larger.linear_operator(), k=k, which="LM", tol=1e-12)[0]
    assert_close(block.values[:k].sort().values, torch.from_numpy(expected).sort().values, 1e-9)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_gamma_spectra_estimate_the_total_and_say_how_well(larger: Hessian, gamma: float) -> None:
    total = float(torch.linalg.eigvalsh(larger.dense()).abs().sum())
    spectrum = larger.spectrum(gamma=gamma)
    (block,) = spectrum.blocks
    assert len(block.values) < larger.size
    assert 0 < block.total_error < 0.05 * total
    assert abs(block.total - total) < 5 * block.total_error
    exact = larger.spectrum().null_space(gamma)
    null = spectrum.null_space(gamma)
    assert abs(null.removed - exact.removed) <= max(2, 0.1 * exact.removed)
    # of the same number of eigenvectors it is the same space
    same = larger.spectrum().null_space(k=null.removed)
    delta = random_displacement(larger.layers)
    assert_close(null.project(delta)["0"], same.project(delta)["0"], 1e-7)


def test_a_space_that_is_exhausted_knows_its_total() -> None:
    c = case("linear, two layers")
    fit = Hessian.fit(*c.arguments, bias=True)
    (block,) = fit.spectrum(gamma=0.999).blocks
    assert len(block.values) == fit.size
    assert block.total_error == block.floor == 0.0
    assert block.total == pytest.approx(float(torch.linalg.eigvalsh(fit.dense()).abs().sum()))


def test_magnitudes_make_the_ellipsoid_of_an_indefinite_hessian() -> None:
    torch.manual_seed(0)
    c = vectors(CrossEntropy(), ["0", "2"], True)
    fit = Hessian.fit(*c.arguments, bias=True)
    assert float(fit.spectrum().blocks[0].values.min()) < 0
    values, U = torch.linalg.eigh(fit.dense("rows"))
    delta = random_displacement(fit.layers)
    v = rows_vector(fit.layers, delta)
    expected = 0.5 * float(((U.T @ v) ** 2 * values.abs()).sum())
    assert float(fit.spectrum().ellipsoid(1.0).spent(delta)) == pytest.approx(expected)
