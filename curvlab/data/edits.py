"""Requests to change what a model says, from the file formats people have, and a check of a set before any work."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from curvlab.data.edit_formats import read_fields

_FILES = {
    "counterfact": ("counterfact.json",),
    "zsre": ("zsre.json",),
    "wikibigedit": ("wikibigedit.json", "wikibigedit_sample.json"),
}


@dataclass(frozen=True)
class Request:
    """An edit: after `prompt` and one space the model shall say `target`.

    Attributes:
        prompt: without a trailing space.
        target: without a leading space.
        subject: what the prompt is about, where known.
        paraphrases: other prompts with the same target.
        neighbours: (prompt, answer) pairs that the edit must not touch.
        truth: the answer before the edit, where known.
    """

    prompt: str
    target: str
    subject: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    truth: str = ""


def load_edits(
    source: str | Path, n: int | None = None, *, seed: int = 0, data: str | Path | None = None
) -> list[Request]:
    """Requests of a named set or a file.

    Args:
        source: "counterfact", "zsre" or "wikibigedit" (the files in `data`/edits), or a file: a JSON list or JSONL
            with the fields of EasyEdit (CounterFact, WikiBigEdit, KnowEdit), ZsRE/MEND, WikiBigEdit or ROME's
            CounterFact, or plainly prompt, target, and if wanted subject, truth, paraphrases (a list) and
            neighbours (a list of [prompt, answer] or {"prompt": …, "answer": …}).
        n: this many, drawn without replacement; the draws of a seed are nested (n = 10 begins n = 100). None: all,
            in the file's order.
        data: the folder of the named sets, else the folder that CURVLAB_DATA names.

    Of a prompt that a *named* set holds several times (22 prompts in CounterFact, with contradictory targets) the
    first record counts; files are taken as they are, for `check_requests` to judge. "nq question: when …", as
    ZsRE's neighbours are written, becomes "When …?".

    Raises:
        FileNotFoundError: no such file or set.
        ValueError: damaged JSON, an empty file, fields missing or of the wrong type (file, record and field are
            named), or n outside 1 to the number of requests.
    """
    named = str(source) in _FILES
    path = _named_file(str(source), data) if named else Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; give a file, or one of {', '.join(_FILES)}")
    requests = [Request(**fields) for fields in read_fields(path)]
    if named:
        first: dict[str, Request] = {}
        for request in requests:
            first.setdefault(request.prompt, request)
        requests = list(first.values())
    if n is None:
        return requests
    if not 1 <= n <= len(requests):
        raise ValueError(f"cannot take {n} of the {len(requests)} requests of {path}; n must be 1..{len(requests)}")
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed))
    return [requests[index] for index in order[:n].tolist()]


def without_contradictions(requests: Sequence[Request]) -> list[Request]:
    """The requests without paraphrases that are another one's prompt and ask for another target there.

    ZsRE holds such pairs (14 in 700); what a paraphrase of them should say, no edit can answer.
    """
    targets = {_plain(request.prompt): request.target.strip() for request in requests}

    def agrees(request: Request, text: str) -> bool:
        return targets.get(_plain(text), request.target.strip()) == request.target.strip()

    return [
        replace(request, paraphrases=tuple(text for text in request.paraphrases if agrees(request, text)))
        for request in requests
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())


def check_requests(requests: Sequence[Request], tokenizer: Any, *, max_length: int = 512) -> None:
    """Refuse a set of requests that cannot be edited as it stands.

    Args:
        tokenizer: of the model to edit.
        max_length: tokens that "prompt target" may have, for prompts, paraphrases and neighbours alike.

    Raises:
        ValueError: one error that lists every problem: no requests, an empty prompt or target, surrounding white
            space, text that the tokenizer cannot encode or reads as a special token, too many tokens, a duplicate,
            two requests that ask for different targets of one prompt, or of a prompt and a paraphrase
            (`without_contradictions` leaves such paraphrases out).
    """
    if not requests:
        raise ValueError("no requests were given")
    if strangers := [request for request in requests if not isinstance(request, Request)]:
        raise ValueError(f"requests must be a list of curvlab.data.edits.Request, got {strangers[0]!r} in it")
    encoder = _Encoder(tokenizer, requests)
    problems: list[str] = []
    first: dict[str, int] = {}
    for index, request in enumerate(requests):
        problems += [f"request {index}: {problem}" for problem in _problems(request, encoder, max_length)]
        prompt = _plain(request.prompt)
        earlier = first.setdefault(prompt, index)
        if earlier != index and prompt:
            other = requests[earlier].target
            if other.strip() == request.target.strip():
                problems.append(f"request {index}: the same as request {earlier} ({prompt!r})")
            else:
                both = f"asks for {request.target!r} where request {earlier} asks for {other!r}"
                problems.append(f"request {index}: {both} ({prompt!r})")
    for index, request in enumerate(requests):
        for text in request.paraphrases:
            earlier = first.get(_plain(text), index)
            other = requests[earlier].target
            if other.strip() != request.target.strip():
                both = f"a paraphrase asks for {request.target!r} where request {earlier} asks for {other!r}"
                problems.append(f"request {index}: {both} ({text!r})")
    if problems:
        raise ValueError(f"{len(problems)} problems in {len(requests)} requests:\n  " + "\n  ".join(problems))


class _Encoder:
    """A tokenizer that has seen all texts at once; one by one they take ten times as long."""

    def __init__(self, tokenizer: Any, requests: Sequence[Request]) -> None:
        self.tokenizer = tokenizer
        pairs = [pair for request in requests for _, *pair in _pairs(request)]
        parts = {text.strip() for pair in pairs for text in pair} - {""}
        characters = {character for text in parts for character in text}
        self.ids = self._encode(parts | characters, add_special_tokens=False)
        self.whole = self._encode({f"{prompt} {answer}" for prompt, answer in pairs})

    def _encode(self, texts: set[str], **options: bool) -> dict[str, list[int]]:
        listed = sorted(texts)
        return dict(zip(listed, self.tokenizer(listed, **options)["input_ids"], strict=True)) if listed else {}

    def problems(self, text: str) -> Iterator[str]:
        """What the tokenizer loses of a text, or reads as something else."""
        ids, tokenizer = self.ids[text], self.tokenizer
        if not ids:
            yield "has no token"
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            yield f"cannot be encoded (it holds {tokenizer.unk_token!r}, the token for unknown text)"
        elif special := sorted(token for token in tokenizer.all_special_tokens if token in text):
            yield f"holds the special token {special[0]!r}"
        elif lost := [char for char in sorted(set(text)) if not char.isspace() and not self.ids[char]]:
            yield f"cannot be encoded (the tokenizer drops {', '.join(map(repr, lost))})"


def _pairs(request: Request) -> Iterator[tuple[str, str, str]]:
    """(name, prompt, answer) of all that a request asks."""
    yield "prompt", request.prompt, request.target
    yield from ((f"paraphrase {i}", prompt, request.target) for i, prompt in enumerate(request.paraphrases))
    yield from ((f"neighbour {i}", prompt, answer) for i, (prompt, answer) in enumerate(request.neighbours))


def _problems(request: Request, encoder: _Encoder, max_length: int) -> Iterator[str]:
    for name, prompt, answer in _pairs(request):
        texts = [(f"the {name}", prompt)]
        if not name.startswith("paraphrase"):  # whose answer is the target, already seen
            texts.append(("the target" if name == "prompt" else f"the answer of {name}", answer))
        for what, text in texts:
            bare = text.strip()
            if not bare:
                yield f"{what} is empty"
                continue
            if text != bare:
                yield f"{what} begins or ends with white space: {text!r}"
            yield from (f"{what} {problem}: {bare!r}" for problem in encoder.problems(bare))
        length = len(encoder.whole[f"{prompt} {answer}"])
        if length > max_length:
            yield f"the {name} and its answer have {length} tokens, more than {max_length}: {prompt[:60]!r}…"


def _named_file(name: str, data: str | Path | None) -> Path:
    root = data or os.environ.get("CURVLAB_DATA")
    if not root:
        raise FileNotFoundError(f"{name} needs a folder with edits/{_FILES[name][0]}: set CURVLAB_DATA or --data")
    paths = [Path(root).expanduser() / "edits" / file for file in _FILES[name]]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{name} was not found: no {' or '.join(map(str, paths))}; set CURVLAB_DATA or --data")
    return found
