"""Eigendecompositions and bases."""

from pathlib import Path

import pytest
import torch
from reference import assert_close, dense_of
from torch import Tensor

from curvlab import memory, spectrum
from curvlab.layers import LayerShape
from curvlab.memory import announce, bytes_of, human
from curvlab.spectrum import Block, DenseBasis, KroneckerBasis, Spectrum, dense_spectrum, eigh
from curvlab.storage import replacing, save_tensors

pytestmark = pytest.mark.usefixtures("float64")

LAYER = LayerShape("w", 4, 6, False)


def orthonormal(d: int, r: int | None = None) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d))[0][:, :r]


def test_eigh_orders_by_magnitude() -> None:
    torch.manual_seed(0)
    C = torch.randn(9, 9)
    values, U = eigh(C)  # symmetrised
    assert_close(U * values @ U.T, (C + C.T) / 2)
    assert bool((values.abs().diff() <= 0).all())
    assert float(values.min()) < 0 < float(values.max())
    B = torch.randn(9, 3)
    values, U = eigh(B @ B.T, semidefinite=True)
    assert float(values.min()) == 0.0
    assert_close(U * values @ U.T, B @ B.T)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            eigh(torch.full((2, 2), bad))


def test_eigh_falls_back_to_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    true, asked = torch.linalg.eigh, []

    def stubborn(C: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(C.dtype)
        if C.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return true(C)

    monkeypatch.setattr(spectrum.torch.linalg, "eigh", stubborn)
    values, U = eigh(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float32)))
    assert asked == [torch.float32, torch.float64]
    assert values.tolist() == [3.0, 1.0]
    assert values.dtype == U.dtype == torch.float32


@pytest.mark.parametrize(("r_out", "r_in"), [(4, 6), (1, 6), (4, 1), (2, 3), (None, 6), (None, 2)])
def test_kronecker_bases_rotate_both_sides(r_out: int | None, r_in: int) -> None:
    torch.manual_seed(0)
    u_out = None if r_out is None else orthonormal(4, r_out)
    basis = KroneckerBasis(LAYER, u_out, orthonormal(6, r_in))
    left = torch.eye(4) if u_out is None else u_out
    Q = torch.randn(2, 3, 4, 6)
    Z = basis.rotate({"w": Q})
    assert Z.shape[2:] == basis.shape
    assert_close(Z, left.T @ Q @ basis.u_in)
    assert_close(basis.rotate_back(Z)["w"], left @ (left.T @ Q @ basis.u_in) @ basis.u_in.T)
    # column-stacking vec: coordinates are (U_in ⊗ U_out)ᵀ vec Q
    both = torch.einsum("jl,ik->jilk", basis.u_in, left).reshape(24, -1)
    vec = both.T @ Q[1, 2].T.flatten()
    assert_close(vec, Z[1, 2].T.flatten())
    assert basis.complete == (r_out in (4, None) and r_in == 6)
    assert basis.size == 24


@pytest.mark.parametrize("rows", [[0, 2], [3], []])
def test_kronecker_bases_are_restricted_to_a_rectangle(rows: list[int]) -> None:
    torch.manual_seed(0)
    for u_out in (orthonormal(4), None):
        basis = KroneckerBasis(LAYER, u_out, orthonormal(6))
        used = torch.zeros(4, 6, dtype=torch.bool)
        for row in rows:
            used[row, [1, 4]] = True
        small, index = basis.restrict(used)
        assert small.shape == ((4 if u_out is None else len(rows)), 2 if rows else 0)
        Q = torch.randn(4, 6)
        full = basis.rotate({"w": Q})
        assert_close(small.rotate({"w": Q}), full[index])
        assert int(used[index].sum()) == int(used.sum())
        assert basis.cost(used) == small.cost(used[index])


