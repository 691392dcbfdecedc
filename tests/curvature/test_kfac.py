"""K-FAC: the factors position by position, the cases where it is exact, labels, sharing, merging."""

import pytest
import torch
from reference import (
    IGNORED,
    Case,
    Pooled,
    Tokens,
    assert_close,
    case,
    gauss_newton_matrix,
    images,
    kfac_factors,
    padded,
    random_displacement,
    reorder,
    sequences,
    vectors,
)
from torch import Tensor, nn

from curvlab.curvature import KFAC, Covariance
from curvlab.curvature import kfac as kfac_module
from curvlab.curvature.kfac import kronecker_block
from curvlab.layers import LayerShape
from curvlab.losses import CrossEntropy, SquaredError
from curvlab.spectrum import Spectrum

pytestmark = pytest.mark.usefixtures("float64")

FACTOR_CASES = [
    "linear, two layers",
    "linear, squared error",
    "linear, ignored",
    "sequence, two layers",
    "sequence, squared error",
    "sequence, ragged",
    "sequence, keywords",
    "Conv1D, two layers",
    "convolution and linear",
    "convolution, replicate",
    "convolution, same",
    "convolution, one pixel",
]


def vec_block(fit: KFAC, layer: str) -> Tensor:
    """A ⊗ S, which is the curvature of column-stacking vec."""
    return torch.kron(fit.factors[layer].A, fit.factors[layer].S)


# Definitions


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["exact", "data"])
@pytest.mark.parametrize("name", FACTOR_CASES)
def test_factors_position_by_position(name: str, labels: str, sharing: str) -> None:
    c = case(name)
    fit = KFAC.fit(*c.arguments, labels=labels, sharing=sharing, bias=c.bias)  # type: ignore[arg-type]
    assert list(fit.factors) == c.layers
    for layer in c.layers:
        A, S = kfac_factors(c, layer, labels, sharing)
        assert_close(fit.factors[layer].A, A)
        assert_close(fit.factors[layer].S, S)
        assert fit.factors[layer].layer.bias == c.bias


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["exact", "data"])
def test_padding_counts_nowhere_and_prompts_do(labels: str, sharing: str) -> None:
    together, single = padded()
    fit = KFAC.fit(*together.arguments, labels=labels, sharing=sharing, bias=True)  # type: ignore[arg-type]
    apart = KFAC.fit(*single.arguments, labels=labels, sharing=sharing, bias=True)  # type: ignore[arg-type]
    for layer in together.layers:
        A, S = kfac_factors(single, layer, labels, sharing)
        for one in (fit, apart):
            assert_close(one.factors[layer].A, A)
            assert_close(one.factors[layer].S, S)
        assert fit.factors[layer].scale == apart.factors[layer].scale
    # 9 real positions, of which 3 prompts carry no loss but enter A
    scale = fit.factors["first"].scale
    assert (scale.terms, scale.positions) == (6, 9 if sharing == "expand" else 3)


@pytest.mark.parametrize("kernel", [3, 1])
def test_images_of_several_sizes(kernel: int) -> None:
    """And with a bias, whose ones belong to no pixel; large and small kernels sum a aᵀ in different ways."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, kernel, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    )
    sizes = ((2, 5, 4), (3, 3, 6), (1, 5, 4))
    data = [(torch.randn(n, 2, h, w), torch.randint(3, (n,))) for n, h, w in sizes]
    c = Case(model, CrossEntropy(), data, ["0"], True)
    for sharing in ("expand", "reduce"):
        fit = KFAC.fit(*c.arguments, labels="exact", sharing=sharing, bias=True).factors["0"]  # type: ignore[arg-type]
        A, S = kfac_factors(c, "0", "exact", sharing)
        assert_close(fit.A, A)
        assert_close(fit.S, S)


def test_prompt_positions_enter_the_factors() -> None:
    """What is ignored as a label is not ignored as an input, for later predictions attend to it."""
    torch.manual_seed(0)
    x, y = torch.randn(1, 3, 3), torch.tensor([[IGNORED, IGNORED, 1]])
    fit = KFAC.fit(Tokens(), CrossEntropy(), [(x, y)], "first", labels="data")
    a = (x + 0.5 * x.cumsum(1))[0]  # what reaches the layer
    assert_close(fit.factors["first"].A, a.T @ a / 3)
    assert float(torch.linalg.matrix_rank(fit.factors["first"].S)) == 3  # g ≠ 0 at all three positions
    assert fit.factors["first"].scale.terms == 1


def test_a_is_over_positions_and_s_over_terms() -> None:
    """S is a sum over positions for each loss term: a convolution's A ⊗ S has the size of its GGN."""
    torch.manual_seed(0)
    c = images({}, CrossEntropy(), ["0"], False)
    with torch.no_grad():
        c.model[0].weight.mul_(1e-3)
    c.data = [(torch.ones(4, 2, 6, 5), torch.zeros(4, dtype=torch.long))]  # the same patch everywhere
    fit = KFAC.fit(*c.arguments, labels="exact")
    assert_close(fit.factors["0"].A, torch.ones(18, 18))
    assert fit.factors["0"].scale.positions == 4 * 12
    assert fit.factors["0"].scale.terms == 4


