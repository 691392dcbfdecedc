"""Several processes, one fit: each takes its turn of the data, and sums are added up.

    torchrun --nproc-per-node 2 script.py

with `distributed.start()` and `KFAC.fit(..., distributed=True)` in the script. Every process has the whole model and
iterates over the same data; examples keep their numbers, so that labels drawn from the model are those of one process.
"""

import atexit
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> torch.device:
    """Join the processes that torchrun started (NCCL where each has a GPU, else gloo); the device of this one."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:
        raise RuntimeError("this process was not started by torchrun: torchrun --nproc-per-node 2 script.py")
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpu:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
        atexit.register(_stop)
    return torch.device("cuda", local) if gpu else torch.device("cpu")


def _stop() -> None:
    """Leave the group before Python ends: threads of gloo that outlive it abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def turn() -> tuple[int, int]:
    """(rank, number of processes).

    Raises:
        RuntimeError: no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "distributed=True needs a process group: start with torchrun and call curvlab.distributed.start() first"
        )
    return dist.get_rank(), dist.get_world_size()


def agree(what: str, value: str) -> None:
    """Refuse to add up what does not belong together.

    Raises:
        ValueError: processes that differ in `value`; on all of them.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        raise ValueError(f"{what}: processes {others} differ from process 0; sums of different fits do not add up")


def add_up(sums: dict[str, Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place; all processes have the same names."""
    for name in sorted(sums):
        moved = sums[name].to(_device())
        dist.all_reduce(moved)
        sums[name].copy_(moved)


def same(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of process 0, in place."""
    for t in tensors:
        moved = t.to(_device()).contiguous()
        dist.broadcast(moved, 0)
        t.copy_(moved)


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
