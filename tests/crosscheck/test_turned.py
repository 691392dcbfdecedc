"""Weights stored d_in x d_out, as GPT-2's Conv1D has them."""

from pathlib import Path

import pytest
import torch
from made import Made, made
from production import gpt2
from torch import Tensor

from curvlab.crosscheck import updates
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.identify import identify
from curvlab.crosscheck.parts import Part, Stored
from curvlab.layers import LayerShape, supported_layers

PROJ = "transformer.h.1.mlp.c_proj"


def edited(m: Made, name: str, *, turned: bool, projected: bool = True) -> list[Stored]:
    """Factors, cache, and weights before and after a step; `turned`: the weights lie d_in x d_out."""
    generator = torch.Generator().manual_seed(9)
    base, gradient = torch.randn(2, len(m.B), len(m.A), generator=generator)
    step = m.Ub @ ((m.Ub.mT @ gradient @ m.Ua) * m.M.mT) @ m.Ua.mT if projected else gradient
    weights = {"base": base, "edited": base - 0.05 * step * base.norm() / step.norm()}

    def lying(W: Tensor) -> Tensor:
        return W.mT.contiguous() if turned else W

    return [
        Stored(Path(f"{name}_float32_kfac_100.npz"), "torch zip", {"A": m.A, "B": m.B}, {"N": 100}),
        Stored(Path(f"cache_{name}.pt"), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "M": m.M}),
        *(Stored(Path(f"{k}.safetensors"), "safetensors", {f"{name}.weight": lying(W)}) for k, W in weights.items()),
    ]


def checked(files: list[Stored], layers: dict[str, LayerShape] | None = None) -> tuple[Part, list[Finding]]:
    (part,) = identify(files, layers)
    return part, updates.check(part, None, None)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(10, 16), (16, 10), (12, 12)])
@pytest.mark.parametrize("name", [PROJ, "model.layers.1.mlp.down_proj"])
def test_the_update_lies_inside_as_it_is_stored(name: str, shape: tuple[int, int], turned: bool) -> None:
    part, found = checked(edited(made(shape), name, turned=turned))
    assert part.shape == shape
    assert [f.severity for f in found if f.check == "update-subspace"] == ["ok"]
    assert any(f.check == "weight-orientation" for f in part.assumed) == turned


def test_a_square_update_outside_in_both_is_read_by_its_name() -> None:
    m = made((12, 12))
    for name, transposed in ((PROJ, True), ("model.layers.1.mlp.down_proj", False)):
        part, found = checked(edited(m, name, turned=False, projected=False))
        assert part.items["base"].transposed == transposed
        assert [f.fault for f in found if f.check == "update-subspace"] != [None]


def test_one_removed_direction_missed_by_chance_turns_nothing() -> None:
    """Transposed, the unprojected step lies nearly inside: as one random step in a hundred does."""
    m = made((12, 12))
    mask = torch.ones_like(m.M)
    mask[0, 0] = False
    u, v = m.Ub[:, 0], m.Ua[:, 0]
    base, step = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(9))
    step += 10 * torch.outer(u, v) - (v @ step @ u + 10 * (v @ u) ** 2 - 0.05) * torch.outer(v, u)
    files = edited(m, "model.layers.1.mlp.down_proj", turned=False)[:1]
    files += [Stored(Path("cache_model.layers.1.mlp.down_proj.pt"), "torch zip", {"Ua": m.Ua, "Ub": m.Ub, "M": mask})]
    for name, W in (("base", base), ("edited", base - 0.01 * step)):
        files.append(Stored(Path(f"{name}.safetensors"), "safetensors", {"model.layers.1.mlp.down_proj.weight": W}))
    part, found = checked(files)
    assert not part.items["base"].transposed
    assert [f.fault for f in found if f.check == "update-subspace"] == ["update-outside-subspace"]


def test_the_model_s_layer_tells() -> None:
    layers: dict[str, LayerShape] = {own.name: own for own in supported_layers(gpt2(0))}
    square = "transformer.h.1.attn.c_proj"
    m = made((8, 8))
    part, found = checked(edited(m, square, turned=True), layers)
    assert part.items["edited"].transposed
    assert not [f for f in part.assumed if f.check == "weight-orientation"]  # nothing was assumed
    assert [f.severity for f in found if f.check == "update-subspace"] == ["ok"]
