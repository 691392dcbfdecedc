"""Masks: the γ rule recognised, every way of getting it wrong named, and no alarm on correct ones."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made import LAYER, Made, alarms, authors_mask, faults, findings, made, of_part
from torch import Tensor

from curvlab.crosscheck import masks
from curvlab.crosscheck.evidence import precision
from curvlab.crosscheck.gamma_rule import Products, gamma_range, nested, sequential_ranks, threshold_of
from curvlab.crosscheck.parts import Item, Part, Stored
from curvlab.curvature.kfac import kronecker_block
from curvlab.layers import LayerShape
from curvlab.spectrum import Spectrum

SHAPES = [(10, 16), (12, 12), (1, 8), (8, 1), (2, 3), (1, 1)]
KINDS = ["power", "flat", "steep", "dominant", "repeated"]


def ordered(m: Made) -> tuple[Tensor, Tensor]:
    products = torch.outer(m.la, m.lb)
    return products, products.flatten().sort(descending=True).values


def rank(sums: Tensor, gamma: float) -> int:
    return min(int(torch.searchsorted(sums / sums[-1], gamma)), len(sums) - 1)


def ascending(m: Made) -> None:
    products, largest_first = ordered(m)
    smallest_first = largest_first.flip(0)
    m.M = products < smallest_first[rank(smallest_first.cumsum(0), m.gamma)]


def non_strict(m: Made) -> None:
    products, largest_first = ordered(m)
    m.M = products <= largest_first[rank(largest_first.cumsum(0), m.gamma)]


def one_more(m: Made) -> None:
    products, largest_first = ordered(m)
    m.M = products < largest_first[rank(largest_first.cumsum(0), m.gamma) + 1]


def other_factors(m: Made) -> None:
    order = torch.randperm(len(m.A), generator=torch.Generator().manual_seed(3))
    m.M = made((len(m.B), len(m.A)), seed=77, kind="flat").M[order]


def wrong_end(m: Made) -> None:
    m.M = ~m.M


def transposed(m: Made) -> None:
    m.M = m.M.mT.contiguous()


def both(m: Made) -> None:
    transposed(m)
    wrong_end(m)


FAULTS: dict[str, tuple[Callable[[Made], None], list[str]]] = {
    "complement": (wrong_end, ["wrong-end-threshold"]),
    "summed from the small end": (ascending, ["wrong-end-threshold"]),
    "transposed": (transposed, ["transposed-mask"]),
    "transposed complement": (both, ["transposed-mask", "wrong-end-threshold"]),
    "non-strict": (non_strict, ["non-strict-threshold"]),
    "as if sorted": (
        lambda m: setattr(m, "M", authors_mask(m.la.flip(0), m.lb.flip(0), m.gamma)),
        ["unsorted-eigenvalues"],
    ),
    "of other factors": (other_factors, ["stale-mask"]),
    "another gamma": (lambda m: setattr(m, "M", authors_mask(m.la, m.lb, 0.5)), ["wrong-gamma"]),
    "one direction more": (one_more, ["wrong-gamma"]),
    "all kept": (lambda m: setattr(m, "M", torch.ones_like(m.M)), ["mask-all-kept"]),
    "all removed": (lambda m: setattr(m, "M", torch.zeros_like(m.M)), ["mask-all-removed"]),
    "not a mask": (lambda m: setattr(m, "M", m.M * 0.5), ["mask-not-binary"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_correct_masks_give_no_alarm(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    for seed, gamma, samples in ((0, 0.5, 100), (1, 0.9, 3), (2, 0.999, 0)):
        m = made(shape, seed, kind, dtype, gamma, samples)
        for asked in (gamma, None):
            assert not alarms(findings(m.files(), asked)), (seed, gamma, asked)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["power", "flat", "steep"])
@pytest.mark.parametrize("shape", [(10, 16), (12, 12)])
def test_faults_are_named(shape: tuple[int, int], kind: str, fault: str) -> None:
    damage, expected = FAULTS[fault]
    for seed, dtype in ((0, torch.float32), (1, torch.float64)):
        m = made(shape, seed, kind, dtype)
        correct = m.M
        damage(m)
        if "transposed" in fault and shape[0] == shape[1] and torch.equal(correct, correct.mT):
            continue  # a symmetric mask has no wrong way round
        if fault == "another gamma":
            same = dataclasses.replace(m)
            ascending(same)
            if torch.equal(m.M, same.M):
                continue  # summing from the small end would have given the same mask
        assert faults(findings(m.files(), 0.9)) == expected, (seed, dtype)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_do_not_matter(scale: float) -> None:
    m = made()
    m.A, m.B = m.A * scale, m.B * scale
    assert not alarms(findings(m.files(), 0.9))
    m.M = ~m.M
    assert faults(findings(m.files(), 0.9)) == ["wrong-end-threshold"]


def test_gamma_range_against_a_loop() -> None:
    """Every mask of a rule says its γ, and only such γ give that mask."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    values[0, 0] = values[2, 3]  # one eigenspace of two
    products = Products(values, 1e-14 * torch.ones_like(values), 2.0**-52)
    for gamma in np.linspace(0.02, 0.98, 49):
        flat = sorted(values.flatten().tolist(), reverse=True)
        total, running = sum(flat), 0.0
        for value in flat:
            running += value
            if running >= gamma * total:
                break
        removed = values >= value
        found = gamma_range(products, removed)
        assert found.holds(gamma)
        assert found.removed == pytest.approx(float(values[removed].sum()) / total)
        assert threshold_of(products, gamma)[0] == value
        strictly_above = float(values[values > value].sum()) / total
        assert found.low == pytest.approx(strictly_above, abs=1e-12)
        assert found.high == pytest.approx(found.removed, abs=1e-12)


