"""Σ x xᵀ over examples and positions, at half the cost of a full product where it is large."""

import torch
from torch import Tensor

LEAF = 512  # below, a product of the whole square is as fast as its upper triangle


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += Σ x xᵀ over the examples and positions of x (N, T, d), in `total`'s dtype and on its device.

    The upper triangle of a large one alone, at half the cost; `mirror` completes it when all is summed up.
    """
    x = x.to(total.device)
    if x.is_contiguous():
        _add_upper(total, x.flatten(0, 1) if _exact_in_half(x, total) else x.flatten(0, 1).to(total.dtype))
    elif x.shape[1] > x.shape[2]:  # many positions: small products an example
        x = x.to(total.dtype)
        total.addbmm_(x.mT, x)
    else:
        _add_upper(total, x.to(total.dtype).movedim(-1, 0).flatten(1).mT)


def _exact_in_half(x: Tensor, total: Tensor) -> bool:
    """Products of two bfloat16 or float16 numbers are float32 numbers, and tensor cores add these up as such."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """total += rowsᵀ rows, rows (R, d), in blocks of the upper triangle."""
    d = len(total)
    if d <= LEAF:
        _add_product(total, rows, rows)
        return
    h = d // 2
    _add_product(total[:h, h:], rows[:, :h], rows[:, h:])
    _add_upper(total[:h, :h], rows[:, :h])
    _add_upper(total[h:, h:], rows[:, h:])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right)
    else:
        total += torch.mm(left.mT, right, out_dtype=total.dtype)


def mirror(total: Tensor) -> None:
    """Fill in the lower triangle of what `add_gram` summed up."""
    d = len(total)
    if d <= LEAF:
        return
    h = d // 2
    total[h:, :h] = total[:h, h:].mT
    mirror(total[:h, :h])
    mirror(total[h:, h:])
