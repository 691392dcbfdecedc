"""Caches whose names lead to no factors."""

from pathlib import Path

import pytest
import torch
from made import Made, alarms, faults, findings, made

from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Stored


def factors(m: Made, name: str) -> Stored:
    return Stored(Path(f"{name}_float32_kfac_100.npz"), "torch zip", {"A": m.A, "B": m.B}, {"N": 100})


def cache(m: Made, name: str) -> Stored:
    return Stored(Path(name), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "M": m.M})


@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
@pytest.mark.parametrize("kind", ["power", "flat", "steep"])
def test_a_cache_goes_to_the_factors_that_it_diagonalises(kind: str, shape: tuple[int, int]) -> None:
    two = [made(shape, seed, kind) for seed in (0, 1)]
    names = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    files = [factors(m, name) for m, name in zip(two, names, strict=True)]
    first, second = identify([*files, cache(two[1], "model.layers.9.attn.o_proj.pt")])
    assert "mask" not in first.items
    assert {"A", "S", "U_in", "U_out", "mask"} <= set(second.items)
    assert second.layer == names[1]
    (said,) = [f for f in second.assumed if "held against the factors" in f.cause]
    assert said.severity == "convention"
    assert not alarms(findings([*files, cache(two[1], "model.layers.9.attn.o_proj.pt")], 0.9))


def test_a_cache_of_no_factors_is_said() -> None:
    other = made((10, 16), 5)
    files = [factors(made((10, 16), seed), f"model.layers.{seed}.mlp.down_proj") for seed in (0, 1)]
    found = findings([*files, cache(other, "model.layers.9.mlp.down_proj.pt")], 0.9)
    assert faults(found) == ["cache-without-factors"]
    assert "held against none" in next(f.cause for f in found if f.fault == "cache-without-factors")


def test_a_nameless_cache_of_the_only_factors_is_held_against_them() -> None:
    m = made((10, 16), 0)
    m.Ua = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    found = findings([factors(m, "model.layers.1.mlp.down_proj"), cache(m, "cache.pt")], 0.9)
    assert faults(found) == ["stale-mask"]


def test_caches_alone_are_no_orphans() -> None:
    assert not alarms(findings([cache(made((10, 16)), "model.layers.9.mlp.down_proj.pt")]))
