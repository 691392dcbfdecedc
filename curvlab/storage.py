"""Tensors on disk: safetensors with a JSON header and a checksum, written to a temporary name and renamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvlab import __version__
from curvlab.checksum import digest

_CHECKSUM = "content_checksum"  # ("checksum" is that of a model, in some headers)


def cache_folder() -> Path:
    """Where downloads and pretrained weights are kept: CURVLAB_CACHE, else ~/.cache/curvlab."""
    return Path(os.environ.get("CURVLAB_CACHE") or "~/.cache/curvlab").expanduser()


def require_writable(folder: str | Path) -> None:
    """See that files can be put into `folder`, which need not exist yet; nothing is left behind.

    Raises:
        PermissionError: they cannot, or a part of the path is a file.
    """
    folder = Path(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write into {folder}: {existing}: {error.strerror}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once written; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".tmp{path.suffix}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write `tensors` and `header` to `path`; a reader sees the old file or the whole new one."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    metadata = {"curvlab": __version__, "kind": kind} | header
    metadata[_CHECKSUM] = _checksum(tensors, metadata)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, damaged (as far as it has a checksum), or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                found = metadata.get("kind", "no curvlab file")
                raise ValueError(f"{path} holds {found!r}, expected {kind!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error
    checksum = metadata.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its tensors or its header are not those that were written")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of all that a file holds."""
    content = digest(sorted(tensors.items())) + json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextmanager
def parsing(path: str | Path) -> Iterator[None]:
    """What goes wrong within, where tensors are put together as their header says, is the fault of the file.

    Raises:
        ValueError: an entry or tensor that is missing, or one that does not fit; the message names the file.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def require_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """See that a tensor read from a file has the shape that the header implies.

    Raises:
        ValueError: another one.
    """
    if t.shape != shape:
        raise ValueError(f"{name!r} is of shape {tuple(t.shape)}, expected {shape}")


def require_sum_of_squares(name: str, t: Tensor) -> None:
    """See that numbers read from a file can be sums of squares.

    Raises:
        ValueError: a negative one, or one that is not finite.
    """
    if not bool((t.isfinite() & (t >= 0)).all()):
        raise ValueError(f"{name!r} has entries that are negative or not finite where sums of squares belong")
