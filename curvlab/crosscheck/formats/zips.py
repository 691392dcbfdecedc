"""Zip archives, looked over before anything in them is unpacked."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvlab.crosscheck.formats.refusal import UnreadableFile, first_line, require_memory
from curvlab.memory import human

RATIO = 250  # statistics hardly compress at all; zeros compress a thousandfold
SMALL = 2**28  # a mask of zeros may be this large


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with members that neither overlap nor are encrypted, nor grow beyond reason when unpacked.

    Raises:
        UnreadableFile: what is wrong with it, also while it is being read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_sane(path, archive)
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise UnreadableFile(path, f"the zip archive is damaged or cut short ({first_line(error)})") from error


def _require_sane(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if not members:
        raise UnreadableFile(path, "the zip archive is empty")
    twice = [name for name, count in Counter(info.filename for info in members).items() if count > 1]
    if twice:
        raise UnreadableFile(path, f"the zip archive holds {twice[0]!r} more than once; save it again")
    if any(info.flag_bits & 1 for info in members):
        raise UnreadableFile(path, "the zip archive is encrypted; unpack it and save the tensors again")
    size = path.stat().st_size
    packed = sum(info.compress_size for info in members)
    unpacked = sum(info.file_size for info in members)
    claim = f"the zip archive of {human(size)} claims {human(unpacked)} of content"
    if packed > size:
        raise UnreadableFile(path, f"{claim}, in members that overlap or reach beyond its end: damaged or a zip bomb")
    if unpacked > SMALL and unpacked > RATIO * size:
        raise UnreadableFile(path, f"{claim}, {unpacked // size} times its size: a zip bomb; save it uncompressed")
    for info in members:
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise UnreadableFile(path, f"{claim}; its member {info.filename!r} has two different sizes: damaged")
    require_memory(path, sum(i.file_size for i in members if i.compress_type != zipfile.ZIP_STORED), "unpacking it")
