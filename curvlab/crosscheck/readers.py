"""Files as other implementations leave them, read without executing anything in them.

Formats are told by their bytes: the authors' factor files are torch zips under names that end in ".npz". Tensors are
memory-mapped where the format allows it (torch zips, aligned members of NumPy files, safetensors).

Keys, by format (`Stored.format` in quotes):

- "torch zip", "torch legacy", "NumPy archive", "NumPy array", "safetensors": as in the file, and as stored; keys of
  nested dictionaries and positions in lists are joined by "/"; a bare tensor has the key "". Whatever has no dimension
  (counts, gammas, names) and safetensors' metadata are `numbers`. Nothing is rescaled: ROME's "mom2.mom2" is a sum
  over "mom2.count" positions.
- "curvlab K-FAC", "curvlab EK-FAC", "curvlab covariance", "curvlab spectrum", "curvlab null space", "curvlab
  ellipsoid", "curvlinops KFAC", "curvlinops EKFAC": "<layer>/<role>" with the roles of `curvlab.crosscheck.parts` (A,
  S, U_in and U_out with eigenvectors in columns, eigenvalues, mask: true where a direction is kept), laid out like W.
  curvlab's own sums become *means*: A over the "<layer>/N" positions, S over the "<layer>/loss_terms".
  Where a basis holds the leading eigenvectors only, "<layer>/truncated" is 1: what lies outside of it is kept.
- "kronfluence factors": "<module>/<kind of factor>"; covariances are sums, with their counts as numbers of
  kronfluence's names; "lambda_matrix" is the mean (`curvlab.crosscheck.formats.kronfluence_files`).
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from curvlab.crosscheck.formats import numpy_files, safetensors_files, torch_files
from curvlab.crosscheck.formats.refusal import UnreadableFile
from curvlab.crosscheck.parts import Stored

__all__ = ["UnreadableFile", "read", "survey"]

# plainly no tensors: what lies beside factors in the folders of a run or a model
OTHER_SUFFIXES = {
    ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".toml", ".xml", ".cfg", ".ini", ".lock", ".log",
    ".md", ".txt", ".rst", ".tex", ".html", ".css", ".js", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".out",
    ".err", ".py", ".ipynb", ".sh", ".jinja", ".model",
}  # fmt: skip
FOREIGN = {
    b"\x1f\x8b": "gzip-compressed",
    b"\x89HDF": "HDF5",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"(\xb5/\xfd": "zstd-compressed",
    b"GGUF": "GGUF",
    b"%PDF": "PDF",
    b"\x89PNG": "PNG",
    b"7z\xbc\xaf": "7z",
}


def read(path: Path) -> list[Stored]:
    """A file, or all files of a folder that may hold tensors, recursively and sorted.

    In a folder, hidden files and those whose suffix is plainly none of ours (.json, .md, .csv, …) are left out.

    Raises:
        UnreadableFile: a file that is of no known format, damaged, or that would run code; a folder without any
            readable file. (`survey` goes on to the other files.)
    """
    stored, refused = survey(path)
    if refused:
        raise refused[0]
    return stored


def survey(path: Path) -> tuple[list[Stored], list[UnreadableFile]]:
    """`read`, with every refusal beside what could be read."""
    path = Path(path)
    stored: list[Stored] = []
    refused: list[UnreadableFile] = []
    try:
        files = list(_files(path)) if _is_folder(path) else [path]
    except OSError as error:
        where = Path(error.filename or path)
        return [], [UnreadableFile(where, f"the folder cannot be listed ({error.strerror})")]
    for file in files:
        try:
            stored.append(_read_file(file))
        except UnreadableFile as error:
            refused.append(error)
    if not files:
        wrong = "no file in this folder may hold tensors; name the folder with the .npz, .pt or .safetensors files"
        refused.append(UnreadableFile(path, wrong))
    return stored, refused


def _read_file(path: Path) -> Stored:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(path, "it is no ordinary file but a device, pipe or socket")
        if status.st_size == 0:
            raise UnreadableFile(path, "the file is empty; whatever wrote it was stopped before the first byte")
        with path.open("rb") as file:
            head = file.read(64)
        return _by_bytes(path, head)
    except FileNotFoundError as error:
        raise UnreadableFile(path, "no such file" + (" (a broken link)" if path.is_symlink() else "")) from error
    except PermissionError as error:
        raise UnreadableFile(path, "this user may not read it; change its permissions") from error
    except (OSError, ValueError) as error:  # a loop of links; a null byte in the name
        if isinstance(error, UnreadableFile):
            raise
        raise UnreadableFile(path, f"it cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def _by_bytes(path: Path, head: bytes) -> Stored:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if torch_files.is_torch_zip(path):
            return torch_files.read_zip(path)
        return numpy_files.read_archive(path)
    if head.startswith(b"\x93NUMPY"):
        return numpy_files.read_array(path)
    if safetensors_files.looks_like(head):
        return safetensors_files.read(path)
    if head.startswith(torch_files.LEGACY_MAGIC):
        return torch_files.read_legacy(path)
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            raise UnreadableFile(path, f"it is a {name} file; give torch, NumPy or safetensors files")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        wrong = "it is a bare pickle, and loading one can run code; save it by torch.save, numpy.savez or safetensors"
        raise UnreadableFile(path, wrong)
    what = "text" if _is_text(head) else "of no known format, or damaged at its beginning"
    raise UnreadableFile(path, f"it is {what}; a torch zip, NumPy .npz or .npy, or safetensors file was expected")


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\n\r\f" or 32 <= byte != 127 for byte in head)


def _files(folder: Path) -> Iterator[Path]:
    """Files that may hold tensors, sorted; every folder once, whatever links lead back to it."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(Path(entry.path) for entry in os.scandir(here) if not entry.name.startswith("."))
        yield from (e for e in entries if not _is_folder(e) and e.suffix.lower() not in OTHER_SUFFIXES)
        pending += [e for e in reversed(entries) if _is_folder(e)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a loop of links: a file that cannot be opened
        return False
