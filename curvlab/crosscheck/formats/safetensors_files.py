"""Safetensors, memory-mapped; curvlab's own files and kronfluence's factors get keys by layer and role."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvlab.crosscheck.formats import curvlab_files, kronfluence_files
from curvlab.crosscheck.formats.nested import Number, plain
from curvlab.crosscheck.formats.refusal import UnreadableFile, first_line
from curvlab.crosscheck.parts import Stored

LONGEST = 10**8  # bytes of a header that safetensors itself reads


def looks_like(head: bytes) -> bool:
    """The length of a JSON header, and its first brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST


def read(path: Path) -> Stored:
    """A safetensors file; its metadata are numbers.

    Raises:
        UnreadableFile: damaged, or one of curvlab's with a header that does not fit.
    """
    stored = raw(path)
    if curvlab_files.is_ours(stored):
        return curvlab_files.by_role(stored)
    if kronfluence_files.is_theirs(path):
        counts = kronfluence_files.counts_beside(path)
        return kronfluence_files.by_module(stored, None if counts is None else raw(counts))
    return stored


def raw(path: Path) -> Stored:
    """Keys as in the file."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    try:
        with safe_open(path, framework="pt") as file:
            numbers |= file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                tensor = plain(path, key, file.get_tensor(key))
                if tensor.dim():
                    tensors[key] = tensor
                else:
                    numbers[key] = tensor.item()
    except SafetensorError as error:
        raise UnreadableFile(path, f"the safetensors file is damaged or cut short ({first_line(error)})") from error
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a dtype that this torch does not have, a name that is no UTF-8
        raise UnreadableFile(path, f"safetensors cannot read it ({first_line(error)})") from error
    return Stored(path, "safetensors", tensors, numbers)
