"""Both constraints against their definitions: the mask by brute force, projectors and ellipsoids as dense matrices."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import assert_close, random_displacement
from scipy.optimize import NonlinearConstraint, minimize
from torch import Tensor

from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.curvature.kfac import Factors, kronecker_block
from curvlab.layers import LayerShape, Matrices
from curvlab.losses import Scale, SquaredError
from curvlab.projector import Constraint, Ellipsoid, NullSpace, overlap, stack
from curvlab.spectrum import Block, DenseBasis, KroneckerBasis, Spectrum, dense_spectrum

pytestmark = pytest.mark.usefixtures("float64")

LAYER = LayerShape("w", 4, 6, False)
OTHER = LayerShape("v", 2, 3, False)


def orthonormal(d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def dense(values: Tensor, layers: tuple[LayerShape, ...] | None = None, seed: int = 0) -> Spectrum:
    """These eigenvalues, in a random basis."""
    p = len(values)
    layers = (LayerShape("w", 1, p, False),) if layers is None else layers
    return Spectrum((Block(DenseBasis(layers, orthonormal(p, seed)), values.double(), float(values.abs().sum())),))


def kronecker(grid: Tensor, layer: LayerShape = LAYER, seed: int = 0) -> Spectrum:
    basis = KroneckerBasis(layer, orthonormal(layer.d_out, seed), orthonormal(layer.d_in, seed + 1))
    return Spectrum((Block(basis, grid.double(), float(grid.abs().sum())),))


def truncated(spectrum: Spectrum, r: int) -> Spectrum:
    """Only the r leading eigenpairs of a dense spectrum, in descending order of magnitude."""
    (block,) = spectrum.blocks
    order = block.values.abs().argsort(descending=True)
    basis = replace(block.basis, vectors=block.basis.vectors[:, order[:r]])
    values = block.values[order]
    floor = float(values[r - 1].abs())
    return Spectrum((Block(basis, values[:r], block.total, floor=floor),))


def matrix_of(function: Callable[[Matrices], Matrices], layers: list[LayerShape]) -> Tensor:
    """A linear map of displacements as a matrix (row-major layout)."""
    sizes = [layer.size for layer in layers]
    columns = []
    for e in torch.eye(sum(sizes), dtype=torch.float64):
        delta = {l.name: part.view(l.d_out, l.d_in) for l, part in zip(layers, e.split(sizes), strict=True)}
        image = function(delta)
        columns.append(torch.cat([image[l.name].flatten() for l in layers]))
    return torch.stack(columns, 1)


def curvature_of(spectrum: Spectrum, magnitude: bool = False) -> Tensor:
    def apply(delta: Matrices) -> Matrices:
        out: Matrices = {}
        for block in spectrum.blocks:
            values = block.values.abs() if magnitude else block.values
            out |= block.basis.rotate_back(values * block.basis.rotate(delta))
        return out

    return matrix_of(apply, spectrum.layers)


# γ: k = min{r : Σ_{i≤r}|σ_i| ≥ γ Σ|σ_i|}, and the whole eigenspace of |σ_k|


def removed_by_definition(values: list[int], gamma: Fraction) -> list[bool]:
    sizes = [abs(v) for v in values]
    ordered = sorted(sizes, reverse=True)
    k = next(r for r in range(1, len(ordered) + 1) if sum(ordered[:r]) >= gamma * sum(ordered))
    return [size >= ordered[k - 1] for size in sizes]


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=24), st.integers(1, 63))
def test_dense_masks_by_brute_force(values: list[int], share: int) -> None:
    assume(any(values))
    gamma = share / 64
    null = dense(torch.tensor(values)).null_space(gamma)
    expected = removed_by_definition(values, Fraction(share, 64))
    assert null.blocks[0].removed.tolist() == expected
    assert null.removed == sum(expected)
    assert null.kept == len(values) - sum(expected)
    sizes = torch.tensor(values).abs().double()
    assert null.energy_removed == pytest.approx(float(sizes[torch.tensor(expected)].sum() / sizes.sum()))
    assert null.energy_removed >= gamma
    assert float(null.blocks[0].threshold) == float(sizes[torch.tensor(expected)].min())
    assert null.gamma == gamma


@given(
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    st.integers(1, 63),
)
def test_kronecker_masks_by_brute_force(outer: list[int], inner: list[int], share: int) -> None:
    grid = torch.tensor(outer)[:, None] * torch.tensor(inner)[None, :]
    assume(bool(grid.any()))
    null = kronecker(grid).null_space(share / 64)
    assert null.blocks[0].removed.flatten().tolist() == removed_by_definition(
        grid.flatten().tolist(), Fraction(share, 64)
    )


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=24), st.data())
def test_k_given_takes_the_eigenspace_of_the_kth(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    null = dense(torch.tensor(values)).null_space(k=k)
    smallest = sorted((abs(v) for v in values), reverse=True)[k - 1]
    assert null.blocks[0].removed.tolist() == [abs(v) >= smallest and v != 0 for v in values]
    assert null.gamma is None
    assert null.removed >= min(k, len(values) - values.count(0))


@pytest.mark.parametrize(
    ("values", "gamma", "removed"),
    [
        ([3.0, 1.0], 0.75, 1),  # reached exactly
        ([3.0, 1.0], np.nextafter(0.75, 1), 2),
        ([1.0, 1.0, 1.0, 1.0], 0.25, 4),  # one would do, but an eigenspace is not cut
        ([2.0, 1.0, 1.0], 0.5, 1),
        ([2.0, 1.0, 1.0], 0.51, 3),
        ([-3.0, 1.0], 0.75, 1),  # magnitudes
        ([1.0, -1.0, 0.0], 0.1, 2),  # ±σ are one magnitude
        ([1.0, 0.0, 0.0], 1 - 1e-12, 1),  # what has no curvature is kept
        ([1.0, 1e-9, 0.0], 1 - 1e-12, 2),
        ([1.0], 0.5, 1),
        ([1.0, 1.0 - 1e-15, 0.5], 0.3, 2),  # equal up to rounding is equal
        ([1.0, 1.0 - 1e-13, 0.5], 0.3, 1),
    ],
)
def test_boundary_cases(values: list[float], gamma: float, removed: int) -> None:
    assert dense(torch.tensor(values)).null_space(gamma).removed == removed


def test_small_eigenvalues_are_not_tied_by_the_size_of_the_largest() -> None:
    """Rounding of 1e17 is larger than these, and yet they differ."""
    null = dense(torch.tensor([1e17, 3.0, 2.0, 1.0])).null_space(k=2)
    assert null.blocks[0].removed.tolist() == [True, True, False, False]


def test_the_cut_does_not_depend_on_the_basis_of_an_eigenspace() -> None:
    values = torch.tensor([4.0, 2.0, 2.0, 2.0, 1.0, 0.0])
    (block,) = dense(values).blocks
    turned = block.basis.vectors.clone()
    turned[:, 1:4] = turned[:, 1:4] @ orthonormal(3, 5)
    other = Spectrum((replace(block, basis=replace(block.basis, vectors=turned)),))
    for gamma in (0.3, 0.4, 0.5, 0.7, 0.9):
        a, b = (s.null_space(gamma) for s in (Spectrum((block,)), other))
        assert_close(matrix_of(a.project, a.layers), matrix_of(b.project, b.layers))


@pytest.mark.parametrize("spectrum", [dense(torch.zeros(24), (LAYER,)), kronecker(torch.zeros(4, 6))])
def test_without_curvature_everything_is_kept(spectrum: Spectrum) -> None:
    delta = random_displacement([LAYER])
    for null in (spectrum.null_space(0.5), spectrum.null_space(k=3)):
        assert null.kept == 24
        assert_close(null.project(delta)["w"], delta["w"], 1e-14)


def test_each_block_has_its_own_cut() -> None:
    blocks = kronecker(torch.arange(24).view(4, 6)).blocks + kronecker(torch.ones(2, 3), OTHER).blocks
    null = Spectrum(blocks).null_space(0.5)
    alone = Spectrum(blocks[:1]).null_space(0.5)
    assert torch.equal(null.blocks[0].removed, alone.blocks[0].removed)
    assert bool(null.blocks[1].removed.all())
    assert null.removed == alone.removed + 6
    assert null.dimensions == 30
    assert null.energy_removed == min(alone.energy_removed, 1.0)
    assert [layer.name for layer in null.layers] == ["w", "v"]


# P_γ


def psd(d: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(d, rank, generator=generator, dtype=torch.float64) * torch.exp(-0.6 * torch.arange(rank))
    return B @ B.T


def factored(d_out: int = 4, d_in: int = 6, rank_out: int = 4, rank_in: int = 6) -> tuple[Tensor, Tensor, Spectrum]:
    A, S = psd(d_in, rank_in, 0), psd(d_out, rank_out, 1)
    layer = LayerShape("w", d_out, d_in, False)
    return A, S, Spectrum((kronecker_block(layer, A, S, None, 0),))


@pytest.mark.parametrize("gamma", [0.05, 0.5, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("ranks", [(4, 6), (2, 3), (4, 1)])
def test_proposition_3_the_projector_of_the_kronecker_product(gamma: float, ranks: tuple[int, int]) -> None:
    """Two small eigendecompositions give the projector of the dense A ⊗ S, in column-stacking vec."""
    A, S, spectrum = factored(rank_out=ranks[0], rank_in=ranks[1])
    values, U = torch.linalg.eigh(torch.kron(A, S))
    values, U = values.flip(0).clamp_min(0), U.flip(1)
    k = int((values.cumsum(0) < gamma * values.sum()).sum()) + 1
    P = torch.eye(24) - U[:, :k] @ U[:, :k].T
    null = spectrum.null_space(gamma)
    assert null.removed == k
    Q = torch.randn(3, 4, 6)
    projected = null.project({"w": Q})["w"]
    for q, image in zip(Q, projected, strict=True):
        assert_close(image.T.flatten(), P @ q.T.flatten())


@pytest.mark.parametrize("make", [lambda: factored()[2], lambda: dense(torch.exp(-torch.arange(24.0)), (LAYER,))])
def test_both_restricted_forms_are_the_full_projector(make: Callable[[], Spectrum]) -> None:
    """P from the removed directions where they are few, from the kept ones where those are."""
    spectrum, forms = make(), set()
    for k in (1, 2, 5, 12, 20, 23):
        null = spectrum.null_space(k=k)
        (block,) = null.blocks
        *_, removes = block._cheapest
        forms.add(removes)
        assert removes == (block.basis.cost(block.removed) <= block.basis.cost(~block.removed))
        Z = block.basis.rotate({"w": torch.eye(24).view(24, 4, 6)})
        full = block.basis.rotate_back(Z * ~block.removed)["w"].flatten(1).T
        assert_close(matrix_of(null.project, null.layers), full)
    assert forms == {True, False}


NULL_SPACES: dict[str, Callable[[], NullSpace]] = {
    "dense": lambda: dense(torch.linspace(-1, 2, 24), (LAYER,)).null_space(0.7),
    "dense, several layers": lambda: dense(torch.linspace(-1, 2, 30), (LAYER, OTHER)).null_space(0.7),
    "dense, truncated": lambda: truncated(dense(torch.linspace(-1, 2, 24), (LAYER,)), 15).null_space(0.7),
    "kronecker": lambda: factored()[2].null_space(0.9),
    "kronecker, any mask": lambda: kronecker(torch.randperm(24).view(4, 6)).null_space(0.6),
    "kronecker, few kept": lambda: kronecker(torch.randperm(24).view(4, 6)).null_space(k=22),
    "kronecker, compact": lambda: factored()[2].null_space(0.9).compact(),
    "identity ⊗ A": lambda: covariance().null_space(0.8),
    "identity ⊗ A, compact": lambda: covariance().null_space(0.8).compact(),
    "two blocks": lambda: Spectrum(
        factored()[2].blocks + kronecker(torch.arange(6).view(2, 3), OTHER).blocks
    ).null_space(0.8),
}


def covariance() -> Spectrum:
    values = torch.exp(-torch.arange(6.0)).expand(4, -1)
    return Spectrum((Block(KroneckerBasis(LAYER, None, orthonormal(6)), values, float(values.sum())),))


@pytest.fixture(params=list(NULL_SPACES))
def null(request: pytest.FixtureRequest) -> NullSpace:
    torch.manual_seed(0)
    return NULL_SPACES[request.param]()


def test_projectors_are_idempotent_self_adjoint_and_of_the_rank_they_say(null: NullSpace) -> None:
    P = matrix_of(null.project, null.layers)
    assert_close(P @ P, P)
    assert_close(P, P.T)
    assert round(float(P.trace()), 6) == null.kept
    assert 0 < null.kept < null.dimensions
    assert null.linear
    assert null.removed + null.kept == null.dimensions
    delta = random_displacement(null.layers, 2)
    confined = null.confine(delta)
    for name, Q in null.project(delta).items():
        assert_close(confined[name], Q)


def test_removed_directions_are_eigenvectors(null: NullSpace) -> None:
    for block in null.blocks:
        zeros = {l.name: torch.zeros(l.d_out, l.d_in) for l in null.layers}
        for index in block.removed.nonzero()[:3]:
            Z = torch.zeros(block.basis.shape)
            Z[tuple(index)] = 1.0
            direction = zeros | block.basis.rotate_back(Z)
            assert all(float(Q.abs().max()) < 1e-12 for Q in null.project(direction).values())


def test_stacks_of_displacements_are_projected_one_by_one(null: NullSpace) -> None:
    delta = random_displacement(null.layers, 2, 3)
    together = null.project(delta)
    for i in range(2):
        for j in range(3):
            alone = null.project({name: Q[i, j] for name, Q in delta.items()})
            for name, Q in alone.items():
                assert_close(together[name][i, j], Q)


def test_coordinates_of_descent(null: NullSpace) -> None:
    delta = random_displacement(null.layers, 2)
    Z = null.coordinates(delta)
    assert [tuple(z.shape[1:]) for z in Z] == [tuple(shape) for shape in null.coordinate_shapes]
    projected = null.project(delta)
    for name, Q in null.displacement(Z).items():
        assert_close(Q, projected[name])
    # whatever the coordinates are, the displacement obeys
    anything = [torch.randn(2, *shape, requires_grad=True) for shape in null.coordinate_shapes]
    moved = null.displacement(anything)
    for name, Q in null.project(moved).items():
        assert_close(Q, moved[name])
    sum(Q.square().sum() for Q in moved.values()).backward()
    assert all(z.grad is not None for z in anything)
    norms = [sum(float(t.square().sum()) for t in ts) for ts in (projected.values(), Z)]
    assert norms[0] == pytest.approx(norms[1])


def test_compact_is_the_same_projector(null: NullSpace) -> None:
    small = null.compact()
    assert_close(matrix_of(small.project, small.layers), matrix_of(null.project, null.layers))
    assert (small.kept, small.removed, small.gamma) == (null.kept, null.removed, null.gamma)
    stored, before = (sum(t.numel() for b in n.blocks for t in b.basis.tensors().values()) for n in (small, null))
    assert stored <= before


def test_saved_and_loaded(null: NullSpace, tmp_path: Path) -> None:
    null.save(tmp_path / "p")
    loaded = NullSpace.load(tmp_path / "p")
    delta = random_displacement(null.layers)
    for name, Q in null.project(delta).items():
        assert_close(loaded.project(delta)[name], Q, 1e-14)
    assert (loaded.gamma, loaded.kept, loaded.energy_removed) == (null.gamma, null.kept, null.energy_removed)
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in null.layers]


def test_in_single_precision(null: NullSpace) -> None:
    single = null.to(torch.float32)
    delta = random_displacement(null.layers)
    for name, Q in single.project({name: Q.float() for name, Q in delta.items()}).items():
        assert Q.dtype == torch.float32
        assert_close(Q.double(), null.project(delta)[name], 1e-5)
    assert (single.kept, single.gamma) == (null.kept, null.gamma)


@pytest.mark.parametrize(
    "make",
    [
        lambda: factored()[2],
        lambda: dense(torch.linspace(-1, 2, 24), (LAYER,)),
        lambda: truncated(dense(torch.linspace(-1, 2, 24), (LAYER,)), 20),
        covariance,
        lambda: Spectrum(factored()[2].blocks + kronecker(torch.arange(6).view(2, 3), OTHER).blocks),
    ],
    ids=["kronecker", "dense", "truncated", "identity ⊗ A", "two blocks"],
)
@pytest.mark.parametrize("gammas", [(0.2, 0.5, 0.8), (0.7, 0.7), (0.8, 0.05)])
def test_a_stack_of_null_spaces_projects_each_run_by_its_own(make, gammas: tuple[float, ...], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spectrum = make()
    each = [spectrum.null_space(gamma) for gamma in gammas]
    joined = stack(each)
    assert isinstance(joined, NullSpace)
    joined.save(tmp_path / "s")
    delta = random_displacement(spectrum.layers, len(gammas))
    Z = joined.coordinates(delta)
    for one in (joined, joined.compact(), joined.to(torch.float64), NullSpace.load(tmp_path / "s")):
        together = one.project(delta)
        for r, alone in enumerate(each):
            for name, Q in alone.project({name: Q[r] for name, Q in delta.items()}).items():
                assert_close(together[name][r], Q)
                assert_close(joined.displacement(Z)[name][r], Q)
    same = {name: Q[0] for name, Q in delta.items()}  # one displacement for all runs
    for r, alone in enumerate(each):
        for name, Q in alone.project(same).items():
            assert_close(joined.project(same)[name][r], Q)


def test_masks_of_fitted_statistics_alone() -> None:
    """From the sums to the projector, nothing else between."""
    A, S, _ = factored()
    fit = KFAC({"w": Factors(LAYER, 30 * A, 7 * S, Scale(terms=7, positions=30))}, "exact", "expand")
    (block,) = fit.spectrum().null_space(0.9).blocks
    values = torch.outer(torch.linalg.eigvalsh(S).flip(0), torch.linalg.eigvalsh(A).flip(0))
    k = int((values.flatten().sort(descending=True).values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    assert int(block.removed.sum()) == k
    assert float(block.threshold) == pytest.approx(float(values.flatten().sort(descending=True).values[k - 1]))
    # a Young diagram: in descending order, what is removed is removed together with all that is larger in both
    removed = block.removed.int()
    assert bool((removed.diff(dim=0) <= 0).all())
    assert bool((removed.diff(dim=1) <= 0).all())


# Errors


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.1, float("nan"), float("inf")])
def test_gamma_outside_its_range(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must lie strictly between 0 and 1"):
        factored()[2].null_space(gamma)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_k_outside_its_range(k: int) -> None:
    with pytest.raises(ValueError, match="k must lie between 1 and 24"):
        factored()[2].null_space(k=k)


def test_gamma_or_k() -> None:
    for arguments in ({}, {"gamma": 0.5, "k": 3}):
        with pytest.raises(ValueError, match="either gamma or k"):
            factored()[2].null_space(**arguments)  # type: ignore[arg-type]


def test_truncated_spectra_say_when_they_end() -> None:
    spectrum = truncated(dense(torch.arange(24.0), (LAYER,)), 6)  # 23 … 18, floor 18
    full = dense(torch.arange(24.0), (LAYER,))
    for k in (1, 5):
        assert spectrum.null_space(k=k).removed == k
        a, b = spectrum.null_space(k=k), full.null_space(k=k)
        assert_close(matrix_of(a.project, a.layers), matrix_of(b.project, b.layers))
    assert spectrum.null_space(23 / 276).removed == full.null_space(23 / 276).removed == 1
    for k in (6, 7, 24):  # the sixth may have a twin among the unknown
        with pytest.raises(ValueError, match=r"known only down to \|σ\| = 18"):
            spectrum.null_space(k=k)
    for gamma in (0.45, 0.9):
        with pytest.raises(ValueError, match="compute more of it"):
            spectrum.null_space(gamma)
    with pytest.raises(ValueError, match="compute more of it"):
        truncated(dense(torch.tensor([3.0, 2.0, 2.0, 1.0])), 2).null_space(k=2)


CONSTRAINTS: dict[str, Callable[[Spectrum], Constraint]] = {
    "null space": lambda s: s.null_space(0.5),
    "ellipsoid": lambda s: s.ellipsoid(0.1),
}


@pytest.mark.parametrize("kind", list(CONSTRAINTS))
@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({}, r"covers layer 'w', the displacement has \[\]"),
        ({"w": (4, 6), "x": (4, 6)}, r"knows no layers \['x'\]; it covers \['w'\]"),
        ({"w": (6, 4)}, r"'w': expected \(…, 4, 6\), got \(6, 4\)"),
        ({"w": (2, 4, 7)}, r"got \(2, 4, 7\)"),
    ],
)
def test_displacements_of_other_layers(kind: str, delta: dict[str, tuple[int, ...]], message: str) -> None:
    constraint = CONSTRAINTS[kind](factored()[2])
    with pytest.raises(ValueError, match=message):
        constraint.confine({name: torch.zeros(shape) for name, shape in delta.items()})


def test_only_constraints_on_one_spectrum_are_stacked() -> None:
    one, other = factored()[2], factored()[2]
    for wrong in (
        [one.null_space(0.5), other.null_space(0.5)],
        [one.null_space(0.5), one.ellipsoid(1.0)],
        [one.null_space(0.5), Spectrum(one.blocks + other.blocks).null_space(0.5)],
    ):
        with pytest.raises(ValueError, match="one spectrum"):
            stack(wrong)


# Overlap


def test_overlap_is_the_share_of_dimensions() -> None:
    torch.manual_seed(0)
    spaces = [
        dense(torch.linspace(0.1, 2, 24), (LAYER,)).null_space(k=9),
        dense(torch.linspace(0.1, 2, 24), (LAYER,), seed=3).null_space(k=14),
        truncated(dense(torch.linspace(0.1, 2, 24), (LAYER,), seed=4), 15).null_space(k=7),
        factored()[2].null_space(0.9),
        factored()[2].null_space(0.9).compact(),
        kronecker(torch.randperm(24).view(4, 6) + 1, seed=7).null_space(k=11),
        covariance().null_space(k=2),
    ]
    for a in spaces:
        for b in spaces:
            P, R = matrix_of(a.project, a.layers), matrix_of(b.project, b.layers)
            assert overlap(a, b) == pytest.approx(float((P @ R).trace() / P.trace()), abs=1e-10)
        assert overlap(a, a) == pytest.approx(1.0)
    layers = (LAYER, OTHER)
    joint = dense(torch.linspace(0.1, 2, 30), layers).null_space(k=12)
    blocks = Spectrum(factored()[2].blocks + kronecker(torch.arange(6).view(2, 3), OTHER).blocks).null_space(0.8)
    P, R = (matrix_of(n.project, list(layers)) for n in (joint, blocks))
    assert overlap(joint, blocks) == pytest.approx(float((P @ R).trace() / P.trace()))
    assert overlap(blocks, joint) == pytest.approx(float((P @ R).trace() / R.trace()))


def test_overlaps_that_have_no_meaning() -> None:
    one = factored()[2].null_space(0.9)
    with pytest.raises(ValueError, match="different layers"):
        overlap(one, kronecker(torch.ones(2, 3) + torch.arange(3), OTHER).null_space(0.1))
    nothing = kronecker(torch.ones(4, 6)).null_space(0.5)
    assert nothing.kept == 0
    with pytest.raises(ValueError, match="empty"):
        overlap(nothing, one)
    assert overlap(one, nothing) == pytest.approx(0.0)


# The ellipsoid ½ δᵀCδ ≤ ε


ELLIPSOIDS: dict[str, Callable[[], Spectrum]] = {
    "kronecker": lambda: factored()[2],
    "singular": lambda: factored(rank_out=2, rank_in=3)[2],
    "indefinite": lambda: dense(torch.linspace(-1, 2, 24), (LAYER,)),
    "several layers": lambda: dense(torch.exp(-torch.arange(30.0) / 3), (LAYER, OTHER)),
    "identity ⊗ A": covariance,
    "two blocks": lambda: Spectrum(factored()[2].blocks + kronecker(torch.arange(6).view(2, 3), OTHER).blocks),
}


@pytest.fixture(params=list(ELLIPSOIDS))
def ellipsoidal(request: pytest.FixtureRequest) -> Spectrum:
    torch.manual_seed(0)
    return ELLIPSOIDS[request.param]()


def flat(layers: list[LayerShape], delta: Matrices) -> Tensor:
    return torch.cat([delta[l.name].flatten(-2) for l in layers], -1)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3, 0.3])
def test_confining_is_the_euclidean_projection(ellipsoidal: Spectrum, epsilon: float) -> None:
    """Karush–Kuhn–Tucker: δ₀ − δ = μ C δ with μ ≥ 0, and ½ δᵀCδ = ε; the problem is convex."""
    C = curvature_of(ellipsoidal, magnitude=True)
    constraint = ellipsoidal.ellipsoid(epsilon)
    start = random_displacement(ellipsoidal.layers)
    x0, x = flat(ellipsoidal.layers, start), flat(ellipsoidal.layers, constraint.confine(start))
    assert 0.5 * float(x0 @ C @ x0) > epsilon
    assert 0.5 * float(x @ C @ x) == pytest.approx(epsilon, rel=1e-9)
    assert float(constraint.spent(constraint.confine(start))) <= epsilon * (1 + 1e-9)
    normal = C @ x
    mu = float((x0 - x) @ normal / (normal @ normal))
    assert mu > 0
    assert_close(x0 - x, mu * normal, 1e-8)


def test_confining_agrees_with_a_general_optimiser(ellipsoidal: Spectrum) -> None:
    C = curvature_of(ellipsoidal, magnitude=True).numpy()
    constraint, start = ellipsoidal.ellipsoid(0.05), random_displacement(ellipsoidal.layers)
    x0 = flat(ellipsoidal.layers, start).numpy()
    inside = NonlinearConstraint(lambda x: 0.5 * x @ C @ x, -np.inf, 0.05, jac=lambda x: (C @ x)[None])
    found = minimize(
        lambda x: 0.5 * ((x - x0) ** 2).sum(), 0.1 * x0, jac=lambda x: x - x0, constraints=[inside], method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert found.success
    assert_close(flat(ellipsoidal.layers, constraint.confine(start)), torch.from_numpy(found.x), 1e-5)


def test_inside_nothing_changes(ellipsoidal: Spectrum) -> None:
    start = random_displacement(ellipsoidal.layers)
    C, v = curvature_of(ellipsoidal, magnitude=True), flat(ellipsoidal.layers, start)
    energy = 0.5 * float(v @ C @ v)
    constraint = ellipsoidal.ellipsoid(1.01 * energy)
    assert float(constraint.spent(start)) == pytest.approx(energy)
    for name, Q in constraint.confine(start).items():
        assert_close(Q, start[name], 1e-13)
    once = ellipsoidal.ellipsoid(0.1 * energy).confine(start)
    for name, Q in ellipsoidal.ellipsoid(0.1 * energy).confine(once).items():
        assert_close(Q, once[name], 1e-9)  # idempotent


def test_a_stack_of_ellipsoids_confines_each_run_by_its_own(ellipsoidal: Spectrum, tmp_path: Path) -> None:
    epsilons = (1e-6, 1e-2, 1e3)
    each = [ellipsoidal.ellipsoid(epsilon) for epsilon in epsilons]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # what the budgets are kept in must not depend on it
    try:
        joined = stack(each)
    finally:
        torch.set_default_dtype(default)
    assert isinstance(joined, Ellipsoid)
    joined.save(tmp_path / "e")
    delta = random_displacement(ellipsoidal.layers, 3)
    for one in (joined, joined.to(torch.float64), Ellipsoid.load(tmp_path / "e")):
        together, spent = one.confine(delta), one.spent(delta)
        assert spent.shape == (3,)
        for r, alone in enumerate(each):
            own = {name: Q[r] for name, Q in delta.items()}
            assert float(spent[r]) == pytest.approx(float(alone.spent(own)))
            for name, Q in alone.confine(own).items():
                assert_close(together[name][r], Q)
        Z = one.confine_coordinates(one.coordinates(delta))
        for name, Q in one.displacement(Z).items():
            assert_close(Q, together[name])


def test_coordinates_of_an_ellipsoid(ellipsoidal: Spectrum) -> None:
    constraint, delta = ellipsoidal.ellipsoid(1e-3), random_displacement(ellipsoidal.layers)
    Z = constraint.coordinates(delta)
    assert [tuple(z.shape) for z in Z] == [tuple(shape) for shape in constraint.coordinate_shapes]
    for name, Q in constraint.displacement(Z).items():
        assert_close(Q, delta[name])
    for name, Q in constraint.displacement(constraint.confine_coordinates(Z)).items():
        assert_close(Q, constraint.confine(delta)[name])


@settings(max_examples=60)
@given(
    st.lists(st.floats(-12, 8), min_size=1, max_size=12),
    st.floats(-10, 4),
    st.floats(-6, 6),
    st.integers(0, 10**6),
)
def test_feasible_to_rounding_at_any_scale(exponents: list[float], epsilon: float, size: float, seed: int) -> None:
    values = 10.0 ** torch.tensor([*exponents, -math.inf])  # and one direction without curvature
    spectrum, budget = dense(values), 10.0**epsilon
    C = curvature_of(spectrum)
    generator = torch.Generator().manual_seed(seed)
    start = 10.0**size * torch.randn(1, len(values), generator=generator, dtype=torch.float64)
    constraint = spectrum.ellipsoid(budget)
    x = constraint.confine({"w": start})["w"]
    rounding = math.sqrt(float(values.max()) / 2) * 1e-14 * float(start.norm())  # of the coordinates of x
    spent = math.sqrt(float(constraint.spent({"w": x})))
    assert spent <= math.sqrt(budget) * (1 + 1e-9) + rounding
    assert float(x.norm()) <= float(start.norm()) * (1 + 1e-12)
    if 0.5 * float(start[0] @ C @ start[0]) <= budget * 0.99:
        assert_close(x, start, 1e-12)
    elif 0.5 * float(start[0] @ C @ start[0]) >= budget * 1.01:
        assert spent >= math.sqrt(budget) * (1 - 1e-9) - rounding  # on the boundary


@pytest.mark.parametrize("r", [3, 10, 20])
def test_truncated_bases_stay_feasible_for_the_true_curvature(r: int) -> None:
    """What lies outside the known eigenvectors counts with the largest unknown |σ|."""
    torch.manual_seed(0)
    layers = (LAYER, OTHER)
    full = dense(torch.exp(-torch.arange(30.0) / 5) * torch.tensor([1.0, -1.0]).repeat(15), layers)
    C = curvature_of(full, magnitude=True)
    constraint = truncated(full, r).ellipsoid(0.01)
    delta = random_displacement(list(layers), 5)
    x = flat(list(layers), constraint.confine(delta))
    true = 0.5 * ((x @ C) * x).sum(1)
    assert bool((true <= 0.01 * (1 + 1e-9)).all())
    assert bool((constraint.spent(constraint.confine(delta)) - 0.01).abs().max() < 1e-9)  # it spends what it counts
    # it is the projection onto the ellipsoid of the bound
    (block,) = truncated(full, r).blocks
    U = block.basis.vectors
    bound = U * block.values.abs() @ U.T + block.floor * (torch.eye(30) - U @ U.T)
    normal = x @ bound
    mu = ((flat(list(layers), delta) - x) * normal).sum(1) / normal.square().sum(1)
    assert_close(flat(list(layers), delta) - x, mu[:, None] * normal, 1e-8)
    # stacked budgets, coordinates and single precision take the same path
    runs = stack([truncated_of.ellipsoid(e) for truncated_of in [truncated(full, r)] for e in (0.01, 0.02)])
    together = runs.confine({name: Q[:2] for name, Q in delta.items()})
    assert_close(flat(list(layers), together)[0], x[0])
    Z = constraint.coordinates(delta)
    assert_close(flat(list(layers), constraint.displacement(constraint.confine_coordinates(Z))), x)
    single = constraint.to(torch.float32).confine({name: Q.float() for name, Q in delta.items()})
    assert_close(flat(list(layers), single).double(), x, 1e-4)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.6, 0.9])
def test_eigenspaces_stay_whole_under_the_rounding_of_single_precision_statistics(gamma: float) -> None:
    """Squared error: each eigenvalue of A comes five times. The sums are float32, their decomposition float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x, y = torch.randn(50, 3, 6), torch.zeros(50, 3, 5)
    removed = {}
    for dtype in (torch.float32, torch.float64):
        arguments = (model.to(dtype), SquaredError(), [(x.to(dtype), y.to(dtype))], "0")
        fits = (KFAC.fit(*arguments, labels="exact"), EKFAC.fit(*arguments, labels="exact"))
        removed[dtype] = [fit.spectrum().null_space(gamma).removed for fit in fits]
    assert removed[torch.float32] == removed[torch.float64]
    assert all(count % 5 == 0 for count in removed[torch.float64])


