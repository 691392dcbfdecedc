"""What a command cannot do is said in one line on standard error, before any work, with exit status 2."""

import sys
from pathlib import Path
from typing import NoReturn

import torch

from curvlab.storage import require_writable


class Refusal(SystemExit):
    """Ends the program with status 2; the text of the exception is what was said."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


def refuse(message: object) -> NoReturn:
    """Say why, such as an option's name and what would be right, and end the program."""
    print(message, file=sys.stderr)
    raise Refusal(str(message))


def require_device(device: str) -> None:
    """See that torch can use a device (--device) here.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error


def refuse_unusable(device: str, out: Path) -> None:
    """Refuse a device (--device) that torch cannot use here, and a folder of results (--out) that cannot be written."""
    try:
        require_device(device)
    except ValueError as error:
        refuse(error)
    try:
        require_writable(out)
    except PermissionError as error:
        refuse(f"--out: {error}")