def test_costs_count_multiply_adds() -> None:
    """Of both directions with what is used of the basis, the cheaper order of the two products."""

    def used(rows: int, columns: int) -> Tensor:
        mask = torch.zeros(4, 6, dtype=torch.bool)
        mask[:rows, :columns] = True
        return mask

    five = torch.zeros(24, dtype=torch.bool)
    five[:5] = True
    assert DenseBasis((LAYER,), orthonormal(24)).cost(five) == 2 * 24 * 5
    basis = KroneckerBasis(LAYER, orthonormal(4), orthonormal(6))
    assert basis.cost(used(4, 6)) == 2 * (4 * 4 * 6 + 4 * 6 * 6)
    assert basis.cost(used(1, 6)) == 2 * (4 * 6 + 6 * 6)  # one row of U_out first: 1·4·6, then 1·6·6
    assert basis.cost(used(4, 1)) == 2 * (4 * 6 + 4 * 4)  # one column of U_in first: 4·6·1, then 4·4·1
    assert KroneckerBasis(LAYER, None, orthonormal(6)).cost(used(1, 2)) == 2 * 4 * 6 * 2


def test_a_staircase_is_filtered_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips give U (M ⊙ Uᵀδ) for any mask and stack of masks, and cost less than the rectangle for a staircase."""
    monkeypatch.setattr(spectrum, "STRIP", 2)
    torch.manual_seed(0)
    for d_out, d_in in ((7, 11), (11, 7)):
        layer = LayerShape("w", d_out, d_in, False)
        i, j = torch.arange(d_out)[:, None], torch.arange(d_in)[None, :]
        staircase = (i + 1) * (j + 1) <= d_in  # a hyperbola: a third of its rectangle
        assert bool(staircase.any(1)[: min(d_out, d_in)].all())
        assert bool(staircase.any(0).all())
        some = torch.rand(d_out, d_in) < 0.2
        for u_out in (orthonormal(d_out), None):
            basis = KroneckerBasis(layer, u_out, orthonormal(d_in))
            for mask in (staircase, ~staircase, some, torch.stack([some, staircase]), torch.zeros_like(some)):
                used = mask.any(0) if mask.dim() == 3 else mask
                for Q in (torch.randn(d_out, d_in), torch.randn(2, d_out, d_in)):
                    expected = basis.rotate_back(mask * basis.rotate({"w": Q}))["w"]
                    small, index = basis.restrict(used)
                    found = small.filter({"w": Q}, mask[..., *index].to(Q), small.plan(used[index]))["w"]
                    assert_close(found, expected)
        basis = KroneckerBasis(layer, orthonormal(d_out), orthonormal(d_in))
        plan = basis.plan(staircase)
        assert len(plan.strips) > 1
        assert plan.cost < 0.8 * basis.plan(torch.ones_like(staircase)).cost
        covered = torch.zeros_like(staircase)
        for strip in plan.strips:
            covered[strip] = True
        assert not bool((staircase & ~covered).any())


def test_dense_bases_span_several_layers() -> None:
    torch.manual_seed(0)
    layers = (LayerShape("a", 2, 3, False), LayerShape("b", 1, 2, False))
    basis = DenseBasis(layers, orthonormal(8, 5))
    delta = {"b": torch.randn(7, 1, 2), "a": torch.randn(7, 2, 3)}
    v = torch.cat([delta["a"].flatten(1), delta["b"].flatten(1)], 1)
    Z = basis.rotate(delta)
    assert_close(Z, v @ basis.vectors)
    back = basis.rotate_back(Z)
    assert_close(torch.cat([back["a"].flatten(1), back["b"].flatten(1)], 1), v @ basis.vectors @ basis.vectors.T)
    assert (basis.shape, basis.size, basis.complete) == ((5,), 8, False)
    small, (index,) = basis.restrict(torch.tensor([True, False, False, True, False]))
    assert index.tolist() == [0, 3]
    assert torch.equal(small.vectors, basis.vectors[:, [0, 3]])


def test_eigenvalues_must_fit_the_basis() -> None:
    with pytest.raises(ValueError, match=r"\(6, 4\) do not fit the basis \(4, 6\)"):
        Block(KroneckerBasis(LAYER, torch.eye(4), torch.eye(6)), torch.ones(6, 4), 24.0)


def test_dense_spectra_split_off_what_has_no_curvature() -> None:
    torch.manual_seed(0)
    C = torch.randn(24, 24)
    C = C + C.T
    dead = [0, 7, 8, 23]
    C[dead] = 0
    C[:, dead] = 0
    s = dense_spectrum(C, (LAYER,), semidefinite=False)
    U = s.blocks[0].basis.vectors
    assert_close(U.T @ U, torch.eye(24))
    assert_close(dense_of(s), C)
    assert float(U[dead][:, :20].abs().max()) == 0.0
    assert s.blocks[0].total == pytest.approx(float(torch.linalg.eigvalsh(C).abs().sum()))
    nothing = dense_spectrum(torch.zeros(24, 24), (LAYER,), semidefinite=True)
    assert nothing.blocks[0].total == 0.0
    assert_close(nothing.blocks[0].basis.vectors, torch.eye(24))


def test_quadratic_forms_add_over_blocks() -> None:
    torch.manual_seed(0)
    other = LayerShape("v", 2, 3, False)
    blocks = (
        Block(KroneckerBasis(LAYER, orthonormal(4), orthonormal(6)), torch.randn(4, 6), 1.0),
        Block(KroneckerBasis(other, None, orthonormal(3)), torch.randn(2, 3), 1.0),
    )
    delta = {"v": torch.randn(5, 2, 3), "w": torch.randn(5, 4, 6)}
    expected = torch.zeros(5)
    for block in blocks:
        v = delta[block.basis.layer.name].flatten(1)
        expected += ((v @ dense_of(Spectrum((block,)))) * v).sum(1)
    s = Spectrum(blocks)
    assert_close(s.quadratic_form(delta), expected)
    assert s.quadratic_form({name: Q.float() for name, Q in delta.items()}).dtype == torch.float64
    assert (s.size, [layer.name for layer in s.layers]) == (30, ["w", "v"])


# Memory


def test_what_cannot_fit_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bytes_of(3, 5, dtype=torch.float64) == 120
    assert [human(n) for n in (5, 2048, 3 * 2**20, 2**50)] == ["5 B", "2.0 KiB", "3.0 MiB", "1024.0 TiB"]
    monkeypatch.setattr(memory, "available", lambda device="cpu": 2**30)
    announce("little", memory.LARGE, "nothing")
    assert capsys.readouterr().err == ""
    announce("much", 3 * 2**28, "less")
    assert "curvlab: much: 768.0 MiB of 1.0 GiB free" in capsys.readouterr().err
    with pytest.raises(MemoryError, match=r"huge needs 2.0 GiB, 1.0 GiB are free on cpu; instead: less"):
        announce("huge", 2**31, "less")
    monkeypatch.setattr(memory, "available", lambda device="cpu": 1000)
    with pytest.raises(MemoryError, match=r"spectrum\(gamma="):
        dense_spectrum(torch.zeros(24, 24), (LAYER,), True)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_tensors(path, "spectrum", {"a": torch.ones(2)}, {})
    old = path.read_bytes()
    sparse = torch.ones(2).to_sparse()
    with pytest.raises(Exception):  # noqa: B017, PT011
        save_tensors(path, "spectrum", {"a": sparse}, {})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_truncated_and_unscaled_spectra_survive_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = (
        Block(
            DenseBasis((LAYER,), orthonormal(24, 5)), torch.randn(5), 7.0, total_error=0.25, floor=0.125, precision=1e-7
        ),
        Block(KroneckerBasis(LayerShape("v", 2, 3, True), None, orthonormal(3)), torch.rand(2, 3), 3.0),
    )
    for scaled in (False, True):
        Spectrum(blocks, scaled).save(tmp_path / "s")
        loaded = Spectrum.load(tmp_path / "s")
        assert loaded.scaled == scaled
        assert loaded.layers == [LAYER, LayerShape("v", 2, 3, True)]
        for a, b in zip(loaded.blocks, blocks, strict=True):
            assert (a.total, a.total_error, a.floor, a.precision) == (b.total, b.total_error, b.floor, b.precision)
            assert torch.equal(a.values, b.values)
            assert type(a.basis) is type(b.basis)
            assert a.basis.tensors().keys() == b.basis.tensors().keys()
            for name, t in a.basis.tensors().items():
                assert torch.equal(t, b.basis.tensors()[name])


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "kept") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "kept").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_half_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")

    def interrupted() -> None:
        with replacing(tmp_path / "kept") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (tmp_path / "kept").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
