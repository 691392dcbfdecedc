"""One progress bar: quiet for short work and where nobody looks."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], desc: str, total: int | None = None) -> "tqdm[T]":
    """`iterable` behind a bar that appears after a second, on terminals only."""
    return tqdm(iterable, desc=desc, total=total, delay=1.0, leave=False, disable=None, dynamic_ncols=True)