def test_curvlabs_own_rule_agrees() -> None:
    """The reference's null space, stored in the authors' layout, is the rule."""
    for seed in range(3):
        m = made((9, 14), seed, dtype=torch.float64)
        block = kronecker_block(LayerShape(LAYER, 9, 14, False), m.A, m.B, None, 0)
        null = Spectrum((block,)).null_space(gamma=0.95).blocks[0]
        m.Ua, m.Ub, m.M = block.basis.u_in, block.basis.u_out, ~null.removed.mT
        found = findings(m.files(), 0.95)
        assert not alarms(found)
        (said,) = [finding for finding in found if finding.check == "mask-gamma"]
        assert said.measured == pytest.approx(float(null.energy), rel=1e-9)


def with_values(values: Tensor, mask: Tensor) -> Part:
    d_out, d_in = values.shape
    items = {"mask": Item("mask", mask, "m", "key"), "eigenvalues": Item("eigenvalues", values, "v", "key")}
    return Part("fc", items, shape=(d_out, d_in))  # type: ignore[arg-type]


def test_a_cut_through_equal_eigenvalues() -> None:
    values = torch.tensor([[4.0, 2.0, 2.0], [2.0, 1.0, 0.5]], dtype=torch.float64)
    whole = values < 2.0
    assert not alarms(masks.check(with_values(values, whole), 0.7))
    cut = whole.clone()
    cut[1, 0] = True
    (found,) = alarms(masks.check(with_values(values, cut), 0.7))
    assert (found.fault, found.severity) == ("ties-cut", "deviation")
    # equal up to round-off only: who recomputes may see another order
    noisy = values * (1 + 1e-16 * torch.arange(6).view(2, 3)) + torch.tensor([[0, 0, 4e-16], [8e-16, 0, 0]])
    found = masks.check(with_values(noisy, cut), 0.7)
    assert [(f.severity) for f in found if f.fault == "ties-cut"] == ["convention"]
    assert not alarms(found)


