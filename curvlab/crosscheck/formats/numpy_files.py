"""NumPy's .npy arrays and .npz archives, never with pickled objects; memory-mapped where their bytes allow it."""

import io
import math
import mmap
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from curvlab.crosscheck.formats.nested import Number, number, plain
from curvlab.crosscheck.formats.refusal import UnreadableFile, first_line, require_memory
from curvlab.crosscheck.formats.zips import opened
from curvlab.crosscheck.parts import Stored
from curvlab.memory import human

CHUNK = 2**20  # bytes unpacked at a time
NULL = 0xFFF8000000000002  # the NaN by which ROME's statistics say None


def read_array(path: Path) -> Stored:
    """A .npy file: one tensor or number of key "".

    Raises:
        UnreadableFile: damaged, or no numbers.
    """
    mapped = _map(path)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    _sort(path, "", _view(path, "the array", mapped, 0, len(mapped)), tensors, numbers)
    return Stored(path, "NumPy array", tensors, numbers)


def read_archive(path: Path) -> Stored:
    """A zip of .npy members, by their names. Compressed and misaligned members are read, the others mapped.

    Raises:
        UnreadableFile: damaged, a zip bomb, another kind of zip, pickled objects, no numbers.
    """
    mapped = _map(path)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    with opened(path) as archive:
        others = [info.filename for info in archive.infolist() if not info.filename.endswith(".npy")]
        if others:
            wrong = f"it is a zip archive, but neither torch's nor NumPy's: it holds {others[0]!r}; unpack it"
            raise UnreadableFile(path, wrong)
        for info in archive.infolist():
            named = f"its member {info.filename!r}"
            if info.compress_type == zipfile.ZIP_STORED:
                start = _start(path, named, mapped, info)
                array = _view(path, named, mapped, start, start + info.file_size)
            else:
                data = _unpack(path, named, archive, info)
                array = _view(path, named, data, 0, len(data))
            _sort(path, info.filename.removesuffix(".npy"), array, tensors, numbers)
    return Stored(path, "NumPy archive", tensors, numbers)


Buffer = bytearray | mmap.mmap


def _map(path: Path) -> mmap.mmap:
    """The file's bytes: loaded when touched, and private where they are written to."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _start(path: Path, named: str, mapped: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where a stored member's content begins."""
    header = mapped[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise UnreadableFile(path, f"{named} does not begin where the archive says: damaged")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > len(mapped):
        raise UnreadableFile(path, f"{named} reaches beyond the end of the file: cut short")
    return start


def _unpack(path: Path, named: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytearray:
    """A compressed member; never more bytes than it declares, which `opened` has held against the free memory."""
    data = bytearray()
    try:
        with archive.open(info) as file:
            while len(data) <= info.file_size and (more := file.read(CHUNK)):
                data += more
    except (zlib.error, OSError, RuntimeError) as error:
        raise UnreadableFile(path, f"{named} cannot be unpacked ({first_line(error)}): damaged") from error
    if len(data) != info.file_size:
        raise UnreadableFile(path, f"{named} does not unpack to the {human(info.file_size)} that it claims: damaged")
    return data


def _view(path: Path, named: str, data: Buffer, start: int, stop: int) -> np.ndarray:
    """The array in data[start:stop], without a copy where it is aligned."""
    header = io.BytesIO(data[start : min(stop, start + 2**17)])
    try:
        shape, fortran, dtype = _header(header)
    except Exception as error:  # NumPy's parsers meet hostile headers with any error of Python's
        raise UnreadableFile(path, f"the header of {named} is damaged ({first_line(error)})") from error
    if dtype.hasobject:
        wrong = f"{named} holds Python objects in a pickle, which can run code; save plain arrays of numbers"
        raise UnreadableFile(path, wrong)
    start += header.tell()
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed != stop - start:
        claim = f"shape {shape} of {dtype}, {human(needed)}"
        raise UnreadableFile(path, f"{named} claims {claim}, and {human(stop - start)} are there: damaged or made up")
    array: np.ndarray = np.ndarray(shape, dtype, data, start, order="F" if fortran else "C")
    if array.flags.aligned:
        return array
    require_memory(path, needed, named)
    return array.copy(order="K")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype; parsed as a literal by NumPy, at most 10,000 characters."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    raise ValueError(f"version {version}, where 1.0 or 2.0 was expected")


def _sort(path: Path, key: str, array: np.ndarray, tensors: dict[str, Tensor], numbers: dict[str, Number]) -> None:
    """An array among the tensors; what has no dimension, and strings, among the numbers."""
    named = f"its array {key!r}" if key else "its array"
    if array.dtype.kind in "US":
        try:
            text = array.item() if array.ndim == 0 else f"{array.size} strings"
        except (SystemError, ValueError) as error:  # code points that there are none of
            raise UnreadableFile(path, f"{named} holds no valid text ({first_line(error)}): damaged") from error
        numbers[key] = text.decode("latin-1") if isinstance(text, bytes) else text
    elif array.dtype.kind not in "biufc":
        raise UnreadableFile(path, f"{named} has dtype {array.dtype}; arrays of plain numbers were expected")
    elif array.ndim == 0:
        if not _is_null(array):
            numbers[key] = number(array.item())
    else:
        tensors[key] = plain(path, key, _tensor(path, named, array))


def _tensor(path: Path, named: str, array: np.ndarray) -> Tensor:
    if not array.dtype.isnative:
        require_memory(path, array.nbytes, named)
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        wrong = f"{named} has dtype {array.dtype}, which torch does not have; save it as float32 or float64"
        raise UnreadableFile(path, wrong) from error


def _is_null(array: np.ndarray) -> bool:
    return array.dtype == np.float64 and int(array.astype("<f8").view("<u8")) == NULL
