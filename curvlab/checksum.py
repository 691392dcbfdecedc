"""Checksums of tensors: equal for equal bytes, wherever they lie."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 2**17  # words of 4 bytes, which fit into a cache


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum (16 digits) of named tensors: names, dtypes, shapes and bytes, but not where they lie.

    Against accidents, not against forgers. It is computed where a tensor lies, at the speed of reading it; of one
    without content (on "meta") name, dtype and shape count.
    """
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        if not t.is_meta:
            found.update(_piece_sums(t.detach()).numpy().data)
    return found.hexdigest()[:16]


def _piece_sums(t: Tensor) -> Tensor:
    """For each piece of a tensor's bytes Σ weight · word modulo 2^64: exact in any order of summation."""
    flat = t.contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 4 or flat.storage_offset() % 4:
        flat = F.pad(flat, (0, -len(flat) % 4))  # (copies)
    pieces, weights = flat.view(torch.int32).split(_PIECE), _weights(t.device)
    room = torch.empty(len(pieces[0]), dtype=torch.int64, device=t.device)  # new pages would cost more than the work
    return torch.stack([torch.mul(weights[: len(p)], p, out=room[: len(p)]).sum() for p in pieces]).cpu()


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """A fixed random number for each place in a piece; odd, so that no change of one word is lost."""
    content = bytearray(hashlib.shake_256(b"curvlab").digest(8 * _PIECE))
    return (torch.frombuffer(content, dtype=torch.int64) | 1).to(device)
