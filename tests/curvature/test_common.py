"""What every curvature promises, one inherited class for all five."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    Case,
    Tokens,
    assert_close,
    case,
    dense_of,
    mlp,
    padded,
    random_displacement,
    rows_vector,
    vectors,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton, Hessian
from curvlab.losses import CrossEntropy, SquaredError
from curvlab.projector import Ellipsoid, NullSpace
from curvlab.spectrum import Spectrum

pytestmark = pytest.mark.usefixtures("float64")

ONE_LAYER = ["linear", "linear, bias", "sequence", "Conv1D", "convolution, stride"]


_ZEROS = torch.zeros(2, 3, dtype=torch.float64)


class Curvature:
    """Inherit and say how to fit."""

    kind: Any
    options: dict[str, Any] = {}  # noqa: RUF012
    semidefinite = True
    saves = True  # statistics of its own, beside the spectrum

    def fit(self, c: Case, data: Any = None, **options: Any) -> Any:
        data = c.data if data is None else data
        return self.kind.fit(c.model, c.loss, data, c.layers, **({"bias": c.bias} | self.options | options))

    def small(self) -> Case:
        torch.manual_seed(0)
        return vectors(CrossEntropy(), ["0"], True)

    # The spectrum

    @pytest.mark.parametrize("name", ONE_LAYER)
    def test_spectra_are_orthonormal_and_complete(self, name: str) -> None:
        c = case(name)
        for block in self.fit(c).spectrum().blocks:
            for U in block.basis.tensors().values():
                assert_close(U.T @ U, torch.eye(U.shape[1]))
            assert block.basis.complete
            assert block.values.dtype == torch.float64
            assert block.total == pytest.approx(float(block.values.abs().sum()))
            assert block.floor == 0.0
            assert (float(block.values.min()) >= 0) == self.semidefinite or name == "Conv1D"

    def test_quadratic_forms_are_those_of_the_dense_matrix(self) -> None:
        spectrum = self.fit(self.small()).spectrum()
        C, delta = dense_of(spectrum), random_displacement(spectrum.layers, 3)
        v = delta["0"].flatten(1)
        assert_close(spectrum.quadratic_form(delta), ((v @ C) * v).sum(1))
        assert spectrum.size == 16

    def test_rotations_are_inverses(self) -> None:
        (block,) = self.fit(self.small()).spectrum().blocks
        delta = random_displacement(block.basis.layers, 2, 3)
        Z = block.basis.rotate(delta)
        assert Z.shape == (2, 3, *block.basis.shape)
        assert_close(block.basis.rotate_back(Z)["0"], delta["0"])
        assert_close(Z.square().sum(), delta["0"].square().sum())

    # Both constraints

    def test_null_spaces_and_ellipsoids_come_of_every_spectrum(self) -> None:
        spectrum = self.fit(self.small(), **self.units).spectrum()
        C = dense_of(spectrum)
        values, U = torch.linalg.eigh(C)
        null, delta = spectrum.null_space(0.9), random_displacement(spectrum.layers)
        P = torch.stack([null.project({"0": e.view(4, 4)})["0"].flatten() for e in torch.eye(16)], 1)
        assert_close(P @ P, P)
        assert_close(P, P.T)
        assert_close(P @ C, C @ P)
        assert float((C - P @ C).diagonal().sum() / C.trace()) >= 0.9 - 1e-12 or not self.semidefinite
        epsilon = 0.01
        inside = spectrum.ellipsoid(epsilon).confine(delta)["0"].flatten()
        assert 0.5 * float(((U.T @ inside) ** 2 * values.abs()).sum()) == pytest.approx(epsilon)

    units: dict[str, Any] = {}  # noqa: RUF012

    # Data

    @pytest.mark.parametrize("name", ["linear", "linear, bias", "sequence", "convolution, stride"])
    def test_batch_sizes_do_not_matter(self, name: str) -> None:
        c = case(name)
        whole = dense_of(self.fit(c).spectrum())
        assert_close(dense_of(self.fit(c, micro_batch=1).spectrum()), whole)
        assert_close(dense_of(self.fit(c, data=list(reversed(c.data))).spectrum()), whole)

    def test_padding_and_masks(self) -> None:
        together, single = padded()
        together.layers = single.layers = ["first"]
        assert_close(dense_of(self.fit(together).spectrum()), dense_of(self.fit(single).spectrum()))

    def test_wholly_padded_examples_count_nowhere(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(3, 1, 3), torch.tensor([[0], [-100], [2]])
        mask = torch.tensor([[True], [False], [True]])
        c = Case(Tokens(), CrossEntropy(), [(x, y, mask)], ["first"])
        assert_close(dense_of(self.fit(c).spectrum()), dense_of(self.fit(c, [(x[::2], y[::2])]).spectrum()))

    def test_a_loss_at_padding_is_refused(self) -> None:
        together, _ = padded()
        x, y, mask = together.data[0]
        with pytest.raises(ValueError, match="padding carries a loss"):
            self.fit(together, [(x, y.clamp_min(0), mask)])

    def test_masks_that_do_not_fit_are_refused(self) -> None:
        together, _ = padded()
        x, y, mask = together.data[0]
        with pytest.raises(ValueError, match="mask"):
            self.fit(together, [(x, y, mask[:, :-1])])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "empty"),
            ([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))], "empty"),
            ([(torch.zeros(3, 3), torch.zeros(2, dtype=torch.long))], "3 inputs but 2 targets"),
            ([torch.zeros(2, 3)], "inputs, targets"),
            ([(torch.zeros(2, 3),)], "inputs, targets"),
            ([(_ZEROS, torch.zeros(2, 3, dtype=torch.long))], "do not fit"),
            ([(_ZEROS, torch.tensor([0, 3]))], "class indices"),
            ([(_ZEROS, torch.tensor([0, -1]))], "class indices"),
        ],
        ids=["no batch", "no example", "lengths", "tensor", "inputs alone", "target shape", "too large", "negative"],
    )
    def test_data_that_cannot_be_meant(self, data: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.fit(self.small(), data)

    def test_scalar_regression_targets_must_have_the_outputs_shape(self) -> None:
        c = Case(nn.Sequential(nn.Linear(3, 1)), SquaredError(), [(torch.randn(4, 3), torch.randn(4))], ["0"])
        with pytest.raises(ValueError, match="shaped like the outputs"):
            self.fit(c)

    def test_losses_that_are_not_finite(self) -> None:
        c = self.small()
        c.data[1][0][2, 1] = float("nan")
        with pytest.raises(FloatingPointError, match="examples 3 to 6"):
            self.fit(c)
        c = self.small()
        with torch.no_grad():
            c.model[2].bias[0] = float("inf")
        with pytest.raises(FloatingPointError, match="examples 0 to 2"):
            self.fit(c)

    def test_curvature_that_is_not_finite(self) -> None:
        c = self.small()
        c.data[1][0][2, 1] = float("inf")  # tanh makes it a finite loss
        with pytest.raises(ValueError, match="not finite"):
            self.fit(c).spectrum()

    # The model

    def test_the_model_is_left_as_it_was(self) -> None:
        c = self.small()
        c.model[2].weight.requires_grad_(False)
        before = [p.detach().clone() for p in c.model.parameters()]
        self.fit(c)
        self.fit(c, micro_batch=2)
        self.assert_untouched(c.model, before)

    @pytest.mark.parametrize("when", ["in the data", "in the model", "in a later batch"])
    def test_the_model_is_left_as_it_was_when_fitting_fails(self, when: str) -> None:
        c = self.small()
        c.model[2].weight.requires_grad_(False)
        before = [p.detach().clone() for p in c.model.parameters()]
        x, y = c.data[0]
        data = {
            "in the data": [(x, y), (x, y[:1])],
            "in the model": [(torch.cat([x, x], 1), y)],
            "in a later batch": [(x, y), (x * float("nan"), y)],
        }[when]
        with pytest.raises((ValueError, RuntimeError, FloatingPointError)):
            self.fit(c, data)
        self.assert_untouched(c.model, before)

    @staticmethod
    def assert_untouched(model: nn.Module, before: list[Tensor]) -> None:
        assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks

    @pytest.mark.parametrize("extra", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(4)], ids=["dropout", "norm"])
    def test_training_mode_is_refused_where_it_matters(self, extra: Any) -> None:
        c = self.small()
        c.model = nn.Sequential(c.model[0], extra(), nn.Linear(4, 3)).train()
        with pytest.raises(ValueError, match=r"training mode.*'1'.*eval"):
            self.fit(c)
        c.model.eval()
        self.fit(c)

    def test_frozen_models_are_fitted_alike(self) -> None:
        c = self.small()
        free = dense_of(self.fit(c).spectrum())
        c.model.requires_grad_(False)
        assert_close(dense_of(self.fit(c).spectrum()), free, 1e-14)

    def test_under_no_grad_as_well(self) -> None:
        c = self.small()
        with torch.no_grad():
            inside = dense_of(self.fit(c).spectrum())
        assert_close(inside, dense_of(self.fit(c).spectrum()), 1e-14)

    def test_activations_in_place(self) -> None:
        torch.manual_seed(0)
        c = self.small()
        c.model[1] = nn.ReLU()
        expected = dense_of(self.fit(c).spectrum())
        c.model[1] = nn.ReLU(inplace=True)
        assert_close(dense_of(self.fit(c).spectrum()), expected, 1e-14)

    def test_inputs_that_are_overwritten_are_noticed(self) -> None:
        class Overwrites(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                h = self.first(x)
                s = self.second(h)
                with torch.no_grad():
                    h.mul_(0.0)
                return s

        c = self.small()
        c.model, c.layers = Overwrites(), ["second"]
        with pytest.raises(RuntimeError, match=r"'second'.*in place"):
            self.fit(c)

    def test_reused_layers_are_refused(self) -> None:
        class Reuses(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.first(self.first(x).tanh())

        c = self.small()
        c.model, c.layers = Reuses(), ["first"]
        with pytest.raises(ValueError, match="'first' is used more than once"):
            self.fit(c)
        assert not c.model.first._forward_hooks

    def test_layers_that_are_never_used_are_refused(self) -> None:
        c = self.small()
        c.model.add_module("spare", nn.Identity())
        c.model[3].inner = nn.Linear(3, 3)
        c.layers = ["0", "spare.inner"]
        with pytest.raises(ValueError, match=r"never used \['spare.inner'\]"):
            self.fit(c)

    def test_unknown_layers_are_refused_with_near_names(self) -> None:
        torch.manual_seed(0)
        c = self.small()
        c.model, c.layers = nn.ModuleDict({"decoder": mlp()}), ["decodr.0"]
        with pytest.raises(ValueError, match=r"no layer fits 'decodr.0'.*'decoder.0'"):
            self.fit(c)

    def test_tied_weights_are_refused(self) -> None:
        torch.manual_seed(0)
        c = self.small()
        c.model[2] = nn.Linear(4, 4, bias=False)
        c.model.add_module("tied", nn.Linear(4, 4))
        c.model.tied.weight = c.model[2].weight
        c.layers = ["tied"]
        with pytest.raises(ValueError, match=r"'tied' shares its weight with \['2.weight', 'tied.weight'\]"):
            self.fit(c)

    def test_what_is_no_loss_is_refused(self) -> None:
        c = self.small()
        c.loss = "cross-entropy"
        with pytest.raises(TypeError, match="is no loss"):
            self.fit(c)

    def test_torch_losses_are_understood(self) -> None:
        c = self.small()
        expected = dense_of(self.fit(c).spectrum())
        c.loss = nn.CrossEntropyLoss()
        assert_close(dense_of(self.fit(c).spectrum()), expected, 0)

    def test_single_precision(self) -> None:
        c = self.small()
        expected = dense_of(self.fit(c).spectrum())
        c.model.float()
        single = self.fit(c, [(x.float(), y) for x, y in c.data]).spectrum()
        (block,) = single.blocks
        back = block.basis.map(Tensor.double)
        columns = [
            back.rotate_back(block.values * back.rotate({"0": e.view(4, 4)}))["0"].flatten() for e in torch.eye(16)
        ]
        assert_close(torch.stack(columns, 1), expected, 2e-6)

    # Files

    def test_statistics_survive_a_file(self, tmp_path: Path) -> None:
        fitted = self.fit(self.small())
        if isinstance(fitted, (GaussNewton, Hessian, EKFAC)):
            return  # a spectrum is what they save
        fitted.save(tmp_path / "there" / "fit.safetensors")
        assert_identical(self.kind.load(tmp_path / "there" / "fit.safetensors"), fitted)

    def test_spectra_and_constraints_survive_files(self, tmp_path: Path) -> None:
        spectrum = self.fit(self.small(), **self.units).spectrum()
        null, ellipsoid = spectrum.null_space(0.8), spectrum.ellipsoid(0.1)
        for i, (thing, kind) in enumerate(((spectrum, Spectrum), (null, NullSpace), (ellipsoid, Ellipsoid))):
            thing.save(tmp_path / str(i))  # type: ignore[attr-defined]
            assert_identical(kind.load(tmp_path / str(i)), thing)  # type: ignore[attr-defined]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]  # no temporary files

    def test_files_of_another_kind_are_refused(self, tmp_path: Path) -> None:
        spectrum = self.fit(self.small()).spectrum()
        path = tmp_path / "x.safetensors"
        spectrum.save(path)
        for kind in (NullSpace, Ellipsoid, KFAC, Covariance):
            with pytest.raises(ValueError, match="holds 'spectrum', expected"):
                kind.load(path)  # type: ignore[attr-defined]
        spectrum.null_space(0.5).save(path)
        with pytest.raises(ValueError, match="holds 'null space', expected 'spectrum'"):
            Spectrum.load(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="no intact safetensors file"):
            NullSpace.load(path)
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="no curvlab file"):
            Spectrum.load(path)
        for junk in (b"", b"hello", b"\xff" * 64):
            path.write_bytes(junk)
            with pytest.raises(ValueError, match="no intact safetensors file"):
                Spectrum.load(path)
        with pytest.raises(FileNotFoundError, match="no such file"):
            Spectrum.load(tmp_path / "nowhere")


def assert_identical(a: Any, b: Any) -> None:
    """Field by field, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    elif hasattr(a, "__dataclass_fields__"):
        for name in a.__dataclass_fields__:
            assert_identical(getattr(a, name), getattr(b, name))
    else:
        assert a == b


