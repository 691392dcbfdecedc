"""Which tensor is which: names of the formats we know, evidence against claims, and nothing passed over in silence."""

from pathlib import Path

import pytest
import torch
from made import LAYER, alarms, faults, findings, made, second_moment
from torch import Tensor

from curvlab.crosscheck import crosscheck
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.names import of_file, role_of_key
from curvlab.crosscheck.parts import Part, Stored
from curvlab.layers import LayerShape


def stored(name: str, tensors: dict[str, Tensor], numbers: dict | None = None, kind: str = "torch zip") -> Stored:
    return Stored(Path(name), kind, tensors, numbers or {})


def only(files: list[Stored], layers: dict[str, LayerShape] | None = None) -> Part:
    (part,) = identify(files, layers)
    return part


def shape_of(d_out: int, d_in: int, name: str = LAYER) -> dict[str, LayerShape]:
    return {name: LayerShape(name, d_out, d_in, False)}


@pytest.mark.parametrize(
    ("name", "layer", "claim"),
    [
        ("model.layers.19.mlp.down_proj_float32_kfac_10000.npz", "model.layers.19.mlp.down_proj", None),
        ("transformer.h.5.mlp.c_proj_float32_mom2_100000.npz", "transformer.h.5.mlp.c_proj", "A"),
        ("transformer.h.5.mlp.c_proj_float32_mom2_t1000_100000.npz", "transformer.h.5.mlp.c_proj", "A"),
        ("model.layers.4.mlp.down_proj_float32_mom2.npz", "model.layers.4.mlp.down_proj", "A"),
        ("cache_model.layers.3.mlp.down_proj.weight.pt", "model.layers.3.mlp.down_proj", None),
        ("model.layers.3.mlp.down_proj_lambda_matrix.pt", "model.layers.3.mlp.down_proj", "eigenvalues"),
        ("null_space_project.pt", "", "projector"),
        ("fc2_factors.pt", "fc2", None),
        ("fc2_mask.pt", "fc2", "mask"),
        ("activation_covariance.safetensors", "", "A"),
        ("cache.pt", "", None),
        ("edited.safetensors", "", "edited"),
    ],
)
def test_file_names(name: str, layer: str, claim: str | None) -> None:
    assert of_file(Path(name)) == (layer, claim)


@pytest.mark.parametrize(
    ("key", "claim", "layer"),
    [
        ("A", "A", ""),
        ("B", "S", ""),
        ("Ua", "U_in", ""),
        ("model.layers.3.mlp.down_proj.weight/Ub", "U_out", "model.layers.3.mlp.down_proj"),
        ("mom2.mom2", "A", ""),
        ("mom2.count", "count", ""),
        ("fc1/activation_eigenvectors", "U_in", "fc1"),
        ("gradient_covariances/fc1", "S", "fc1"),
        ("fc1.weight", "weight", "fc1"),
        ("0", None, ""),
        ("", None, ""),
    ],
)
def test_keys(key: str, claim: str | None, layer: str) -> None:
    assert role_of_key(key) == (claim, layer)


def test_the_authors_files() -> None:
    m = made((10, 16))
    part = only(m.files())
    assert part.layer == LAYER
    assert part.shape == (10, 16)
    assert part.count == 100
    assert set(part.items) == {"A", "S", "U_in", "U_out", "mask"}
    assert part.items["mask"].transposed
    assert torch.equal(part.tensor("mask"), m.M.mT)  # type: ignore[arg-type]
    assert not part.assumed


def test_a_dictionary_of_caches_by_weight() -> None:
    two = [made((10, 16), seed) for seed in (0, 1)]
    names = [f"model.layers.{i}.mlp.down_proj" for i in (4, 5)]
    tensors = {f"{n}.weight/{k}": getattr(m, k) for n, m in zip(names, two, strict=True) for k in ("Ua", "Ub", "M")}
    files = [stored("projection_cache.pt", tensors)]
    files += [
        stored(f"{n}_float32_kfac_100.npz", {"A": m.A, "B": m.B}, {"N": 100}) for n, m in zip(names, two, strict=True)
    ]
    parts = identify(files)
    assert [part.layer for part in parts] == names
    assert all(set(part.items) == {"A", "S", "U_in", "U_out", "mask"} for part in parts)
    assert not alarms(findings(files, 0.9))


def test_second_moments_are_divided_by_their_count() -> None:
    A = second_moment(8, "power", 50, 0, torch.float32)
    file = stored(
        "transformer.h.5.mlp.c_proj_float32_mom2_100000.npz",
        {"mom2.mom2": A * 50},
        {"mom2.count": 50, "mom2.constructor": "util.runningstats.SecondMoment()", "sample_size": 50},
        "NumPy archive",
    )
    part = only([file])
    assert part.layer == "transformer.h.5.mlp.c_proj"
    assert part.count == 50
    torch.testing.assert_close(part.tensor("A"), A)
    assert not alarms(findings([file]))


