"""Torch's files: zips (whatever their name) and the older pickled streams; always with `weights_only=True`."""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch._weights_only_unpickler import Unpickler, get_globals_in_pkl

from curvlab.crosscheck.formats import curvlinops_files
from curvlab.crosscheck.formats.nested import flatten
from curvlab.crosscheck.formats.refusal import UnreadableFile, first_line, require_memory
from curvlab.crosscheck.formats.stand_ins import stand_ins
from curvlab.crosscheck.formats.zips import opened
from curvlab.crosscheck.parts import Stored
from curvlab.memory import human

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch's format before 1.6
DATA_PKL = re.compile(r"[^/]*/data\.pkl")
PLAIN = "save tensors and plain numbers only: torch.save({'A': A, 'B': B, 'N': N}, path)"


def is_torch_zip(path: Path) -> bool:
    """Whether a zip is torch's, by the pickle in its one folder.

    Raises:
        UnreadableFile: a damaged zip.
    """
    with opened(path) as archive:
        return any(DATA_PKL.fullmatch(name) for name in archive.namelist())


def read_zip(path: Path) -> Stored:
    """A torch zip, memory-mapped.

    Raises:
        UnreadableFile: damaged, compressed or too large, code in its pickle, tensors that are larger than what is
            stored of them, or that are not plain dense ones.
    """
    with opened(path) as archive:
        _require_stored(path, archive)
        pickled = _pickle(path, archive)
    with _refusing(path):
        _require_known(path, pickled)
        if _mappable(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            require_memory(path, path.stat().st_size, "it")
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    tensors, numbers = flatten(path, content, path.stat().st_size)
    with opened(path) as archive, _refusing(path):
        _require_own_bytes(path, archive, pickled)
    return curvlinops_files.by_role(Stored(path, "torch zip", tensors, numbers))


def read_legacy(path: Path) -> Stored:
    """Torch's format before version 1.6, if it holds tensors alone; read into memory.

    Raises:
        UnreadableFile: damaged, code in its pickle, or tensors that are not plain dense ones.
    """
    size = path.stat().st_size
    require_memory(path, size, "it")
    with _refusing(path), path.open("rb") as file:
        for _ in range(4):  # a magic number, the version, the system, the content
            _require_known(path, file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    tensors, numbers = flatten(path, content, size)
    return curvlinops_files.by_role(Stored(path, "torch legacy", tensors, numbers))


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Torch's errors as ours; pickles that name other functions than tensors' are refused before they are called."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins()):
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError as error:
        raise UnreadableFile(path, _of_pickle(str(error))) from None
    except UnreadableFile:
        raise
    except (FileNotFoundError, PermissionError):
        raise
    except MemoryError as error:
        raise UnreadableFile(path, "it asks for more memory than there is: damaged or made up") from error
    except Exception as error:  # torch's unpickler meets hostile input with any error of Python's
        raise UnreadableFile(path, f"torch cannot read it: {first_line(error)}") from error


def _of_pickle(message: str) -> str:
    named = re.search(r"GLOBAL (\S+) ", message)
    name = named.group(1) if named else None
    if "Unsupported operand" in message:
        risky = "its pickle is of a protocol that cannot be read without risk, or damaged"
        return f"{risky}; {PLAIN}, without pickle_protocol"
    if name is None:
        last = [line.strip() for line in message.splitlines() if line.strip() and "http" not in line]
        detail = next((line for line in reversed(last) if "Check the documentation" not in line), "")[:120]
        return f"its pickle holds more than tensors and could run code ({detail}); {PLAIN}"
    return f"its pickle would call {name}, which could run code: nothing of it was executed; {PLAIN}"


def _mappable(path: Path) -> bool:
    """torch.load tells safetensors by their name, and maps files by names in UTF-8."""
    name = str(path)
    return not name.endswith(".safetensors") and name == name.encode("utf-8", "ignore").decode()


def _require_stored(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if sum(DATA_PKL.fullmatch(name) is not None for name in names) > 1:
        raise UnreadableFile(path, "it is several torch files in one zip; unpack it")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnreadableFile(path, "it is a TorchScript program, which holds code; save tensors instead")
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            packed = f"{human(info.file_size)} packed into {human(info.compress_size)}"
            raise UnreadableFile(
                path, f"its member {info.filename!r} is compressed ({packed}), which torch never does; {PLAIN}"
            )


class _Claims(Unpickler):
    """Torch's unpickler without data: what each storage is called, and how many bytes it should have."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        self.storages[key] = max(count * dtype.itemsize, self.storages.get(key, 0))
        storage = torch.UntypedStorage(count * dtype.itemsize, device="meta")
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _pickle(path: Path, archive: zipfile.ZipFile) -> io.BytesIO:
    """The pickle in the zip's one folder."""
    (name,) = (name for name in archive.namelist() if DATA_PKL.fullmatch(name))
    require_memory(path, 4 * archive.getinfo(name).file_size, "its pickle")  # NumPy arrays stand in it
    return io.BytesIO(archive.read(name))


def _require_known(path: Path, file: IO[bytes]) -> None:
    """Torch lets a pickle make a bytearray of any size, which fills the memory before anyone can look at it."""
    if "builtins.bytearray" in get_globals_in_pkl(file):
        raise UnreadableFile(path, f"its pickle would make a bytearray, which is no tensor: not executed; {PLAIN}")


def _require_own_bytes(path: Path, archive: zipfile.ZipFile, pickled: io.BytesIO) -> None:
    """A storage must be what one member of the zip holds; torch would give a window onto its neighbours."""
    pickled.seek(0)
    claims = _Claims(pickled)
    claims.load()
    root = archive.namelist()[0].partition("/")[0]
    for key, claimed in claims.storages.items():
        held = archive.getinfo(f"{root}/data/{key}").file_size
        if claimed > held:
            wrong = f"its storage {key} claims {human(claimed)} where the file holds {human(held)}: damaged or made up"
            raise UnreadableFile(path, wrong)