def test_a_mask_of_corrected_eigenvalues() -> None:
    """EK-FAC: right with its own eigenvalues, said to be likely EK-FAC's without, stale against others."""
    m = made((12, 20), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(20, 12, generator=generator, dtype=torch.float64)
    corrected = torch.outer(m.la, m.lb) * (0.5 + noise)
    flat = corrected.flatten().sort(descending=True).values
    m.M = corrected < flat[rank(flat.cumsum(0), 0.9)]
    files = m.files()
    found = findings(files, 0.9)
    assert not alarms(found)
    (said,) = [f for f in found if f.check == "mask-threshold"]
    assert said.severity == "convention"
    assert "EK-FAC" in said.cause
    files.append(Stored(Path(f"{LAYER}_lambda_matrix.pt"), "torch zip", {"lambda_matrix": corrected.mT.contiguous()}))
    found = findings(files, 0.9)
    assert not alarms(found)
    assert [f.severity for f in found if f.check == "mask-gamma"] == ["ok"]


def test_float32_running_sum() -> None:
    """Small products vanish in a running float32 sum of many: the rank it gives is named."""
    d_out, d_in, gamma = 600, 800, 0.9999
    outer = torch.arange(1, d_out + 1, dtype=torch.float64) ** -0.9
    inner = torch.arange(1, d_in + 1, dtype=torch.float64) ** -0.9
    values = torch.outer(outer, inner)
    products = Products(values, 1e-12 * values, 2.0**-23)
    exact = values.flatten().sort(descending=True).values
    k = int(torch.searchsorted(exact.cumsum(0), gamma * exact.sum())) + 1
    wrong = [r for r in sequential_ranks(products, gamma) if abs(r - k) > 100]
    assert wrong
    items = {
        "values_out": Item("values_out", outer, "o", "key"),
        "values_in": Item("values_in", inner, "i", "key"),
        "mask": Item("mask", values < exact[wrong[0] - 1], "m", "key"),
    }
    part = Part("fc", items, shape=(d_out, d_in))  # type: ignore[arg-type]
    (found,) = alarms(masks.check(part, gamma))
    assert (found.fault, found.severity) == ("float32-energy", "deviation")
    items["mask"] = dataclasses.replace(items["mask"], tensor=values < exact[k - 1])
    assert not alarms(masks.check(part, gamma))


def test_sequential_ranks_against_a_loop() -> None:
    values = torch.rand(30, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = Products(values, torch.zeros_like(values), 2.0**-23)
    flat = [np.float32(v) for v in sorted(values.flatten().tolist(), reverse=True)]
    sums, running = [], np.float32(0)
    for value in flat:
        running = np.float32(running + value)
        sums.append(running)
    first = next(i for i, total in enumerate(sums) if total >= np.float32(0.9) * sums[-1])
    assert first + 1 in sequential_ranks(products, 0.9)


def test_a_basis_of_the_leading_eigenvectors() -> None:
    """What curvlab's compact null space stores: the mask is whole, what lies outside the basis is kept."""
    m = made((9, 14), dtype=torch.float64)
    block = kronecker_block(LayerShape(LAYER, 9, 14, False), m.A, m.B, None, 0)
    null = Spectrum((block,)).null_space(gamma=0.8).compact().blocks[0]
    mask = torch.ones(9, 14, dtype=torch.bool)
    mask[: null.removed.shape[0], : null.removed.shape[1]] = ~null.removed
    m.Ua, m.Ub, m.M = null.basis.u_in, null.basis.u_out, mask.mT
    assert null.removed.numel() < mask.numel()
    found = findings(m.files(), 0.8)
    assert not alarms(found)
    assert [f.severity for f in found if f.check == "mask-gamma"] == ["ok"]


def test_a_mask_of_the_inputs_alone() -> None:
    """I ⊗ A: the same for every output."""
    m = made((9, 14))
    shares = m.la.flip(0).cumsum(0) / m.la.sum()
    cut = m.la.flip(0)[int(torch.searchsorted(shares, 0.9))]
    m.M = (m.la < cut)[:, None].expand(14, 9).contiguous()
    cache = m.files()[1]
    files = [Stored(Path(f"{LAYER}_float32_mom2_100.npz"), "torch zip", {"A": m.A}), cache]
    del cache.tensors["Ub"]
    found = findings(files, 0.9)
    assert not alarms(found)
    assert [f.severity for f in found if f.check == "mask-gamma"] == ["ok"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 8)])
