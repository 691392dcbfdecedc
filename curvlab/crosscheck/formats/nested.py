"""Dictionaries and lists of tensors, as deep as they come, with keys joined by "/"."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlab.crosscheck.formats.refusal import UnreadableFile, require_memory
from curvlab.crosscheck.formats.stand_ins import Array
from curvlab.crosscheck.formats.zips import RATIO, SMALL
from curvlab.memory import human

Number = int | float | str

DEPTH = 32  # of nesting; the formats known use three levels
ENTRIES = 100_000  # a list that contains another ten times, which contains another ten times, … is a few bytes long


def flatten(path: Path, content: Any, size: int) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Tensors and numbers by key; a bare tensor has the key "", items of a list have their position.

    Tensors without dimensions are numbers. None says nothing and is left out; objects that are neither tensors nor
    numbers (dtypes, sizes) become their description.

    Args:
        size: of the file, in bytes.

    Raises:
        UnreadableFile: nesting without end, two entries of one name, a tensor without plain dense data, or whose data
            are not in the file.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    for key, leaf in leaves(path, content):
        if key in tensors or key in numbers:
            raise UnreadableFile(path, f"two of its entries are named {key!r}; give each its own name")
        leaf = getattr(leaf, "tensor", None) if isinstance(leaf, Array) else leaf
        if isinstance(leaf, Tensor):
            dense = _dense(path, key, leaf)
            _require_real(path, key, dense, size)
            dense = _widened(path, key, dense)
            if dense.dim() == 0:
                numbers[key] = number(dense.item())
            else:
                tensors[key] = dense
        elif leaf is not None:
            numbers[key] = number(leaf)
    return tensors, numbers


def number(value: Any) -> Number:
    """A plain number or string, else what it is in a few words: some objects would print all their content."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray | list | tuple | set) and len(value) > 20:
        return f"{type(value).__name__} of {len(value):,}"
    if isinstance(value, bytes | bytearray | list | tuple | set | complex | torch.dtype | torch.device):
        return str(value)
    return type(value).__name__


WIDER = {  # where torch computes too little with a dtype; exactly, up to 2**53
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
    torch.float8_e8m0fnu: torch.float32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.float64,
}
PLAIN = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip


def plain(path: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor without its graph, if it is an ordinary dense one, in a dtype that can be computed with.

    Raises:
        UnreadableFile: sparse, quantised, nested and meta tensors, and dtypes that are no numbers.
    """
    return _widened(path, key, _dense(path, key, tensor))


def _dense(path: Path, key: str, tensor: Tensor) -> Tensor:
    named = _named(key)
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else f"stored as {tensor.layout}"
        raise UnreadableFile(path, f"{named} is {layout}; save it dense (tensor.to_dense())")
    if tensor.is_quantized:
        raise UnreadableFile(path, f"{named} is quantised ({tensor.dtype}); save it as floats (tensor.dequantize())")
    if tensor.is_meta:
        raise UnreadableFile(path, f"{named} is a meta tensor: a shape without numbers; save it from a real device")
    return tensor.detach().resolve_conj().resolve_neg()


def _named(key: str) -> str:
    return f"its tensor {key!r}" if key else "its tensor"


def _widened(path: Path, key: str, tensor: Tensor) -> Tensor:
    named = _named(key)
    if tensor.dtype in PLAIN:
        return tensor
    wider = WIDER.get(tensor.dtype)
    if wider is None:
        raise UnreadableFile(path, f"{named} has dtype {tensor.dtype}; save it as float32 or float64")
    require_memory(path, tensor.numel() * wider.itemsize, named)
    return tensor.to(wider)


def _require_real(path: Path, key: str, tensor: Tensor, size: int) -> None:
    """Numbers that stand in the file, and no shape that they cannot fill."""
    named = _named(key)
    storage = tensor.untyped_storage()
    if storage.resizable() and storage.nbytes() > size:  # allocated by the pickle, not read
        raise UnreadableFile(path, f"the numbers of {named} are not in the file: damaged or made up")
    needed = tensor.numel() * tensor.itemsize
    if needed > storage.nbytes():  # expanded: as large as its shape when computed with
        if needed > SMALL and needed > RATIO * storage.nbytes():
            wrong = f"{named} claims {human(needed)} by repeating {human(storage.nbytes())}: made up; save it in full"
            raise UnreadableFile(path, wrong)
        require_memory(path, needed, named)


def leaves(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Everything that is no container, in order, by joined key; `UnreadableFile` where there is no end to it."""
    count = 0
    pending: list[tuple[str, int, Any]] = [("", 0, content)]
    while pending:
        key, depth, value = pending.pop()
        count += 1
        if count > ENTRIES or depth > DEPTH:
            raise UnreadableFile(
                path, f"its dictionaries and lists nest without end (over {DEPTH} levels or {ENTRIES:,} entries)"
            )
        if isinstance(value, Mapping):
            inner = [(str(name), entry) for name, entry in value.items()]
        elif isinstance(value, list | tuple) and not isinstance(value, torch.Size) and _holds_tensors(value):
            inner = [(str(i), entry) for i, entry in enumerate(value)]
        else:
            yield key, value
            continue
        pending += [(f"{key}/{name}" if key else name, depth + 1, entry) for name, entry in reversed(inner)]


def _holds_tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list is more than a list of numbers, which is one fact and stays together."""
    return any(isinstance(value, Tensor | Mapping | list | tuple) for value in values)
