"""Files that are damaged, or whose contents do not fit together, are refused; so are merges of nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.losses import CrossEntropy, Scale
from curvlab.spectrum import Spectrum

Tensors, Header = dict[str, Tensor], dict[str, str]


def fitted(kind: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    fits: dict[str, Any] = {"KFAC": KFAC, "EKFAC": EKFAC, "Covariance": Covariance, "Spectrum": KFAC}
    fit = fits[kind].fit(model, CrossEntropy(), data, "0", labels="data")
    return fit.spectrum() if kind == "Spectrum" else fit


def written(kind: str, path: Path) -> tuple[Tensors, Header, type[Any]]:
    """What a file holds, to be changed."""
    fit = fitted(kind)
    fit.save(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata(), type(fit)  # noqa: SIM118


CONTENT = {"KFAC": "0/S", "EKFAC": "0.values", "Covariance": "0", "Spectrum": "0.u_in"}  # one tensor of each


@pytest.mark.parametrize("kind", CONTENT)
def test_what_was_not_written_so_is_damaged(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors, header, own = written(kind, path)
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(ValueError, match="is damaged"):
        own.load(path)
    save_file(tensors, path, header | {"labels": "exact", "scaled": "false"})
    with pytest.raises(ValueError, match="is damaged"):
        own.load(path)
    header.pop("content_checksum")
    save_file(tensors, path, header)  # by others, who write none
    own.load(path)


@pytest.mark.parametrize("kind", CONTENT)
def test_what_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors, header, own = written(kind, path)
    header.pop("content_checksum")
    name = CONTENT[kind]

    def refused(tensors: Tensors, header: Header, message: str) -> None:
        save_file(tensors, path, header)
        with pytest.raises(ValueError, match=f"f.safetensors.*{message}"):
            own.load(path)

    for entry in header.keys() - {"curvlab", "kind", "origin", "format"}:
        refused(tensors, {key: value for key, value in header.items() if key != entry}, f"lacks '{entry}'")
    for entry in header.keys() - {"curvlab", "kind", "format", "labels", "sharing", "scaled"}:
        refused(tensors, header | {entry: "{"}, "")
        refused(tensors, header | {entry: "[3]"}, "")
    refused({key: t for key, t in tensors.items() if key != name} | {"x": torch.ones(1)}, header, f"lacks '{name}'")
    for t in (tensors[name][:2, :2], torch.ones(2), torch.ones(()).reshape(1, 1, 1)):
        refused(tensors | {name: t.contiguous()}, header, f"'{name}' is of shape")


@pytest.mark.parametrize("number", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC", "Covariance"])
def test_sums_of_squares_are_not_negative(kind: str, number: float, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors, header, own = written(kind, path)
    header.pop("content_checksum")
    name = CONTENT[kind]
    tensors[name][1, 1] = number
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=f"f.safetensors: '{name}' has entries that are n"):
        own.load(path)
    if kind == "Covariance":
        fit = fitted(kind)
        replace(fit, moments={"0": replace(fit.moments["0"], g_norm=number)}).save(path)
        with pytest.raises(ValueError, match="g_norm"):
            own.load(path)


def test_vectors_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors, header, _ = written("Spectrum", path)
    header.pop("content_checksum")
    layers = json.loads(header["bases"])
    layers[0]["layers"][0]["d_out"] = 7
    save_file(tensors, path, header | {"bases": json.dumps(layers)})
    with pytest.raises(ValueError, match=r"'0.u_out' is of shape \(5, 5\), expected \(7, 5\)"):
        Spectrum.load(path)
    tensors["0.values"][0, 0] = torch.nan
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match="not finite"):
        Spectrum.load(path)


@pytest.mark.parametrize("merge", [KFAC.merge, Covariance.merge])
def test_nothing_does_not_merge(merge: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no parts"):
        merge()


def test_shares_are_numbers_of_parts_that_have_means() -> None:
    fit = fitted("KFAC")
    for weights in ([torch.nan, 1.0], [1.0, torch.nan], [torch.inf, 1.0], [1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights must be 2 numbers"):
            KFAC.merge(fit, fit, weights=weights)
    own = fit.factors["0"]
    for scale in (Scale(0, 6), Scale(6, 0)):
        empty = replace(fit, factors={"0": replace(own, scale=scale)})
        with pytest.raises(ValueError, match=r"part 1 has no loss terms or positions at \['0'\]"):
            KFAC.merge(fit, empty, weights=[1.0, 0.0])
        assert KFAC.merge(fit, empty).factors["0"].scale == own.scale + scale
