"""Requests to change what a model says, from the file formats people have, and a check of a set before any work."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from curvlab.data.edit_formats import lone_surrogate, read_fields

_FILES = {
    "counterfact": ("counterfact.json",),
    "zsre": ("zsre.json",),
    "wikibigedit": ("wikibigedit.json", "wikibigedit_sample.json"),
}
_TEXTS = ("prompt", "target", "subject", "truth")
_SHOWN = 40  # characters of a prompt that name its request


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
    first record counts, and its paraphrases are `without_contradictions`; files are taken as they are, for
    `check_requests` to judge. "nq question: when …", as ZsRE's neighbours are written, becomes "When …?".

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
            first.setdefault(_plain(request.prompt), request)
        requests = without_contradictions(list(first.values()))  # as a whole: what is drawn does not alter a request
    if n is None:
        return requests
    if not 1 <= n <= len(requests):
        raise ValueError(f"cannot take {n} of the {len(requests)} requests of {path}; n must be 1..{len(requests)}")
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed))
    return [requests[index] for index in order[:n].tolist()]


def without_contradictions(requests: Sequence[Request]) -> list[Request]:
    """The requests without paraphrases that another one asks, too (as prompt or paraphrase), for another target.

    CounterFact holds 29 such paraphrases (in 5972), ZsRE 22 (in 700); what they should say, no edit can answer.
    Targets that differ in case or Unicode form only are the same.

    Raises:
        ValueError: fields of the wrong type, or half a character in a text.
    """
    damaged = _damaged(requests)
    _refuse([problem for found in damaged.values() for problem in found], requests)
    asked = _asked(dict(enumerate(requests)))

    def agrees(request: Request, text: str) -> bool:
        return asked.get(_plain(text), {}).keys() <= {_said(request.target)}

    return [
        replace(request, paraphrases=tuple(text for text in request.paraphrases if agrees(request, text)))
        for request in requests
    ]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _said(target: str) -> str:
    return _plain(target.casefold())


def _asked(requests: Mapping[int, Request]) -> dict[str, dict[str, int]]:
    """The targets of every text, each with the first request that asks for it there.

    Where the text is a prompt, that is what counts; else the paraphrases have one say each.
    """
    prompts: dict[str, dict[str, int]] = {}
    others: dict[str, dict[str, int]] = {}
    for index, request in requests.items():
        said = _said(request.target)
        prompts.setdefault(_plain(request.prompt), {}).setdefault(said, index)
        for text in request.paraphrases:
            others.setdefault(_plain(text), {}).setdefault(said, index)
    return {text: targets for text, targets in (others | prompts).items() if text}


def check_requests(requests: Sequence[Request], tokenizer: Any, *, max_length: int = 512) -> None:
    """Refuse a set of requests that cannot be edited as it stands.

    Args:
        tokenizer: of the model to edit.
        max_length: tokens that "prompt target" may have, for prompts, paraphrases and neighbours alike.

    Raises:
        ValueError: one error that lists every problem: no requests, fields of the wrong type, an empty prompt or
            target, surrounding white space, text that the tokenizer cannot encode or reads as a special token, too
            many tokens, a duplicate, different targets of one prompt or paraphrase (`without_contradictions` leaves
            such paraphrases out).
    """
    if not requests:
        raise ValueError("no requests were given")
    damaged = _damaged(requests)
    sound = {index: request for index, request in enumerate(requests) if not damaged[index]}
    encoder = _Encoder(tokenizer, list(sound.values()))
    asked = _asked(sound)

    def clash(index: int, text: str) -> str:
        """Where the first request that asks this text has another target."""
        earlier = next(iter(asked.get(_plain(text), {}).values()), index)
        target, other = requests[index].target, requests[earlier].target
        if _said(target) == _said(other):
            return ""
        return f"asks for {target!r} where {_name(earlier, requests[earlier])} asks for {other!r}"

    problems: list[str] = []
    first: dict[str, int] = {}
    for index, request in enumerate(requests):
        problems += damaged[index]
        if index not in sound:
            continue
        name = _name(index, request)
        problems += [f"{name}: {problem}" for problem in _problems(request, encoder, max_length)]
        earlier = first.setdefault(_plain(request.prompt), index)
        if earlier != index and request.prompt.strip():
            same = f"the same as {_name(earlier, requests[earlier])}"
            problems.append(f"{name}: {clash(index, request.prompt) or same}")
    problems += [
        f"{_name(index, request)}: a paraphrase {both} ({text!r}); `without_contradictions` leaves it out"
        for index, request in sound.items()
        for text in request.paraphrases
        if (both := clash(index, text))
    ]
    _refuse(problems, requests)


def _refuse(problems: Sequence[str], requests: Sequence[Request]) -> None:
    if problems:
        raise ValueError(f"{len(problems)} problems in {len(requests)} requests:\n  " + "\n  ".join(problems))


def _name(index: int, request: Request) -> str:
    """A request by its place and its prompt: drawn ones are found by the latter only."""
    prompt = str(request.prompt)  # it may be no text
    return f"request {index} ({(prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN].rstrip() + ' …')!r})"


def _damaged(requests: Sequence[Request]) -> dict[int, list[str]]:
    """Of each request, its fields that are no texts (or pairs of them) that can be encoded at all.

    Raises:
        ValueError: something that is no request.
    """
    if strangers := [request for request in requests if not isinstance(request, Request)]:
        raise ValueError(f"requests must be a list of curvlab.data.edits.Request, got {strangers[0]!r} in it")
    return {
        index: [f"{_name(index, request)}: {problem}" for problem in _damages(request)]
        for index, request in enumerate(requests)
    }


def _damages(request: Request) -> Iterator[str]:
    texts: list[tuple[str, Any]] = [(f"the {name}", getattr(request, name)) for name in _TEXTS]
    for name in ("paraphrases", "neighbours"):
        listed = getattr(request, name)
        if not isinstance(listed, (tuple, list)):
            yield f"the {name} must be a tuple, got {type(listed).__name__}"
            continue
        for i, item in enumerate(listed):
            if name == "paraphrases":
                texts.append((f"the paraphrase {i}", item))
            elif isinstance(item, (tuple, list)) and len(item) == 2:
                texts += [(f"the neighbour {i}", item[0]), (f"the answer of neighbour {i}", item[1])]
            else:
                yield f"the neighbour {i} must be (prompt, answer), got {item!r}"
    for what, text in texts:
        if not isinstance(text, str):
            yield f"{what} must be a text, got {type(text).__name__}"
        elif half := lone_surrogate(text):
            yield f"{what} holds the lone surrogate {half!r}"


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