class TestGaussNewton(Curvature):
    kind = GaussNewton


class TestGaussNewtonRecomputed(Curvature):
    kind = GaussNewton
    options = {"store": False}  # noqa: RUF012


class TestHessian(Curvature):
    kind = Hessian
    semidefinite = False

    def small(self) -> Case:
        torch.manual_seed(0)
        return vectors(CrossEntropy(), ["0"], True)


class TestKFAC(Curvature):
    kind = KFAC
    options = {"labels": "exact"}  # noqa: RUF012


class TestKFACReduced(Curvature):
    kind = KFAC
    options = {"labels": "data", "sharing": "reduce"}  # noqa: RUF012


class TestEKFAC(Curvature):
    kind = EKFAC
    options = {"labels": "exact"}  # noqa: RUF012


class TestCovariance(Curvature):
    kind = Covariance
    units = {"labels": "exact"}  # noqa: RUF012


class TestScaledCovariance(Curvature):
    kind = Covariance
    options = {"labels": "exact"}  # noqa: RUF012


def test_vectors_in_rows_layout_are_what_displacements_flatten_to() -> None:
    c = case("linear, two layers")
    fit = GaussNewton.fit(*c.arguments, bias=True)
    delta = random_displacement(fit.layers)
    v = rows_vector(fit.layers, delta)
    assert float(fit.spectrum().quadratic_form(delta)) == pytest.approx(float(v @ fit.dense("rows") @ v))


@pytest.mark.parametrize(
    ("kind", "options", "cheaper"),
    [
        (GaussNewton, {}, "store=False"),
        (Hessian, {}, "fewer examples"),
        (KFAC, {"labels": "exact"}, "fewer layers"),
        (EKFAC, {"labels": "exact"}, "fewer layers"),
        (Covariance, {}, "fewer layers"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_cheaper_way(
    kind: Any, options: dict[str, Any], cheaper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("linear")
    exact = kind.fit(*c.arguments, **options)
    monkeypatch.setattr("curvlab.memory.available", lambda device="cpu": 50)
    with pytest.raises(MemoryError, match=cheaper):
        kind.fit(*c.arguments, **options)
    if kind in (GaussNewton, Hessian):
        with pytest.raises(MemoryError, match=r"spectrum\(gamma="):
            exact.dense()
        with pytest.raises(MemoryError, match="fewer layers"):
            exact.spectrum(k=2)
