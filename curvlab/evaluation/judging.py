"""Whether a generated text gives the answer asked for; and whether it degenerates into repetition."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Reply(NamedTuple):
    """A question as the model was asked it (without its context), the right answer, and what the model said."""

    question: str
    answer: str
    text: str


Judge = Callable[[Sequence[Reply]], list[float]]  # a value in [0, 1] for each reply

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, words separated by single spaces."""
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(replies: Sequence[Reply]) -> list[float]:
    """1 where the *whole* generated text equals the answer, both normalised; the default, as in the paper.

    The text ends at the paper's stop strings, so that "Paris, of course" is no match for "Paris".
    """
    return [float(_comparable(text) == _comparable(answer)) for _, answer, text in replies]


def begins_with(replies: Sequence[Reply]) -> list[float]:
    """1 where the generated text begins with the answer's words, both normalised; more lenient than the paper."""
    found = []
    for _, answer, text in replies:
        words = _comparable(answer).split()
        found.append(float(_comparable(text).split()[: len(words)] == words))
    return found


def _comparable(text: str) -> str:
    # an answer such as "The" or "A" must not become the empty text, which matches silence
    return normalise(text) or text.strip().lower()


def repeats(text: str, *, copies: int = 3) -> bool:
    """Whether a text ends in at least `copies` copies of one n-gram of words, or of letters within its last word.

    The failure of the paper's Appendix F: "endangered species endangered species endangered species …" and
    "mezzo-srano-srano-srano-…". Words are runs of letters and digits, in lower case; a copy that the token limit cut
    off does not hide the repetition, since the n-gram may begin anywhere in the cycle. A word repeats with a
    group of at least two letters ("sranosranosrano"), so that "1000" does not count.
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        return False
    letters = [] if any(c.isdigit() for c in words[-1]) else list(words[-1])
    return _cycles(words, copies, shortest=1) or _cycles(letters, copies, shortest=2)


def _cycles(items: Sequence[str], copies: int, shortest: int) -> bool:
    """Whether the last copies × n items have period n, for some n."""
    for n in range(shortest, len(items) // copies + 1):
        tail = items[-copies * n :]
        if tail[n:] == tail[:-n]:
            return True
    return False
