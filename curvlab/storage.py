"""Tensors on disk: safetensors with a JSON header, written to a temporary name and renamed."""

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvlab import __version__


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write `tensors` and `header` to `path`; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"curvlab": __version__, "kind": kind} | header
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, damaged, or of another kind.
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
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error