# Where K-FAC is exact


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError(scale=0.3)], ids=["cross-entropy", "squared error"])
def test_one_datum_is_exact(loss, layer: str, bias: bool) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    c = vectors(loss, [layer], bias, N=4)
    c.data = [(c.data[0][0][:1], c.data[0][1][:1])]
    for sharing in ("expand", "reduce"):
        fit = KFAC.fit(*c.arguments, labels="exact", sharing=sharing, bias=bias)  # type: ignore[arg-type]
        assert_close(vec_block(fit, layer), reorder(c, gauss_newton_matrix(c), "vec"))


def deep_linear(*shape: int, pooled: bool = False) -> Case:
    torch.manual_seed(0)
    model = Pooled() if pooled else nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    x = torch.randn(*shape, 3)
    y = torch.randn(*(shape[:1] if pooled else shape), 2)
    return Case(model, SquaredError(scale=1.7), list(zip(x.split(2), y.split(2), strict=True)), [], False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("c", "sharings"),
    [
        (lambda: deep_linear(5), ("expand", "reduce")),  # one position: both
        (lambda: deep_linear(4, 3), ("expand",)),  # a loss at every position
        (lambda: deep_linear(5, 3, pooled=True), ("reduce",)),  # one loss for all positions
    ],
    ids=["vectors", "sequences", "pooled"],
)
def test_deep_linear_networks_with_squared_error_are_exact(c, sharings, bias: bool) -> None:  # type: ignore[no-untyped-def]
    c = c()
    c.bias = bias
    for layer in [name for name, module in c.model.named_modules() if isinstance(module, nn.Linear)]:
        expected = reorder(c.only(layer), gauss_newton_matrix(c.only(layer)), "vec")
        for sharing in ("expand", "reduce"):
            fit = KFAC.fit(*c.only(layer).arguments, labels="exact", sharing=sharing, bias=bias)  # type: ignore[arg-type]
            if sharing in sharings:
                assert_close(vec_block(fit, layer), expected)
            elif layer != "second":  # the other treatment is only an approximation
                assert float((vec_block(fit, layer) - expected).norm()) > 1e-3 * float(expected.norm())


def test_the_spectrum_is_a_kron_s() -> None:
    c = case("linear, two layers")
    fit = KFAC.fit(*c.arguments, labels="exact", bias=True)
    for layer, block in zip(c.layers, fit.spectrum().blocks, strict=True):
        U = torch.kron(block.basis.u_in, block.basis.u_out)
        values = block.values.T.flatten()  # laid out like W, so that vec stacks its columns
        assert_close(U * values @ U.T, vec_block(fit, layer))
        assert_close(U.T @ U, torch.eye(len(U)))
        A, S = fit.factors[layer].A, fit.factors[layer].S
        assert block.total == pytest.approx(float(A.trace() * S.trace()))
        delta = random_displacement(block.basis.layers, 2)
        v = delta[layer].mT.flatten(1)
        one = Spectrum((block,))
        assert_close(one.quadratic_form(delta), ((v @ vec_block(fit, layer)) * v).sum(1))


