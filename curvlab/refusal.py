"""What a command cannot do is said in one line on standard error, before any work, with exit status 2."""

import sys
from typing import NoReturn


class Refusal(SystemExit):
    """Ends the program with status 2; the text of the exception is what was said."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


def refuse(message: object) -> NoReturn:
    """Say why, such as an option's name and what would be right, and end the program."""
    print(message, file=sys.stderr)
    raise Refusal(str(message))
