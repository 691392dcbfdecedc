"""Random numbers keyed by (seed, draw, example, position): batch size and sharding change nothing.

A counter-based generator (the splitmix64 finaliser over the key): each number is a pure function of its
key, the same on every device, so any worker can draw for any example.
"""

import math

import torch
from torch import Tensor

CHUNK = 2**19  # probabilities at a time, 4 MiB: a core's cache; more elsewhere
BLOCK = 128  # classes whose probabilities are summed before the search

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def uniforms(seed: int, draw: int, examples: Tensor, positions: int, width: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), float64, shape (N, positions, width), for `examples` (N,) int64 indices."""
    device = examples.device
    state = _mix(torch.tensor(seed, dtype=torch.int64, device=device) * _GOLDEN + 1)
    state = _mix(state + torch.tensor(draw, dtype=torch.int64, device=device) * _GOLDEN)
    state = _mix(state + examples.to(torch.int64)[:, None, None] * _GOLDEN)
    state = _mix(state + torch.arange(1, positions + 1, device=device)[None, :, None] * _GOLDEN)
    state = _mix(state + torch.arange(1, width + 1, device=device)[None, None, :] * _GOLDEN)
    return (_shift_right(state, 12).to(torch.float64) + 0.5) * 2.0**-52  # 53 bits would round up to one


def normals(seed: int, draw: int, examples: Tensor, positions: int, width: int) -> Tensor:
    """Standard normal numbers, float64, shape (N, positions, width) (inverse normal CDF of `uniforms`)."""
    return torch.special.erfinv(2 * uniforms(seed, draw, examples, positions, width) - 1) * math.sqrt(2)


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """The class at which the running sum of softmax(logits) (…, C), in float64, first reaches u (…) in (0, 1).

    Two searches, over sums of blocks of classes and inside one block: no running sum over a whole vocabulary, and
    float64 numbers of a few rows at a time.
    """
    rows, heights = logits.flatten(0, -2), u.flatten()
    size = max(1, (CHUNK if logits.device.type == "cpu" else 64 * CHUNK) // logits.shape[-1])
    parts = [_search(few, some) for few, some in zip(rows.split(size), heights.split(size), strict=True)]
    return torch.cat(parts).view(u.shape)


def _search(logits: Tensor, u: Tensor) -> Tensor:
    """`categorical` of a few rows (R, C)."""
    p = logits.double()
    if p is logits:
        p = p.clone()
    p.sub_(p.amax(-1, keepdim=True)).exp_()
    C = p.shape[-1]
    whole = C - C % BLOCK
    sums = [p[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)] if whole else []
    sums += [p[:, whole:].sum(-1, keepdim=True)] if whole < C else []
    cdf = torch.cat(sums, -1).cumsum(-1)
    height = u[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, height)
    below = torch.where(block > 0, cdf.gather(-1, (block - 1).clamp_min(0)), 0.0)
    classes = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(-1, classes.clamp(max=C - 1)).masked_fill_(classes >= C, 0.0).cumsum(-1)
    # rounding must not lead past the block's last class with a probability
    step = torch.searchsorted(inside, torch.minimum(height - below, inside[:, -1:]))
    return (block * BLOCK + step).squeeze(-1)