# Labels


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "linear, squared error", "sequence", "convolution, stride"])
def test_many_draws_converge_to_exact_labels(name: str, sharing: str) -> None:
    c = case(name)
    exact = KFAC.fit(*c.arguments, labels="exact", sharing=sharing, bias=c.bias)  # type: ignore[arg-type]

    def error(draws: int) -> float:
        fit = KFAC.fit(*c.arguments, labels="model", draws=draws, sharing=sharing, bias=c.bias)  # type: ignore[arg-type]
        layer = c.layers[0]
        assert_close(fit.factors[layer].A, exact.factors[layer].A, 1e-14)
        return float((fit.factors[layer].S - exact.factors[layer].S).norm() / exact.factors[layer].S.norm())

    few, many = error(10), error(1000)
    assert many < 0.08
    assert few > 2 * many


def test_labels_differ() -> None:
    c = case("linear")
    S = {kind: KFAC.fit(*c.arguments, labels=kind).factors["0"].S for kind in ("exact", "model", "data")}  # type: ignore[arg-type]
    for one, other in (("exact", "data"), ("exact", "model"), ("model", "data")):
        assert float((S[one] - S[other]).norm()) > 0.05 * float(S["exact"].norm())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "sequence", "convolution, padding"])
def test_draws_do_not_depend_on_batches_shards_or_order(name: str, sharing: str) -> None:
    c = case(name)

    def fit(data: list, **options) -> KFAC:  # type: ignore[no-untyped-def, type-arg]
        return KFAC.fit(c.model, c.loss, data, c.layers, labels="model", draws=4, seed=3, sharing=sharing, **options)

    whole = fit(c.data)
    first, second = c.data
    joined = [tuple(torch.cat(parts) for parts in zip(first, second, strict=True))]
    n = len(first[0])
    variants = {
        "one batch": fit(joined),
        "micro-batches": fit(joined, micro_batch=1),
        "shards": KFAC.merge(fit([first]), fit([second], first_example=n)),
        "order": KFAC.merge(fit([second], first_example=n), fit([first])),
    }
    for variant in variants.values():
        assert_close(variant.factors[c.layers[0]].A, whole.factors[c.layers[0]].A, 1e-13)
        assert_close(variant.factors[c.layers[0]].S, whole.factors[c.layers[0]].S, 1e-13)
        assert variant.factors[c.layers[0]].scale == whole.factors[c.layers[0]].scale
    unkeyed = KFAC.merge(fit([first]), fit([second]))  # both shards draw as if they came first
    reseeded = (
        fit(c.data).factors[c.layers[0]].S
        - KFAC.fit(*c.arguments, labels="model", draws=4, seed=4, sharing=sharing).factors[c.layers[0]].S
    )  # type: ignore[arg-type]
    for difference in (unkeyed.factors[c.layers[0]].S - whole.factors[c.layers[0]].S, reseeded):
        assert float(difference.norm()) > 1e-3 * float(whole.factors[c.layers[0]].S.norm())


def test_unknown_labels_and_sharing_are_refused() -> None:
    c = case("linear")
    with pytest.raises(ValueError, match="labels must be"):
        KFAC.fit(*c.arguments, labels="true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sharing must be"):
        KFAC.fit(*c.arguments, labels="exact", sharing="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws"):
        KFAC.fit(*c.arguments, labels="model", draws=0)
    with pytest.raises(TypeError, match="labels"):
        KFAC.fit(*c.arguments)  # type: ignore[call-arg]


def test_exact_labels_are_refused_above_a_stated_number() -> None:
    model = nn.Sequential(nn.Linear(2, 700))
    x, y = torch.randn(2, 3, 2), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"700 × 3.*2048.*labels='model'"):
        KFAC.fit(model, CrossEntropy(), [(x, y)], "0", labels="exact")


# Merging


def shards(c: Case) -> list[KFAC]:
    return [KFAC.fit(c.model, c.loss, [batch], c.layers, labels="exact", bias=c.bias) for batch in c.data]