def test_unknown_directions_may_count_with_their_mean() -> None:
    full = dense(torch.arange(1.0, 25.0).flip(0), (LAYER,))  # 24 … 1
    few = truncated(full, 6)
    (block,) = few.blocks
    assert block.mean_outside == pytest.approx(sum(range(1, 19)) / 18)
    assert full.blocks[0].mean_outside == 0.0
    for outside, weight in (("bound", 19.0), ("mean", 9.5)):
        constraint = few.ellipsoid(0.01, outside=outside)  # type: ignore[arg-type]
        assert constraint.blocks[0].floor == pytest.approx(weight)
        U = block.basis.vectors  # type: ignore[union-attr]
        C = U * block.values @ U.T + weight * (torch.eye(24) - U @ U.T)
        x = flat([LAYER], constraint.confine(random_displacement([LAYER], 3)))
        assert_close(0.5 * ((x @ C) * x).sum(1), torch.full((3,), 0.01), 1e-8)
    # over a random direction the mean is right on average: its trace is that of the curvature
    v = torch.randn(4000, 24)
    U = block.basis.vectors  # type: ignore[union-attr]
    model = (v @ U).square() @ block.values + 9.5 * (v - v @ U @ U.T).square().sum(1)
    assert float(model.mean()) == pytest.approx(300.0, rel=0.02)
    with pytest.raises(ValueError, match="outside must be"):
        few.ellipsoid(0.01, outside="median")  # type: ignore[arg-type]


