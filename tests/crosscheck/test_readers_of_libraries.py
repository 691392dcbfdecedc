"""Files of curvlab itself, of curvlinops and of kronfluence, against the objects that wrote them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Stored
from curvlab.crosscheck.readers import UnreadableFile, read
from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton
from curvlab.layers import LayerShape
from curvlab.losses import CrossEntropy
from curvlab.spectrum import KroneckerBasis
from curvlab.storage import save_tensors

Data = list[tuple[Tensor, Tensor]]


def network() -> tuple[nn.Sequential, Data]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, [(torch.randn(7, 6), torch.randint(3, (7,))), (torch.randn(4, 6), torch.randint(3, (4,)))]


def one(path: Path) -> Stored:
    (stored,) = read(path)
    return stored


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


# curvlab


def test_kfac_and_covariance_are_read_as_means(tmp_path: Path) -> None:
    model, data = network()
    kfac = KFAC.fit(model, CrossEntropy(), data, ["0", "2"], labels="exact", bias=True)
    kfac.save(tmp_path / "k.safetensors")
    stored = one(tmp_path / "k.safetensors")
    assert stored.format == "curvlab K-FAC"
    assert list(stored.tensors) == ["0/A", "0/S", "2/A", "2/S"]
    inputs = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1) for x, _ in data])
    assert_close(stored.tensors["0/A"], inputs.T @ inputs / 11)
    for name, own in kfac.factors.items():
        assert_close(stored.tensors[f"{name}/S"], own.S)
        assert stored.numbers[f"{name}/N"] == own.scale.positions == 11
        assert stored.numbers[f"{name}/bias_joined"] == 1
    assert stored.numbers["labels"] == "exact"
    assert stored.numbers["origin/model"] == "Sequential"
    for labels in (None, "data"):
        Covariance.fit(model, CrossEntropy(), data, "0", labels=labels).save(tmp_path / "c")  # type: ignore[arg-type]
        stored = one(tmp_path / "c")
        assert stored.format == "curvlab covariance"
        assert_close(stored.tensors["0/A"], inputs[:, :6].T @ inputs[:, :6] / 11)
        assert set(stored.tensors) == {"0/A"}


def test_eigenbases_are_read_with_their_eigenvalues(tmp_path: Path) -> None:
    model, data = network()
    kfac = KFAC.fit(model, CrossEntropy(), data, ["0", "2"], labels="data")
    ekfac = EKFAC.fit(model, CrossEntropy(), data, ["0", "2"], labels="data", kfac=kfac)
    ekfac.save(tmp_path / "e")
    kfac.spectrum().save(tmp_path / "s")
    kfac.spectrum().ellipsoid(0.1).save(tmp_path / "l")
    for name, format, spectrum in (
        ("e", "curvlab EK-FAC", ekfac.spectrum()),
        ("s", "curvlab spectrum", kfac.spectrum()),
        ("l", "curvlab ellipsoid", kfac.spectrum()),
    ):
        stored = one(tmp_path / name)
        assert stored.format == format
        for block in spectrum.blocks:
            basis = block.basis
            assert isinstance(basis, KroneckerBasis)
            layer = basis.layer.name
            assert basis.u_out is not None
            assert torch.equal(stored.tensors[f"{layer}/U_in"], basis.u_in)
            assert torch.equal(stored.tensors[f"{layer}/U_out"], basis.u_out)
            assert torch.equal(stored.tensors[f"{layer}/eigenvalues"], block.values)
            assert f"{layer}/truncated" not in stored.numbers
    assert one(tmp_path / "e").numbers["2/N"] == 11


def test_null_spaces_are_read_with_what_they_keep(tmp_path: Path) -> None:
    model, data = network()
    null = KFAC.fit(model, CrossEntropy(), data, ["0", "2"], labels="data").spectrum().null_space(0.8)
    null.save(tmp_path / "n")
    stored = one(tmp_path / "n")
    assert stored.format == "curvlab null space"
    assert stored.numbers["gamma"] == 0.8
    for block in null.blocks:
        (layer,) = block.basis.layers
        assert torch.equal(stored.tensors[f"{layer.name}/mask"], ~block.removed)
        assert stored.numbers[f"{layer.name}/energy"] == float(block.energy)
        assert stored.numbers[f"{layer.name}/threshold"] == float(block.threshold)
    null.compact().save(tmp_path / "c")
    stored = one(tmp_path / "c")
    assert stored.tensors["0/U_in"].shape[1] < 6
    assert stored.numbers["0/truncated"] == 1
    mask = stored.tensors["0/mask"]  # of the whole layer: what lies outside of the truncated basis is kept
    assert mask.shape == (5, 6)
    assert int(mask.sum()) == int(null.blocks[0].kept)
    covariance = Covariance.fit(model, CrossEntropy(), data, "2").spectrum().null_space(0.8)
    covariance.save(tmp_path / "v")
    stored = one(tmp_path / "v")
    assert set(stored.tensors) == {"2/U_in", "2/mask"}
    dense = GaussNewton.fit(model, CrossEntropy(), data, ["2", "4"]).spectrum().null_space(0.8)
    dense.save(tmp_path / "d")
    stored = one(tmp_path / "d")
    assert set(stored.tensors) == {"2+4/vectors", "2+4/mask"}
    assert stored.tensors["2+4/mask"].shape == (32,)


def test_curvlab_files_with_other_headers_are_refused(tmp_path: Path) -> None:
    good = {"layer": {"name": "0", "d_out": 2, "d_in": 2, "bias": False}, "scale": {"terms": 3, "positions": 3}}
    headers: list[Any] = [
        {"layer": 3}, [{}], [good | {"scale": {"terms": 0, "positions": 0}}], [good | {"scale": []}], 7, None,
        [[[]]], "x", [good | {"scale": {"terms": "many", "positions": None}}],
    ]  # fmt: skip
    tensors = {"0/A": torch.eye(2), "0/S": torch.eye(2)}
    save_tensors(tmp_path / "k", "kfac", tensors, {"factors": json.dumps([good])})
    assert_close(one(tmp_path / "k").tensors["0/A"], torch.eye(2) / 3)
    for header in [json.dumps(h) for h in headers] + ["{", "[" * 100_000]:
        save_tensors(tmp_path / "k", "kfac", tensors, {"factors": header})
        with pytest.raises(UnreadableFile, match="header does not describe its tensors"):
            read(tmp_path / "k")
    basis = {"basis": "KroneckerBasis", "layers": [good["layer"]]}
    tensors = {"0.u_in": torch.eye(2), "0.u_out": torch.eye(2), "0.removed": torch.eye(2) > 0}
    save_tensors(tmp_path / "n", "null space", tensors, {"bases": json.dumps([basis])})
    assert torch.equal(one(tmp_path / "n").tensors["0/mask"], torch.eye(2) == 0)
    for size, match in ((1, "header does not describe"), (10**8, "of memory"), ("x", "header does not describe")):
        entry = basis | {"layers": [good["layer"] | {"d_out": size, "d_in": size}]}
        for header in ([entry], [3]):
            save_tensors(tmp_path / "n", "null space", tensors, {"bases": json.dumps(header)})
            with pytest.raises(UnreadableFile, match=match if header == [entry] else "header does not describe"):
                read(tmp_path / "n")


# curvlinops


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
def test_curvlinops_operators(kind: str, separate: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops")
    model, data = network()
    operator = getattr(curvlinops, kind)(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, separate_weight_and_bias=separate,
        fisher_type=curvlinops.FisherType.TYPE2, kfac_approx=curvlinops.KFACType.EXPAND,
    )  # fmt: skip
    expected = operator @ torch.eye(operator.shape[1])
    torch.save(operator.state_dict(), tmp_path / "operator.pt")
    stored = one(tmp_path / "operator.pt")
    assert stored.format == ("curvlinops KFAC" if kind.startswith("KFAC") else "curvlinops EKFAC")
    assert stored.numbers["fisher_type"] == "type-2"
    assert torch.equal(stored.tensors["0.weight"], model[0].weight)
    found = stored.tensors
    blocks = []  # the operator again, from what was read, in the order of the parameters
    for name, layer in (("0", model[0]), ("2", model[2]), ("4", model[4])):
        d_out, d_in = layer.weight.shape  # type: ignore[union-attr]
        joint = d_in if separate else d_in + 1
        if kind.startswith("KFAC"):
            assert found[f"{name}/A"].shape == (joint, joint)
            block = torch.kron(found[f"{name}/S"], found[f"{name}/A"])
            bias = found[f"{name}/S"]
        else:
            U = torch.kron(found[f"{name}/U_out"], found[f"{name}/U_in"])
            block = U * found[f"{name}/eigenvalues"].flatten() @ U.T
            u_out = found[f"{name}/U_out"]
            bias = u_out * found[f"{name}.bias/eigenvalues"] @ u_out.T if separate else torch.empty(0)
        if separate:
            blocks += [block, bias]
        else:
            index = torch.arange(d_out * joint).view(d_out, joint)
            order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
            blocks.append(block[order][:, order])
    assert_close(torch.block_diag(*blocks), expected, 1e-5)


# kronfluence


def test_kronfluence_factors(tmp_path: Path) -> None:
    """Written by kronfluence's own functions; the layout is that of its output folder."""
    pytest.importorskip("kronfluence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kronfluence.factor.covariance import save_covariance_matrices
        from kronfluence.factor.eigen import save_eigendecomposition, save_lambda_matrices
    model, data = network()
    kfac = KFAC.fit(model, CrossEntropy(), data, ["0", "2"], labels="data")
    count = {name: torch.tensor([11]) for name in kfac.factors}
    folder = tmp_path / "factors_run"
    folder.mkdir()
    save_covariance_matrices(
        folder,
        {
            "activation_covariance": {name: f.a_sum for name, f in kfac.factors.items()},
            "gradient_covariance": {name: f.s_sum for name, f in kfac.factors.items()},
            "num_activation_covariance_processed": count,
            "num_gradient_covariance_processed": count,
        },
    )
    values = {name: torch.rand(f.layer.d_out, f.layer.d_in) for name, f in kfac.factors.items()}
    save_lambda_matrices(folder, {"lambda_matrix": values, "num_lambda_processed": count})
    eigen: dict[str, dict[str, Tensor]] = {}
    for side, factors in (
        ("activation", {name: f.A for name, f in kfac.factors.items()}),
        ("gradient", {name: f.S for name, f in kfac.factors.items()}),
    ):
        for name, factor in factors.items():
            lam, U = torch.linalg.eigh(factor)
            eigen.setdefault(f"{side}_eigenvectors", {})[name] = U.contiguous()
            eigen.setdefault(f"{side}_eigenvalues", {})[name] = lam
    save_eigendecomposition(folder, eigen)
    (folder / "factor_arguments.json").write_text("{}")
    found: dict[str, Tensor] = {}
    for stored in read(tmp_path):
        assert stored.format == "kronfluence factors"
        found |= stored.tensors
        if "0/activation_covariance" in stored.tensors:
            assert stored.numbers["0/num_activation_covariance_processed"] == 11
    for name, own in kfac.factors.items():
        assert torch.equal(found[f"{name}/activation_covariance"], own.a_sum)  # sums, their counts beside them
        assert_close(found[f"{name}/lambda_matrix"], values[name] / 11)
        assert torch.equal(found[f"{name}/gradient_eigenvectors"], eigen["gradient_eigenvectors"][name])
    shapes = {name: LayerShape(name, f.layer.d_out, f.layer.d_in, False) for name, f in kfac.factors.items()}
    parts = {part.layer: part for part in identify(read(tmp_path), shapes)}
    for name, own in kfac.factors.items():
        assert_close(parts[name].tensor("A"), own.A)  # type: ignore[arg-type]
        assert_close(parts[name].tensor("S"), own.S)  # type: ignore[arg-type]


def test_kronfluence_counts_that_are_none_are_refused(tmp_path: Path) -> None:
    save_file({"fc": torch.eye(2)}, tmp_path / "activation_covariance.safetensors")
    assert set(one(tmp_path / "activation_covariance.safetensors").tensors) == {"fc/activation_covariance"}
    for count in (
        torch.tensor([0]),
        torch.tensor([1, 2]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([torch.nan]),
    ):
        save_file({"fc": count}, tmp_path / "num_activation_covariance_processed.safetensors")
        with pytest.raises(UnreadableFile, match="'fc' is no positive number"):
            read(tmp_path / "activation_covariance.safetensors")


def test_names_alone_make_no_kronfluence(tmp_path: Path) -> None:
    """Another library's file may be called the same; only the keys tell then."""
    save_file({"fc": torch.eye(2)}, tmp_path / "covariance.safetensors")
    assert one(tmp_path / "covariance.safetensors").format == "safetensors"
    assert torch.equal(load_file(tmp_path / "covariance.safetensors")["fc"], torch.eye(2))