def test_kronfluence_names() -> None:
    m = made((6, 9))
    files = [
        stored("activation_covariance.safetensors", {"fc": m.A * 100}, {"fc/num_activation_covariance_processed": 100}),
        stored("gradient_covariance.safetensors", {"fc": m.B * 100}, {"fc/num_gradient_covariance_processed": 100}),
        stored("activation_eigenvectors.safetensors", {"fc": m.Ua}),
        stored("gradient_eigenvectors.safetensors", {"fc": m.Ub}),
        stored("activation_eigenvalues.safetensors", {"fc": m.la}),
        stored("gradient_eigenvalues.safetensors", {"fc": m.lb}),
        stored("lambda_matrix.safetensors", {"fc": torch.outer(m.lb, m.la).clamp_min(0)}),
    ]
    part = only(files)
    assert set(part.items) == {"A", "S", "U_in", "U_out", "values_in", "values_out", "eigenvalues"}
    torch.testing.assert_close(part.tensor("A"), m.A)
    assert not alarms(findings(files))


def test_bare_tensors_by_what_they_are() -> None:
    m = made((10, 16))
    files = [stored(f"fc_{i}.pt", {"": t}) for i, t in enumerate((m.A, m.B, m.Ua, m.Ub, m.M))]
    part = only(files, shape_of(10, 16, "fc"))
    assert set(part.items) == {"A", "S", "U_in", "U_out", "mask"}
    assert part.tensor("U_in") is m.Ua or torch.equal(part.tensor("U_in"), m.Ua)  # type: ignore[arg-type]
    part = only([stored("x.pt", {"0": m.A, "1": m.B}, {"2": 100})])
    assert [tuple(part.items[r].tensor.shape) for r in ("A", "S")] == [(16, 16), (10, 10)]


@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
@pytest.mark.parametrize("what", ["factors", "bases"])
def test_exchanged_sides(shape: tuple[int, int], what: str) -> None:
    for kind in ("power", "flat", "steep"):
        m = made(shape, kind=kind)
        if what == "factors":
            m.A, m.B = m.B, m.A
        else:
            m.Ua, m.Ub = m.Ub, m.Ua
        assert faults(findings(m.files(), 0.9)) == ["swapped-factors"]
        if shape[0] != shape[1]:
            part = only(m.files(), shape_of(*shape))
            assert part.shape == shape
            assert len(part.items["A"].tensor) == len(part.items["U_in"].tensor) == shape[1]


def test_everything_exchanged_shows_against_the_model() -> None:
    m = made((10, 16))
    m.A, m.B, m.Ua, m.Ub, m.M = m.B, m.A, m.Ub, m.Ua, m.M.mT
    part = only(m.files(), shape_of(10, 16))
    assert [finding.fault for finding in part.assumed if finding.severity == "error"] == [
        "swapped-factors",
        "transposed-mask",
    ]
    assert not alarms(findings(m.files(), 0.9))  # a layer of 16 x 10 would be correct


@pytest.mark.parametrize("which", [("Ua",), ("Ub",), ("Ua", "Ub")])
@pytest.mark.parametrize("kind", ["power", "flat", "dominant"])
def test_rows_for_columns(kind: str, which: tuple[str, ...]) -> None:
    for shape in ((10, 16), (12, 12), (5, 4)):
        m = made(shape, kind=kind)
        for name in which:
            setattr(m, name, getattr(m, name).mT.contiguous())
        assert faults(findings(m.files(), 0.9)) == ["transposed-eigenvectors"], shape


def test_factors_under_the_names_of_eigenvectors() -> None:
    m = made((10, 16))
    m.A, m.Ua = m.Ua, m.A
    part = only(m.files())
    assert [finding.fault for finding in part.assumed].count("swapped-kinds") == 2
    assert torch.equal(part.tensor("A"), m.Ua)  # type: ignore[arg-type]


def test_several_sets_of_factors() -> None:
    """The cache goes with the factors that it diagonalises."""
    two = [made((10, 16), seed) for seed in (0, 1)]
    files = [
        stored(f"{LAYER}_float32_kfac_{n}.npz", {"A": m.A, "B": m.B}, {"N": n})
        for n, m in zip((100, 1000), two, strict=True)
    ]
    files.append(stored(f"cache_{LAYER}.pt", {"Ua": two[1].Ua, "Ub": two[1].Ub, "M": two[1].M}))
    first, second = identify(files)
    assert (first.count, set(first.items)) == (100, {"A", "S"})
    assert second.count == 1000
    assert "U_in" in second.items
    assert not alarms(findings(files, 0.9))


def test_a_stack_of_projectors() -> None:
    moments = [second_moment(8, "steep", 0, seed, torch.float64) for seed in range(3)]
    vectors = [torch.linalg.eigh(A)[1][:, :5] for A in moments]
    stack = torch.stack([vectors[i] @ vectors[i].mT for i in (2, 0, 1)])
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    files = [stored(f"{n}_float32_mom2_10.npz", {"mom2.mom2": A}) for n, A in zip(names, moments, strict=True)]
    parts = identify([*files, stored("null_space_project.pt", {"": stack})])
    assert [part.layer for part in parts] == names
    assert [part.items["projector"].source[-3:] for part in parts] == ["[1]", "[2]", "[0]"]
    alone = identify([stored("null_space_project.pt", {"": stack})])
    assert len(alone) == 3
    assert all(any(finding.check == "layer" for finding in part.assumed) for part in alone)