@pytest.mark.parametrize("name", ["linear, two layers", "sequence, two layers", "sequence, ragged"])
def test_merged_sums_are_one_fit(name: str) -> None:
    c = case(name)
    merged, whole = KFAC.merge(*shards(c)), KFAC.fit(*c.arguments, labels="exact", bias=c.bias)
    for layer in c.layers:
        assert_close(merged.factors[layer].A, whole.factors[layer].A, 1e-13)
        assert_close(merged.factors[layer].S, whole.factors[layer].S, 1e-13)
        assert merged.factors[layer].scale == whole.factors[layer].scale


def test_merge_leaves_its_parts_alone() -> None:
    parts = shards(case("linear"))
    before = [part.factors["0"].a_sum.clone() for part in parts]
    KFAC.merge(*parts).factors["0"].a_sum.zero_()
    KFAC.merge(parts[0]).factors["0"].a_sum.zero_()
    for part, a_sum in zip(parts, before, strict=True):
        assert_close(part.factors["0"].a_sum, a_sum, 0)


def test_explicit_weights_mix_means() -> None:
    c = case("sequence")  # batches of three and one examples
    one, two = shards(c)
    mixed = KFAC.merge(one, two, weights=[1, 3]).factors["first"]
    assert_close(mixed.A, 0.25 * one.factors["first"].A + 0.75 * two.factors["first"].A)
    assert_close(mixed.S, 0.25 * one.factors["first"].S + 0.75 * two.factors["first"].S)
    # weights in proportion to the counts are the sums where positions and terms have one proportion
    c = case("linear")
    one, two = shards(c)
    n = [part.factors["0"].scale.terms for part in (one, two)]
    by_count, by_sum = KFAC.merge(one, two, weights=n), KFAC.merge(one, two)
    assert_close(by_count.factors["0"].S, by_sum.factors["0"].S)
    assert_close(by_count.factors["0"].A, by_sum.factors["0"].A)


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        KFAC.merge(*shards(case("linear")), weights=weights)


