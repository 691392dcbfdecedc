"""Where in a prompt its subject ends: the token at which locate-and-edit methods read keys and write values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlab.data.edits import Request
from curvlab.data.text import fill

SUBJECTS = ("required", "last-token", "ignored")
_SHOWN = 20  # requests without a subject that are written out


def subject_ends(requests: Sequence[Request], template: str, subject: str = "required") -> list[int]:
    """For each request the index of the subject's last character in the prompt, filled into `template`.

    Of several occurrences the first counts, as for the one placeholder of ROME's templates (EasyEdit refuses such
    prompts); one that stands as a word goes before one inside another word ("Ann" in "Joanna met Ann").

    Args:
        subject: "required"; "last-token": where a request has no subject, or its prompt does not hold it, the
            prompt's last character takes its place; "ignored": it does so everywhere.

    Raises:
        ValueError: requests without a subject in their prompt, all of them listed, where it is required.
    """
    if subject not in SUBJECTS:
        raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}; got {subject!r}")
    ends, problems = [], []
    for index, request in enumerate(requests):
        start = None if subject == "ignored" else _find(request.prompt, request.subject.strip())
        if start is not None:
            ends.append(template.index("{question}") + start + len(request.subject.strip()) - 1)
            continue
        ends.append(len(fill(template, request.prompt).rstrip()) - 1)
        what = f"{request.subject!r} is not in the prompt" if request.subject.strip() else "no subject is given"
        problems.append(f"request {index}: {what}: {request.prompt!r}")
    if problems and subject == "required":
        shown = "\n  ".join(problems[:_SHOWN]) + ("\n  …" if len(problems) > _SHOWN else "")
        raise ValueError(
            f"the prompts of {len(problems)} of {len(requests)} requests do not hold their subject, at whose last "
            "token this editor works; give Request(…, subject=…) as it is written there, or subject='last-token', "
            f"which takes the last token of such prompts instead:\n  {shown}"
        )
    return ends


def named(request: Request) -> bool:
    """Whether a request's prompt holds its subject."""
    return _find(request.prompt, request.subject.strip()) is not None


def token_positions(tokenizer: Any, texts: Sequence[str], characters: Sequence[int]) -> Tensor:
    """(n,) for each text the position of the last token that holds its character of the given index.

    A token counts that holds more than the character (merged with its neighbours), and of several that spell one
    character (bytes of an emoji) the last.

    Raises:
        ValueError: a tokenizer without character offsets, or a character that no token holds.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("subjects are found by character offsets: load the tokenizer's fast version")
    found, lost = [], []
    for text, character, offsets in zip(
        texts, characters, tokenizer(list(texts), return_offsets_mapping=True)["offset_mapping"], strict=True
    ):
        holding = [i for i, (start, stop) in enumerate(offsets) if start <= character < stop]
        if not holding:
            lost.append(f"{text[character]!r} in {text!r}")
        found.append(max(holding, default=0))
    if lost:
        raise ValueError(f"the tokenizer has no token for the last character of a subject: {'; '.join(lost[:_SHOWN])}")
    return torch.tensor(found)


def _find(prompt: str, subject: str) -> int | None:
    """Where `subject` begins in `prompt`: the first time as a word of its own, else the first time."""
    if not subject:
        return None
    starts = [i for i in range(len(prompt) - len(subject) + 1) if prompt.startswith(subject, i)]

    def is_word(start: int) -> bool:
        before, after = prompt[:start][-1:], prompt[start + len(subject) :][:1]
        return not (before.isalnum() and subject[0].isalnum()) and not (after.isalnum() and subject[-1].isalnum())

    return next((start for start in starts if is_word(start)), starts[0] if starts else None)
