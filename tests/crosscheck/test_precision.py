"""Digits lost to storage, told from numbers that are short by nature."""

import math
from pathlib import Path

import pytest
import torch
from made import LAYER, alarms, faults, findings, made, second_moment

from curvlab.crosscheck import precision
from curvlab.crosscheck.evidence import coarse_dtype, eight_bits
from curvlab.crosscheck.parts import Item, Part, Stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
def test_half_precision_factors(shape: tuple[int, int], stored_as: torch.dtype | None, dtype: torch.dtype) -> None:
    for kind in ("power", "flat", "steep"):
        m = made(shape, kind=kind)
        m.A, m.B = (C.to(dtype).to(stored_as or dtype) for C in (m.A, m.B))
        assert faults(findings(m.files(), 0.9)) == [f"{str(dtype).removeprefix('torch.')}-factors"]


def test_short_numbers_are_no_half_precision() -> None:
    for tensor in (torch.eye(20), torch.arange(400.0).view(20, 20) % 17, torch.zeros(5, 5), 2.0 ** -torch.arange(40.0)):
        assert coarse_dtype(tensor) is None
    x = torch.randint(0, 3, (50, 12), generator=torch.Generator().manual_seed(0)).float()
    assert coarse_dtype(x.mT @ x) is None
    assert coarse_dtype(second_moment(12, "power", 50, 0, torch.float32)) is None
    assert coarse_dtype(second_moment(12, "power", 50, 0, torch.float32).half().double()) is torch.float16


def test_a_count_that_stopped_growing() -> None:
    A = second_moment(5, "flat", 50, 0, torch.float32)
    A[-1, -1] = 2**24 / 3e7
    part = Part("fc", {"A": Item("A", A, "A", "key")}, 3e7)
    (found,) = alarms(precision.check(part))
    assert found.fault == "float32-accumulation"
    A[-1, -1] = 1.0
    assert not alarms(precision.check(part))


def test_gamma_below_the_digits() -> None:
    m = made((10, 16), kind="steep", samples=0)
    found = precision.check(of_part(m), 1 - 1e-9)
    assert [f.severity for f in found if f.check == "precision-gamma"] == ["convention"]
    found = precision.check(of_part(m), 0.9)
    assert [f.severity for f in found if f.check == "precision-gamma"] == ["ok"]


def of_part(m):  # type: ignore[no-untyped-def]
    from curvlab.crosscheck.identify import identify

    return identify(m.files())[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 3e7])
def test_eight_bits(dtype: torch.dtype, scale: float) -> None:
    A = second_moment(16, "power", 100, 0, torch.float32)
    short = (A / A.max() * 200).to(dtype).float() * 2.0 ** round(math.log2(scale))
    name = str(dtype).removeprefix("torch.").removesuffix("fn")
    assert eight_bits(short) == name
    assert "float8-factors" in faults(findings([Stored(Path(f"{LAYER}.A.pt"), "torch zip", {"A": short})]))
    sums = Stored(
        Path("h.5.mlp.c_proj_float32_mom2_1000.npz"), "NumPy archive", {"mom2.mom2": short * 4}, {"mom2.count": 300}
    )
    assert "float8-factors" in faults(findings([sums]))  # dividing by N brings no digits back


def test_what_is_short_without_eight_bits() -> None:
    x = torch.randint(0, 9, (50, 12), generator=torch.Generator().manual_seed(0)).float()
    for tensor in (
        x.mT @ x,
        x,
        torch.eye(20),
        torch.arange(400.0).view(20, 20),
        2.0 ** -torch.arange(40.0),
        torch.zeros(4),
    ):
        assert eight_bits(tensor) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert eight_bits(second_moment(16, "power", 100, 0, torch.float32).to(dtype)) is None