def test_what_does_not_fit_is_not_merged() -> None:
    c = case("linear")
    exact = KFAC.fit(*c.arguments, labels="exact")
    with pytest.raises(ValueError, match="labels or sharing"):
        KFAC.merge(exact, KFAC.fit(*c.arguments, labels="data"))
    with pytest.raises(ValueError, match="labels or sharing"):
        KFAC.merge(exact, KFAC.fit(*c.arguments, labels="exact", sharing="reduce"))
    with pytest.raises(ValueError, match="layers"):
        KFAC.merge(exact, KFAC.fit(*c.only("2").arguments, labels="exact"))
    with pytest.raises(ValueError, match="layers"):
        KFAC.merge(exact, KFAC.fit(*c.arguments, labels="exact", bias=True))
    with pytest.raises(ValueError, match="labels or layers"):
        Covariance.merge(Covariance.fit(*c.arguments), Covariance.fit(*c.arguments, labels="data"))


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_accumulate_in_float32_or_better(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
    x, y = torch.randn(400, 3, dtype=dtype), torch.randint(2, (400,))
    fit = KFAC.fit(model, CrossEntropy(), [(x, y)], "0", labels="data", micro_batch=1)
    assert fit.factors["0"].a_sum.dtype == fit.factors["0"].s_sum.dtype == torch.float32
    assert_close(fit.factors["0"].A, x.double().T @ x.double() / 400, 1e-5)
    assert fit.spectrum().blocks[0].basis.like.dtype == torch.float64


# The staircase


def graded(d: int, decay: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return U * torch.exp(-decay * torch.arange(d)) @ U.T


@pytest.fixture
def small_krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac_module, "LANCZOS_FROM", 40)
    monkeypatch.setattr(kfac_module, "LANCZOS_UNTIL", 0.75)


@pytest.mark.usefixtures("small_krylov")
@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("d_out", [12, 160])
def test_a_staircase_spectrum_gives_the_null_space_of_the_full_one(d_out: int, gamma: float) -> None:
    layer, A, S = LayerShape("w", d_out, 400, False), graded(400, 0.15, 0), graded(d_out, 0.2, 1)
    full = Spectrum((kronecker_block(layer, A, S, None, 0),))
    part = Spectrum((kronecker_block(layer, A, S, gamma, 0),))
    assert part.blocks[0].basis.u_in.shape[1] < 400  # it did save work
    assert part.blocks[0].floor > 0
    assert part.blocks[0].total == pytest.approx(full.blocks[0].total)
    a, b = part.null_space(gamma), full.null_space(gamma)
    assert a.removed == b.removed
    assert a.energy_removed == pytest.approx(b.energy_removed)
    delta = random_displacement(a.layers, 2)
    assert_close(a.project(delta)["w"], b.project(delta)["w"], 1e-8)
    smaller = part.null_space(gamma / 2)
    assert smaller.removed == full.null_space(gamma / 2).removed
    with pytest.raises(ValueError, match="known only down to"):
        part.null_space(1 - 1e-6)
    with pytest.raises(ValueError, match="all eigenvectors"):
        part.ellipsoid(1.0)


@pytest.mark.usefixtures("small_krylov")
def test_staircases_grow_until_the_energy_is_reached() -> None:
    """Well separated eigenvalues: the first 32 are clear of the rest, and hold less than 0.9 of the energy."""
    layer, A, S = LayerShape("w", 12, 400, False), graded(400, 0.06, 0), graded(12, 6.0, 1)
    for gamma in (0.5, 0.95):
        part, full = (Spectrum((kronecker_block(layer, A, S, g, 0),)) for g in (gamma, None))
        assert not part.blocks[0].basis.complete
        assert part.null_space(gamma).removed == full.null_space(gamma).removed
    assert part.null_space(0.95).removed > 40


@pytest.mark.usefixtures("small_krylov")
def test_staircases_with_repeated_and_with_no_eigenvalues() -> None:
    layer = LayerShape("w", 60, 200, False)
    for A, S in (
        (graded(200, 0.2, 0), torch.eye(60)),
        (torch.eye(200), graded(60, 0.3, 0)),
        (torch.eye(200), torch.eye(60)),
        (graded(200, 0.5, 0), torch.zeros(60, 60)),
        (torch.zeros(200, 200), torch.eye(60)),
    ):
        full = Spectrum((kronecker_block(layer, A, S, None, 0),)).null_space(0.7)
        part = Spectrum((kronecker_block(layer, A, S, 0.7, 0),)).null_space(0.7)
        assert part.removed == full.removed


@pytest.mark.usefixtures("small_krylov")
@pytest.mark.parametrize("zero", ["A", "S", "both"])
def test_zero_curvature_comes_to_an_end(zero: str) -> None:
    zeros, some = torch.zeros(300, 300), graded(300, 0.1, 0)
    A, S = (zeros if zero in (name, "both") else some for name in "AS")
    assert kronecker_block(LayerShape("w", 300, 300, False), A, S, 0.9, 0).total == 0.0


@pytest.mark.usefixtures("small_krylov")
def test_fitted_factors_have_staircases(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 60), nn.Tanh(), nn.Linear(60, 3))
    data = [(torch.randn(12, 300), torch.randint(3, (12,)))]
    fit = KFAC.fit(model, CrossEntropy(), data, "0", labels="exact")
    part, full = fit.spectrum(gamma=0.8), fit.spectrum()
    assert not part.blocks[0].basis.complete
    assert part.null_space(0.8).removed == full.null_space(0.8).removed
    delta = random_displacement(part.layers)
    assert_close(part.null_space(0.8).project(delta)["0"], full.null_space(0.8).project(delta)["0"], 1e-8)
    for gamma in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="gamma"):
            fit.spectrum(gamma=gamma)
    monkeypatch.setattr(kfac_module, "LANCZOS_FROM", 1024)
    assert fit.spectrum(gamma=0.8).blocks[0].basis.complete  # small factors are decomposed in full


def test_sequences_of_equal_length_need_no_mask() -> None:
    torch.manual_seed(0)
    c = sequences(CrossEntropy(), ["first"], True)
    masked = [(x, y, torch.ones(x.shape[:2])) for x, y in c.data]
    a = KFAC.fit(*c.arguments, labels="exact", bias=True)
    b = KFAC.fit(c.model, c.loss, masked, c.layers, labels="exact", bias=True)
    assert_close(a.factors["first"].A, b.factors["first"].A, 1e-14)
    assert_close(a.factors["first"].S, b.factors["first"].S, 1e-14)