def test_nested_sets(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, generator=generator) for n in shape)
    assert nested(torch.outer(a, b) < 0.2)
    if shape == (5, 8):
        kept = torch.outer(a, b) < 0.2
        kept[0, 0], kept[1, 1], kept[0, 1], kept[1, 0] = True, True, False, False
        assert not nested(kept)


def test_a_cache_alone_says_what_can_be_said() -> None:
    m = made()
    found = findings(m.files()[1:], 0.9)
    assert not alarms(found)
    assert [f.severity for f in found if f.check == "mask-threshold"] == ["ok"]


def test_a_mask_beside_factors_without_eigenvectors() -> None:
    """Indices then mean an ascending or descending order; both are tried."""
    for flip in (False, True):
        m = made((10, 16))
        M = m.M.flip(0, 1) if flip else m.M
        part = Part(
            "fc",
            {
                "A": Item("A", m.A, "A", "key"),
                "S": Item("S", m.B, "B", "key"),
                "mask": Item("mask", M, "M", "key", transposed=True),
            },
            shape=(10, 16),
        )
        assert not alarms(of_part(part, 0.9))


def test_energy_is_measured_in_float64() -> None:
    m = made((10, 16), gamma=0.9)
    (said,) = [f for f in findings(m.files(), 0.9) if f.check == "mask-gamma"]
    la, lb = (torch.linalg.eigvalsh(C.double()) for C in (m.A, m.B))
    products = torch.outer(la, lb)
    share = float(products[~m.M].sum() / products.sum())
    assert isinstance(said.measured, float)
    assert math.isclose(said.measured, share, rel_tol=1e-5)


def cache_of(m: Made, **tensors: Tensor) -> list[Stored]:
    return [m.files()[0], Stored(Path(f"cache_{LAYER}.pt"), "torch zip", tensors)]


@pytest.mark.parametrize("one", ["Ua", "Ub"])
def test_half_a_cache(one: str) -> None:
    m = made((10, 16))
    assert faults(findings(cache_of(m, M=m.M, **{one: getattr(m, one)}), 0.9)) == ["incomplete-cache"]
    assert not alarms(findings(cache_of(m, M=m.M)))  # eigenvectors of both sides may be anywhere


def test_a_mask_of_inputs_alone_needs_no_basis_of_outputs() -> None:
    m = made((10, 16))
    ordered = m.la.flip(0)
    kept = m.la < ordered[rank(ordered.cumsum(0), 0.9)]
    inputs = cache_of(m, M=kept[:, None].expand_as(m.M).clone(), Ua=m.Ua)
    assert not alarms(findings(inputs, 0.9))
    inputs = cache_of(m, M=~kept[:, None].expand_as(m.M), Ua=m.Ua)
    assert faults(findings(inputs, 0.9)) == ["wrong-end-threshold"]


def test_factors_of_float32_products_in_float64() -> None:
    """Their triangles differ, and their small eigenvalues are known, as float32 leaves them."""
    for seed in range(3):
        x = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed)) * 0.8 ** torch.arange(16)
        skewed = (
            x.mT @ x
            + 1e-7 * torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * x.square().sum(0).max()
        )
        m = made((10, 16), seed, dtype=torch.float64)
        m.A = skewed.double() / 7
        m.la, m.Ua = torch.linalg.eigh(m.A)
        m.M = authors_mask(m.la, m.lb, 0.9)
        assert precision(m.A) == torch.finfo(torch.float32).eps
        assert not alarms(findings(m.files(), 0.9))
    assert precision(made(dtype=torch.float64).A) == torch.finfo(torch.float64).eps
