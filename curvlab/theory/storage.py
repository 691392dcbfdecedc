"""Claim 5: entries, bytes and operations of a projection, counted on the library's own objects."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvlab.curvature.kfac import Factors, kronecker_block
from curvlab.layers import LayerShape
from curvlab.losses import Scale
from curvlab.projector import NullSpace
from curvlab.spectrum import Spectrum, dense_spectrum
from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.curvatures import projector

Shape = tuple[int, int]  # (d_out, d_in)
LLAMA: Shape = (4096, 14336)  # down_proj of Llama-3-8B
SMALL: tuple[Shape, ...] = ((2, 3), (4, 7), (5, 5), (8, 3), (6, 14))


def entries(shape: Shape) -> dict[str, int]:
    """Numbers to be stored for one layer, by what is stored."""
    d_out, d_in = shape
    return {
        "explicit projector": (d_out * d_in) ** 2, "factors": d_in**2 + d_out**2, "bases": d_in**2 + d_out**2,
        "mask": d_out * d_in,
    }  # fmt: skip


def products(shape: Shape) -> dict[str, int]:
    """Of U_out ((U_outᵀ Q U_in) ⊙ M) U_inᵀ: matrix products, Hadamard products, multiply–adds of the former."""
    d_out, d_in = shape
    return {"matrix products": 4, "Hadamard products": 1, "multiply–adds": 2 * d_out * d_in * (d_out + d_in)}


@claim(5, "paper, sections 3.3 and D; reviews")
def storage_of_a_projection(*, shapes: Sequence[Shape] = SMALL, gamma: float = 0.6, seed: int = 0) -> Findings:
    """A projection stores d_in² + d_out² + d_in d_out entries instead of (d_in d_out)², which is O(d_in² + d_out²).

    By Prop. 3 the factors' eigenvectors and one mask suffice. The mask does not change the order that the reviews
    give: 2 d_in d_out ≤ d_in² + d_out², so that it adds at most half.

    Control: the formulas with one side's dimension for the other; a mask in the order of one side.

    Args:
        shapes: (d_out, d_in); everything is allocated at them, the explicit projector too.
    """
    cases, controls = [], []
    for shape in shapes:
        factors, space, dense = _objects(shape, gamma, seed)
        (block,) = space.blocks
        found = {
            "factors": factors.A.numel() + factors.S.numel(),
            "bases": sum(t.numel() for t in block.basis.tensors().values()),
            "mask": block.removed.numel(),
            "explicit projector": projector(space).numel(),
        }
        expected = entries(shape)
        name = f"{shape[0]} × {shape[1]}"
        for what, count in found.items():
            cases.append(Case(f"{name}: {what}, entries beyond the formula", abs(count - expected[what]), 0.0))
        whole = found["bases"] + found["mask"]
        cases += [
            Case(f"{name}: bases and mask / (d_in² + d_out²)", whole / expected["bases"], 1.5),
            Case(f"{name}: mask, bytes an entry", block.removed.element_size(), 1.0),
            # the same projector with all its eigenvectors, as any curvature but a Kronecker one needs it
            Case(f"{name}: eigenvectors of a dense curvature", abs(dense - expected["explicit projector"]), 0.0),
        ]
        if shape[0] != shape[1]:
            wrong = 2 * shape[1] ** 2
            controls.append(control(f"{name}: bases as 2 d_in²", abs(found["bases"] - wrong), 0.0))
        if found["mask"] != sum(shape):
            controls.append(control(f"{name}: a mask of d_in + d_out", abs(found["mask"] - sum(shape)), 0.0))
    return Findings(cases + controls, {"entries at 4096 × 14336": entries(LLAMA)})


@claim(5, "paper, eq. (6); reviews")
def operations_of_a_projection(*, shapes: Sequence[Shape] = SMALL, gamma: float = 0.6, seed: int = 0) -> Findings:
    """A projected step takes four matrix products, 2 d_in d_out (d_in + d_out) multiply–adds: more than linear.

    In p = d_in d_out parameters of one aspect ratio that is p^1.5, where an explicit projector takes p². The library
    multiplies only with the eigenvectors that the mask needs and so takes no more.

    Control: three products; the cost of the explicit projector.
    """
    cases, controls = [], []
    for shape in shapes:
        _, space, _ = _objects(shape, gamma, seed)
        (block,) = space.blocks
        bases = block.basis.tensors()
        Q = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        plain = _run(_plain, bases["u_out"], bases["u_in"], ~block.removed, Q)
        ours = _run(space.project, {"layer": Q})
        expected, name = products(shape), f"{shape[0]} × {shape[1]}"
        cases += [
            Case(f"{name}: matrix products beyond four", abs(plain.count - expected["matrix products"]), 0.0),
            Case(f"{name}: multiply–adds beyond the formula", abs(plain.work - expected["multiply–adds"]), 0.0),
            Case(f"{name}: the library's multiply–adds / the formula's", ours.work / expected["multiply–adds"], 1.0),
        ]
        controls.append(control(f"{name}: three matrix products", abs(plain.count - 3), 0.0))
        if (shape[0] - 2) * (shape[1] - 2) != 4:  # there p² happens to be the cost of the step
            square = (shape[0] * shape[1]) ** 2
            controls.append(control(f"{name}: p² multiply–adds", abs(plain.work - square), 0.0))
    slope = log(_work((128, 224)) / _work((4, 7))) / log(32**2)
    cases += [
        Case("order of the step in p, beside 1.5", abs(slope - 1.5), 1e-9),
        Case("order of the step in p, for the linear time of a review", slope, 1.0, should=False),
    ]
    return Findings(cases + controls, {"at 4096 × 14336": products(LLAMA), "order in p": slope})


def _objects(shape: Shape, gamma: float, seed: int) -> tuple[Factors, NullSpace, int]:
    """K-FAC statistics and a null space of the library at a shape, and entries of a dense curvature's eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    a, g = (torch.randn(2 * d, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    layer = LayerShape("layer", d_out, d_in, False)
    factors = Factors(layer, a.mT @ a, g.mT @ g, Scale(1, 1))
    space = Spectrum((kronecker_block(layer, factors.A, factors.S, None, 0),)).null_space(gamma)
    (dense,) = dense_spectrum(torch.kron(factors.S, factors.A), [layer], True).blocks
    return factors, space, sum(t.numel() for t in dense.basis.tensors().values())


def _plain(u_out: Tensor, u_in: Tensor, kept: Tensor, Q: Tensor) -> Tensor:
    """Eq. (6) as printed."""
    return u_out @ ((u_out.mT @ Q @ u_in) * kept) @ u_in.mT


class _Products(TorchDispatchMode):
    """Counts the matrix products that run, and their multiply–adds."""

    count = work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.count += 1
            self.work += args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


def _work(shape: Shape) -> int:
    """Multiply–adds of eq. (6) at a shape."""
    u_out, u_in = (torch.eye(d) for d in shape)
    return _run(_plain, u_out, u_in, torch.ones(shape, dtype=torch.bool), torch.ones(shape)).work


def _run(function: Callable[..., Any], *args: Any) -> _Products:
    with _Products() as counted:
        function(*args)
    return counted
