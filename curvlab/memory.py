"""Bytes are estimated and said before anything large is allocated."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
LARGE = 512 * 2**20  # allocations above are announced


def bytes_of(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a dense tensor of that shape."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def human(count: float) -> str:
    """12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def available(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on `device`; on the CPU within the limit of a container, too."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def _left_in_container() -> list[int]:
    """What the limits of control groups leave (versions 2 and 1), files that the kernel may drop not counted."""
    left = []
    for limit, used, stat, droppable in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            lines = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            taken = int((CGROUP / used).read_text()) - int(lines[droppable])
            left.append(max(0, int((CGROUP / limit).read_text()) - taken))
    return left


def peak(device: torch.device | str = "cpu") -> int:
    """Most bytes in use so far: on a CUDA device what tensors took, else the resident size of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def announce(what: str, needed: int, cheaper: str, device: torch.device | str = "cpu") -> None:
    """Say what is about to be allocated, and refuse what cannot fit.

    Raises:
        MemoryError: `needed` bytes exceed what `device` has left; the message names the cheaper way.
    """
    free = available(device)
    if needed > free:
        raise MemoryError(f"{what} needs {human(needed)}, {human(free)} are free on {device}; instead: {cheaper}")
    if needed > LARGE:
        print(f"curvlab: {what}: {human(needed)} of {human(free)} free", file=sys.stderr, flush=True)
