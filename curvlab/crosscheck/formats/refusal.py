"""Why a file is not read, in one line."""

from pathlib import Path

from curvlab.memory import available, human


class UnreadableFile(ValueError):
    """A file that cannot be read, or must not be: which, what is wrong, what would be right; one line.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, wrong: str) -> None:
        super().__init__(printable(f"{path}: {wrong}"))
        self.path = path


def first_line(error: BaseException, limit: int = 200) -> str:
    """The start of another library's message, as part of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def require_memory(path: Path, needed: int, what: str) -> None:
    """Refuse what the machine could not hold.

    Raises:
        UnreadableFile: `needed` bytes exceed what is free.
    """
    free = available()
    if needed > free:
        raise UnreadableFile(path, f"{what} would take {human(needed)} of memory, {human(free)} are free")


def printable(text: str) -> str:
    """Without line breaks and other unprintable characters, which file names may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