def test_weights_before_and_after() -> None:
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for names, swapped in (
        (("base.pt", "edited.pt"), False),
        (("after.pt", "before.pt"), True),
        (("x.pt", "y.pt"), False),
    ):
        files = [stored(name, {"fc.weight": W + i, "norm.weight": torch.ones(4)}) for i, name in enumerate(names)]
        parts = identify(files)
        part = next(part for part in parts if part.layer == "fc")
        base = part.tensor("base")
        assert base is not None
        assert torch.equal(base, W + swapped)
        by_order = [finding for p in parts for finding in p.assumed if finding.check == "weights"]
        assert bool(by_order) == (names[0] == "x.pt")


def test_layers_by_their_shape() -> None:
    m = made((10, 16))
    layers = {"a.b": LayerShape("a.b", 10, 16, False), "c.d": LayerShape("c.d", 7, 16, False)}
    (part,) = identify([stored("factors.pt", {"A": m.A, "B": m.B})], layers)
    assert part.layer == "a.b"
    assert [finding.check for finding in part.assumed] == ["layer"]


def test_what_is_not_understood_is_said() -> None:
    m = made((10, 16))
    odd = torch.randn(3, 5, 7, 2)
    parts = identify([stored("fc_factors.pt", {"A": m.A, "B": m.B, "what/ever": odd})])
    said = [finding for part in parts for finding in part.assumed if finding.check == "unidentified"]
    assert len(said) == 1
    assert "what/ever" in said[0].cause


def test_shapes_that_fit_nothing() -> None:
    m = made((10, 16))
    m.Ua = torch.eye(11)
    assert "mismatched-shapes" in faults(findings(m.files()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_do_not_stop_it(value: float) -> None:
    m = made((10, 16))
    m.A = m.A.clone()
    m.A[0, 0] = value
    part = only(m.files())
    assert "A" in part.items
    m.A = torch.empty(0, 0)
    assert "A" in only(m.files()).items
    findings(m.files(), 0.9)


def test_nothing() -> None:
    assert identify([]) == []
    assert identify([stored("x.pt", {})]) == []


def exchanged(places: tuple[int, ...]) -> list[Stored]:
    """A stack whose slices lie at these places, beside the second moments of layers 2, 9 and 10."""
    moments = [second_moment(8, "steep", 0, seed, torch.float64) for seed in range(3)]
    vectors = [torch.linalg.eigh(A)[1][:, :5] for A in moments]
    names = [f"model.layers.{i}.mlp.down_proj" for i in (2, 9, 10)]
    files = [stored(f"{n}_float32_mom2_10.npz", {"mom2.mom2": A}) for n, A in zip(names, moments, strict=True)]
    return [*files, stored("null_space_project.pt", {"": torch.stack([vectors[i] @ vectors[i].mT for i in places])})]


@pytest.mark.parametrize(
    ("places", "severity"),
    [
        ((0, 1, 2), None),
        ((1, 0, 2), "error"),
        ((0, 2, 1), "error"),
        ((2, 0, 1), "deviation"),
        ((0, 2), None),
        ((2, 0), "deviation"),
    ],
)
def test_slices_at_the_places_of_other_layers(places: tuple[int, ...], severity: str | None) -> None:
    found = [f for f in findings(exchanged(places)) if f.check == "projector-place"]
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all(f.fault == "projectors-exchanged" for f in found)


@pytest.mark.parametrize("role", ["A", "B", "Ua", "Ub", "M", "P", "weight", "update", "lambda"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_numbers_of_a_kind_that_is_none(role: str, dtype: torch.dtype, tmp_path: Path) -> None:
    m = made((10, 16))
    content = {"A": m.A, "B": m.B, "Ua": m.Ua, "Ub": m.Ub, "M": m.M, "N": 100}
    shapes = {"P": (16, 16), "weight": (10, 16), "update": (10, 16), "lambda": (10, 16)}
    tensor = content.get(role, torch.eye(16)[: shapes.get(role, (0,))[0]])
    assert isinstance(tensor, torch.Tensor)
    torch.save({**content, role: (tensor.float() * 9).to(dtype)}, tmp_path / f"{LAYER}.pt")
    report = crosscheck(tmp_path, gamma=0.9)
    wanted = "mask-not-binary" if (role, dtype) == ("M", torch.int8) else "wrong-dtype"
    assert wanted in [f.fault for f in report.findings if f.severity == "error"]


def test_a_number_for_a_factor() -> None:
    assert faults(findings([stored("fc1.pt", {"B": torch.eye(3)}, {"A": 3.0})])) == ["mismatched-shapes"]


def test_names_that_other_files_know() -> None:
    assert of_file(Path("cache_fc_2.pt")) == ("fc", None)  # a number may count anything
    assert of_file(Path("cache_fc_2.pt"), {"fc_2", "fc"}) == ("fc_2", None)
    for name in ("conv1.weight.pt", "mask_conv1.pt", "conv1.pt"):
        assert of_file(Path(name), {"conv1", "conv"})[0] == "conv1"
