"""The activation covariance I ⊗ A, bare and in the loss' units."""

import pytest
import torch
from reference import assert_close, case, dense_of, kfac_factors, padded

from curvlab.curvature import Covariance
from curvlab.spectrum import Spectrum

pytestmark = pytest.mark.usefixtures("float64")

CASES = [
    "linear",
    "linear, two layers",
    "linear, ignored",
    "sequence, two layers",
    "sequence, ragged",
    "Conv1D",
    "convolution, stride",
]


@pytest.mark.parametrize("name", CASES)
def test_identity_kron_inputs(name: str) -> None:
    c = case(name)
    fit = Covariance.fit(*c.arguments, bias=c.bias)
    spectrum = fit.spectrum()
    assert fit.labels is None
    assert not spectrum.scaled
    for layer, block in zip(c.layers, spectrum.blocks, strict=True):
        A, _ = kfac_factors(c, layer)
        assert_close(fit.moments[layer].A, A)
        expected = torch.kron(torch.eye(block.basis.layer.d_out), A)  # rows: each output unit has A
        assert_close(dense_of(Spectrum((block,))), expected)
        assert block.total == pytest.approx(float(expected.trace()))
        assert block.values.shape == (block.basis.layer.d_out, block.basis.layer.d_in)


@pytest.mark.parametrize("labels", ["exact", "data"])
@pytest.mark.parametrize("name", CASES)
def test_labels_scale_by_the_mean_of_s(name: str, labels: str) -> None:
    c = case(name)
    fit = Covariance.fit(*c.arguments, labels=labels, bias=c.bias)  # type: ignore[arg-type]
    assert fit.spectrum().scaled
    for layer, block in zip(c.layers, fit.spectrum().blocks, strict=True):
        A, S = kfac_factors(c, layer, labels)
        d_out = block.basis.layer.d_out
        assert_close(dense_of(Spectrum((block,))), float(S.trace()) / d_out * torch.kron(torch.eye(d_out), A))
        assert block.total == pytest.approx(float(A.trace() * S.trace()))


def test_padding_counts_nowhere() -> None:
    together, single = padded()
    for layer in together.layers:
        A, S = kfac_factors(single, layer)
        moments = Covariance.fit(*together.arguments, labels="exact", bias=True).moments[layer]
        assert_close(moments.A, A)
        assert moments.g_norm / moments.scale.terms == pytest.approx(float(S.trace()))


@pytest.mark.parametrize("labels", [None, "model"])
def test_merged_sums_are_one_fit(labels) -> None:  # type: ignore[no-untyped-def]
    c = case("sequence, two layers")
    first, second = c.data
    whole = Covariance.fit(*c.arguments, labels=labels, bias=True)
    merged = Covariance.merge(
        Covariance.fit(c.model, c.loss, [first], c.layers, labels=labels, bias=True),
        Covariance.fit(c.model, c.loss, [second], c.layers, labels=labels, bias=True, first_example=len(first[0])),
    )
    for layer in c.layers:
        assert_close(merged.moments[layer].A, whole.moments[layer].A)
        assert merged.moments[layer].g_norm == pytest.approx(whole.moments[layer].g_norm)
        assert merged.moments[layer].scale == whole.moments[layer].scale


def test_every_eigenvalue_is_removed_d_out_times() -> None:
    c = case("linear")
    null = Covariance.fit(*c.arguments).spectrum().null_space(k=1)
    assert null.removed == 4  # d_out
    assert torch.equal(null.blocks[0].removed.any(0), null.blocks[0].removed.all(0))


def test_a_bare_covariance_has_no_ellipsoid() -> None:
    c = case("linear")
    with pytest.raises(ValueError, match=r"units.*labels"):
        Covariance.fit(*c.arguments).spectrum().ellipsoid(1.0)
    assert Covariance.fit(*c.arguments, labels="exact").spectrum().ellipsoid(1.0).epsilon == 1.0
