"""Results are rows: what was run, on what, with which versions, and what came out."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pandas as pd
import torch

from curvlab import __version__
from curvlab.storage import replacing

Row = dict[str, Any]


def provenance(*scripts: str | Path) -> Row:
    """Versions, commit, a hash of the package's sources (and of `scripts`), and the machine, as flat columns."""
    return {
        "curvlab": __version__,
        "commit": _commit(),
        "sources": _sources(*scripts),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """The commit of the checkout that holds this package, '+' where files were changed; '' outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _sources(*scripts: str | Path) -> str:
    """Uncommitted changes count too: results of other code are not mixed in."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), *map(Path, scripts)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of a configuration."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached_rows(path: Path, compute: Callable[[], list[Row]]) -> list[Row]:
    """Rows of one unit of work: read from `path` if it was finished before, else computed and written there."""
    if path.is_file():
        return list(json.loads(path.read_text()))
    rows = compute()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows))  # with an indent Python's slow encoder would write it
    return rows


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV: a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)