def test_mixed_precision_keeps_the_dtype_of_the_displacement() -> None:
    constraint = factored()[2].ellipsoid(1e-3)
    delta = random_displacement(constraint.layers)
    x = constraint.confine({"w": delta["w"].float()})["w"]
    assert x.dtype == torch.float32
    assert_close(x.double(), constraint.confine(delta)["w"], 1e-5)


def test_gradients_cannot_be_projected_onto_an_ellipsoid() -> None:
    with pytest.raises(ValueError, match="project='update'"):
        factored()[2].ellipsoid(1.0).project({"w": torch.zeros(4, 6)})
    assert not factored()[2].ellipsoid(1.0).linear


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_are_positive_numbers(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be positive and finite"):
        factored()[2].ellipsoid(epsilon)


def test_ellipsoids_need_units_and_all_of_a_kronecker_basis() -> None:
    with pytest.raises(ValueError, match="no units"):
        Spectrum(covariance().blocks, scaled=False).ellipsoid(1.0)
    (block,) = factored()[2].blocks
    basis = replace(block.basis, u_in=block.basis.u_in[:, :2])
    with pytest.raises(ValueError, match="all eigenvectors"):
        Spectrum((Block(basis, block.values[:, :2], block.total, floor=1.0),)).ellipsoid(1.0)


def test_ellipsoids_are_saved_and_loaded(ellipsoidal: Spectrum, tmp_path: Path) -> None:
    constraint, delta = ellipsoidal.ellipsoid(0.02), random_displacement(ellipsoidal.layers)
    constraint.save(tmp_path / "e")
    loaded = Ellipsoid.load(tmp_path / "e")
    assert loaded.epsilon == 0.02
    for name, Q in constraint.confine(delta).items():
        assert_close(loaded.confine(delta)[name], Q, 1e-14)
    few = truncated(dense(torch.exp(-torch.arange(24.0)), (LAYER,)), 5).ellipsoid(0.1)
    few.save(tmp_path / "f")
    assert Ellipsoid.load(tmp_path / "f").blocks[0].floor == few.blocks[0].floor > 0


def test_zero_curvature_bounds_nothing() -> None:
    spectrum = dense_spectrum(torch.zeros(24, 24), (LAYER,), True)
    delta = {"w": torch.randn(4, 6)}
    assert_close(spectrum.ellipsoid(1e-9).confine(delta)["w"], delta["w"], 1e-14)


def test_ellipsoids_of_fitted_covariances_have_the_units_of_the_loss() -> None:
    moments = {"w": (6.0, Scale(terms=3, positions=5))}
    from curvlab.curvature.covariance import Moments

    A, _, _ = factored()
    fit = Covariance({name: Moments(LAYER, 5 * A, g, scale) for name, (g, scale) in moments.items()}, "exact")
    delta = random_displacement([LAYER])
    expected = 0.5 * (6.0 / 3 / 4) * float((delta["w"] @ A * delta["w"]).sum())
    assert float(fit.spectrum().ellipsoid(1.0).spent(delta)) == pytest.approx(expected)
